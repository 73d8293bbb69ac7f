//! `janua experts`: the shards of a running installation.
//!
//! | File | Holds |
//! |---|---|
//! | `survey.rs` | who holds what and has done how much, asked over the mesh |
//! | `list.rs` | `experts list`: that, printed; and forgetting a shard |
//! | `rebalance.rs` | `experts rebalance`: copies of hot experts in other shards |

mod list;
mod rebalance;
mod survey;

use std::path::PathBuf;

use anyhow::Context;
use clap::{Args, Subcommand};
use config::ConfigError;
use mesh::{Bucket, Mesh, MeshConfig, Wire};
use placement::BUCKET;

use crate::Failure;
use crate::failure::chain;

/// Look after the routed experts of a running installation: who holds them, and who should
#[derive(Debug, Args)]
pub struct Experts {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Subcommand)]
enum What {
    List(list::List),
    Rebalance(rebalance::Rebalance),
}

/// How to join the mesh of the installation.
#[derive(Debug, Args)]
pub struct Installation {
    /// Settings of the installation as a TOML file; without it janua.toml in the working directory, if there is one
    #[arg(long, value_name = "FILE", env = "JANUA_CONFIG")]
    config: Option<PathBuf>,
    /// Override one setting, such as mesh.nats_url; may be given several times
    #[arg(long = "set", value_name = "SECTION.KEY=VALUE")]
    settings: Vec<String>,
}

impl Installation {
    /// Joins the mesh as a service would, and opens the placement of experts.
    async fn join(&self) -> Result<(Mesh, Bucket), Failure> {
        let wire = self.wire()?;
        let joined = async {
            let mesh = Mesh::connect(&wire).await.context("cannot join the mesh")?;
            let bucket = mesh.bucket(BUCKET).await.context("opening the placement of experts")?;
            Ok((mesh, bucket))
        };
        joined.await.map_err(|error: anyhow::Error| Failure::new(process::exit_code(&error), format!("{error:#}")))
    }

    fn wire(&self) -> Result<MeshConfig, Failure> {
        let setting = |text: &String| {
            let (key, value) = text.split_once('=').ok_or_else(|| Failure::usage("--set: a setting reads SECTION.KEY=VALUE"))?;
            Ok((key.to_owned(), value.to_owned()))
        };
        let settings = self.settings.iter().map(setting).collect::<Result<_, Failure>>()?;
        let args = process::Args { config: self.config.clone(), settings, ..process::Args::default() };
        let wrong = |error: ConfigError| Failure::usage(chain(&error));
        let wire: MeshConfig = args.load().map_err(wrong)?.section("mesh").map_err(wrong)?;
        if wire.wire == Wire::InProcess {
            let reason = "mesh.wire: shards in other processes are found over \"nats\" or \"direct\"; name the installation's settings";
            return Err(Failure::usage(format!("{reason} with --config or --set")));
        }
        Ok(wire)
    }
}

/// Runs `janua experts`.
pub async fn run(flags: Experts) -> Result<(), Failure> {
    match flags.what {
        What::List(flags) => list::run(flags).await,
        What::Rebalance(flags) => rebalance::run(flags).await,
    }
}
