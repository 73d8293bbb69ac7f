//! `janua doctor`: will it run on this machine, and if not, what to do.
//!
//! | File | Holds |
//! |---|---|
//! | `machine.rs` | processor, memory, ONNX Runtime |
//! | `models.rs` | checkpoint folders |
//! | `network.rs` | nats-server, Redis, addresses to listen on |

mod machine;
mod models;
mod network;

use clap::Args;
use serde_json::{Value, json};

use crate::Failure;
use crate::failure::COMPARISON;
use crate::terminal::{self, BAD, BOLD, DIM, GOOD, paint};

pub use machine::size;

/// Check this machine, the settings and the checkpoints before serving
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  janua doctor --model ./janus-pro-1b
  janua doctor --config janua.toml --json

Exit codes: 0 nothing stands in the way, 1 something does; each problem is listed with its remedy.")]
pub struct Doctor {
    #[command(flatten)]
    pub process: process::Args,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

/// Something that was looked at.
#[derive(Debug)]
pub struct Finding {
    pub subject: String,
    pub fact: String,
    /// What to do about it; `None` when it is fine.
    pub remedy: Option<String>,
}

impl Finding {
    /// Nothing to do.
    pub fn fine(subject: impl Into<String>, fact: impl Into<String>) -> Self {
        Self { subject: subject.into(), fact: fact.into(), remedy: None }
    }

    /// A problem and what to do about it.
    pub fn problem(subject: impl Into<String>, fact: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { subject: subject.into(), fact: fact.into(), remedy: Some(remedy.into()) }
    }
}

/// Runs `janua doctor`.
pub async fn run(flags: Doctor) -> Result<(), Failure> {
    let config = flags.process.load().map_err(|error| Failure::usage(crate::failure::chain(&error)))?;
    let mut findings = vec![machine::processor(), machine::onnx_runtime()];
    let (models, bytes) = models::check(&config.models());
    findings.push(machine::memory(bytes));
    findings.extend(models);
    findings.extend(network::check(&config).await?);
    print(&findings, flags.json)?;
    let problems = findings.iter().filter(|finding| finding.remedy.is_some()).count();
    match problems {
        0 => Ok(()),
        1 => Err(Failure::new(COMPARISON, "1 problem found, its remedy is above")),
        _ => Err(Failure::new(COMPARISON, format!("{problems} problems found, their remedies are above"))),
    }
}

fn print(findings: &[Finding], as_json: bool) -> Result<(), Failure> {
    if as_json {
        let finding = |f: &Finding| json!({"subject": f.subject, "ok": f.remedy.is_none(), "fact": f.fact, "remedy": f.remedy});
        let ok = findings.iter().all(|finding| finding.remedy.is_none());
        return terminal::json(&json!({"ok": ok, "findings": findings.iter().map(finding).collect::<Vec<Value>>()})).map(drop);
    }
    for finding in findings {
        let (mark, advice) = match &finding.remedy {
            None => (paint(GOOD, "ok "), String::new()),
            Some(remedy) => (paint(BAD, "BAD"), format!(" {}", paint(DIM, format!("-> {remedy}")))),
        };
        if !terminal::line(&format!("{mark} {} {}{advice}", paint(BOLD, &finding.subject), finding.fact))? {
            break;
        }
    }
    Ok(())
}
