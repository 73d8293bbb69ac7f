use std::net::SocketAddr;
use std::time::Duration;

use cache::CacheConfig;
use config::{Config, ConfigError};
use mesh::{MeshConfig, Wire};
use router::RouterConfig;
use serde_json::Value;
use telemetry::TelemetryConfig;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use super::Finding;
use crate::Failure;

/// How long a broker may take to answer.
const LIMIT: Duration = Duration::from_secs(3);
const NATS_PORT: u16 = 4222;
const REDIS_PORT: u16 = 6379;

/// Brokers that the configuration names, and addresses that the services would listen on.
pub async fn check(config: &Config) -> Result<Vec<Finding>, Failure> {
    let wrong = |error: ConfigError| Failure::usage(error.to_string());
    let mesh: MeshConfig = config.section("mesh").map_err(wrong)?;
    let cache: CacheConfig = config.section("cache").map_err(wrong)?;
    let router: RouterConfig = config.section("router").map_err(wrong)?;
    let telemetry: TelemetryConfig = config.section("telemetry").map_err(wrong)?;
    let mut findings = Vec::new();
    match (&mesh.nats_url, mesh.wire) {
        (Some(urls), _) => {
            for url in urls.split(',') {
                findings.push(nats(url.trim()).await);
            }
        }
        (None, Wire::InProcess) => findings.push(Finding::fine("nats-server", "not needed: services talk inside one process")),
        (None, _) => {
            findings.push(Finding::problem("nats-server", "no address configured", "set mesh.nats_url, for example nats://127.0.0.1:4222"))
        }
    }
    findings.push(match &cache.redis_url {
        Some(url) => redis(url).await,
        None => Finding::fine("redis", "not configured: pictures are cached in memory"),
    });
    findings.push(listen("router.listen", router.listen).await);
    if let Some(address) = telemetry.metrics_listen {
        findings.push(listen("telemetry.metrics_listen", address).await);
    }
    Ok(findings)
}

/// A nats-server greets with a line `INFO {...}`.
async fn nats(url: &str) -> Finding {
    let greeting = exchange(url, NATS_PORT, b"").await;
    let facts = greeting.as_deref().ok().and_then(|text| serde_json::from_str::<Value>(text.strip_prefix("INFO ")?.trim()).ok());
    match (facts, greeting) {
        (Some(facts), _) => {
            let fact = |key: &str| facts.get(key).map(ToString::to_string).unwrap_or_default();
            let sentence =
                format!("{} · version {}, max_payload {}", host(url, NATS_PORT), fact("version").trim_matches('"'), fact("max_payload"));
            Finding::fine("nats-server", sentence)
        }
        (None, Ok(_)) => {
            Finding::problem("nats-server", format!("{}: what answers is no nats-server", host(url, NATS_PORT)), "check mesh.nats_url")
        }
        (None, Err(reason)) => Finding::problem(
            "nats-server",
            format!("{}: {reason}", host(url, NATS_PORT)),
            "start it (`make up` does) or correct mesh.nats_url",
        ),
    }
}

/// A Redis server answers `PING` with `+PONG`, or asks for a password.
async fn redis(url: &str) -> Finding {
    match exchange(url, REDIS_PORT, b"PING\r\n").await {
        Ok(answer) if answer.starts_with("+PONG") || answer.starts_with("-NOAUTH") => Finding::fine("redis", host(url, REDIS_PORT)),
        Ok(_) => Finding::problem("redis", format!("{}: what answers is no Redis server", host(url, REDIS_PORT)), "check cache.redis_url"),
        Err(reason) => Finding::problem(
            "redis",
            format!("{}: {reason}", host(url, REDIS_PORT)),
            "start it (`make up` does) or correct cache.redis_url",
        ),
    }
}

/// Sends `hello` to the host of `url` and returns the first line that comes back.
async fn exchange(url: &str, default_port: u16, hello: &[u8]) -> Result<String, String> {
    let talk = async {
        let mut stream = TcpStream::connect(host(url, default_port)).await?;
        stream.write_all(hello).await?;
        let mut answer = Vec::new();
        let mut piece = [0; 4096];
        // A greeting is a few hundred bytes; more than this is somebody else's.
        while answer.len() < 64 << 10 && !answer.contains(&b'\n') {
            match stream.read(&mut piece).await? {
                0 => break,
                n => answer.extend_from_slice(&piece[..n]),
            }
        }
        Ok::<_, std::io::Error>(String::from_utf8_lossy(&answer).lines().next().unwrap_or_default().to_owned())
    };
    match tokio::time::timeout(LIMIT, talk).await {
        Ok(Ok(answer)) => Ok(answer),
        Ok(Err(error)) => Err(error.to_string()),
        Err(_) => Err(format!("no answer within {} s", LIMIT.as_secs())),
    }
}

/// `host:port` of an URL, without the password that may be in it, such as `nats://user:secret@host:4222/path`.
fn host(url: &str, default_port: u16) -> String {
    let rest = url.split_once("://").map_or(url, |(_, rest)| rest);
    let authority = rest.split('/').next().unwrap_or(rest);
    let host = authority.rsplit_once('@').map_or(authority, |(_, host)| host);
    let has_port = host.rsplit_once(':').is_some_and(|(_, port)| port.parse::<u16>().is_ok());
    if has_port { host.to_owned() } else { format!("{host}:{default_port}") }
}

async fn listen(setting: &str, address: SocketAddr) -> Finding {
    match TcpListener::bind(address).await {
        Ok(_) => Finding::fine(setting, format!("{address} is free")),
        Err(error) => Finding::problem(setting, format!("{address}: {error}"), format!("stop what uses it, or set {setting}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts() {
        for (url, expected) in [
            ("nats://127.0.0.1:4223", "127.0.0.1:4223"),
            ("nats://a:b@broker", "broker:4222"),
            ("broker", "broker:4222"),
            ("redis://r:7000/0", "r:7000"),
            ("nats://[::1]:4222", "[::1]:4222"),
        ] {
            assert_eq!(host(url, NATS_PORT), expected, "{url}");
        }
    }
}
