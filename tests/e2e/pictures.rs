//! Pictures of every kind that people have, in any number and place.

use image::{DynamicImage, GrayImage, ImageFormat, RgbImage, RgbaImage};
use proto::v1;
use tests::request::{chat, completion, for_text, greedy, picture, text};
use tests::{Answer, Wire, World};

/// A picture whose red, green and blue all change from pixel to pixel.
fn rgb(width: u32, height: u32) -> RgbImage {
    RgbImage::from_fn(width, height, |x, y| image::Rgb([(x * 5) as u8, (y * 3) as u8, (x * y) as u8]))
}

fn encoded(picture: &DynamicImage, format: ImageFormat) -> Vec<u8> {
    let mut file = std::io::Cursor::new(Vec::new());
    picture.write_to(&mut file, format).unwrap();
    file.into_inner()
}

/// An RGB picture as PNG.
pub fn png(width: u32, height: u32) -> Vec<u8> {
    encoded(&rgb(width, height).into(), ImageFormat::Png)
}

/// The same as JPEG.
pub fn jpeg(width: u32, height: u32) -> Vec<u8> {
    encoded(&rgb(width, height).into(), ImageFormat::Jpeg)
}

async fn look(world: &World, data: Vec<u8>) -> Answer {
    world.ask(for_text("janus", chat(vec![picture(data), text("What is in the image?")]), greedy(6))).await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn every_kind_of_picture_is_read() {
    let world = World::start(Wire::InProcess, &["janus"]).await;
    let (width, height) = (60, 44);
    let plain = rgb(width, height);
    let reference = look(&world, png(width, height)).await;

    // What holds the same pixels gives the same answer.
    let deep = image::ImageBuffer::from_fn(width, height, |x, y| image::Rgb(plain.get_pixel(x, y).0.map(|level| u16::from(level) << 8)));
    let clear = RgbaImage::from_fn(width, height, |x, y| {
        let [r, g, b] = plain.get_pixel(x, y).0;
        image::Rgba([r, g, b, (x + y) as u8])
    });
    let same = [
        ("16 bits", encoded(&DynamicImage::ImageRgb16(deep), ImageFormat::Png)),
        ("alpha", encoded(&clear.into(), ImageFormat::Png)),
        ("WebP", encoded(&plain.clone().into(), ImageFormat::WebP)),
    ];
    for (kind, file) in same {
        assert_eq!(look(&world, file).await.ids(), reference.ids(), "{kind}");
    }

    // What holds other pixels is answered, too.
    let gray = GrayImage::from_fn(width, height, |x, y| image::Luma([(x * y) as u8]));
    let other = [
        ("gray PNG", encoded(&gray.clone().into(), ImageFormat::Png)),
        ("gray JPEG", encoded(&gray.into(), ImageFormat::Jpeg)),
        ("JPEG", jpeg(width, height)),
        ("CMYK JPEG", cmyk_jpeg()),
        ("one pixel", png(1, 1)),
        ("very wide", png(500, 2)),
    ];
    for (kind, file) in other {
        let answer = look(&world, file).await;
        assert_eq!(answer.ids().len(), 6, "{kind}");
        assert_eq!(answer.usage.unwrap().image_tokens, reference.usage.unwrap().image_tokens, "{kind}");
    }
    world.stop().await;
}

/// A four-component JPEG, which no encoder at hand writes.
fn cmyk_jpeg() -> Vec<u8> {
    std::fs::read(concat!(env!("CARGO_MANIFEST_DIR"), "/../services/engine/pixels/tests/data/cmyk.jpg")).unwrap()
}

/// Pictures stand where the client put them: the order changes the answer, and each takes its positions.
#[tokio::test(flavor = "multi_thread")]
async fn several_pictures_anywhere() {
    const MODELS: [&str; 3] = ["janus", "deepseek_vl", "deepseek_vl_hybrid"];
    let world = World::start(Wire::InProcess, &MODELS).await;
    let (a, b) = (|| picture(png(48, 48)), || picture(jpeg(90, 30)));
    let sampling = v1::Sampling { top_logprobs: Some(1), ..greedy(8) };
    for model in MODELS {
        let ask = async |input| world.ask(for_text(model, input, sampling.clone())).await.unwrap();
        let tokens = ask(chat(vec![a(), text("and?")])).await.usage.unwrap().image_tokens;
        assert!(tokens > 0);
        let orders = [
            (
                chat(vec![text("first"), a(), text("then"), b(), text("and?")]),
                chat(vec![text("first"), b(), text("then"), a(), text("and?")]),
            ),
            (completion(vec![a(), text(" and "), b()]), completion(vec![b(), text(" and "), a()])),
        ];
        for (forward, backward) in orders {
            let (forward, backward) = (ask(forward).await, ask(backward).await);
            assert_eq!(forward.usage.unwrap().image_tokens, 2 * tokens, "{model}");
            assert_eq!(forward.usage.unwrap().prompt_tokens, backward.usage.unwrap().prompt_tokens, "{model}");
            assert_ne!(forward.logprobs, backward.logprobs, "{model}");
        }
    }
    world.stop().await;
}
