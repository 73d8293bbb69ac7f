//! The service through a mesh channel, as the router calls it.
#![allow(clippy::unwrap_used)]

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

use checkpoint::Checkpoint;
use config::Config;
use mesh::{Channel, Mesh, Target};
use pixels::Limits;
use process::{Doors, Host, LoadedModel, Served, Silent};
use proto::v1;
use proto::v1::images_client::ImagesClient;
use tonic::{Code, Status};
use tonic_types::StatusExt;

const FIXTURES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/fixtures");

fn host(fixture: &str, settings: &[(&str, &str)]) -> Host {
    let checkpoint = Arc::new(Checkpoint::open(&Path::new(FIXTURES).join(fixture)).unwrap());
    let settings = settings.iter().map(|(key, value)| (format!("images.{key}"), value.to_string())).collect::<Vec<_>>();
    let config = Config::resolve(None, [], &settings).unwrap();
    Host::new(config, Mesh::in_process(), vec![LoadedModel { name: "tiny".to_owned(), checkpoint }], Arc::new(Silent))
}

async fn serve() -> (ImagesClient<Channel>, Served) {
    let host = host("janus", &[]);
    let offers = images::start(&host).await.unwrap();
    let served = process::serve(&host.mesh, &Doors::default(), offers).await.unwrap();
    (ImagesClient::new(host.mesh.channel(&Target::new("images", "tiny"))), served)
}

fn golden_codes() -> Vec<u32> {
    let text = std::fs::read(Path::new(FIXTURES).join("janus/golden.json")).unwrap();
    let golden: serde_json::Value = serde_json::from_slice(&text).unwrap();
    serde_json::from_value(golden["text_to_image"][0]["image_ids"].clone()).unwrap()
}

fn request(codes: Vec<u32>, format: v1::ImageFormat) -> v1::DecodeImageRequest {
    v1::DecodeImageRequest { codes, format: format.into(), metadata: HashMap::new() }
}

fn rgb(data: &[u8]) -> pixels::Rgb {
    pixels::decode(data, &Limits::default()).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn codes_become_the_reference_picture_in_either_format() {
    let (mut client, _served) = serve().await;
    let reference = rgb(&std::fs::read(Path::new(FIXTURES).join("janus/t2i0.png")).unwrap());
    for (format, media_type) in [(v1::ImageFormat::Png, "image/png"), (v1::ImageFormat::Webp, "image/webp")] {
        let picture = client.decode(request(golden_codes(), format)).await.unwrap().into_inner();
        assert_eq!((picture.width, picture.height, picture.media_type.as_str()), (reference.width, reference.height, media_type));
        assert_eq!(rgb(&picture.data).data, reference.data, "{media_type}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_preview_is_grey_where_nothing_is_drawn() {
    let (mut client, _served) = serve().await;
    let codes = golden_codes();
    let whole = rgb(&client.decode(request(codes.clone(), v1::ImageFormat::Png)).await.unwrap().into_inner().data);
    let preview = rgb(&client.decode(request(codes[..8].to_vec(), v1::ImageFormat::Png)).await.unwrap().into_inner().data);
    assert_eq!((preview.width, preview.height), (whole.width, whole.height));
    // 6 x 6 cells of 2 x 2 pixels: eight codes are the first row and two cells of the second.
    let pixel = |x: usize, y: usize| &preview.data[(y * 12 + x) * 3..][..3];
    assert!((0..12).flat_map(|y| (0..12).map(move |x| (x, y))).all(|(x, y)| {
        let drawn = y / 2 * 6 + x / 2 < 8;
        drawn || pixel(x, y) == [127; 3]
    }));
    assert!((0..4).any(|x| pixel(x, 3) != [127; 3]), "the drawn part is grey too");
}

#[tokio::test(flavor = "multi_thread")]
async fn metadata_is_written_into_the_file() {
    let (mut client, _served) = serve().await;
    let metadata = HashMap::from([("prompt".to_owned(), "a café by the river".to_owned())]);
    let picture = client.decode(v1::DecodeImageRequest { metadata, ..request(golden_codes(), v1::ImageFormat::Png) }).await.unwrap();
    let data = picture.into_inner().data;
    assert!(data.windows("a café by the river".len()).any(|window| window == "a café by the river".as_bytes()));
}

fn fields(status: &Status) -> Vec<String> {
    let violations = status.get_details_bad_request().map(|details| details.field_violations).unwrap_or_default();
    violations.into_iter().map(|violation| violation.field).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_requests_are_refused_by_field() {
    let (mut client, _served) = serve().await;
    let (codes, png) = (golden_codes(), v1::ImageFormat::Png);
    let with = |key: &str, value: String| HashMap::from([(key.to_owned(), value)]);
    let rows = [
        ("codes", request(vec![], png)),
        ("codes", request(vec![0; codes.len() + 1], png)),
        ("codes[2]", request(vec![0, 1, 96], png)),
        ("format", v1::DecodeImageRequest { format: 77, ..request(codes.clone(), png) }),
        ("metadata", v1::DecodeImageRequest { metadata: with("", "x".into()), ..request(codes.clone(), png) }),
        ("metadata", v1::DecodeImageRequest { metadata: with("k", "x".repeat(1 << 20)), ..request(codes.clone(), png) }),
    ];
    for (field, request) in rows {
        let status = client.decode(request).await.unwrap_err();
        assert_eq!((status.code(), fields(&status)), (Code::InvalidArgument, vec![field.to_owned()]), "{status}");
    }
    client.decode(request(codes, png)).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_burst_is_decoded_in_turn_and_a_flood_is_told_to_come_back() {
    let host = host("janus", &[("queue_limit", "1")]);
    let offers = images::start(&host).await.unwrap();
    let _served = process::serve(&host.mesh, &Doors::default(), offers).await.unwrap();
    let client = ImagesClient::new(host.mesh.channel(&Target::new("images", "tiny")));
    let calls = (0..32).map(|_| {
        let mut client = client.clone();
        tokio::spawn(async move { client.decode(request(golden_codes(), v1::ImageFormat::Png)).await })
    });
    let (mut done, mut refused) = (0, 0);
    for call in calls.collect::<Vec<_>>() {
        match call.await.unwrap() {
            Ok(_) => done += 1,
            Err(status) => {
                assert_eq!(status.code(), Code::ResourceExhausted, "{status}");
                assert!(status.get_details_retry_info().is_some());
                refused += 1;
            }
        }
    }
    assert!(done >= 2 && done + refused == 32, "{done} done, {refused} refused");
}

#[tokio::test]
async fn a_model_that_cannot_draw_is_left_out_and_a_bad_setting_is_named() {
    assert!(images::start(&host("llama", &[])).await.unwrap().is_empty());
    let error = images::start(&host("janus", &[("queue_limit", "0")])).await.err().unwrap();
    assert!(error.to_string().contains("images.queue_limit"), "{error}");
}
