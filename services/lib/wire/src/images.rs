//! The code maps and latent maps that become pictures.

use std::collections::HashMap;

use domain::{Canvas, CodeGrid, Drawing, Invalid, Latent, LatentGrid};
use proto::v1;

const MAX_METADATA_ENTRIES: usize = 64;
const MAX_METADATA_BYTES: usize = 64 << 10;
/// The longest keyword that a PNG text chunk takes.
const MAX_KEY_BYTES: usize = 79;

/// What a request to the Images service wants painted, checked against what the model's images are made of.
pub fn drawing(codes: Vec<u32>, latent: Option<&v1::Latent>, canvas: Canvas) -> Result<Drawing, Invalid> {
    match (canvas, latent) {
        (Canvas::Codes(_), Some(_)) => Err(Invalid::new("latent", "the model's images are made of codes")),
        (Canvas::Codes(grid), None) => self::codes(&codes, grid).map(|()| Drawing::Codes(codes)),
        (Canvas::Latent(_), _) if !codes.is_empty() => Err(Invalid::new("codes", "the model's images are made of a latent map")),
        (Canvas::Latent(_), None) => Err(Invalid::new("latent", "a latent map is needed")),
        (Canvas::Latent(grid), Some(latent)) => self::latent(latent, grid).map(Drawing::Latent),
    }
}

/// A latent map of exactly this shape.
fn latent(message: &v1::Latent, grid: LatentGrid) -> Result<Latent, Invalid> {
    let latent = crate::latent::latent(message, "latent")?;
    if latent.fits(grid) {
        return Ok(latent);
    }
    let reason = format!(
        "{} x {} x {} values, the image has {} x {} x {}",
        latent.channels, latent.rows, latent.columns, grid.channels, grid.rows, grid.columns
    );
    Err(Invalid::new("latent", reason))
}

/// Codes of a request to the Images service, checked against the grid they are for.
pub fn codes(codes: &[u32], grid: CodeGrid) -> Result<(), Invalid> {
    if codes.is_empty() || codes.len() > grid.len() {
        let reason = format!("{} codes, the image has {} x {} = {}", codes.len(), grid.rows, grid.columns, grid.len());
        return Err(Invalid::new("codes", reason));
    }
    match codes.iter().position(|&code| code as usize >= grid.codebook_size) {
        Some(i) => Err(Invalid::new(format!("codes[{i}]"), format!("{} is not in the codebook of {}", codes[i], grid.codebook_size))),
        None => Ok(()),
    }
}

/// Metadata of a request to the Images service: few entries, short, with keywords that a PNG file takes.
pub fn metadata(metadata: &HashMap<String, String>) -> Result<(), Invalid> {
    let bytes: usize = metadata.iter().map(|(key, value)| key.len() + value.len()).sum();
    if metadata.len() > MAX_METADATA_ENTRIES || bytes > MAX_METADATA_BYTES {
        let reason =
            format!("{} entries of {bytes} bytes, at most {MAX_METADATA_ENTRIES} of {MAX_METADATA_BYTES} are taken", metadata.len());
        return Err(Invalid::new("metadata", reason));
    }
    let legal = |key: &str| !key.is_empty() && key.len() <= MAX_KEY_BYTES && key.bytes().all(|b| b.is_ascii_graphic() || b == b' ');
    match metadata.keys().find(|key| !legal(key)) {
        Some(key) => Err(Invalid::new("metadata", format!("a keyword has 1 to {MAX_KEY_BYTES} printable ASCII characters, not {key:?}"))),
        None => Ok(()),
    }
}
