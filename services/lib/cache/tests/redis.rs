//! With a real redis-server, which is killed, restarted, filled with rubbish and made to wait.
#![allow(clippy::unwrap_used)]

use std::time::Duration;

use bytes::Bytes;
use cache::{Cache, CacheConfig};
use testkit::RedisServer;

fn config(url: &str) -> CacheConfig {
    // A limit far above what a busy machine takes: these tests are about answers, not about time.
    CacheConfig { redis_url: Some(url.to_owned()), timeout_ms: 5000, ..CacheConfig::default() }
}

/// A process that shares Redis but no memory with others.
async fn process(redis: &RedisServer) -> Cache {
    Cache::connect(&config(&redis.url())).await.unwrap()
}

fn value(bytes: usize) -> Bytes {
    (0..bytes).map(|i| (i * 31 % 251) as u8).collect::<Vec<_>>().into()
}

/// Asks until the answer is there: Redis is left alone for a moment after a failure.
async fn eventually(cache: &Cache, key: &str) -> Bytes {
    let wait = async {
        loop {
            match cache.get(key).await {
                Some(value) => return value,
                None => tokio::time::sleep(Duration::from_millis(20)).await,
            }
        }
    };
    tokio::time::timeout(Duration::from_secs(20), wait).await.expect("the value comes")
}

#[tokio::test]
async fn processes_share_what_they_cache() {
    let redis = RedisServer::start().await;
    let (one, other) = (process(&redis).await, process(&redis).await);
    for (key, bytes) in [("empty", 0), ("small", 10), ("embeddings", 5 << 20)] {
        assert_eq!(one.get(key).await, None);
        one.put(key, value(bytes)).await;
        assert_eq!(one.get(key).await, Some(value(bytes)));
        assert_eq!(other.get(key).await, Some(value(bytes)));
    }
}

#[tokio::test]
async fn values_have_an_end() {
    let redis = RedisServer::start().await;
    process(&redis).await.put("key", value(10)).await;
    let mut connection = redis::Client::open(redis.url()).unwrap().get_multiplexed_async_connection().await.unwrap();
    let left: i64 = redis::cmd("TTL").arg("janua:1:key").query_async(&mut connection).await.unwrap();
    assert!((1..=24 * 3600).contains(&left), "{left}");
}

/// Killed mid-way: memory goes on; afterwards Redis, empty now, is used again.
#[tokio::test]
async fn a_redis_that_dies_and_comes_back() {
    let mut redis = RedisServer::start().await;
    let (one, other) = (process(&redis).await, process(&redis).await);
    one.put("before", value(100)).await;
    redis.kill();
    assert_eq!(one.get("before").await, Some(value(100)), "memory has it");
    assert_eq!(other.get("before").await, None, "a miss, no error");
    one.put("during", value(200)).await;
    assert_eq!(one.get("during").await, Some(value(200)));

    redis.restart().await;
    let shared = async {
        loop {
            one.put("after", value(300)).await; // comes through once the pause is over
            if other.get("after").await.is_some() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), shared).await.expect("redis is used again");
}

#[tokio::test]
async fn a_redis_that_is_not_there_at_the_start() {
    let mut redis = RedisServer::start().await;
    redis.kill();
    let (one, other) = (process(&redis).await, process(&redis).await);
    one.put("key", value(10)).await;
    assert_eq!(one.get("key").await, Some(value(10)));
    assert_eq!(other.get("key").await, None);
    redis.restart().await;
    let writer = async {
        loop {
            one.put("key", value(10)).await;
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::select! {
        found = eventually(&other, "key") => assert_eq!(found, value(10)),
        () = writer => unreachable!("it does not end"),
    }
}

/// A Redis that takes commands and does not answer costs the limit once, not once a request.
#[tokio::test]
async fn a_redis_that_hangs() {
    let redis = RedisServer::start().await;
    let cache = Cache::connect(&CacheConfig { timeout_ms: 50, ..config(&redis.url()) }).await.unwrap();
    let mut connection = redis::Client::open(redis.url()).unwrap().get_multiplexed_async_connection().await.unwrap();
    let _: () = redis::cmd("CLIENT").arg("PAUSE").arg(60_000).arg("ALL").query_async(&mut connection).await.unwrap();
    let asked = async {
        for i in 0..200 {
            assert_eq!(cache.get(&format!("key {i}")).await, None);
        }
    };
    // Each of the 200 would take 50 ms: 10 s, had the first failure taught nothing.
    tokio::time::timeout(Duration::from_secs(5), asked).await.expect("the rest does not wait");
}

#[tokio::test]
async fn a_damaged_value_is_not_found() {
    let redis = RedisServer::start().await;
    process(&redis).await.put("key", value(1000)).await;
    let mut connection = redis::Client::open(redis.url()).unwrap().get_multiplexed_async_connection().await.unwrap();
    let stored: Vec<u8> = redis::cmd("GET").arg("janua:1:key").query_async(&mut connection).await.unwrap();
    let mut flipped = stored.clone();
    flipped[500] ^= 1;
    for damaged in [&stored[..stored.len() - 1], &stored[..10], b"", &flipped] {
        let _: () = redis::cmd("SET").arg("janua:1:key").arg(damaged).query_async(&mut connection).await.unwrap();
        assert_eq!(process(&redis).await.get("key").await, None);
    }
    let _: () = redis::cmd("SET").arg("janua:1:other").arg(&stored[..]).query_async(&mut connection).await.unwrap();
    assert_eq!(process(&redis).await.get("other").await, None, "a value under another key");
    let _: () = redis::cmd("DEL").arg("janua:1:key").query_async(&mut connection).await.unwrap();
    let _: () = redis::cmd("LPUSH").arg("janua:1:key").arg("a list").query_async(&mut connection).await.unwrap();
    assert_eq!(process(&redis).await.get("key").await, None, "a value of another type");
}

#[tokio::test]
async fn settings_are_checked() {
    let base = CacheConfig::default();
    for (config, expected) in [
        (CacheConfig { redis_url: Some("http://localhost".into()), ..base.clone() }, "cache.redis_url: "),
        (CacheConfig { ttl_s: 0, ..base.clone() }, "cache.ttl_s: 0 is not in 1..=31536000"),
        (CacheConfig { timeout_ms: 0, ..base.clone() }, "cache.timeout_ms: 0 is not in 1..=10000"),
    ] {
        let error = Cache::connect(&config).await.err().unwrap().to_string();
        assert!(error.starts_with(expected), "{error}");
    }
    assert!(Cache::connect(&base).await.unwrap().get("key").await.is_none());
}
