//! Questions and answers over TCP with nothing else in them, as a step asks its shards: to all at once, then wait for the last.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::link::{Harm, Network};

/// What is to be done by a process of this program in another namespace.
const ROLE: &str = "JANUA_FAULT_ROLE";
/// This test, which is that process.
const ITSELF: &str = "rhythm::a_process_of_other_tests";
const PORT: u16 = 7;
/// Between an answer and the next question, as the engine has other things to do.
const PAUSE: Duration = Duration::from_millis(1);

/// Bytes of a question and its answer.
#[derive(Debug, Clone, Copy)]
pub struct Sizes {
    pub question: usize,
    pub answer: usize,
}

/// Times of questions to all shards of `network`, each until the last answer; ascending.
pub fn measure(network: &Network, shards: usize, sizes: Sizes, rounds: usize) -> Vec<Duration> {
    let role = |role: &str| format!("{role} {} {} {rounds} {shards}", sizes.question, sizes.answer);
    let answering: Vec<_> = (1..=shards).map(|at| Helper(begin(network.space(at), &role("answer")))).collect();
    let asking = begin(network.space(0), &role("ask")).wait_with_output().unwrap();
    drop(answering);
    let output = String::from_utf8(asking.stdout).unwrap();
    let nanos = output.lines().filter_map(|line| line.strip_prefix("took ")?.parse().ok());
    let mut times: Vec<_> = nanos.map(Duration::from_nanos).collect();
    assert_eq!(times.len(), rounds, "{output}");
    times.sort_unstable();
    times
}

struct Helper(Child);

impl Drop for Helper {
    fn drop(&mut self) {
        // Fails when it has ended.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn begin(space: &str, role: &str) -> Child {
    let itself = std::env::current_exe().unwrap();
    let mut command = Command::new("ip");
    command.args(["netns", "exec", space]).arg(itself).args(["--ignored", "--exact", ITSELF, "--nocapture"]);
    command.env(ROLE, role).stdin(Stdio::null()).stdout(Stdio::piped()).spawn().unwrap()
}

#[test]
#[ignore = "other tests run it in a namespace"]
fn a_process_of_other_tests() {
    let Ok(role) = std::env::var(ROLE) else { return };
    let words: Vec<_> = role.split(' ').collect();
    let [question, answer, rounds, shards] = [1, 2, 3, 4].map(|at| words[at].parse::<usize>().unwrap());
    match words[0] {
        "answer" => answers(Sizes { question, answer }),
        _ => asks(Sizes { question, answer }, rounds, shards),
    }
}

fn answers(sizes: Sizes) {
    let listener = TcpListener::bind(("0.0.0.0", PORT)).unwrap();
    let (mut stream, _) = listener.accept().unwrap();
    stream.set_nodelay(true).unwrap();
    let (mut question, answer) = (vec![0; sizes.question], vec![7; sizes.answer]);
    while stream.read_exact(&mut question).is_ok() {
        stream.write_all(&answer).unwrap();
    }
}

fn asks(sizes: Sizes, rounds: usize, shards: usize) {
    let mut streams: Vec<_> = (1..=shards).map(dial).collect();
    let (question, mut answer) = (vec![7; sizes.question], vec![0; sizes.answer]);
    for _ in 0..rounds {
        let begun = Instant::now();
        streams.iter_mut().for_each(|stream| stream.write_all(&question).unwrap());
        streams.iter_mut().for_each(|stream| stream.read_exact(&mut answer).unwrap());
        println!("took {}", begun.elapsed().as_nanos());
        std::thread::sleep(PAUSE);
    }
}

fn dial(shard: usize) -> TcpStream {
    let end = Instant::now() + Duration::from_secs(60);
    loop {
        match TcpStream::connect((format!("10.9.{shard}.2").as_str(), PORT)) {
            Ok(stream) => {
                stream.set_nodelay(true).unwrap();
                return stream;
            }
            Err(error) => assert!(Instant::now() < end, "{error}"),
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

pub fn mean(times: &[Duration]) -> Duration {
    times.iter().sum::<Duration>() / times.len() as u32
}

/// `share` of the times, which ascend, are at most this.
pub fn quantile(times: &[Duration], share: f64) -> Duration {
    times[((times.len() - 1) as f64 * share).round() as usize]
}

/// A link and those who talk over it, on paper.
#[derive(Debug, Clone, Copy)]
pub struct Paper {
    pub harm: Harm,
    /// Of a question and an answer of one packet, without loss.
    pub round_trip: Duration,
    /// Linux's `tcp_rto_min`.
    pub least_timeout: Duration,
    pub shards: u32,
    /// Whether a second replica is asked when the first is late.
    pub is_hedged: bool,
}

/// Bytes of a packet that TCP may fill.
const SEGMENT: usize = 1448;
/// A second replica is not asked before: `LEAST` and `FACTOR` of the language service.
const LEAST_HEDGE: Duration = Duration::from_millis(10);
const HEDGE_FACTOR: u32 = 2;

impl Paper {
    /// What loss adds to the mean time of asking all shards.
    ///
    /// A packet that is lost before the last of its message is missed when those behind it arrive, after a round trip, and a quarter of one is
    /// given to packets that only came late (RACK). The last packet of a message has none behind it. The probe for such losses waits two round
    /// trips and, as soon as no other packet is under way, the least retransmission timeout on top; the timeout itself comes a round trip
    /// earlier. So it costs the least timeout and a round trip, however long the message was, or the time until a second replica is asked.
    ///
    /// Losses also keep the window small: it swings between 2/3 and 4/3 of sqrt(3 / 2p) packets (Mathis et al. 1997), and what does not fit into
    /// the smaller of these takes one more round trip. Losses are rare: what two shards lose is added up, as if never in the same question.
    pub fn loss(&self, sizes: Sizes) -> Duration {
        let tail = (self.least_timeout + self.round_trip).min(self.hedge(sizes).unwrap_or(Duration::MAX));
        let cost = |bytes: usize| {
            let middle = (packets(bytes) - 1) * self.round_trip * 5 / 4;
            (middle + tail).mul_f64(self.harm.loss)
        };
        (cost(sizes.question) + cost(sizes.answer)) * self.shards + self.flights(sizes) * self.round_trip
    }

    /// When a batch is late: nineteen of twenty take no longer than one that has lost a packet in the middle, if it has a middle.
    pub fn hedge(&self, sizes: Sizes) -> Option<Duration> {
        let has_middle = packets(sizes.question) + packets(sizes.answer) > 2;
        let usual = (1 + self.flights(sizes)) * self.round_trip + if has_middle { self.round_trip * 5 / 4 } else { Duration::ZERO };
        self.is_hedged.then(|| LEAST_HEDGE.max(usual * HEDGE_FACTOR))
    }

    /// Round trips that a question and its answer take because they do not fit into the window.
    fn flights(&self, sizes: Sizes) -> u32 {
        let window = 2.0 / 3.0 * (1.5 / self.harm.loss).sqrt();
        let more = |bytes| (f64::from(packets(bytes)) / window).ceil() as u32 - 1;
        more(sizes.question) + more(sizes.answer)
    }
}

fn packets(bytes: usize) -> u32 {
    bytes.div_ceil(SEGMENT) as u32
}
