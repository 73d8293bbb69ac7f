//! `janua plan`: what it takes to split a model's experts over many nodes, on paper.
//!
//! | File | Holds |
//! |---|---|
//! | `shape.rs` | bytes of weights, and who holds them |
//! | `routing.rs` | where tokens go: probabilities, exactly or by drawing |
//! | `traffic.rs` | bytes on the wire |
//! | `time.rs` | a bound for tokens per second |
//! | `print.rs` | all of it for people and as JSON |

mod print;
mod routing;
#[cfg(test)]
mod samples;
mod shape;
mod time;
mod traffic;

use std::path::PathBuf;

use clap::Args;
use placement::ExpertRange;

use self::shape::{Shape, split};
use self::time::{Bound, Machines, bound};
use self::traffic::{Activations, Traffic, traffic};
use crate::Failure;
use crate::failure::COMPARISON;

/// Say on paper what a model whose experts are split over many nodes needs, and how fast it can be
#[derive(Debug, Args)]
#[command(after_help = "Only DIR/config.json is read: the weights need not be there.

Examples:
  janua plan --model ./deepseek-v2 --nodes 8 --node-memory-gb 80
  janua plan --model ./deepseek-v2-lite --nodes 4 --replicas 2 --batch 32 --activations bf16
  janua plan --model ./deepseek-moe-16b --starts 0,10,40 --bandwidth-gbit 1 --rtt-us 1000 --json

Tokens are taken to choose experts uniformly; experts that are hotter than others make the busiest shard
slower than said here, see `janua experts rebalance`. The rate is a bound: a measured one is below it.

Exit codes: 0 done, 1 something does not fit into --node-memory-gb.")]
pub struct Plan {
    /// Folder with the model's config.json
    #[arg(long, value_name = "DIR")]
    pub model: PathBuf,
    /// Shards, each of them on a node of its own
    #[arg(long, value_name = "N", required_unless_present = "starts", allow_negative_numbers = true)]
    pub nodes: Option<usize>,
    /// Replicas of each shard
    #[arg(long, value_name = "R", default_value_t = 1, allow_negative_numbers = true)]
    pub replicas: usize,
    /// The expert that each shard begins with, as 0,10,40; without it shards are as equal as can be
    #[arg(long, value_name = "LIST", value_delimiter = ',')]
    pub starts: Vec<usize>,
    /// Tokens that the language node computes in one step
    #[arg(long, value_name = "B", default_value_t = 16, allow_negative_numbers = true)]
    pub batch: usize,
    /// How activations travel, as language.expert_activations
    #[arg(long, value_enum, value_name = "KIND", default_value = "f32")]
    pub activations: Activations,
    /// Gigabits per second of the language node's link, each direction
    #[arg(long, value_name = "G", default_value_t = 10.0, allow_negative_numbers = true)]
    pub bandwidth_gbit: f64,
    /// Microseconds from the language node to a shard and back
    #[arg(long, value_name = "U", default_value_t = 100.0, allow_negative_numbers = true)]
    pub rtt_us: f64,
    /// Gigabytes (10^9) per second that a node reads weights with
    #[arg(long, value_name = "M", default_value_t = 50.0, allow_negative_numbers = true)]
    pub memory_gb_per_s: f64,
    /// Gigabytes (10^9) of a node that weights may take
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    pub node_memory_gb: Option<f64>,
    /// Microseconds that a shard computes on one row of one expert, if you have measured it
    #[arg(long, value_name = "C", allow_negative_numbers = true)]
    pub compute_us_per_row_layer: Option<f64>,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

/// Most tokens of a step: the experts service takes no larger batches.
const MOST_TOKENS: usize = 1 << 16;
/// Far more than anybody has.
const MOST_REPLICAS: usize = 1 << 16;

/// Everything that is said about one split.
struct Sheet {
    shards: Vec<ExpertRange>,
    traffic: Traffic,
    bound: Bound,
}

impl Sheet {
    fn new(shape: &Shape, shards: Vec<ExpertRange>, flags: &Plan) -> Self {
        let traffic = traffic(shape, &shards, flags.batch, flags.activations);
        let bound = bound(shape, &shards, flags.batch, &traffic, &flags.machines());
        Self { shards, traffic, bound }
    }

    /// Bytes of the smallest and the largest shard.
    fn shard_bytes(&self, shape: &Shape) -> (u64, u64) {
        let bytes = || self.shards.iter().map(|&shard| shape.shard_bytes(shard));
        (bytes().min().unwrap_or(0), bytes().max().unwrap_or(0))
    }
}

impl Plan {
    fn machines(&self) -> Machines {
        Machines {
            bandwidth: self.bandwidth_gbit * 1e9 / 8.0,
            round_trip: self.rtt_us * 1e-6,
            memory: self.memory_gb_per_s * 1e9,
            per_row: self.compute_us_per_row_layer.map(|microseconds| microseconds * 1e-6),
        }
    }

    /// Refuses what nothing can be reckoned with, by the flag's name.
    fn check(&self) -> Result<(), Failure> {
        let counts = [("--replicas", self.replicas, MOST_REPLICAS), ("--batch", self.batch, MOST_TOKENS)];
        if let Some((flag, value, most)) = counts.into_iter().find(|(_, value, most)| !(1..=*most).contains(value)) {
            return Err(Failure::usage(format!("{flag}: {value} is not in 1..={most}")));
        }
        let positive = [
            ("--bandwidth-gbit", Some(self.bandwidth_gbit)),
            ("--memory-gb-per-s", Some(self.memory_gb_per_s)),
            ("--node-memory-gb", self.node_memory_gb),
        ];
        let not_negative = [("--rtt-us", Some(self.rtt_us)), ("--compute-us-per-row-layer", self.compute_us_per_row_layer)];
        for (flag, value) in positive.into_iter().filter_map(|(flag, value)| Some((flag, value?))) {
            if !(value > 0.0 && value.is_finite()) {
                return Err(Failure::usage(format!("{flag}: {value} is not a positive number")));
            }
        }
        for (flag, value) in not_negative.into_iter().filter_map(|(flag, value)| Some((flag, value?))) {
            if !(value >= 0.0 && value.is_finite()) {
                return Err(Failure::usage(format!("{flag}: {value} is not zero or a positive number")));
            }
        }
        Ok(())
    }
}

/// Runs `janua plan`.
pub fn run(flags: &Plan) -> Result<(), Failure> {
    flags.check()?;
    let shape = Shape::read(&flags.model)?;
    let sheet = Sheet::new(&shape, split(shape.gating().experts, flags.nodes, &flags.starts)?, flags);
    let others = others(&shape, &sheet, flags)?;
    if flags.json {
        print::json(&shape, &sheet, &others, flags)?;
    } else {
        print::table(&shape, &sheet, &others, flags)?;
    }
    match flags.node_memory_gb.map(|gigabytes| gigabytes * 1e9) {
        Some(memory) if sheet.shard_bytes(&shape).1 as f64 > memory || shape.rest().total() as f64 > memory => {
            Err(Failure::new(COMPARISON, "this split does not fit into --node-memory-gb, see above"))
        }
        _ => Ok(()),
    }
}

/// Equal splits to compare with: powers of two, and one expert per shard.
fn others(shape: &Shape, sheet: &Sheet, flags: &Plan) -> Result<Vec<Sheet>, Failure> {
    let experts = shape.gating().experts;
    let powers = (0..).map(|power| 1usize << power).take_while(|&nodes| nodes < experts);
    let counts = powers.chain([experts]).filter(|&nodes| nodes != sheet.shards.len() || !flags.starts.is_empty());
    counts.map(|nodes| Ok(Sheet::new(shape, split(experts, Some(nodes), &[])?, flags))).collect()
}
