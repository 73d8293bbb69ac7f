//! The service through a mesh channel, as language calls it.
#![allow(clippy::unwrap_used)]

mod support;

use std::sync::{Arc, Mutex};

use bytes::Bytes;
use checkpoint::Checkpoint;
use config::Config;
use mesh::{Mesh, MeshConfig};
use process::{Bar, Host, LoadedModel, Progress, Silent, Unit};
use proto::v1;
use proto::v1::activations::Encoding;
use proto::v1::expert_failure::Reason;
use proto::v1::expert_reply::Reply;
use support::{MODEL, PATIENCE, Question, Random, Service, Whole, host, with_nan};
use testkit::NatsServer;
use tokio::sync::watch;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};
use wire::activations::{pack, unpack};

fn setting(key: &'static str, value: impl ToString) -> (&'static str, String) {
    (key, value.to_string())
}

/// Three rows for experts 3, 4 and 7 of the first layer of experts: the good batch that bad ones are made of.
fn good(whole: &Whole) -> v1::ExpertBatch {
    let hidden = whole.shape().hidden;
    let values: Vec<f32> = (0..3 * hidden).map(|i| (i as f32).sin()).collect();
    v1::ExpertBatch {
        id: 1,
        layer: whole.shape().layers[0] as u32,
        rows: Some(pack(values, hidden, Encoding::F32)),
        experts: vec![3, 4, 7],
        counts: vec![2, 1, 3],
        places: vec![0, 2, 1, 0, 1, 2],
        weights: vec![0.5; 6],
        traceparent: String::new(),
    }
}

#[tokio::test]
async fn bad_batches_are_refused_by_field_and_the_stream_goes_on() {
    let (service, whole) = (Service::whole("moe_v1", &[]).await, Whole::open("moe_v1"));
    let (mut talk, _) = service.open().await;
    let good = good(&whole);
    let expected = talk.outputs(&good).await;
    type Change<'a> = &'a dyn Fn(&mut v1::ExpertBatch);
    fn rows(batch: &mut v1::ExpertBatch) -> &mut v1::Activations {
        batch.rows.as_mut().unwrap()
    }
    let bad: Vec<(Change<'_>, &str)> = vec![
        (&|b| b.layer = 0, "layer: 0 has no experts, only [1, 2] have"),
        (&|b| b.layer = u32::MAX, "layer: 4294967295 has no experts"),
        (&|b| b.rows = None, "rows: missing"),
        (&|b| rows(b).rows = 65_537, "rows: 65537 rows, at most 65536 are taken"),
        (&|b| rows(b).width = 32, "rows: rows of 32, 64 expected"),
        (&|b| rows(b).encoding = 0, "rows: no known encoding"),
        (&|b| rows(b).data = Bytes::from_static(&[0; 12]), "rows: 12 bytes for 3 rows"),
        (&|b| rows(b).data = [0xFF; 3 * 64 * 4].to_vec().into(), "rows: number 0 is not finite"),
        (&|b| rows(b).scales = vec![1.0], "rows: 1 scales, 0 expected"),
        (&|b| b.experts.clear(), "experts: none is named"),
        (&|b| b.experts = vec![3, 3, 7], "experts[1]: 3 after 3"),
        (&|b| b.experts = vec![3, 7, 4], "experts[2]: 4 after 7"),
        (&|b| b.experts = vec![3, 4, 16], "experts[2]: 16: the model has 16 experts"),
        (&|b| b.counts.truncate(2), "counts: 2 counts for 3 experts"),
        (&|b| b.counts = vec![3, 0, 3], "counts[1]: expert 4 has no rows"),
        (&|b| b.counts = vec![2, 1, 4], "places: 6 places, the counts add up to 7"),
        (&|b| b.counts = vec![u32::MAX; 3], "places: 6 places, the counts add up to 12884901885"),
        (&|b| b.places = vec![0, 3, 1, 0, 1, 2], "places[1]: row 3 of 3 for expert 3"),
        (&|b| b.places = vec![2, 0, 1, 0, 1, 2], "places[1]: row 0 of 3 for expert 3"),
        (&|b| b.places = vec![0, 2, 1, 0, 1, 1], "places[5]: row 1 of 3 for expert 7"),
        (&|b| b.weights.truncate(5), "weights: 5 weights for 6 places"),
        (&|b| b.weights[4] = f32::INFINITY, "weights[4]: not finite"),
        (
            &|b| (b.counts, b.places, b.weights) = (vec![1, 1, 5 << 20], vec![0; (5 << 20) + 2], vec![]),
            "places: 5242882 rows of 64 numbers",
        ),
    ];
    for (change, said) in bad {
        let mut batch = good.clone();
        change(&mut batch);
        let (reason, message) = talk.failure(&batch).await;
        assert!(reason == Reason::Invalid && message.starts_with(said), "{reason:?} {message}: {said} expected");
        assert_eq!(talk.outputs(&good).await, expected, "after {said}");
    }
}

#[tokio::test]
async fn outputs_that_are_not_finite_name_layer_and_expert() {
    let (service, whole) = (Service::whole("moe_v1", &[]).await, Whole::open("moe_v1"));
    let (mut talk, _) = service.open().await;
    let mut batch = good(&whole);
    batch.rows = Some(pack(vec![3e38; 3 * 64], 64, Encoding::F32));
    let (reason, message) = talk.failure(&batch).await;
    assert_eq!(reason, Reason::Compute);
    assert!(message.starts_with("layer 1: expert 3: outputs are NaN or infinite"), "{message}");
    batch = good(&whole);
    batch.weights.fill(3.4e38);
    let (reason, message) = talk.failure(&batch).await;
    assert_eq!((reason, message.as_str()), (Reason::Compute, "layer 1: experts [3, 4, 7]: their weighted sum is NaN or infinite"));
    talk.outputs(&good(&whole)).await;
}

#[tokio::test]
async fn copies_are_held_as_the_entry_says() {
    let (fixture, whole) = (testkit::fixture("moe_v1"), Whole::open("moe_v1"));
    let service = Service::start(&Mesh::in_process(), &fixture, &[setting("shards", 2)]).await;
    let question = Question {
        shares: Question::full(&mut Random(5), whole.shape(), 2, "6-9".parse().unwrap(), 4).shares,
        ..Question::full(&mut Random(5), whole.shape(), 2, "0-0".parse().unwrap(), 4)
    };
    let (mut talk, _) = service.open().await;
    let (mut other, _) = service.open().await;
    let batch = question.batch(3);
    assert_eq!(talk.failure(&batch).await, (Reason::NotHeld, "expert 8 is not held by shard 0-7".to_owned()));
    // 5 is its own, 16 is nobody's.
    service.extra(&[5, 8, 9, 15, 16]);
    for talk in [&mut talk, &mut other] {
        let Reply::Holdings(holdings) = talk.next().await.unwrap() else { panic!("holdings come when they change") };
        assert_eq!((holdings.first, holdings.last, holdings.extra), (0, 7, vec![8, 9, 15]));
        let answer = unpack("rows", &talk.outputs(&batch).await, 64).unwrap();
        assert_eq!(answer, whole.answer(&question));
    }
    let bytes = |experts: &[usize]| whole.0.holding(experts.iter().copied()).unwrap().weight_bytes();
    assert_eq!(service.inspect().await.weight_bytes, bytes(&[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 15]));
    // What cannot be read changes nothing; what follows it does.
    service.entry(Bytes::from_static(b"?"));
    service.extra(&[9]);
    let Reply::Holdings(holdings) = talk.next().await.unwrap() else { panic!("holdings come when they change") };
    assert_eq!(holdings.extra, [9]);
    assert_eq!(talk.failure(&batch).await.0, Reason::NotHeld);
    assert_eq!(service.open().await.1.extra, [9], "a new stream is told at once");
}

#[tokio::test]
async fn copies_with_a_nan_are_not_held() {
    let folder = with_nan("moe_v1", "model.layers.2.mlp.experts.9.up_proj.weight");
    let totals = Arc::new(Totals::default());
    let service = Service::start_with(&Mesh::in_process(), folder.path(), &[setting("shards", 2)], totals.clone()).await;
    let (mut talk, _) = service.open().await;
    service.extra(&[9]);
    testkit::wait_until("the copy is read", PATIENCE, async || totals.0.lock().unwrap().len() == 2).await;
    service.extra(&[10]);
    let Reply::Holdings(holdings) = talk.next().await.unwrap() else { panic!("holdings come when they change") };
    assert_eq!(holdings.extra, [10]);
}

#[tokio::test]
async fn a_nan_stops_only_the_shard_that_holds_it() {
    let name = "model.layers.2.mlp.experts.9.up_proj.weight";
    let folder = with_nan("moe_v1", name);
    let (_, entries) = watch::channel(Arc::default());
    for (shard, starts) in [(0, true), (1, false)] {
        let settings = [setting("shards", 2), setting("shard", shard)];
        let host = host(&Mesh::in_process(), folder.path(), &settings, Arc::new(Silent));
        let opened = experts::open(&host, &entries).await;
        assert_eq!(opened.is_ok(), starts);
        if let Err(error) = opened {
            let text = format!("{error:#}");
            assert!(text.contains(name) && text.contains("NaN"), "{text}");
            assert_eq!(process::exit_code(&error), 66);
        }
    }
}

/// More work than is submitted in the time that it takes.
fn heavy(whole: &Whole, rows: usize) -> Question {
    Question { weighted: true, ..Question::full(&mut Random(9), whole.shape(), 1, "0-15".parse().unwrap(), rows) }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_queue_refuses() {
    let (service, whole) = (Service::whole("moe_v1", &[setting("queue_limit", 1), setting("threads", 1)]).await, Whole::open("moe_v1"));
    let (mut talk, _) = service.open().await;
    let (question, count) = (heavy(&whole, 2048), 32);
    for id in 0..count {
        talk.send(&question.batch(id)).await;
    }
    let (mut computed, mut refused) = (0, 0);
    let expected = pack(whole.answer(&question), 64, Encoding::F32);
    for _ in 0..count {
        match talk.next().await.unwrap() {
            Reply::Outputs(outputs) => {
                assert_eq!(outputs.rows.unwrap(), expected);
                computed += 1;
            }
            Reply::Failure(failure) => {
                assert_eq!((failure.reason(), failure.message.as_str()), (Reason::Busy, "1 batches wait already"));
                refused += 1;
            }
            Reply::Holdings(_) => panic!("nothing has changed"),
        }
    }
    assert!(computed >= 1 && refused >= 1, "{computed} computed, {refused} refused");
    talk.outputs(&good(&whole)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_nobody_waits_for_is_not_computed() {
    let server = NatsServer::start().await;
    for mesh in [Mesh::in_process(), Mesh::connect(&MeshConfig::nats(server.url())).await.unwrap()] {
        let service = Service::start(&mesh, &testkit::fixture("moe_v1"), &[setting("threads", 1)]).await;
        let whole = Whole::open("moe_v1");
        let (mut talk, _) = service.open().await;
        for id in 0..8 {
            talk.send(&heavy(&whole, 16_384).batch(id)).await;
        }
        // They are taken in much less time than the first one needs.
        talk.next().await.unwrap();
        drop(talk);
        let (mut talk, _) = service.open().await;
        talk.outputs(&heavy(&whole, 1024).batch(9)).await; // in its turn, so nothing waits before it
        let batches = service.inspect().await.batches;
        assert!((2..9).contains(&batches), "{batches} batches were computed");
    }
}

#[tokio::test]
async fn what_was_computed_is_counted() {
    let (service, whole) = (Service::whole("v2_lite", &[]).await, Whole::open("v2_lite"));
    let (mut talk, holdings) = service.open().await;
    let (mut random, shape) = (Random(3), whole.shape().clone());
    let mut expected = vec![0u64; shape.layers.len() * shape.experts];
    for id in 0..6 {
        let position = id as usize % shape.layers.len();
        let question = Question::random(&mut random, &shape, shape.layers[position], service.range, 9);
        for share in &question.shares {
            expected[position * shape.experts + share.expert] += share.rows.len() as u64;
        }
        talk.outputs(&Question { weighted: id % 2 == 0, ..question }.batch(id)).await;
    }
    talk.failure(&v1::ExpertBatch { layer: 77, ..good(&whole) }).await;
    let layers = shape.layers.iter().map(|&layer| layer as u32).collect();
    let expected = v1::InspectExpertsResponse {
        holdings: Some(holdings),
        layers,
        experts: 12,
        hidden_size: 64,
        rows_by_expert: expected,
        batches: 6,
        weight_bytes: whole.0.weight_bytes(),
    };
    assert_eq!(service.inspect().await, expected);
}

/// Notes the totals of what is begun.
#[derive(Default)]
struct Totals(Mutex<Vec<u64>>);

impl Progress for Totals {
    fn start(&self, _what: &str, total: u64, unit: Unit) -> Box<dyn Bar> {
        assert_eq!(unit, Unit::Bytes);
        self.0.lock().unwrap().push(total);
        Silent.start("", total, unit)
    }
}

#[tokio::test]
async fn only_the_own_experts_are_read() {
    let fixture = testkit::fixture("v2_full");
    let checkpoint = Checkpoint::open(&fixture).unwrap();
    let bytes = |experts: &[usize]| checkpoint.bytes_of(&|name| models::expert_of(name).is_some_and(|expert| experts.contains(&expert)));
    let totals = Arc::new(Totals::default());
    let settings = [setting("starts", "0,3,5"), setting("shard", 1)];
    let service = Service::start_with(&Mesh::in_process(), &fixture, &settings, totals.clone()).await;
    let read = || totals.0.lock().unwrap().clone();
    assert_eq!(read(), [bytes(&[3, 4])]);
    assert!(bytes(&[3, 4]) > 0 && bytes(&[3, 4]) * 8 == bytes(&Vec::from_iter(0..16)));
    service.extra(&[4, 9]);
    testkit::wait_until("the copy is read", PATIENCE, async || read().len() == 2).await;
    assert_eq!(read()[1], bytes(&[9]));
}

#[tokio::test]
async fn a_process_without_experts_says_so() {
    let open = |name: &str| LoadedModel::new(name, Arc::new(Checkpoint::open(&testkit::fixture(name)).unwrap()));
    let start = async |models: Vec<LoadedModel>| {
        let host = Host::new(Config::default(), Mesh::in_process(), models, Arc::new(Silent));
        let error = experts::start(&host).await.err().unwrap();
        (format!("{error:#}"), process::exit_code(&error))
    };
    let none = start(vec![open("llama"), open("janus")]).await;
    assert_eq!(none, ("model llama, janus: no routed experts, there is nothing to serve".to_owned(), 66));
    assert_eq!(start(vec![]).await.1, 64);
    let host = Host::new(Config::default(), Mesh::in_process(), vec![open("llama"), open("moe_v1"), open("v2_lite")], Arc::new(Silent));
    let offers = experts::start(&host).await.unwrap();
    let targets: Vec<_> = offers.iter().map(|offer| offer.target.to_string()).collect();
    assert_eq!(targets, ["experts.moe_v1.0-15", "experts.v2_lite.0-11"]);
}

#[tokio::test]
async fn bad_settings_stop_the_start_with_their_key() {
    for (settings, key) in [
        (vec![setting("queue_limit", 0)], "experts.queue_limit"),
        (vec![setting("shards", 0)], "experts.shards"),
        (vec![setting("shards", 17)], "experts.shards"),
        (vec![setting("shards", "many")], "experts.shards"),
        (vec![setting("shard", 1)], "experts.shard:"),
        (vec![setting("starts", "0,16")], "experts.starts"),
        (vec![setting("starts", "0,8"), setting("shards", 3)], "experts.shards"),
        (vec![setting("shrads", 3)], "experts.shrads"),
    ] {
        let host = host(&Mesh::in_process(), &testkit::fixture("moe_v1"), &settings, Arc::new(Silent));
        let error = experts::start(&host).await.err().unwrap();
        assert!(format!("{error:#}").contains(key), "{error:#}: {key} expected");
        assert_eq!(process::exit_code(&error), 64);
    }
}

#[tokio::test]
async fn a_shard_is_healthy_and_a_stream_ends_with_its_caller() {
    let service = Service::whole("moe_v1", &[]).await;
    let request = HealthCheckRequest { service: "janua.v1.Experts".into() };
    let health = HealthClient::new(service.channel.clone()).check(request).await.unwrap().into_inner().status();
    assert_eq!(health, ServingStatus::Serving);
    let (mut talk, _) = service.open().await;
    let batch = good(&Whole::open("moe_v1"));
    talk.send(&batch).await;
    talk.batches = tokio::sync::mpsc::channel(1).0; // the sender that there was is gone
    talk.collect(&batch).await; // what has been sent is answered
    assert!(matches!(talk.next().await, Err(None)));
    assert_eq!(service.range.to_string(), "0-15");
    assert_eq!(MODEL, service.channel.target().model);
}
