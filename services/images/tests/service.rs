//! The service through a mesh channel, as the router calls it.
#![allow(clippy::unwrap_used)]

use std::collections::HashMap;
use std::fs;
use std::io::Cursor;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use checkpoint::Checkpoint;
use config::Config;
use futures::future::join_all;
use mesh::{Channel, MAX_MESSAGE_BYTES, Mesh, Target};
use pixels::{Limits, Rgb};
use process::{Doors, Host, LoadedModel, Served, Silent};
use proto::v1;
use proto::v1::images_client::ImagesClient;
use safetensors::SafeTensors;
use tonic::{Code, Status};
use tonic_types::StatusExt;

/// Limit of everything that is waited for.
const PATIENCE: Duration = Duration::from_secs(60);

fn fixture(name: &str) -> PathBuf {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/fixtures")).join(name)
}

struct Service {
    client: ImagesClient<Channel>,
    _served: Served,
}

/// The service of the Janus fixture with these settings.
async fn serve(settings: &[(&str, &str)]) -> Service {
    serve_model("janus", settings).await
}

async fn serve_model(model: &str, settings: &[(&str, &str)]) -> Service {
    let settings: Vec<_> = settings.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
    let config = Config::resolve(None, [], &settings).unwrap();
    let open = |name: &str| LoadedModel::new(name, Arc::new(Checkpoint::open(&fixture(name)).unwrap()));
    let host = Host::new(config, Mesh::in_process(), vec![open("llama"), open("janus"), open("janusflow")], Arc::new(Silent));
    let offers = images::start(&host).await.unwrap();
    assert_eq!(
        offers.iter().map(|offer| offer.target.clone()).collect::<Vec<_>>(),
        ["janus", "janusflow"].map(|model| Target::new("images", model))
    );
    let served = process::serve(&host.mesh, &Doors::default(), offers).await.unwrap();
    let client = ImagesClient::new(host.mesh.channel(&Target::new("images", model)));
    Service { client: client.max_decoding_message_size(MAX_MESSAGE_BYTES).max_encoding_message_size(MAX_MESSAGE_BYTES), _served: served }
}

impl Service {
    async fn decode(&self, request: v1::DecodeImageRequest) -> Result<v1::DecodeImageResponse, Status> {
        let call = async { self.client.clone().decode(request).await };
        tokio::time::timeout(PATIENCE, call).await.expect("an answer comes").map(tonic::Response::into_inner)
    }

    async fn picture(&self, codes: &[u32], format: v1::ImageFormat) -> Rgb {
        let request = v1::DecodeImageRequest { codes: codes.to_vec(), format: format.into(), ..Default::default() };
        let answer = self.decode(request).await.unwrap();
        let picture = pixels::decode(&answer.data, &Limits::default()).unwrap();
        assert_eq!((picture.width, picture.height), (answer.width, answer.height));
        picture
    }
}

/// Codes and pixels (8-bit, `[height, width, 3]`) of the reference drawing.
fn golden() -> (Vec<u32>, Vec<u8>) {
    let file = fs::read(fixture("janus").join("golden.safetensors")).unwrap();
    let golden = SafeTensors::deserialize(&file).unwrap();
    let ids = golden.tensor("t2i0.image_ids").unwrap();
    let codes = ids.data().chunks_exact(4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
    (codes, golden.tensor("t2i0.pixels_u8").unwrap().data().to_vec())
}

#[tokio::test]
async fn codes_become_the_reference_picture() {
    let (service, (codes, expected)) = (serve(&[]).await, golden());
    for (format, media_type) in
        [(v1::ImageFormat::Unspecified, "image/png"), (v1::ImageFormat::Png, "image/png"), (v1::ImageFormat::Webp, "image/webp")]
    {
        let request = v1::DecodeImageRequest { codes: codes.clone(), format: format.into(), ..Default::default() };
        let answer = service.decode(request).await.unwrap();
        assert_eq!((answer.media_type.as_str(), answer.width, answer.height), (media_type, 12, 12));
        let picture = service.picture(&codes, format).await;
        // The last bit of a sum may fall on the other side of a step between two levels.
        assert!(picture.data.iter().zip(&expected).all(|(a, b)| a.abs_diff(*b) <= 1));
        let different = picture.data.iter().zip(&expected).filter(|(a, b)| a != b).count();
        assert!(different <= 4, "{different} of {} levels differ", expected.len());
    }
}

#[tokio::test]
async fn a_shorter_map_is_a_preview() {
    let (service, (codes, _)) = (serve(&[]).await, golden());
    let whole = service.picture(&codes, v1::ImageFormat::Png).await;
    for known in [1, 6, 17, 35] {
        let preview = service.picture(&codes[..known], v1::ImageFormat::Webp).await;
        let gray = |pixel: &[u8]| pixel == [127; 3];
        for (index, pixel) in preview.data.chunks_exact(3).enumerate() {
            let patch = index / 12 / 2 * 6 + index % 12 / 2;
            assert!(patch < known || gray(pixel), "patch {patch} of {known}");
        }
        assert!(preview.data[..3] != [127; 3] && preview != whole);
    }
}

#[tokio::test]
async fn metadata_is_written_into_the_file() {
    let (service, (codes, _)) = (serve(&[]).await, golden());
    let metadata: HashMap<String, String> = [("prompt", "eine rote Laterne 灯"), ("seed", "7")].map(|(k, v)| (k.into(), v.into())).into();
    let request = |format: v1::ImageFormat| v1::DecodeImageRequest {
        codes: codes.clone(),
        format: format.into(),
        metadata: metadata.clone(),
        ..Default::default()
    };
    let file = service.decode(request(v1::ImageFormat::Png)).await.unwrap().data;
    let mut reader = png::Decoder::new(Cursor::new(&file)).read_info().unwrap();
    reader.finish().unwrap();
    let text: HashMap<_, _> = reader.info().utf8_text.iter().map(|chunk| (chunk.keyword.clone(), chunk.get_text().unwrap())).collect();
    assert_eq!(text, metadata);
    let file = service.decode(request(v1::ImageFormat::Webp)).await.unwrap().data;
    assert!(String::from_utf8_lossy(&file).contains("prompt: eine rote Laterne 灯"));
}

#[tokio::test]
async fn bad_requests_are_refused_by_name() {
    let (service, (codes, _)) = (serve(&[]).await, golden());
    let good = v1::DecodeImageRequest { codes: codes.clone(), ..Default::default() };
    let mut outside = codes.clone();
    outside[3] = 96;
    let long = HashMap::from([("prompt".to_owned(), "x".repeat(300_000))]);
    for (request, field, message) in [
        (v1::DecodeImageRequest { codes: vec![], ..good.clone() }, "codes", "codes: 0 codes, the image has 6 x 6 = 36"),
        (v1::DecodeImageRequest { codes: vec![0; 37], ..good.clone() }, "codes", "codes: 37 codes, the image has 6 x 6 = 36"),
        (v1::DecodeImageRequest { codes: outside, ..good.clone() }, "codes[3]", "codes[3]: 96 is not in the codebook of 96"),
        (v1::DecodeImageRequest { format: 9, ..good.clone() }, "format", "format: 9 is not an ImageFormat"),
        (v1::DecodeImageRequest { metadata: long, ..good.clone() }, "metadata", "metadata: 300006 bytes, at most 262144 are taken"),
    ] {
        let status = service.decode(request).await.unwrap_err();
        assert_eq!((status.code(), status.message()), (Code::InvalidArgument, message));
        assert_eq!(status.get_details_bad_request().unwrap().field_violations[0].field, field);
    }
    service.decode(good).await.unwrap();
}

/// The last map of the reference flow, and its picture (8-bit, `[height, width, 3]`).
fn golden_flow() -> (v1::Latent, Vec<u8>) {
    let file = fs::read(fixture("janusflow").join("golden.safetensors")).unwrap();
    let golden = SafeTensors::deserialize(&file).unwrap();
    let maps = golden.tensor("gen.z_trajectory").unwrap().data().to_vec();
    let data = maps[maps.len() - 4 * 12 * 12 * 4..].to_vec().into();
    (v1::Latent { channels: 4, rows: 12, columns: 12, data }, golden.tensor("vae.pixels_u8").unwrap().data().to_vec())
}

#[tokio::test]
async fn a_latent_map_becomes_the_reference_picture() {
    let (service, (latent, expected)) = (serve_model("janusflow", &[]).await, golden_flow());
    let good = v1::DecodeImageRequest { latent: Some(latent.clone()), ..Default::default() };
    let answer = service.decode(good.clone()).await.unwrap();
    assert_eq!((answer.media_type.as_str(), answer.width, answer.height), ("image/png", 24, 24));
    let picture = pixels::decode(&answer.data, &Limits::default()).unwrap();
    assert!(picture.data.iter().zip(&expected).all(|(a, b)| a.abs_diff(*b) <= 1));
    let different = picture.data.iter().zip(&expected).filter(|(a, b)| a != b).count();
    assert!(different <= 10, "{different} of {} levels differ", expected.len());
    for (request, message) in [
        (v1::DecodeImageRequest { latent: None, ..good.clone() }, "latent: a latent map is needed"),
        (v1::DecodeImageRequest { codes: vec![1], ..good.clone() }, "codes: the model's images are made of a latent map"),
        (
            v1::DecodeImageRequest { latent: Some(v1::Latent { rows: 6, columns: 24, ..latent.clone() }), ..good.clone() },
            "latent: 4 x 6 x 24 values, the image has 4 x 12 x 12",
        ),
        (
            v1::DecodeImageRequest { latent: Some(v1::Latent { rows: 6, ..latent }), ..good },
            "latent.data: 2304 bytes cannot be 4 x 6 x 12 float32 values",
        ),
    ] {
        let status = service.decode(request).await.unwrap_err();
        assert_eq!((status.code(), status.message()), (Code::InvalidArgument, message));
    }
}

#[tokio::test]
async fn a_full_queue_refuses() {
    let (service, (codes, _)) = (serve(&[("images.parallel_images", "1"), ("images.queue_limit", "1")]).await, golden());
    let request = v1::DecodeImageRequest { codes, ..Default::default() };
    let answers = join_all((0..64).map(|_| service.decode(request.clone()))).await;
    let (served, refused): (Vec<_>, Vec<_>) = answers.into_iter().partition(Result::is_ok);
    assert!(served.len() >= 2 && !refused.is_empty(), "{} served, {} refused", served.len(), refused.len());
    for status in refused.into_iter().map(Result::unwrap_err) {
        assert_eq!((status.code(), status.message()), (Code::ResourceExhausted, "1 pictures wait already"));
        assert!(status.get_details_retry_info().is_some());
    }
    service.decode(request).await.unwrap();
}

#[tokio::test]
async fn bad_settings_are_refused() {
    for key in ["images.parallel_images", "images.queue_limit"] {
        let config = Config::resolve(None, [], &[(key.to_owned(), "0".to_owned())]).unwrap();
        let host = Host::new(config, Mesh::in_process(), Vec::new(), Arc::new(Silent));
        let error = images::start(&host).await.err().unwrap();
        assert!(format!("{error:#}").contains(key), "{error:#}");
        assert_eq!(process::exit_code(&error), 64);
    }
}
