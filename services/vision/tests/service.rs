//! The service through a mesh channel, as the router calls it.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use checkpoint::Checkpoint;
use config::Config;
use futures::future::join_all;
use mesh::{Channel, MAX_MESSAGE_BYTES, Mesh, Target};
use process::{Doors, Host, LoadedModel, Served, Silent};
use proto::v1;
use proto::v1::vision_client::VisionClient;
use safetensors::SafeTensors;
use testkit::RedisServer;
use tonic::{Code, Status};
use tonic_types::StatusExt;

/// Limit of everything that is waited for.
const PATIENCE: Duration = Duration::from_secs(60);

fn fixture(name: &str) -> PathBuf {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/fixtures")).join(name)
}

fn bytes(path: &str) -> Bytes {
    fs::read(fixture(path)).unwrap().into()
}

/// A picture file of the decoder's tests.
fn sample(name: &str) -> Bytes {
    fs::read(Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../engine/pixels/tests/data")).join(name)).unwrap().into()
}

struct Service {
    client: VisionClient<Channel>,
    model: String,
    _served: Served,
}

/// The service of the Janus fixture under a name of its own, which keeps its counters apart, with these settings.
async fn serve(model: &str, settings: &[(&str, &str)]) -> Service {
    serve_fixture("janus", model, settings).await
}

/// The same for another fixture.
async fn serve_fixture(name: &str, model: &str, settings: &[(&str, &str)]) -> Service {
    let settings: Vec<_> = settings.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
    let config = Config::resolve(None, [], &settings).unwrap();
    let checkpoint = Arc::new(Checkpoint::open(&fixture(name)).unwrap());
    let text = Arc::new(Checkpoint::open(&fixture("llama")).unwrap());
    let models = vec![LoadedModel::new("text-only", text), LoadedModel::new(model, checkpoint)];
    let host = Host::new(config, Mesh::in_process(), models, Arc::new(Silent));
    let offers = vision::start(&host).await.unwrap();
    assert_eq!(offers.iter().map(|offer| offer.target.clone()).collect::<Vec<_>>(), [Target::new("vision", model)]);
    let served = process::serve(&host.mesh, &Doors::default(), offers).await.unwrap();
    let client = VisionClient::new(host.mesh.channel(&Target::new("vision", model)));
    let client = client.max_decoding_message_size(MAX_MESSAGE_BYTES).max_encoding_message_size(MAX_MESSAGE_BYTES);
    Service { client, model: model.to_owned(), _served: served }
}

impl Service {
    async fn encode(&self, data: Bytes) -> Result<v1::EncodeImageResponse, Status> {
        let request = v1::EncodeImageRequest { image: Some(v1::ImagePart { data }) };
        let call = async { self.client.clone().encode(request).await };
        tokio::time::timeout(PATIENCE, call).await.expect("an answer comes").map(tonic::Response::into_inner)
    }

    /// A counter of this service's model.
    fn count(&self, outcome: &str) -> u64 {
        let label = format!("janua_vision_images_total{{model=\"{}\",outcome=\"{outcome}\"}} ", self.model);
        telemetry::metrics_text().lines().find_map(|line| line.strip_prefix(&label)?.parse().ok()).unwrap_or(0)
    }
}

/// Counting needs the recorder of the process, which is installed once.
async fn counting() {
    static ONCE: tokio::sync::OnceCell<telemetry::Guard> = tokio::sync::OnceCell::const_new();
    ONCE.get_or_init(async || telemetry::init(&telemetry::TelemetryConfig::default(), "test").await.unwrap()).await;
}

fn floats(data: &[u8]) -> Vec<f32> {
    data.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
}

/// The `field` of the one violation in an INVALID_ARGUMENT.
fn field(status: &Status) -> String {
    assert_eq!(status.code(), Code::InvalidArgument, "{status}");
    let details = status.get_details_bad_request().unwrap();
    assert_eq!(details.field_violations.len(), 1);
    details.field_violations[0].field.clone()
}

#[tokio::test]
async fn a_picture_becomes_the_reference_embeddings() {
    for (name, tolerance) in [("janus", 5e-5), ("deepseek_vl", 5e-5), ("deepseek_vl_hybrid", 1e-4)] {
        let service = serve_fixture(name, &format!("golden-{name}"), &[]).await;
        let file = bytes(&format!("{name}/golden.safetensors"));
        let golden = SafeTensors::deserialize(&file).unwrap();
        let json: serde_json::Value = serde_json::from_slice(&bytes(&format!("{name}/golden.json"))).unwrap();
        for (number, prompt) in json["prompts"].as_array().unwrap().iter().enumerate() {
            let mut found = Vec::new();
            for picture in prompt["images"].as_array().unwrap() {
                let answer = service.encode(bytes(&format!("{name}/{}", picture.as_str().unwrap()))).await.unwrap();
                let embeddings = answer.embeddings.unwrap();
                assert_eq!((embeddings.rows, embeddings.width), (36, 64));
                found.extend(floats(&embeddings.data));
            }
            let expected = floats(golden.tensor(&format!("p{number}.image_features")).unwrap().data());
            assert_eq!(found.len(), expected.len());
            let worst = found.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(worst <= tolerance, "{name}: off by {worst}");
        }
    }
}

#[tokio::test]
async fn the_same_picture_is_encoded_once() {
    counting().await;
    let service = serve("once", &[]).await;
    let first = service.encode(bytes("janus/image0.png")).await.unwrap();
    let second = service.encode(bytes("janus/image0.png")).await.unwrap();
    assert_eq!((first.cached, second.cached), (false, true));
    assert_eq!(first.embeddings, second.embeddings);
    assert_eq!((service.count("encoded"), service.count("cached")), (1, 1));
    let other = service.encode(bytes("janus/image1.png")).await.unwrap();
    assert!(!other.cached && other.embeddings != first.embeddings);
    assert_eq!((service.count("encoded"), service.count("cached")), (2, 1));
}

#[tokio::test]
async fn equal_pictures_at_once_are_encoded_once() {
    counting().await;
    let service = serve("flight", &[]).await;
    let answers = join_all((0..20).map(|_| service.encode(bytes("janus/image2.png")))).await;
    let first = answers[0].as_ref().unwrap();
    assert!(answers.iter().all(|answer| answer.as_ref().unwrap().embeddings == first.embeddings));
    assert_eq!(service.count("encoded"), 1);
    assert_eq!(service.count("joined") + service.count("cached"), 19);
}

/// Two processes with one Redis: what one has seen, the other need not compute. When Redis dies, both go on.
#[tokio::test]
async fn processes_share_embeddings_through_redis() {
    counting().await;
    let mut redis = RedisServer::start().await;
    let settings = [("cache.redis_url", &*redis.url()), ("cache.timeout_ms", "5000")].map(|(k, v)| (k.to_owned(), v.to_owned()));
    let settings: Vec<(&str, &str)> = settings.iter().map(|(k, v)| (k.as_str(), v.as_str())).collect();
    let (one, other) = (serve("redis-one", &settings).await, serve("redis-other", &settings).await);
    let first = one.encode(bytes("janus/image0.png")).await.unwrap();
    let second = other.encode(bytes("janus/image0.png")).await.unwrap();
    assert_eq!((first.cached, second.cached), (false, true));
    assert_eq!(first.embeddings, second.embeddings);
    assert_eq!((one.count("encoded"), other.count("encoded")), (1, 0));

    redis.kill();
    let first = one.encode(bytes("janus/image1.png")).await.unwrap();
    let second = other.encode(bytes("janus/image1.png")).await.unwrap();
    assert_eq!((first.cached, second.cached), (false, false), "slower, not wrong");
    assert_eq!(first.embeddings, second.embeddings);
    assert!(telemetry::metrics_text().contains("janua_cache_redis_failures_total{"), "and counted");
}

#[tokio::test]
async fn every_kind_of_picture_is_taken() {
    let service = serve("kinds", &[]).await;
    for name in [
        "rgb16.png",
        "gray16.png",
        "rgba.png",
        "palette_transparent.png",
        "interlaced.png",
        "gray.jpg",
        "cmyk.jpg",
        "ycck.jpg",
        "progressive.jpg",
        "lossy.webp",
        "animated.webp",
    ] {
        let answer = service.encode(sample(name)).await.unwrap_or_else(|status| panic!("{name}: {status}"));
        assert_eq!(answer.embeddings.unwrap().rows, 36, "{name}");
    }
    let plain = service.encode(sample("lossless.webp")).await.unwrap().embeddings;
    let alpha = service.encode(sample("rgba.png")).await.unwrap().embeddings;
    assert_eq!(plain, alpha, "alpha is dropped");
}

/// A PNG that announces `width` x `height` pixels and holds next to nothing.
fn bomb(width: u32, height: u32) -> Bytes {
    let mut data = b"\x89PNG\r\n\x1a\n".to_vec();
    let mut chunk = |kind: &[u8], body: &[u8]| {
        let named = [kind, body].concat();
        let sum = !named.iter().fold(!0u32, |sum, byte| {
            (0..8).fold(sum ^ u32::from(*byte), |sum, _| if sum & 1 == 1 { (sum >> 1) ^ 0xEDB8_8320 } else { sum >> 1 })
        });
        data.extend((body.len() as u32).to_be_bytes());
        data.extend(named);
        data.extend(sum.to_be_bytes());
    };
    chunk(b"IHDR", &[&width.to_be_bytes()[..], &height.to_be_bytes(), &[8, 2, 0, 0, 0]].concat());
    chunk(b"IDAT", &[0x78, 0x9C, 0xED, 0xC1, 0x01, 0x01, 0, 0, 0, 0x80]);
    chunk(b"IEND", b"");
    data.into()
}

#[tokio::test]
async fn bad_pictures_are_refused_by_name_and_disturb_nothing() {
    counting().await;
    let service = serve("bad", &[("vision.max_image_bytes", "100000")]).await;
    let jpeg = sample("rgb.jpg");
    let good = bytes("janus/image0.png");
    let expected = service.encode(good.clone()).await.unwrap().embeddings;
    for (data, reason) in [
        (Bytes::new(), "no bytes"),
        (Bytes::from_static(b"hello"), "not a PNG, JPEG or WebP picture"),
        (bomb(31_623, 31_623), "a picture of 31623 x 31623 pixels, at most 32768 a side and 64000000 in all are taken"),
        (bomb(1_000_000_000, 1), "a picture of 1000000000 x 1 pixels"),
        (jpeg.slice(..600), "a JPEG file that cannot be decoded: truncated"),
        (jpeg.slice(..jpeg.len() - 40), "a JPEG file that cannot be decoded: truncated"),
        (good.slice(..good.len() / 2), "a PNG file that cannot be decoded: "),
        (vec![0; 100_001].into(), "a picture file of 100001 bytes, at most 100000 are taken"),
    ] {
        let status = service.encode(data).await.unwrap_err();
        assert_eq!(field(&status), "image.data");
        assert!(status.message().starts_with(&format!("image.data: {reason}")), "{status}");
    }
    let status = service.client.clone().encode(v1::EncodeImageRequest { image: None }).await.unwrap_err();
    assert_eq!(field(&status), "image");
    assert_eq!(service.encode(good).await.unwrap().embeddings, expected);
    assert_eq!(service.count("refused"), 8);
}

/// Most memory this process has ever had, bytes.
#[cfg(target_os = "linux")]
fn peak_memory() -> usize {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmHWM")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<usize>().unwrap() << 10
}

#[cfg(target_os = "linux")]
#[tokio::test]
async fn many_bombs_at_once_cost_nothing() {
    let service = serve("bombs", &[("vision.queue_limit", "1000")]).await;
    service.encode(bytes("janus/image0.png")).await.unwrap();
    let before = peak_memory();
    let answers = join_all((0..200_u32).map(|i| service.encode(bomb(31_623 + i, 31_623)))).await;
    assert!(answers.iter().all(|answer| answer.as_ref().is_err_and(|status| status.code() == Code::InvalidArgument)));
    let grown = peak_memory() - before;
    // One of them decoded would take 3 GB. What the other tests of this process take meanwhile counts here, too.
    assert!(grown < 256 << 20, "{grown} bytes more");
}

/// Different pictures beyond what may wait are refused at once, with advice; the others are served.
#[tokio::test]
async fn a_full_queue_refuses() {
    let service = serve("queue", &[("vision.parallel_images", "1"), ("vision.queue_limit", "1")]).await;
    // So large that the others arrive while it is worked on. Bytes behind the end of a PNG change its digest, not its pixels.
    let large = pixels::Rgb { width: 2000, height: 2000, data: vec![90; 12_000_000] };
    let file = pixels::encode(&large, domain::ImageFormat::Png, &Default::default()).unwrap();
    let different = |i: u8| Bytes::from([&file[..], &[i]].concat());
    let answers = join_all((0..30).map(|i| service.encode(different(i)))).await;
    let (served, refused): (Vec<_>, Vec<_>) = answers.into_iter().partition(Result::is_ok);
    assert!(served.len() >= 2 && !refused.is_empty(), "{} served, {} refused", served.len(), refused.len());
    for status in refused.into_iter().map(Result::unwrap_err) {
        assert_eq!((status.code(), status.message()), (Code::ResourceExhausted, "1 pictures wait already"));
        assert!(status.get_details_retry_info().is_some());
    }
    service.encode(different(0)).await.unwrap();
}

#[tokio::test]
async fn a_folder_without_a_usable_processor_is_refused() {
    use serde_json::json;
    let square = |side: u32| json!({"height": side, "width": side});
    let second = json!({"high_res_size": square(96), "high_res_image_mean": [0.5, 0.5, 0.5], "high_res_image_std": [0.5, 0.5, 0.5]});
    let rows = [
        ("janus", json!(null), "preprocessor_config.json is missing"),
        ("janus", json!({"size": square(56)}), "field size: 56, but the vision tower takes 48"),
        ("janus", json!({"size": null, "image_size": 56}), "field image_size: 56, but the vision tower takes 48"),
        ("janus", json!({"do_pad": false}), "field do_pad: false is not supported"),
        ("deepseek_vl", second, "field high_res_size: the model has no high-resolution tower"),
        (
            "deepseek_vl_hybrid",
            json!({"high_res_size": null}),
            "field high_res_size: missing, but the model has a high-resolution tower that takes 96",
        ),
        ("deepseek_vl_hybrid", json!({"high_res_size": square(80)}), "field high_res_size: 80, but the high-resolution tower takes 96"),
    ];
    for (name, change, expected) in rows {
        let dir = tempfile::tempdir().unwrap();
        for entry in fs::read_dir(fixture(name)).unwrap().map(Result::unwrap) {
            fs::copy(entry.path(), dir.path().join(entry.file_name())).unwrap();
        }
        let file = dir.path().join("preprocessor_config.json");
        match change.as_object() {
            None => fs::remove_file(&file).unwrap(),
            Some(fields) => {
                let mut json: serde_json::Value = serde_json::from_slice(&fs::read(&file).unwrap()).unwrap();
                json.as_object_mut().unwrap().extend(fields.clone());
                fs::write(&file, json.to_string()).unwrap();
            }
        }
        let models = vec![LoadedModel::new("m", Arc::new(Checkpoint::open(dir.path()).unwrap()))];
        let host = Host::new(Config::default(), Mesh::in_process(), models, Arc::new(Silent));
        let error = vision::start(&host).await.err().unwrap();
        assert!(format!("{error:#}").contains(expected), "{error:#}");
        assert_eq!(process::exit_code(&error), 66);
    }
}

#[tokio::test]
async fn bad_settings_are_refused() {
    for (key, value, expected) in [
        ("vision.parallel_images", "0", "vision.parallel_images"),
        ("vision.max_pixels", "0", "vision.max_pixels"),
        ("vision.colour", "red", "vision.colour"),
        ("cache.redis_url", "nats://here", "cache.redis_url"),
        ("cache.ttl_s", "0", "cache.ttl_s"),
    ] {
        let config = Config::resolve(None, [], &[(key.to_owned(), value.to_owned())]).unwrap();
        let host = Host::new(config, Mesh::in_process(), Vec::new(), Arc::new(Silent));
        let error = vision::start(&host).await.err().unwrap();
        assert!(format!("{error:#}").contains(expected), "{error:#}");
        assert_eq!(process::exit_code(&error), 64);
    }
}
