//! What is written can be read again, with its metadata.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::io::Cursor;

use domain::ImageFormat;
use pixels::{Limits, Rgb, decode, encode};

fn picture() -> Rgb {
    let data = (0..31 * 17 * 3).map(|i| (i * 37 % 251) as u8).collect();
    Rgb { width: 31, height: 17, data }
}

fn metadata() -> BTreeMap<String, String> {
    let pairs = [("prompt", "ein Kätzchen <b>&</b> 猫\nsecond line"), ("seed", "7"), ("ключ", "x\0y"), ("", "")];
    pairs.into_iter().map(|(key, text)| (key.to_owned(), text.to_owned())).collect()
}

#[test]
fn both_formats_are_lossless() {
    for format in [ImageFormat::Png, ImageFormat::WebP] {
        for metadata in [BTreeMap::new(), metadata()] {
            let file = encode(&picture(), format, &metadata).unwrap();
            assert_eq!(decode(&file, &Limits::default()).unwrap(), picture(), "{format:?}");
        }
    }
}

#[test]
fn png_text_is_utf8() {
    let file = encode(&picture(), ImageFormat::Png, &metadata()).unwrap();
    let mut reader = png::Decoder::new(Cursor::new(&file)).read_info().unwrap();
    reader.finish().unwrap();
    let text: BTreeMap<_, _> = reader.info().utf8_text.iter().map(|chunk| (chunk.keyword.clone(), chunk.get_text().unwrap())).collect();
    assert_eq!(text["prompt"], "ein Kätzchen <b>&</b> 猫\nsecond line");
    assert_eq!(text["seed"], "7");
    assert_eq!(text["????"], "x\u{FFFD}y");
    assert_eq!(text["?"], "");
}

#[test]
fn webp_metadata_is_xmp() {
    let file = encode(&picture(), ImageFormat::WebP, &metadata()).unwrap();
    let packet = image_webp::WebPDecoder::new(Cursor::new(&file)).unwrap().xmp_metadata().unwrap().unwrap();
    let packet = String::from_utf8(packet).unwrap();
    assert!(packet.contains("<rdf:li>prompt: ein Kätzchen &lt;b&gt;&amp;&lt;/b&gt; 猫\nsecond line</rdf:li>"), "{packet}");
}
