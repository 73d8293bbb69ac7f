//! Buckets: what one process writes all see, and it outlives them and the nats-server.

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;
use futures::future::join_all;
use mesh::{Bucket, Mesh, MeshConfig, MeshError};
use testkit::{NatsOptions, NatsServer, wait_until};
use tokio::sync::watch;

use crate::world::{LIMIT, Over, World};

conformance! { [InProcess Nats NatsShort Direct]
    what_one_writes_all_see a_bucket_is_complete_when_it_opens a_key_is_created_once
    a_bucket_may_be_opened_by_many_at_once keys_are_any_text what_does_not_fit_is_refused
    entries_stay_current_without_their_bucket a_bucket_outlives_who_wrote_it
}

conformance! { [Nats NatsShort Direct]
    entries_survive_a_restart_and_go_on
}

type Entries = watch::Receiver<Arc<BTreeMap<String, Bytes>>>;

async fn reach(entries: &mut Entries, expected: &[(&str, &str)]) {
    let expected: BTreeMap<String, Bytes> =
        expected.iter().map(|(key, value)| ((*key).to_owned(), Bytes::copy_from_slice(value.as_bytes()))).collect();
    let reached = tokio::time::timeout(LIMIT, entries.wait_for(|entries| **entries == expected)).await.is_ok();
    assert!(reached, "{:?} in place of {expected:?}", *entries.borrow());
}

async fn open(mesh: &Mesh) -> Bucket {
    mesh.bucket("test").await.unwrap()
}

/// Through which bucket, a key, its new value or none, and what all see then.
type Step<'a> = (&'a Bucket, &'a str, Option<&'a str>, &'a [(&'a str, &'a str)]);

async fn what_one_writes_all_see(over: Over) {
    let world = World::new(over).await;
    let (one, other) = (open(&world.serving).await, open(&world.calling).await);
    let mut seen = [one.entries(), other.entries()];
    let script: [Step<'_>; 8] = [
        (&one, "a", Some("1"), &[("a", "1")]),
        (&other, "b", Some("2"), &[("a", "1"), ("b", "2")]),
        (&other, "a", Some("3"), &[("a", "3"), ("b", "2")]),
        // An empty value is a value.
        (&one, "b", Some(""), &[("a", "3"), ("b", "")]),
        (&other, "a", None, &[("b", "")]),
        // What is not there can be deleted.
        (&one, "never", None, &[("b", "")]),
        (&one, "a", Some("4"), &[("a", "4"), ("b", "")]),
        (&one, "b", None, &[("a", "4")]),
    ];
    for (bucket, key, value, expected) in script {
        match value {
            Some(value) => bucket.put(key, Bytes::copy_from_slice(value.as_bytes())).await.unwrap(),
            None => bucket.delete(key).await.unwrap(),
        }
        for entries in &mut seen {
            reach(entries, expected).await;
        }
    }
    let unrelated = world.calling.bucket("unrelated").await.unwrap();
    assert!(unrelated.entries().borrow().is_empty());
}

async fn a_bucket_is_complete_when_it_opens(over: Over) {
    let world = World::new(over).await;
    let bucket = open(&world.serving).await;
    for number in 0..200 {
        bucket.put(if number % 2 == 0 { "even" } else { "odd" }, Bytes::from(number.to_string())).await.unwrap();
        bucket.put(&format!("key-{number}"), Bytes::from(number.to_string())).await.unwrap();
    }
    bucket.delete("key-7").await.unwrap();
    for mesh in [&world.calling, &world.another().await] {
        let entries = open(mesh).await.entries().borrow().clone();
        assert_eq!(entries.len(), 201);
        assert_eq!((&entries["even"], &entries["odd"], &entries["key-199"]), (&"198".into(), &"199".into(), &"199".into()));
        assert!(!entries.contains_key("key-7"));
    }
}

async fn a_key_is_created_once(over: Over) {
    let world = World::new(over).await;
    let buckets = [open(&world.serving).await, open(&world.calling).await];
    for round in 0..30 {
        let key = format!("key-{}", round % 3);
        // Both at once, several times: exactly one of all does it.
        let tries = (0..6).map(|number| {
            let (bucket, key) = (buckets[number % 2].clone(), key.clone());
            tokio::spawn(async move { bucket.create(&key, Bytes::from(number.to_string())).await.unwrap() })
        });
        let made: Vec<bool> = join_all(tries).await.into_iter().map(Result::unwrap).collect();
        let makers: Vec<usize> = made.iter().enumerate().filter(|(_, made)| **made).map(|(number, _)| number).collect();
        assert_eq!(makers.len(), 1, "{made:?}");
        let mut entries = buckets[0].entries();
        let expected = Bytes::from(makers[0].to_string());
        let reached = tokio::time::timeout(LIMIT, entries.wait_for(|entries| entries.get(&key) == Some(&expected))).await.is_ok();
        assert!(reached, "another value is there than the one that was created");
        // A key that was deleted can be created again.
        buckets[1].delete(&key).await.unwrap();
    }
}

async fn a_bucket_may_be_opened_by_many_at_once(over: Over) {
    let world = World::new(over).await;
    let others = [world.another().await, world.another().await];
    let meshes = [&world.serving, &world.calling, &others[0], &others[1]];
    for round in 0..5 {
        let name = format!("round-{round}");
        let buckets = join_all((0..12).map(|number| meshes[number % 4].bucket(&name))).await;
        let buckets: Vec<Bucket> = buckets.into_iter().map(Result::unwrap).collect();
        for (number, bucket) in buckets.iter().enumerate() {
            bucket.put(&number.to_string(), Bytes::from_static(b"x")).await.unwrap();
        }
        for bucket in &buckets {
            let mut entries = bucket.entries();
            let complete = tokio::time::timeout(LIMIT, entries.wait_for(|entries| entries.len() == buckets.len())).await.is_ok();
            assert!(complete, "a write of bucket `{name}` is not seen");
        }
    }
}

async fn keys_are_any_text(over: Over) {
    let world = World::new(over).await;
    let (bucket, other) = (open(&world.serving).await, open(&world.calling).await);
    let keys = [
        "",
        " ",
        "a",
        "A",
        "=",
        "==",
        "=41",
        "=2F",
        "a/b",
        "a/b/",
        "/",
        "deepseek-ai/DeepSeek-V2-Lite",
        ".",
        "..",
        "a.b",
        "*",
        ">",
        "$KV",
        "a b\tc\r\n\0",
        "模型 é 🦀",
        "k=v&x=%20",
        "_-_",
    ];
    let expected: Vec<(&str, &str)> = keys.iter().map(|key| (*key, *key)).collect();
    for key in keys {
        assert!(bucket.create(key, Bytes::copy_from_slice(key.as_bytes())).await.unwrap(), "{key:?} is taken for another");
    }
    reach(&mut other.entries(), &expected).await;
    for key in keys {
        other.delete(key).await.unwrap();
    }
    reach(&mut bucket.entries(), &[]).await;
}

async fn what_does_not_fit_is_refused(over: Over) {
    let world = World::new(over).await;
    for name in ["", "a.b", "a b", "a/b", "é", "*"] {
        assert!(matches!(world.calling.bucket(name).await, Err(MeshError::BucketName(_))), "{name:?}");
    }
    let bucket = open(&world.calling).await;
    let error = bucket.put("large", vec![0; 600 << 10].into()).await.unwrap_err();
    assert!(matches!(error, MeshError::BucketValue { .. }), "{error}");
    let error = bucket.create(&"k".repeat(1025), Bytes::new()).await.unwrap_err();
    assert!(matches!(error, MeshError::BucketKey { .. }), "{error}");
    // What fits just so is taken, and the connection is as good as before.
    let value = Bytes::from(vec![7; if over == Over::NatsShort { 60 << 10 } else { 512 << 10 }]);
    bucket.put(&"k".repeat(1024), value.clone()).await.unwrap();
    let mut entries = bucket.entries();
    let reached = tokio::time::timeout(LIMIT, entries.wait_for(|entries| entries.values().any(|other| *other == value))).await.is_ok();
    assert!(reached, "the largest value is not seen");
}

/// The receiver is enough to keep them so.
async fn entries_stay_current_without_their_bucket(over: Over) {
    let world = World::new(over).await;
    let writer = open(&world.serving).await;
    let mut entries = open(&world.another().await).await.entries();
    for (number, value) in ["1", "2", "3"].into_iter().enumerate() {
        if number % 2 == 0 {
            writer.put("a", Bytes::copy_from_slice(value.as_bytes())).await.unwrap();
            reach(&mut entries, &[("a", value)]).await;
        } else {
            writer.delete("a").await.unwrap();
            reach(&mut entries, &[]).await;
        }
    }
}

async fn a_bucket_outlives_who_wrote_it(over: Over) {
    let world = World::new(over).await;
    let mesh = world.another().await;
    open(&mesh).await.put("a", Bytes::from_static(b"1")).await.unwrap();
    drop(mesh);
    reach(&mut open(&world.calling).await.entries(), &[("a", "1")]).await;
}

async fn entries_survive_a_restart_and_go_on(over: Over) {
    let mut world = World::new(over).await;
    let (one, other) = (open(&world.serving).await, open(&world.calling).await);
    let mut seen = [one.entries(), other.entries()];
    one.put("a/b", Bytes::from_static(b"1")).await.unwrap();
    one.put("deleted", Bytes::from_static(b"2")).await.unwrap();
    one.delete("deleted").await.unwrap();
    for round in 0..3 {
        for entries in &mut seen {
            reach(entries, &[("a/b", "1")]).await;
        }
        world.broker.as_mut().unwrap().kill();
        for entries in &seen {
            assert_eq!(entries.borrow().len(), 1, "the last known entries are kept");
        }
        world.broker.as_mut().unwrap().restart().await;
        // Somebody who was not there before finds everything.
        let late = open(&world.another().await).await;
        reach(&mut late.entries(), &[("a/b", "1")]).await;
        let key = format!("key-{round}");
        wait_until("writes to work again", LIMIT, async || late.put(&key, Bytes::from_static(b"3")).await.is_ok()).await;
        for entries in &mut seen {
            reach(entries, &[("a/b", "1"), (&key, "3")]).await;
        }
        wait_until("its own writes to work again", LIMIT, async || other.delete(&key).await.is_ok()).await;
    }
    // A loss that is noticed late must not bring back what was deleted meanwhile.
    for entries in &mut seen {
        reach(entries, &[("a/b", "1")]).await;
    }
}

#[tokio::test]
async fn a_nats_server_without_jetstream_is_named_as_the_reason() {
    let server = NatsServer::start_with(NatsOptions { without_jetstream: true, ..NatsOptions::default() }).await;
    for config in [MeshConfig::nats(server.url()), MeshConfig::direct(server.url())] {
        let mesh = Mesh::connect(&config).await.unwrap();
        let Err(error) = mesh.bucket("placement").await else { panic!("a bucket without JetStream") };
        assert!(matches!(&error, MeshError::NoJetStream { bucket } if bucket == "placement"), "{error:?}");
        assert!(error.to_string().contains("nats-server --jetstream"), "{error}");
    }
}
