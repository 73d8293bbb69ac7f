//! The brokers answer, can be killed, and come back on the same port.

use std::time::Duration;

use testkit::{NatsOptions, NatsServer, RedisServer, wait_until};
use tokio::io::AsyncReadExt as _;
use tokio::net::TcpStream;

const LIMIT: Duration = Duration::from_secs(20);

async fn greeting(url: &str) -> Option<String> {
    let mut socket = TcpStream::connect(url.split_once("://")?.1).await.ok()?;
    let mut text = vec![0; 4096];
    let count = socket.read(&mut text).await.ok()?;
    Some(String::from_utf8_lossy(&text[..count]).into_owned())
}

#[tokio::test]
async fn nats_comes_back_on_its_port_with_its_settings() {
    let mut server = NatsServer::start_with(NatsOptions { max_payload: Some(65_536), ..NatsOptions::default() }).await;
    let url = server.url();
    for _ in 0..2 {
        let info = greeting(&url).await.expect("it greets");
        assert!(info.contains("\"max_payload\":65536"), "{info}");
        server.kill();
        wait_until("the port to close", LIMIT, async || greeting(&url).await.is_none()).await;
        server.restart().await;
    }
    drop(server);
    wait_until("the port to close", LIMIT, async || greeting(&url).await.is_none()).await;
}

#[tokio::test]
async fn redis_comes_back_on_its_port() {
    let mut server = RedisServer::start().await;
    let address = server.url().trim_start_matches("redis://").to_owned();
    server.kill();
    wait_until("the port to close", LIMIT, async || TcpStream::connect(&address).await.is_err()).await;
    server.restart().await;
    TcpStream::connect(&address).await.expect("it is back");
}
