//! Replicas of expert shards that die, hang and leave while streams run through them.

use std::time::{Duration, Instant};

use futures::future::join_all;
use rand_chacha::ChaCha8Rng;
use rand_core::{RngCore, SeedableRng};
use testkit::wait_until;
use tonic::Code;

use crate::installation::{Installation, LIMIT, Plan, Replica, seconds};
use crate::load::{Client, Load, Reading, request, undisturbed, whole};

const STREAMS: usize = 200;
const KILL_EVERY: Duration = Duration::from_secs(2);
/// Longer than the looks that let a replica go because it does not answer, and shorter than any limit on a call.
const STOPPED: Duration = Duration::from_secs(5);
/// The two shards of the model.
const SHARDS: [&str; 2] = ["0-5", "6-11"];

fn plan(wire: &'static str) -> Plan {
    Plan { model: "v2_lite", shards: SHARDS.len(), wire }
}

/// Lengths from 60 to 199.
fn requests(count: usize) -> Vec<proto::v1::GenerateRequest> {
    (0..count).map(|i| request(i, 60 + (i * 37 % 140) as u32)).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_notices_killed_replicas_over_direct() {
    nobody_notices_killed_replicas("direct").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_notices_killed_replicas_over_nats() {
    nobody_notices_killed_replicas("nats").await;
}

async fn nobody_notices_killed_replicas(wire: &'static str) {
    let (installation, mut replicas) = Installation::start(plan(wire), 2).await;
    let client = installation.client().await;
    let begun = Instant::now();
    let expected = undisturbed(&client, &requests(STREAMS)).await;
    println!("{wire}: {STREAMS} undisturbed streams in {:.1} s", begun.elapsed().as_secs_f64());
    shares_are_fair(&replicas).await;

    let mut load = Load::start(&client, requests(STREAMS), &expected);
    let (mut kills, mut longest, mut random, end) =
        (0, Duration::ZERO, ChaCha8Rng::seed_from_u64(4), Instant::now() + Duration::from_secs(seconds().into()));
    while Instant::now() < end {
        tokio::time::sleep(KILL_EVERY).await;
        load.check();
        let waited = Instant::now();
        let at = spare(&replicas, &mut random).await;
        longest = longest.max(waited.elapsed());
        let Replica { shard, process, .. } = replicas.swap_remove(at);
        process.kill().await;
        replicas.push(installation.replica(shard));
        kills += 1;
    }
    let done = load.stop().await;
    let [repeated, hedged] = installation.repeats().await;
    println!(
        "{wire}: {kills} kills, at most {longest:.2?} waited for a new replica to be used, {done} streams with the ids of undisturbed ones, {repeated} batches repeated, {hedged} asked twice"
    );
    assert!(done >= STREAMS && kills > 0);
    // A replica has a batch only a part of the time.
    assert!(kills < 20 || repeated + hedged > 0.0, "of so many that were killed some had batches");
}

/// The replicas of a shard take turns: without faults, and however many shards there are.
async fn shares_are_fair(replicas: &[Replica]) {
    let computed = join_all(replicas.iter().map(Replica::computed)).await;
    for (shard, name) in SHARDS.iter().enumerate() {
        let own: Vec<_> =
            replicas.iter().zip(&computed).filter(|(replica, _)| replica.shard == shard).map(|(_, computed)| *computed).collect();
        let (least, all) = (own.iter().copied().fold(f64::MAX, f64::min), own.iter().sum::<f64>());
        assert!(least > all / own.len() as f64 / 2.0, "batches of the replicas of {name}: {own:?}");
    }
}

/// A replica whose shard has another one that the language service uses, which may have to be waited for.
async fn spare(replicas: &[Replica], random: &mut ChaCha8Rng) -> usize {
    let at = random.next_u32() as usize % replicas.len();
    let others = || replicas.iter().enumerate().filter(move |(other, replica)| *other != at && replica.shard == replicas[at].shard);
    wait_until("another replica that is used", LIMIT, async || {
        for (_, other) in others() {
            if other.is_used().await {
                return true;
            }
        }
        false
    })
    .await;
    at
}

#[tokio::test(flavor = "multi_thread")]
async fn the_last_replica_of_a_shard_is_named_and_missed_no_longer_than_it_is_away_over_direct() {
    the_last_replica_of_a_shard_is_named_and_missed_no_longer_than_it_is_away("direct").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_last_replica_of_a_shard_is_named_and_missed_no_longer_than_it_is_away_over_nats() {
    the_last_replica_of_a_shard_is_named_and_missed_no_longer_than_it_is_away("nats").await;
}

async fn the_last_replica_of_a_shard_is_named_and_missed_no_longer_than_it_is_away(wire: &'static str) {
    let (installation, mut replicas) = Installation::start(plan(wire), 1).await;
    let client = installation.client().await;
    let requests: Vec<_> = (0..STREAMS).map(|i| request(i, 200)).collect();
    let expected = undisturbed(&client, &requests).await;

    let begin = requests.iter().map(async |request| {
        let mut reading = Reading::begin(&client, request.clone()).await.unwrap();
        reading.until(5).await.unwrap();
        reading
    });
    let readings = join_all(begin).await;
    let killed = replicas.remove(1);
    killed.process.kill().await;
    let dead = Instant::now();
    let ends = join_all(readings.into_iter().map(async |reading| (reading.rest().await, dead.elapsed()))).await;
    let (mut failed, mut last, mut wrong) = (0, Duration::ZERO, Vec::new());
    for (number, (outcome, at)) in ends.into_iter().enumerate() {
        let expected = &expected[number];
        assert!(expected.starts_with(&outcome.ids), "stream {number}: no wrong id before the end");
        match outcome.end {
            Ok(()) => assert_eq!(outcome.ids.len(), expected.len(), "a stream without an error is whole"),
            Err(status) => {
                (failed, last) = (failed + 1, last.max(at));
                if !names_the_shard(&status) {
                    wrong.push(status);
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{} errors do not name the shard: {:?}", wrong.len(), wrong[0]);
    assert!(failed > STREAMS / 2, "most streams ran: {failed}");
    println!(
        "{wire}: {failed} of {STREAMS} streams ended with an error that names the shard, the last {:.2} s after the kill",
        last.as_secs_f64()
    );

    let refused = whole(&client, requests[0].clone()).await.end.unwrap_err();
    assert!(names_the_shard(&refused), "{refused:?}");

    let started = Instant::now();
    replicas.push(installation.replica(1));
    wait_until("the shard is served", LIMIT, async || installation.served(SHARDS[1]).await > 0).await;
    let served = Instant::now();
    let first = first_answer(&client, &requests[0]).await;
    assert_eq!(first, expected[0]);
    let (start, pause) = (served - started, served.elapsed());
    println!(
        "{wire}: a shard is served {:.2} s after its start, and {:.2} s later the first request was answered",
        start.as_secs_f64(),
        pause.as_secs_f64()
    );
    assert!(pause < Duration::from_secs(20), "it comes back by itself and soon");
    assert_eq!(undisturbed(&client, &requests).await, expected);
}

fn names_the_shard(status: &tonic::Status) -> bool {
    status.code() == Code::Unavailable && status.message().contains(&format!("expert shard {} of v2_lite", SHARDS[1]))
}

/// Asks until there is an answer; every refusal before it must name the shard.
async fn first_answer(client: &Client, request: &proto::v1::GenerateRequest) -> Vec<u32> {
    let asked = async {
        loop {
            let outcome = whole(client, request.clone()).await;
            match outcome.end {
                Ok(()) => return outcome.ids,
                Err(status) => assert!(names_the_shard(&status), "{status:?}"),
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(LIMIT, asked).await.expect("the service recovers")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replica_that_hangs_is_not_waited_for_over_direct() {
    a_replica_that_hangs_is_not_waited_for("direct").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replica_that_hangs_is_not_waited_for_over_nats() {
    a_replica_that_hangs_is_not_waited_for("nats").await;
}

async fn a_replica_that_hangs_is_not_waited_for(wire: &'static str) {
    let (installation, replicas) = Installation::start(plan(wire), 2).await;
    let client = installation.client().await;
    let expected = undisturbed(&client, &requests(STREAMS)).await;
    let mut load = Load::start(&client, requests(STREAMS), &expected);
    let hanging = &replicas[2];
    wait_until("it computes", LIMIT, async || hanging.is_used().await).await;
    hanging.process.signal("STOP");
    let before = load.done();
    tokio::time::sleep(STOPPED).await;
    load.check();
    let meanwhile = load.done() - before;
    hanging.process.signal("CONT");
    let resumed = Instant::now();
    let computed = hanging.computed().await;
    wait_until("it takes part again", LIMIT, async || {
        load.check();
        hanging.computed().await > computed + 20.0
    })
    .await;
    let resumed = resumed.elapsed().as_secs_f64();
    let done = load.stop().await;
    let [repeated, hedged] = installation.repeats().await;
    println!(
        "{wire}: {meanwhile} streams ended while a replica hung for {STOPPED:?}, {done} in all; it took part again after {resumed:.2} s; {repeated} batches repeated, {hedged} asked twice"
    );
    assert!(hedged > 0.0, "a second replica was asked for what it had");
}

/// Without a batch under way nothing tells that a replica answers again, but looking for it.
#[tokio::test(flavor = "multi_thread")]
async fn a_replica_that_hung_while_idle_is_used_again() {
    let (installation, replicas) = Installation::start(plan("direct"), 1).await;
    let client = installation.client().await;
    let requests = requests(4);
    let expected = undisturbed(&client, &requests).await;
    replicas[1].process.signal("STOP");
    wait_until("it is missed", LIMIT, async || installation.known(SHARDS[1]).await == 0.0).await;
    replicas[1].process.signal("CONT");
    let resumed = Instant::now();
    assert_eq!(first_answer(&client, &requests[0]).await, expected[0]);
    println!("used again {:.2} s after it went on", resumed.elapsed().as_secs_f64());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replica_that_is_told_to_leave_loses_nothing_over_direct() {
    a_replica_that_is_told_to_leave_loses_nothing("direct").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replica_that_is_told_to_leave_loses_nothing_over_nats() {
    a_replica_that_is_told_to_leave_loses_nothing("nats").await;
}

async fn a_replica_that_is_told_to_leave_loses_nothing(wire: &'static str) {
    let (installation, mut replicas) = Installation::start(plan(wire), 2).await;
    let client = installation.client().await;
    let expected = undisturbed(&client, &requests(STREAMS)).await;
    let load = Load::start(&client, requests(STREAMS), &expected);
    wait_until("it computes", LIMIT, async || replicas[0].is_used().await).await;
    let busy = leave(replicas.remove(0)).await;
    let done = load.stop().await;
    let [repeated, hedged] = installation.repeats().await;
    // And one that nothing goes through.
    let idle = leave(replicas.remove(2)).await;
    println!(
        "{wire}: a busy replica left {:.2} s after SIGTERM, an idle one after {:.2} s; {done} streams; {repeated} batches repeated, {hedged} asked twice",
        busy.as_secs_f64(),
        idle.as_secs_f64(),
    );
    assert_eq!(undisturbed(&client, &requests(8)).await, expected[..8]);
}

/// Longest that a replica which is told to leave may take: a part of its grace, which is for those who do not let it go.
const FAREWELL: Duration = Duration::from_secs(45);

async fn leave(replica: Replica) -> Duration {
    replica.process.signal("TERM");
    let told = Instant::now();
    assert_eq!(replica.process.wait().await.code(), Some(0), "SIGTERM drains and ends well");
    assert!(told.elapsed() < FAREWELL, "its callers let go of it: {:?}", told.elapsed());
    told.elapsed()
}
