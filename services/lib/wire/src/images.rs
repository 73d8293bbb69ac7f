//! The code maps that become pictures.

use std::collections::HashMap;

use domain::{CodeGrid, Invalid};

const MAX_METADATA_ENTRIES: usize = 64;
const MAX_METADATA_BYTES: usize = 64 << 10;
/// The longest keyword that a PNG text chunk takes.
const MAX_KEY_BYTES: usize = 79;

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
