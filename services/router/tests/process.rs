//! The router's own program: its exit codes, its HTTP/2 door, its drain. With a real nats-server.
#![allow(clippy::unwrap_used)]

use std::io::Read;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use proto::v1;
use proto::v1::janua_client::JanuaClient;
use testkit::{NatsServer, wait_until};
use tonic::transport::{Channel, Endpoint};
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;

const LIMIT: Duration = Duration::from_secs(30);

fn free_port() -> u16 {
    std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

fn spawn(settings: &[String], flags: &[&str]) -> Child {
    let mut command = Command::new(env!("CARGO_BIN_EXE_janua-router"));
    command.args(settings.iter().flat_map(|setting| ["--set", setting])).args(flags);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

fn signal(child: &Child, name: &str) {
    assert!(Command::new("kill").args([format!("-{name}"), child.id().to_string()]).status().unwrap().success());
}

/// The exit code, and what was said on stderr.
async fn end(mut child: Child) -> (i32, String) {
    wait_until("the process ends", LIMIT, async || child.try_wait().unwrap().is_some()).await;
    let mut said = String::new();
    child.stderr.take().unwrap().read_to_string(&mut said).unwrap();
    (child.wait().unwrap().code().unwrap(), said)
}

/// A router that serves, and a connection to its door.
async fn serving(nats: &NatsServer) -> (Child, Channel) {
    let port = free_port();
    let settings = [format!("mesh.nats_url={}", nats.url()), "mesh.wire=nats".to_owned(), format!("router.listen=127.0.0.1:{port}")];
    let child = spawn(&settings, &["--model", "tiny=nowhere", "--quiet"]);
    let channel = Endpoint::from_shared(format!("http://127.0.0.1:{port}")).unwrap().connect_lazy();
    wait_until("the router is healthy", LIMIT, async || health(&channel).await == Some(ServingStatus::Serving)).await;
    (child, channel)
}

async fn health(channel: &Channel) -> Option<ServingStatus> {
    let request = HealthCheckRequest { service: "janua.v1.Janua".to_owned() };
    let response = HealthClient::new(channel.clone()).check(request).await.ok()?.into_inner();
    ServingStatus::try_from(response.status).ok()
}

#[tokio::test]
async fn what_is_wrong_decides_the_exit_code() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let nats = NatsServer::start().await;
    let url = format!("mesh.nats_url={}", nats.url());
    let cases: [(&[&str], i32, &str); 7] = [
        (&["router.listn=1"], 64, "router.listn: unknown key"),
        (&["router.attempts=0"], 64, "router.attempts: must be in 1..=100"),
        (&["router.max_concurrent=many"], 64, "router.max_concurrent: \"many\" is not"),
        (&["telemetry.level==!"], 64, "telemetry.level"),
        (&["mesh.wire=in-process"], 64, "mesh.wire"),
        (&["mesh.wire=nats"], 64, "nats_url"),
        (&["mesh.wire=nats", "mesh.nats_url=nats://127.0.0.1:1"], 69, "127.0.0.1:1"),
    ];
    for (settings, code, said) in cases {
        let settings: Vec<String> = settings.iter().map(|setting| (*setting).to_owned()).collect();
        // Sound settings for what the case does not touch.
        let mut all: Vec<String> =
            if settings[0].starts_with("mesh.") { Vec::new() } else { vec![url.clone(), "mesh.wire=nats".to_owned()] };
        all.extend(settings);
        let (got, stderr) = end(spawn(&all, &["--quiet"])).await;
        let line = stderr.lines().find(|line| line.starts_with("janua-router: ")).unwrap_or_else(|| panic!("{stderr}"));
        assert!(got == code && line.contains(said), "{all:?}: code {got}, {stderr}");
    }
    let listen = format!("router.listen={}", taken.local_addr().unwrap());
    let (got, stderr) = end(spawn(&[url, "mesh.wire=nats".to_owned(), listen], &["--quiet"])).await;
    assert!(got == 69 && stderr.contains("router.listen: cannot listen on"), "code {got}, {stderr}");
    assert_eq!(end(spawn(&[], &["--colour"])).await.0, 64);
}

#[tokio::test]
async fn it_answers_at_its_door_and_drains_on_sigterm() {
    let nats = NatsServer::start().await;
    let (child, channel) = serving(&nats).await;
    let models = JanuaClient::new(channel.clone()).list_models(v1::ListModelsRequest {}).await.unwrap().into_inner().models;
    assert_eq!(models.iter().map(|model| (model.name.as_str(), model.ready)).collect::<Vec<_>>(), [("tiny", false)]);
    drop(channel);
    signal(&child, "TERM");
    let (code, stderr) = end(child).await;
    assert_eq!(code, 0, "{stderr}");
    assert!(stderr.contains("drained"), "{stderr}");
}

#[tokio::test]
async fn a_second_signal_ends_it_at_once() {
    let nats = NatsServer::start().await;
    let (child, channel) = serving(&nats).await;
    // A call that stays open holds up the drain.
    let request = HealthCheckRequest { service: "janua.v1.Janua".to_owned() };
    let mut watch = HealthClient::new(channel.clone()).watch(request).await.unwrap().into_inner();
    assert_eq!(watch.message().await.unwrap().unwrap().status, ServingStatus::Serving as i32);
    signal(&child, "TERM");
    assert_eq!(watch.message().await.unwrap().unwrap().status, ServingStatus::NotServing as i32);
    signal(&child, "INT");
    assert_eq!(end(child).await.0, 130);
}
