use std::collections::{BTreeMap, BTreeSet};

use clap::Args;
use mesh::{Bucket, Mesh};
use placement::{ExpertRange, Manifest};
use serde_json::{Value, json};

use super::Installation;
use super::survey::{Replica, Survey, copies, instances, ranges, target};
use crate::Failure;
use crate::doctor::size;
use crate::failure::{REFUSED, chain};
use crate::terminal::{self, BAD, BOLD, DIM, GOOD, paint};

/// List the shards of a running installation, their replicas, and what is missing
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  janua experts list --config janua.toml
  janua experts list --set mesh.wire=direct --set mesh.nats_url=nats://10.0.0.5:4222 --json
  janua experts list --config janua.toml --model moe --forget 0-15    a shard of a split that is no more")]
pub struct List {
    /// Only the shards of this model
    #[arg(long, value_name = "NAME")]
    pub model: Option<String>,
    /// Forget a shard of --model that has no replica: nobody waits for it any more
    #[arg(long, value_name = "RANGE", requires = "model")]
    pub forget: Option<String>,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub installation: Installation,
}

/// Runs `janua experts list`.
pub async fn run(flags: List) -> Result<(), Failure> {
    let (mesh, bucket) = flags.installation.join().await?;
    if let (Some(model), Some(range)) = (&flags.model, &flags.forget) {
        let range: ExpertRange = range.parse().map_err(|error| Failure::usage(format!("--forget: {error}")))?;
        forget(&mesh, &bucket, model, range).await?;
        return match flags.json {
            true => terminal::json(&json!({"forgotten": range.to_string(), "model": model})).map(drop),
            false => terminal::line(&format!("forgot shard {range} of {model}")).map(drop),
        };
    }
    let entries = bucket.entries().borrow().clone();
    let names = flags.model.as_ref().map_or_else(|| Manifest::models(&entries), |model| BTreeSet::from([model.clone()]));
    let mut surveys = BTreeMap::new();
    for name in names {
        let survey = Survey::of_known(&mesh, &name, &entries).await?;
        surveys.insert(name, survey);
    }
    if flags.json { print_json(&surveys) } else { print(&surveys) }
}

/// Deletes the entry of a shard. One that runs would go on without anybody finding it, so it stays.
async fn forget(mesh: &Mesh, bucket: &Bucket, model: &str, range: ExpertRange) -> Result<(), Failure> {
    let key = Manifest::key(model, range);
    if !bucket.entries().borrow().contains_key(&key) {
        return Err(Failure::new(REFUSED, format!("--forget: there is no shard {range} of {model}, see `janua experts list`")));
    }
    let running = instances(mesh, &target(model, range)).await.len();
    if running > 0 {
        let reason = format!("--forget: shard {range} of {model} has a replica that runs ({running} in all): stop it first");
        return Err(Failure::new(REFUSED, reason));
    }
    bucket.delete(&key).await.map_err(|error| Failure::software(chain(&error)))
}

fn print(surveys: &BTreeMap<String, Survey>) -> Result<(), Failure> {
    if surveys.is_empty() {
        return terminal::line("no expert shard has ever been started here").map(drop);
    }
    for line in surveys.iter().flat_map(|(model, survey)| lines(model, survey)) {
        if !terminal::line(&line)? {
            break;
        }
    }
    Ok(())
}

fn lines(model: &str, survey: &Survey) -> Vec<String> {
    let unheld = survey.unheld();
    let state = match unheld.is_empty() {
        true => paint(GOOD, "all held"),
        false => paint(BAD, format!("nobody holds {}", ranges(unheld))),
    };
    let mut lines = vec![format!("{} {} experts · {state}", paint(BOLD, model), survey.experts())];
    for (range, replicas) in &survey.replicas {
        let wanted = &survey.manifest.shards[range];
        let count = match replicas.len() {
            0 => paint(BAD, "no replica"),
            1 => "1 replica".to_owned(),
            count => format!("{count} replicas"),
        };
        let kept = if wanted.is_empty() { String::new() } else { format!(", copies of {}", ranges(wanted.iter().copied())) };
        lines.push(format!("  {} {count}{kept}", paint(BOLD, format!("{:<9}", range.to_string()))));
        lines.extend(replicas.iter().map(|replica| line(replica, wanted)));
    }
    lines.extend(survey.unreadable.iter().map(|key| format!("  {}", paint(BAD, format!("the entry {key} cannot be read")))));
    if !survey.agrees() {
        lines.push(format!("  {}", paint(BAD, "not all replicas have read the same weights")));
    }
    lines
}

fn line(replica: &Replica, wanted: &BTreeSet<usize>) -> String {
    let name = paint(DIM, &replica.name);
    let report = match &replica.report {
        Ok(report) => report,
        Err(reason) => return format!("            {name} {}", paint(BAD, format!("does not answer: {reason}"))),
    };
    let held = copies(report);
    let behind = match held == *wanted {
        true => String::new(),
        false => {
            format!(" · {}", paint(BAD, format!("holds copies of {}", if held.is_empty() { "none".to_owned() } else { ranges(held) })))
        }
    };
    let rows: u64 = report.rows_by_expert.iter().sum();
    format!("            {name} {rows} rows in {} batches · {}{behind}", report.batches, size(report.weight_bytes))
}

fn print_json(surveys: &BTreeMap<String, Survey>) -> Result<(), Failure> {
    let models: Vec<Value> = surveys.iter().map(|(model, survey)| value(model, survey)).collect();
    terminal::json(&json!({"models": models})).map(drop)
}

fn value(model: &str, survey: &Survey) -> Value {
    let replica = |replica: &Replica| match &replica.report {
        Err(reason) => json!({"instance": replica.name.as_str(), "error": reason}),
        Ok(report) => json!({
            "instance": replica.name.as_str(),
            "copies": copies(report),
            "rows": report.rows_by_expert.iter().sum::<u64>(),
            "batches": report.batches,
            "weight_bytes": report.weight_bytes,
        }),
    };
    let shard = |(range, replicas): (&ExpertRange, &Vec<Replica>)| {
        let copies = &survey.manifest.shards[range];
        json!({"range": range.to_string(), "copies": copies, "replicas": replicas.iter().map(replica).collect::<Vec<_>>()})
    };
    let unheld = survey.unheld();
    json!({
        "model": model,
        "experts": survey.experts(),
        "complete": unheld.is_empty(),
        "unheld": unheld,
        "same_weights": survey.agrees(),
        "rows_by_expert": survey.rows(),
        "shards": survey.replicas.iter().map(shard).collect::<Vec<_>>(),
        "unreadable": survey.unreadable,
    })
}
