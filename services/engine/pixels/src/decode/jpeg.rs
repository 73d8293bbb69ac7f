use zune_jpeg::JpegDecoder;
use zune_jpeg::errors::DecodeErrors;
use zune_jpeg::zune_core::bytestream::ZCursor;
use zune_jpeg::zune_core::colorspace::ColorSpace;
use zune_jpeg::zune_core::options::DecoderOptions;

use super::{Limits, Rgb, damaged};
use crate::PixelError;

const FORMAT: &str = "JPEG";

/// Baseline and progressive JPEG, gray, YCbCr, RGB, CMYK and YCCK (the last two inverted, as Adobe writes them and Pillow reads them).
pub(super) fn decode(data: &[u8], limits: &Limits) -> Result<Rgb, PixelError> {
    if !has_end(data).unwrap_or(false) {
        return Err(damaged(FORMAT, "truncated: there is no end-of-image marker"));
    }
    match decode_as(data, limits, true) {
        // Stray bytes between two header segments carry nothing; other readers skip them as well.
        Err(Failure::Decoder(DecodeErrors::FormatStatic(reason))) if reason.starts_with("[strict-mode]") => decode_as(data, limits, false),
        other => other,
    }
    .map_err(|failure| match failure {
        Failure::Limit(error) => error,
        Failure::Decoder(error) => damaged(FORMAT, error),
    })
}

enum Failure {
    Limit(PixelError),
    Decoder(DecodeErrors),
}

/// Strict means: an error where a lenient decoder fills the rest with gray.
fn decode_as(data: &[u8], limits: &Limits, strict: bool) -> Result<Rgb, Failure> {
    let options = DecoderOptions::default()
        .set_strict_mode(strict)
        .set_max_width(usize::MAX)
        .set_max_height(usize::MAX)
        .jpeg_set_out_colorspace(ColorSpace::RGB);
    let mut decoder = JpegDecoder::new_with_options(ZCursor::new(data), options);
    decoder.decode_headers().map_err(Failure::Decoder)?;
    let info = decoder.info().ok_or(Failure::Decoder(DecodeErrors::FormatStatic("no frame header")))?;
    let (width, height) = (u32::from(info.width), u32::from(info.height));
    limits.check(width, height).map_err(Failure::Limit)?;
    let data = decoder.decode().map_err(Failure::Decoder)?;
    if data.len() as u64 != u64::from(width) * u64::from(height) * 3 {
        return Err(Failure::Decoder(DecodeErrors::FormatStatic("rows are missing")));
    }
    Ok(Rgb { width, height, data })
}

/// Whether an end-of-image marker follows the first scan; `None` when the data ends before that scan begins.
///
/// Walks the header segments, since a thumbnail inside one of them has an end of its own. In entropy-coded data 0xFF is always followed
/// by 0 or a restart marker, so the two bytes of the marker can be searched for.
fn has_end(data: &[u8]) -> Option<bool> {
    let mut at = 2; // after start-of-image
    loop {
        while data.get(at)? != &0xFF {
            at += 1;
        }
        let marker = *data.get(at + 1)?;
        match marker {
            0xFF => at += 1,                      // fill byte
            0x00 | 0x01 | 0xD0..=0xD8 => at += 2, // stand-alone markers
            0xDA => break,                        // start of scan
            0xD9 => return Some(true),            // no scan at all: the decoder will say so
            _ => at += 2 + usize::from(u16::from_be_bytes([*data.get(at + 2)?, *data.get(at + 3)?])),
        }
    }
    Some(data[at..].windows(2).any(|pair| pair == [0xFF, 0xD9]))
}
