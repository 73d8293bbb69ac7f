//! The program `janua` as a child process.

use std::path::Path;
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use proto::v1::janua_client::JanuaClient;
use serde_json::Value;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader, Lines};
use tokio::process::{Child, ChildStdout, Command};
use tonic::transport::Channel;

/// Generous: the machines that run tests are busy.
pub const LIMIT: Duration = Duration::from_secs(120);

/// What a finished run printed.
#[derive(Debug)]
pub struct Run {
    pub code: Option<i32>,
    pub stdout: String,
    pub stderr: String,
}

impl Run {
    /// Every line of stdout as JSON.
    pub fn json(&self) -> Vec<Value> {
        self.stdout.lines().map(|line| serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}"))).collect()
    }

    /// The run itself when it ended well.
    pub fn ok(self) -> Self {
        assert_eq!(self.code, Some(0), "{self:#?}");
        self
    }

    /// The only line of stderr of a run that failed with `code`.
    pub fn failure(&self, code: i32) -> &str {
        assert_eq!(self.code, Some(code), "{self:#?}");
        let lines: Vec<_> = self.stderr.lines().collect();
        assert_eq!(lines.len(), 1, "one line says what is wrong: {self:#?}");
        lines[0]
    }
}

fn command(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_janua"));
    command.args(args).env_remove("JANUA_SERVER").stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
    command
}

/// Runs the program to its end.
pub async fn janua(args: &[&str]) -> Run {
    janua_reading(args, "").await
}

/// Runs the program to its end, with `input` on its standard input.
pub async fn janua_reading(args: &[&str], input: &str) -> Run {
    let mut child = command(args).stdin(Stdio::piped()).spawn().unwrap();
    // A program that does not read its input has closed it, which is no error here.
    let _ = child.stdin.take().unwrap().write_all(input.as_bytes()).await;
    let output = tokio::time::timeout(LIMIT, child.wait_with_output()).await;
    let output = output.unwrap_or_else(|_| panic!("janua {args:?} does not end")).unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    Run { code: output.status.code(), stdout: text(output.stdout), stderr: text(output.stderr) }
}

/// A server of its own, killed when dropped.
pub struct Server {
    child: Child,
    lines: Lines<BufReader<ChildStdout>>,
}

impl Server {
    /// Starts `janua serve ARGS`.
    pub fn start(args: &[&str]) -> Self {
        let mut child = command(&[&["serve"], args].concat()).stderr(Stdio::inherit()).spawn().unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        Self { child, lines }
    }

    /// Starts every service in one process on a free port, and waits until it says where.
    pub async fn all(model: &Path) -> (Self, String) {
        let model = model.display().to_string();
        let mut server = Self::start(&["--model", &model, "--listen", "127.0.0.1:0", "--json", "--set", "telemetry.level=error"]);
        let line = tokio::time::timeout(LIMIT, server.lines.next_line()).await.unwrap().unwrap().expect("a line when ready");
        let ready: Value = serde_json::from_str(&line).unwrap();
        assert_eq!(ready["event"], "ready");
        let address = ready["address"].as_str().unwrap().to_owned();
        (server, address)
    }

    /// Sends a signal.
    pub fn signal(&self, name: &str) {
        let pid = self.child.id().expect("the server runs").to_string();
        assert!(std::process::Command::new("kill").args([&format!("-{name}"), &pid]).status().unwrap().success());
    }

    /// Waits for its end.
    pub async fn wait(mut self) -> ExitStatus {
        let mut rest = String::new();
        let mut out = self.lines.into_inner();
        let end = async {
            // Nobody else empties the pipe.
            out.read_to_string(&mut rest).await.unwrap();
            self.child.wait().await.unwrap()
        };
        tokio::time::timeout(LIMIT, end).await.expect("a signalled server ends")
    }
}

/// A client of the door at `address`.
pub async fn client(address: &str) -> JanuaClient<Channel> {
    JanuaClient::connect(address.to_owned()).await.unwrap()
}
