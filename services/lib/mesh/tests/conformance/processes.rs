//! Processes that die without a word.
//!
//! The other process is this test program again, told by its environment to do nothing but serve or call.

use std::process::{Child, Command, Stdio};
use std::time::Duration;

use futures::StreamExt as _;
use futures::stream;
use mesh::{Mesh, Target};
use testkit::wait_until;
use tonic::Code;

use crate::basics::{ask, blobs};
use crate::generated::conformance_client::ConformanceClient;
use crate::generated::{Ask, End};
use crate::service::{Service, Watch};
use crate::world::{LIMIT, Over, World, config};

conformance! { [Nats NatsShort Direct]
    a_killed_server_fails_its_calls_and_is_replaced a_killed_server_is_not_missed_when_another_is_there
    a_killed_caller_leaves_no_handler_behind a_killed_instance_fails_the_calls_to_it_and_no_other_gets_them
}

const ROLE: &str = "CONFORMANCE_ROLE";
const URL: &str = "CONFORMANCE_URL";
const OVER: &str = "CONFORMANCE_OVER";

/// Another process in the world's mesh, killed when dropped.
struct Other(Child);

impl Other {
    fn start(world: &World, role: &str) -> Self {
        let child = Command::new(std::env::current_exe().unwrap())
            .args(["processes::other_process", "--exact", "--ignored"])
            .env(ROLE, role)
            .env(URL, world.url())
            .env(OVER, format!("{:?}", world.over))
            // It ends with this process, should that be killed: its standard input closes then.
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        Self(child)
    }

    /// SIGKILL.
    fn kill(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

impl Drop for Other {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Not a test: what the other process runs.
#[test]
#[ignore = "run by other tests as a process of its own"]
fn other_process() {
    let (role, url) = (std::env::var(ROLE).unwrap(), std::env::var(URL).unwrap());
    let over = match std::env::var(OVER).unwrap().as_str() {
        "Direct" => Over::Direct,
        _ => Over::Nats,
    };
    std::thread::spawn(|| {
        let _ = std::io::copy(&mut std::io::stdin(), &mut std::io::sink());
        std::process::exit(0);
    });
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    runtime.block_on(async {
        let mesh = Mesh::connect(&config(over, &url)).await.unwrap();
        let target = Target::new("conformance", "test/1.0");
        let service = Service::named("other");
        let _serving = match role.as_str() {
            "serve" => Some(mesh.serve(target.clone(), service.routes()).await.unwrap()),
            _ => None,
        };
        if role == "call" {
            let mut client = ConformanceClient::new(mesh.channel(&target));
            let hang = Ask { count: 1, size: 1, end: End::Hang.into(), ..Ask::default() };
            let _answers = client.download(hang.clone()).await.unwrap();
            let _ = client.unary(hang).await;
        }
        std::future::pending::<()>().await;
    });
}

async fn served(world: &World) {
    wait_until("the other process to serve", LIMIT, async || world.calling.is_served(&world.target).await).await;
}

async fn a_killed_server_fails_its_calls_and_is_replaced(over: Over) {
    let world = World::new(over).await;
    for _ in 0..2 {
        let mut other = Other::start(&world, "serve");
        served(&world).await;
        let mut client = world.client();
        wait_until("calls to work", LIMIT, async || client.unary(ask(b"x")).await.is_ok()).await;
        let hang = Ask { count: 3, size: 10, end: End::Hang.into(), ..Ask::default() };
        let mut answers = client.download(hang.clone()).await.unwrap().into_inner();
        for _ in 0..3 {
            answers.message().await.unwrap().unwrap();
        }
        let (mut caller, mut uploader) = (world.client(), world.client());
        let waiting = tokio::spawn(async move { caller.unary(Ask { end: End::Hang.into(), ..Ask::default() }).await });
        let uploading = tokio::spawn(async move { uploader.upload(stream::iter(blobs(3, 10)).chain(stream::pending())).await });
        // Both have reached the other process: a call made after them has been answered.
        client.unary(ask(b"x")).await.unwrap();
        other.kill();
        assert_eq!(answers.message().await.unwrap_err().code(), Code::Unavailable);
        assert_eq!(waiting.await.unwrap().unwrap_err().code(), Code::Unavailable);
        assert_eq!(uploading.await.unwrap().unwrap_err().code(), Code::Unavailable);
        assert_eq!(client.unary(ask(b"x")).await.unwrap_err().code(), Code::Unavailable);
    }
}

async fn a_killed_server_is_not_missed_when_another_is_there(over: Over) {
    let world = World::new(over).await;
    let mut other = Other::start(&world, "serve");
    served(&world).await;
    let _serving = world.serve(&Service::named("stays")).await;
    let mut client = world.client();
    let mut seen = std::collections::HashSet::new();
    wait_until("both to be called", LIMIT, async || {
        seen.insert(client.unary(ask(b"x")).await.unwrap().into_inner().instance);
        seen.len() == 2
    })
    .await;
    other.kill();
    // The broker and the connections learn of it in their own time, until then a call may be UNAVAILABLE.
    let mut in_a_row = 0;
    wait_until("calls to succeed", LIMIT, async || {
        match client.unary(ask(b"x")).await {
            Ok(answer) => {
                assert_eq!(answer.into_inner().instance, "stays");
                in_a_row += 1;
            }
            Err(status) => {
                assert_eq!(status.code(), Code::Unavailable, "{status}");
                in_a_row = 0;
            }
        }
        in_a_row == 50
    })
    .await;
}

async fn a_killed_instance_fails_the_calls_to_it_and_no_other_gets_them(over: Over) {
    let world = World::new(over).await;
    let bystander = Service::named("stays");
    let stays = world.serve(&bystander).await;
    for _ in 0..3 {
        let mut other = Other::start(&world, "serve");
        let mut found = None;
        wait_until("the other process to serve", LIMIT, async || {
            found = world.calling.instances(&world.target).await.into_iter().find(|instance| instance != stays.instance());
            found.is_some()
        })
        .await;
        let instance = found.unwrap();
        let mut client = world.client_to(&instance);
        assert_eq!(client.unary(ask(b"x")).await.unwrap().into_inner().instance, "other");
        let (sender, receiver) = tokio::sync::mpsc::channel(4);
        let mut answers = client.chat(tokio_stream::wrappers::ReceiverStream::new(receiver)).await.unwrap().into_inner();
        for blob in blobs(100, 1000) {
            sender.send(blob).await.unwrap();
            assert_eq!(answers.message().await.unwrap().unwrap().instance, "other");
        }
        let mut caller = client.clone();
        let waiting = tokio::spawn(async move { caller.unary(Ask { end: End::Hang.into(), ..Ask::default() }).await });
        client.unary(ask(b"x")).await.unwrap();
        other.kill();
        assert_eq!(answers.message().await.unwrap_err().code(), Code::Unavailable);
        assert_eq!(waiting.await.unwrap().unwrap_err().code(), Code::Unavailable);
        for _ in 0..3 {
            assert_eq!(client.unary(ask(b"x")).await.unwrap_err().code(), Code::Unavailable);
        }
        wait_until("it to be listed no more", LIMIT, async || world.calling.instances(&world.target).await.iter().eq([stays.instance()]))
            .await;
    }
    assert_eq!(Watch::count(&bystander.watch.started), 0);
}

async fn a_killed_caller_leaves_no_handler_behind(over: Over) {
    let world = World::new(over).await;
    let service = Service::named("a");
    let _serving = world.serve(&service).await;
    let mut other = Other::start(&world, "call");
    wait_until("the calls to run", LIMIT, async || Watch::count(&service.watch.started) == 2).await;
    other.kill();
    wait_until("the handlers to be dropped", LIMIT, async || Watch::count(&service.watch.dropped) == 2).await;
    // Its connection is cleaned up as well: nothing is left to probe.
    tokio::time::timeout(Duration::from_secs(30), world.client().unary(ask(b"x"))).await.unwrap().unwrap();
}
