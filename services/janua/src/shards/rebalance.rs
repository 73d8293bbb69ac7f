use std::collections::BTreeMap;
use std::time::Duration;

use clap::Args;
use mesh::{Bucket, Mesh};
use placement::{Balance, ExpertRange, Manifest, balance, loads};
use serde_json::{Value, json};
use tokio::time::Instant;

use super::Installation;
use super::survey::{Survey, copies, ranges};
use crate::Failure;
use crate::doctor::size;
use crate::failure::{REFUSED, TRY_LATER, chain};
use crate::terminal::{self, BOLD, DIM, GOOD, paint};

/// Give copies of hot experts to shards that have less to do
#[derive(Debug, Args)]
#[command(after_help = "The counts are those of all replicas since each was started. Copies that are there now and are not in the new
proposal are given up. Results do not change, and nothing stops meanwhile.

Examples:
  janua experts rebalance --config janua.toml --model moe --dry-run
  janua experts rebalance --config janua.toml --model moe --copies 4

Exit codes: 0 done or nothing to do, 65 no such model, or a shard without a replica, 75 replicas do not hold their copies in time.")]
pub struct Rebalance {
    /// The model
    #[arg(long, value_name = "NAME")]
    pub model: String,
    /// Most copies, all shards together [default: as many as there are shards]
    #[arg(long, value_name = "N")]
    pub copies: Option<usize>,
    /// Say what is expected and change nothing
    #[arg(long)]
    pub dry_run: bool,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub installation: Installation,
}

/// How long replicas may take to hold their copies: weights may have to be read from a disk.
const LIMIT: Duration = Duration::from_secs(60);
const LOOK_EVERY: Duration = Duration::from_millis(250);

/// What is, and what is proposed.
struct Proposal {
    survey: Survey,
    rows: Vec<u64>,
    /// Rows per shard with the copies that are there now.
    now: BTreeMap<ExpertRange, f64>,
    balance: Balance,
}

impl Proposal {
    fn new(survey: Survey, most: Option<usize>) -> Self {
        let rows = survey.rows();
        let shards = survey.manifest.shards.keys().copied().collect();
        let balance = balance(&shards, &rows, most.unwrap_or(survey.manifest.shards.len()));
        Self { now: loads(&survey.manifest, &rows), rows, balance, survey }
    }

    /// Shards whose copies are to change.
    fn changes(&self) -> impl Iterator<Item = ExpertRange> {
        let changed = |range: &&ExpertRange| self.balance.manifest.shards.get(range) != self.survey.manifest.shards.get(range);
        self.survey.manifest.shards.keys().filter(changed).copied()
    }

    /// Bytes that one copy takes in each replica: an even part of what one holds.
    fn copy_bytes(&self) -> u64 {
        let report = self.survey.reports().find_map(|report| Some((report, report.holdings.as_ref()?)));
        report.map_or(0, |(report, held)| report.weight_bytes / (u64::from(held.last - held.first) + 1 + held.extra.len() as u64))
    }
}

/// Runs `janua experts rebalance`.
pub async fn run(flags: Rebalance) -> Result<(), Failure> {
    let (mesh, bucket) = flags.installation.join().await?;
    let entries = bucket.entries().borrow().clone();
    let survey = Survey::of_known(&mesh, &flags.model, &entries).await?;
    check(&flags.model, &survey)?;
    let proposal = Proposal::new(survey, flags.copies);
    let begun = Instant::now();
    let is_idle = proposal.rows.iter().all(|&rows| rows == 0);
    if !flags.json && !is_idle {
        print(&flags.model, &proposal)?;
    }
    let outcome = match () {
        () if is_idle => "no counts",
        () if proposal.changes().next().is_none() => "balanced",
        () if flags.dry_run => "dry run",
        () => {
            write(&bucket, &flags.model, &proposal).await?;
            settle(&mesh, &bucket, &flags.model, &proposal.balance.manifest).await?;
            "done"
        }
    };
    if flags.json { print_json(&flags.model, &proposal, outcome) } else { conclude(&flags.model, outcome, begun.elapsed()) }
}

/// A shard without a replica takes no copies, and its experts have no counts.
fn check(model: &str, survey: &Survey) -> Result<(), Failure> {
    if let Some((range, _)) = survey.replicas.iter().find(|(_, replicas)| replicas.is_empty()) {
        let remedy = format!("start one, or forget the shard: janua experts list --model {model} --forget {range}");
        return Err(Failure::new(REFUSED, format!("shard {range} of {model} has no replica: {remedy}")));
    }
    for (range, replica) in survey.replicas.iter().flat_map(|(range, replicas)| replicas.iter().map(move |replica| (range, replica))) {
        if let Err(reason) = &replica.report {
            return Err(Failure::new(TRY_LATER, format!("replica {} of shard {range} of {model} does not answer: {reason}", replica.name)));
        }
    }
    Ok(())
}

async fn write(bucket: &Bucket, model: &str, proposal: &Proposal) -> Result<(), Failure> {
    for range in proposal.changes() {
        let value = Manifest::value(&proposal.balance.manifest.shards[&range]);
        bucket.put(&Manifest::key(model, range), value).await.map_err(|error| Failure::software(chain(&error)))?;
    }
    Ok(())
}

/// Waits until every replica holds what its shard should.
async fn settle(mesh: &Mesh, bucket: &Bucket, model: &str, wanted: &Manifest) -> Result<(), Failure> {
    let end = Instant::now() + LIMIT;
    loop {
        let entries = bucket.entries().borrow().clone();
        let survey = Survey::of(mesh, model, &entries).await;
        let Some(behind) = behind(&survey, wanted) else { return Ok(()) };
        if Instant::now() >= end {
            let reason =
                format!("{behind} after {} s: the replica's log says why; what is written stays, and it may still follow", LIMIT.as_secs());
            return Err(Failure::new(TRY_LATER, reason));
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

/// The first replica that does not hold what it should, in words.
fn behind(survey: &Survey, wanted: &Manifest) -> Option<String> {
    for (range, wanted) in &wanted.shards {
        let replicas = survey.replicas.get(range).map_or(&[][..], Vec::as_slice);
        if replicas.is_empty() {
            return Some(format!("shard {range} has no replica any more"));
        }
        let is_behind = |report: &Result<_, String>| report.as_ref().map_or(true, |report| copies(report) != *wanted);
        if let Some(replica) = replicas.iter().find(|replica| is_behind(&replica.report)) {
            return Some(format!("replica {} of shard {range} does not hold its copies", replica.name));
        }
    }
    None
}

fn print(model: &str, proposal: &Proposal) -> Result<(), Failure> {
    let total: u64 = proposal.rows.iter().sum();
    terminal::line(&format!("{} {total} rows so far, expected for the same again:", paint(BOLD, model)))?;
    terminal::line(&paint(BOLD, format!("  {:<9} {:>10} {:>10}  copies", "shard", "rows now", "then")))?;
    for (range, copies) in &proposal.balance.manifest.shards {
        let load = |loads: &BTreeMap<ExpertRange, f64>| loads.get(range).copied().unwrap_or(0.0);
        let copies = if copies.is_empty() { "-".to_owned() } else { ranges(copies.iter().copied()) };
        let [now, then] = [load(&proposal.now), load(&proposal.balance.after)];
        terminal::line(&format!("  {:<9} {now:>10.0} {then:>10.0}  {copies}", range.to_string()))?;
    }
    let [now, then] = [peak(&proposal.now), peak(&proposal.balance.after)];
    terminal::line(&format!("  {:<9} {now:>10.2} {:>10}", "max/mean", paint(GOOD, format!("{then:>10.2}"))))?;
    if proposal.balance.copies.is_empty() {
        return Ok(());
    }
    terminal::line(&paint(DIM, format!("  a copy takes {} in each replica of its shard", size(proposal.copy_bytes())))).map(drop)
}

fn conclude(model: &str, outcome: &str, took: Duration) -> Result<(), Failure> {
    terminal::line(&match outcome {
        "no counts" => format!("nothing has been computed yet for {model}: there are no counts to go by, nothing is changed"),
        "balanced" => "no other copies would help: nothing is changed".to_owned(),
        "dry run" => "dry run: nothing is changed".to_owned(),
        _ => format!("{} after {:.1} s", paint(GOOD, "every replica holds its copies"), took.as_secs_f64()),
    })
    .map(drop)
}

/// The busiest shard's load in parts of the mean one; 1 where nothing is to do.
fn peak(loads: &BTreeMap<ExpertRange, f64>) -> f64 {
    let mean = loads.values().sum::<f64>() / loads.len().max(1) as f64;
    if mean > 0.0 { loads.values().copied().fold(0.0, f64::max) / mean } else { 1.0 }
}

fn print_json(model: &str, proposal: &Proposal, outcome: &str) -> Result<(), Failure> {
    let state = |loads: &BTreeMap<ExpertRange, f64>, manifest: &Manifest| {
        let shard = |(range, copies): (&ExpertRange, _)| json!({"range": range.to_string(), "rows": loads.get(range), "copies": copies});
        json!({"max_over_mean": peak(loads), "shards": manifest.shards.iter().map(shard).collect::<Vec<Value>>()})
    };
    let copies = proposal.balance.copies.iter().map(|copy| json!({"expert": copy.expert, "to": copy.to.to_string()}));
    terminal::json(&json!({
        "model": model,
        "outcome": outcome,
        "rows_by_expert": proposal.rows,
        "now": state(&proposal.now, &proposal.survey.manifest),
        "then": state(&proposal.balance.after, &proposal.balance.manifest),
        "copies": copies.collect::<Vec<_>>(),
        "copy_bytes": proposal.copy_bytes(),
    }))
    .map(drop)
}
