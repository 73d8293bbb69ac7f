use std::collections::BTreeMap;

use domain::ImageFormat;
use image_webp::{ColorType, WebPEncoder};

use crate::{PixelError, Rgb};

/// PNG keywords have 1 to 79 Latin-1 characters.
const LONGEST_KEYWORD: usize = 79;

/// Writes a picture with its metadata: text chunks in a PNG (iTXt, UTF-8), an XMP packet in a WebP. Both are lossless.
pub fn encode(image: &Rgb, format: ImageFormat, metadata: &BTreeMap<String, String>) -> Result<Vec<u8>, PixelError> {
    match format {
        ImageFormat::Png => png(image, metadata).map_err(|error| PixelError::Encode { format: "PNG", reason: error.to_string() }),
        ImageFormat::WebP => webp(image, metadata).map_err(|error| PixelError::Encode { format: "WebP", reason: error.to_string() }),
    }
}

/// The media type of a format.
pub fn media_type(format: ImageFormat) -> &'static str {
    match format {
        ImageFormat::Png => "image/png",
        ImageFormat::WebP => "image/webp",
    }
}

fn png(image: &Rgb, metadata: &BTreeMap<String, String>) -> Result<Vec<u8>, png::EncodingError> {
    let mut file = Vec::new();
    let mut encoder = png::Encoder::new(&mut file, image.width, image.height);
    encoder.set_color(png::ColorType::Rgb);
    encoder.set_depth(png::BitDepth::Eight);
    for (key, text) in metadata {
        encoder.add_itxt_chunk(keyword(key), text.replace('\0', "\u{FFFD}"))?;
    }
    let mut writer = encoder.write_header()?;
    writer.write_image_data(&image.data)?;
    writer.finish()?;
    Ok(file)
}

/// What a key becomes as a PNG keyword: printable Latin-1 and not too long.
fn keyword(key: &str) -> String {
    let printable = |c: char| matches!(c, ' '..='~' | '\u{A1}'..='\u{FF}');
    let word: String = key.trim().chars().take(LONGEST_KEYWORD).map(|c| if printable(c) { c } else { '?' }).collect();
    if word.is_empty() { "?".into() } else { word }
}

fn webp(image: &Rgb, metadata: &BTreeMap<String, String>) -> Result<Vec<u8>, image_webp::EncodingError> {
    let mut file = Vec::new();
    let mut encoder = WebPEncoder::new(&mut file);
    if !metadata.is_empty() {
        encoder.set_xmp_metadata(xmp(metadata).into_bytes());
    }
    encoder.encode(&image.data, image.width, image.height, ColorType::Rgb8)?;
    Ok(file)
}

/// An XMP packet with one list entry `key: text` per pair, in the description's place for keywords.
fn xmp(metadata: &BTreeMap<String, String>) -> String {
    let entries: String = metadata.iter().map(|(key, text)| format!("<rdf:li>{}: {}</rdf:li>", xml(key), xml(text))).collect();
    format!(
        "<?xpacket begin=\"\u{FEFF}\" id=\"W5M0MpCehiHzreSzNTczkc9d\"?><x:xmpmeta xmlns:x=\"adobe:ns:meta/\">\
         <rdf:RDF xmlns:rdf=\"http://www.w3.org/1999/02/22-rdf-syntax-ns#\"><rdf:Description rdf:about=\"\" \
         xmlns:dc=\"http://purl.org/dc/elements/1.1/\"><dc:subject><rdf:Bag>{entries}</rdf:Bag></dc:subject>\
         </rdf:Description></rdf:RDF></x:xmpmeta><?xpacket end=\"r\"?>"
    )
}

/// Text content of an XML element: markup escaped, characters that XML cannot hold replaced.
fn xml(text: &str) -> String {
    text.chars()
        .map(|c| match c {
            '&' => "&amp;".into(),
            '<' => "&lt;".into(),
            '>' => "&gt;".into(),
            '\t' | '\n' | '\r' => c.to_string(),
            '\0'..='\u{1F}' | '\u{FFFE}' | '\u{FFFF}' => "\u{FFFD}".into(),
            _ => c.to_string(),
        })
        .collect()
}
