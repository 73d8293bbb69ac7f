use std::fs::{self, File};
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::time::Instant;

/// How long a broker may take until it answers. Generous: the machines that run tests are busy.
const START_LIMIT: Duration = Duration::from_secs(20);
/// Somebody else may take the port that was free a moment ago.
const START_TRIES: usize = 5;

/// Settings of a nats-server that tests change.
#[derive(Clone, Copy, Debug, Default)]
pub struct NatsOptions {
    /// The longest message in bytes, without it the server's own default of 1 MiB.
    pub max_payload: Option<usize>,
    /// Without JetStream, which is there otherwise.
    pub without_jetstream: bool,
}

/// A real nats-server with its own folder on a free port of the loopback interface. What JetStream stores outlives a restart.
pub struct NatsServer {
    process: Process,
}

impl NatsServer {
    pub async fn start() -> Self {
        Self::start_with(NatsOptions::default()).await
    }

    pub async fn start_with(options: NatsOptions) -> Self {
        Self::try_start(options).await.expect("nats-server starts")
    }

    async fn try_start(options: NatsOptions) -> Result<Self> {
        let mut config = if options.without_jetstream { String::new() } else { "jetstream: {}\n".to_owned() };
        if let Some(bytes) = options.max_payload {
            config.push_str(&format!("max_payload: {bytes}\n"));
        }
        let launch: Launch = Box::new(move |folder, port| {
            let file = folder.join("nats.conf");
            fs::write(&file, format!("{config}host: 127.0.0.1\nport: {port}\nstore_dir: {:?}\n", folder.join("jetstream")))?;
            let mut command = Command::new(find("nats-server")?);
            command.arg("--config").arg(file);
            Ok(command)
        });
        Ok(Self { process: Process::start("nats-server", launch, nats_answers).await? })
    }

    /// `nats://127.0.0.1:<port>`, the same after a restart.
    pub fn url(&self) -> String {
        format!("nats://{}", self.process.address())
    }

    /// Kills the server without warning, as a crash would.
    pub fn kill(&mut self) {
        self.process.kill();
    }

    /// Starts a killed (or running) server anew on the same port and waits until it answers.
    pub async fn restart(&mut self) {
        self.process.restart(nats_answers).await.expect("nats-server starts again");
    }
}

/// A real redis-server with its own folder on a free port of the loopback interface, without persistence.
pub struct RedisServer {
    process: Process,
}

impl RedisServer {
    pub async fn start() -> Self {
        Self::try_start().await.expect("redis-server starts")
    }

    async fn try_start() -> Result<Self> {
        let launch: Launch = Box::new(|folder, port| {
            let mut command = Command::new(find("redis-server")?);
            command.args(["--bind", "127.0.0.1", "--port", &port.to_string(), "--save", "", "--appendonly", "no", "--dir"]).arg(folder);
            Ok(command)
        });
        Ok(Self { process: Process::start("redis-server", launch, redis_answers).await? })
    }

    /// `redis://127.0.0.1:<port>`, the same after a restart.
    pub fn url(&self) -> String {
        format!("redis://{}", self.process.address())
    }

    /// Kills the server without warning, as a crash would.
    pub fn kill(&mut self) {
        self.process.kill();
    }

    /// Starts a killed (or running) server anew, empty, on the same port and waits until it answers.
    pub async fn restart(&mut self) {
        self.process.restart(redis_answers).await.expect("redis-server starts again");
    }
}

/// The command that runs a broker with its files in a folder and on a port.
type Launch = Box<dyn Fn(&Path, u16) -> Result<Command> + Send + Sync>;

struct Process {
    name: &'static str,
    launch: Launch,
    folder: TempDir,
    port: u16,
    child: Option<Child>,
}

impl Process {
    async fn start(name: &'static str, launch: Launch, answers: impl AsyncFn(SocketAddr) -> Result<()>) -> Result<Self> {
        let folder = tempfile::Builder::new().prefix(name).tempdir()?;
        let mut process = Self { name, launch, folder, port: 0, child: None };
        let mut last = None;
        for _ in 0..START_TRIES {
            process.port = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?.port();
            match process.restart(&answers).await {
                Ok(()) => return Ok(process),
                Err(error) => last = Some(error),
            }
        }
        Err(last.unwrap_or_else(|| anyhow::anyhow!("{name} was not tried")))
    }

    async fn restart(&mut self, answers: impl AsyncFn(SocketAddr) -> Result<()>) -> Result<()> {
        self.kill();
        let log = self.folder.path().join("log");
        let output = File::create(&log)?;
        let mut command = (self.launch)(self.folder.path(), self.port)?;
        command.stdin(Stdio::null()).stdout(output.try_clone()?).stderr(output);
        let mut child = command.spawn().with_context(|| format!("cannot run {}", self.name))?;
        let end = Instant::now() + START_LIMIT;
        while let Err(error) = answers(self.address()).await {
            let gone = child.try_wait()?.is_some();
            if gone || Instant::now() > end {
                let _ = child.kill();
                let _ = child.wait();
                let log = fs::read_to_string(&log).unwrap_or_default();
                bail!("{} does not answer on port {}: {error:#}\n{log}", self.name, self.port);
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        // Another server that took the port in the meantime would have answered in its place.
        if child.try_wait()?.is_some() {
            bail!("{} ended at once", self.name);
        }
        self.child = Some(child);
        Ok(())
    }

    fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            // Both fail only when the process is gone already.
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    fn address(&self) -> SocketAddr {
        (Ipv4Addr::LOCALHOST, self.port).into()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}

async fn nats_answers(address: SocketAddr) -> Result<()> {
    expect(address, b"", b"INFO ").await
}

async fn redis_answers(address: SocketAddr) -> Result<()> {
    expect(address, b"PING\r\n", b"+PONG").await
}

async fn expect(address: SocketAddr, say: &[u8], hear: &[u8]) -> Result<()> {
    let talk = async {
        let mut socket = TcpStream::connect(address).await?;
        socket.write_all(say).await?;
        let mut heard = vec![0; hear.len()];
        socket.read_exact(&mut heard).await?;
        anyhow::ensure!(heard == hear, "something else answers there");
        Ok(())
    };
    tokio::time::timeout(Duration::from_secs(1), talk).await.context("no answer")?
}

/// Debian keeps servers in `/usr/sbin`, which not every user has on the path.
fn find(program: &str) -> Result<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/sbin", "/usr/local/sbin", "/usr/local/bin"].map(PathBuf::from))
        .map(|folder| folder.join(program))
        .find(|file| file.is_file())
        .with_context(|| format!("{program} is not installed: run `make deps`"))
}
