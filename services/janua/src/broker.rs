use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use serde::Deserialize;

use crate::Failure;
use crate::failure::UNAVAILABLE;

const PROGRAM: &str = "nats-server";
/// How long a nats-server may take to say where it listens.
const START_LIMIT: Duration = Duration::from_secs(15);

/// A nats-server on a free port of the loopback interface, stopped when this value is dropped.
pub struct Broker {
    child: Child,
    folder: PathBuf,
    url: String,
}

/// What nats-server writes into its ports file.
#[derive(Deserialize)]
struct Ports {
    nats: Vec<String>,
}

impl Broker {
    /// Starts the server and waits until it takes connections.
    pub async fn start() -> Result<Self, Failure> {
        let folder = std::env::temp_dir().join(format!("janua-nats-{}", std::process::id()));
        std::fs::create_dir_all(&folder).map_err(|error| Failure::input(format!("cannot make {}: {error}", folder.display())))?;
        let child = Command::new(PROGRAM)
            .args(["--addr", "127.0.0.1", "--port", "-1", "--ports_file_dir"])
            .arg(&folder)
            .args(["--jetstream", "--store_dir"])
            .arg(folder.join("jetstream"))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .map_err(|error| Failure::new(UNAVAILABLE, format!("cannot start {PROGRAM}: {error}; install it with `make deps`")))?;
        // From here on, dropping the value stops the child.
        let mut broker = Self { child, folder, url: String::new() };
        broker.url = tokio::time::timeout(START_LIMIT, broker.wait_for_port())
            .await
            .map_err(|_| Failure::new(UNAVAILABLE, format!("{PROGRAM} did not start within {} s", START_LIMIT.as_secs())))??;
        Ok(broker)
    }

    /// `nats://127.0.0.1:PORT`.
    pub fn url(&self) -> &str {
        &self.url
    }

    async fn wait_for_port(&mut self) -> Result<String, Failure> {
        let file = self.folder.join(format!("{PROGRAM}_{}.ports", self.child.id()));
        loop {
            if let Some(url) = read_ports(&file) {
                return Ok(url);
            }
            if let Ok(Some(status)) = self.child.try_wait() {
                return Err(Failure::new(UNAVAILABLE, format!("{PROGRAM} ended at once ({status}); run it by hand to see why")));
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
}

/// `None` while the file is missing or half written.
fn read_ports(file: &Path) -> Option<String> {
    let ports: Ports = serde_json::from_slice(&std::fs::read(file).ok()?).ok()?;
    ports.nats.into_iter().next()
}

impl Drop for Broker {
    fn drop(&mut self) {
        // Nothing sensible is left to do when the child is gone already.
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}
