use std::io::Cursor;

use image_webp::WebPDecoder;

use super::{Limits, Rgb, damaged, to_rgb};
use crate::PixelError;

const FORMAT: &str = "WebP";

/// Lossy and lossless WebP, the first frame of an animation.
pub(super) fn decode(data: &[u8], limits: &Limits) -> Result<Rgb, PixelError> {
    if is_cut(data) {
        return Err(damaged(FORMAT, "truncated: shorter than its header says"));
    }
    let mut decoder = WebPDecoder::new(Cursor::new(data)).map_err(|error| damaged(FORMAT, error))?;
    decoder.set_memory_limit(limits.memory());
    let (width, height) = decoder.dimensions();
    limits.check(width, height)?;
    let channels = if decoder.has_alpha() { 4 } else { 3 };
    let size = decoder.output_buffer_size().ok_or_else(|| damaged(FORMAT, "the picture does not fit into memory"))?;
    let mut data = vec![0; size];
    decoder.read_image(&mut data).map_err(|error| damaged(FORMAT, error))?;
    Ok(Rgb { width, height, data: to_rgb(data, channels) })
}

/// Whether bytes are missing at the end, which an arithmetic decoder would read as zeros. The last chunk's padding byte may be.
fn is_cut(data: &[u8]) -> bool {
    let Some(&[a, b, c, d]) = data.get(4..8) else { return true };
    u64::from(u32::from_le_bytes([a, b, c, d])) + 8 > data.len() as u64 + 1
}
