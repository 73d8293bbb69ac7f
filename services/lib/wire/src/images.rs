//! The code maps that become pictures.

use domain::{CodeGrid, Invalid};

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
