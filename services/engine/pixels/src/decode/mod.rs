mod jpeg;
mod png;
mod webp;

use crate::PixelError;

/// What a picture may cost.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of the file.
    pub max_bytes: usize,
    /// Width times height.
    pub max_pixels: u64,
    /// Width or height.
    pub max_side: u32,
}

impl Default for Limits {
    fn default() -> Self {
        Self { max_bytes: 32 << 20, max_pixels: 64_000_000, max_side: 32_768 }
    }
}

/// An 8-bit RGB picture.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rgb {
    /// Pixels.
    pub width: u32,
    /// Pixels.
    pub height: u32,
    /// Row-major `[height, width, 3]`.
    pub data: Vec<u8>,
}

/// Decodes a picture file: PNG, JPEG or WebP, recognised by its first bytes.
///
/// Alpha is dropped, not blended; 16-bit channels keep their upper half; of an animation the first frame counts; an orientation in the EXIF
/// data is not applied. All four as the reference preprocessing has it (spec: vision.md section 5).
/// The size in the header is compared with `limits` before any memory is taken for pixels.
pub fn decode(data: &[u8], limits: &Limits) -> Result<Rgb, PixelError> {
    if data.len() > limits.max_bytes {
        return Err(PixelError::TooManyBytes { bytes: data.len(), limit: limits.max_bytes });
    }
    let decoder = match data {
        [0x89, b'P', b'N', b'G', 0x0D, 0x0A, 0x1A, 0x0A, ..] => png::decode,
        [0xFF, 0xD8, 0xFF, ..] => jpeg::decode,
        [b'R', b'I', b'F', b'F', _, _, _, _, b'W', b'E', b'B', b'P', ..] => webp::decode,
        _ => return Err(PixelError::UnknownFormat),
    };
    decoder(data, limits)
}

impl Limits {
    /// Refuses a size from a header.
    fn check(&self, width: u32, height: u32) -> Result<(), PixelError> {
        let pixels = u64::from(width) * u64::from(height);
        if width > self.max_side || height > self.max_side || pixels > self.max_pixels {
            return Err(PixelError::TooManyPixels { width, height, max_side: self.max_side, max_pixels: self.max_pixels });
        }
        Ok(())
    }

    /// Bytes that a decoder may take for pixels and its own tables: 16-bit RGBA of the largest picture.
    fn memory(&self) -> usize {
        usize::try_from(self.max_pixels.saturating_mul(8)).unwrap_or(usize::MAX)
    }
}

/// An error of a decoder, on one line.
fn damaged(format: &'static str, reason: impl std::fmt::Display) -> PixelError {
    PixelError::Damaged { format, reason: reason.to_string().split_whitespace().collect::<Vec<_>>().join(" ") }
}

/// Keeps the first three of every `channels` bytes, in place. 1 and 2 channels (gray, gray with alpha) are spread over three instead.
fn to_rgb(mut data: Vec<u8>, channels: usize) -> Vec<u8> {
    match channels {
        3 => data,
        1 | 2 => data.chunks_exact(channels).flat_map(|pixel| [pixel[0]; 3]).collect(),
        _ => {
            let pixels = data.len() / channels;
            for pixel in 0..pixels {
                data.copy_within(pixel * channels..pixel * channels + 3, pixel * 3);
            }
            data.truncate(pixels * 3);
            data
        }
    }
}
