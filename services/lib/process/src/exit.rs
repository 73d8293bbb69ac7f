use std::process::ExitCode;

use checkpoint::CheckpointError;
use config::ConfigError;
use mesh::MeshError;
use telemetry::TelemetryError;

/// Exit codes, after sysexits.h.
const CONFIG: u8 = 64;
const CHECKPOINT: u8 = 66;
const UNAVAILABLE: u8 = 69;
const INTERNAL: u8 = 70;

/// A checkpoint that an engine crate refused. `start` wraps such errors in it, so that the process ends with code 66.
#[derive(Debug, thiserror::Error)]
#[error("model {model}: {reason}")]
pub struct BadCheckpoint {
    pub model: String,
    pub reason: String,
}

/// Something outside that the process cannot do without does not answer.
#[derive(Debug, thiserror::Error)]
#[error("{what}")]
pub struct Unreachable {
    pub what: String,
}

/// 64: bad configuration; 66: missing or bad checkpoint; 69: NATS unreachable; 70: anything else.
pub fn exit_code(error: &anyhow::Error) -> u8 {
    let any = |test: &dyn Fn(&(dyn std::error::Error + 'static)) -> bool| error.chain().any(test);
    let setting = |e: &(dyn std::error::Error + 'static)| matches!(e.downcast_ref(), Some(MeshError::UrlMissing(_)));
    if any(&|e| e.is::<ConfigError>() || e.is::<TelemetryError>() || setting(e)) {
        CONFIG
    } else if any(&|e| e.is::<CheckpointError>() || e.is::<BadCheckpoint>()) {
        CHECKPOINT
    } else if any(&|e| e.is::<MeshError>() || e.is::<Unreachable>()) {
        UNAVAILABLE
    } else {
        INTERNAL
    }
}

/// Tells the operator in one line on stderr why `program` ends, and gives the code to end with.
pub fn report(program: &str, error: &anyhow::Error) -> ExitCode {
    let red = anstyle::AnsiColor::Red.on_default();
    let line = format!("{error:#}").replace('\n', " ");
    anstream::eprintln!("{red}{program}: {line}{red:#}");
    ExitCode::from(exit_code(error))
}

#[cfg(test)]
mod tests {
    use super::*;
    use anyhow::Context;

    #[test]
    fn codes() {
        let config = config::Config::load(Some("/nonexistent".as_ref()), &[]).unwrap_err();
        let checkpoint = checkpoint::Checkpoint::open("/nonexistent".as_ref()).unwrap_err();
        let bad = BadCheckpoint { model: "tiny".to_owned(), reason: "missing tensor".to_owned() };
        let gone = Unreachable { what: "nats".to_owned() };
        for (error, expected) in [
            (anyhow::Error::from(config), 64),
            (anyhow::Error::from(checkpoint).context("while loading"), 66),
            (Err::<(), _>(bad).context("start").unwrap_err(), 66),
            (anyhow::Error::from(gone), 69),
            (anyhow::anyhow!("else"), 70),
        ] {
            assert_eq!(exit_code(&error), expected, "{error:#}");
        }
    }
}
