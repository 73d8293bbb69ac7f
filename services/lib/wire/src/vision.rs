//! Picture embeddings.

use domain::{Embeddings, Invalid};
use proto::v1;

/// Embeddings from the wire; `field` names where they stand in the message.
pub fn embeddings(message: &v1::Embeddings, field: &str) -> Result<Embeddings, Invalid> {
    let (rows, width) = (message.rows as usize, message.width as usize);
    let expected = rows.checked_mul(width).and_then(|values| values.checked_mul(4));
    if rows == 0 || width == 0 || expected != Some(message.data.len()) {
        let reason = format!("{} bytes cannot be {rows} rows of {width} float32 values", message.data.len());
        return Err(Invalid::new(format!("{field}.data"), reason));
    }
    let values: Vec<f32> = message.data.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
    if values.iter().any(|value| !value.is_finite()) {
        return Err(Invalid::new(format!("{field}.data"), "NaN or infinity among the values"));
    }
    Ok(Embeddings { width, values: values.into() })
}

/// Embeddings for the wire.
pub fn to_embeddings(embeddings: &Embeddings) -> v1::Embeddings {
    let data = embeddings.values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<u8>>();
    v1::Embeddings { rows: embeddings.rows() as u32, width: embeddings.width as u32, data: data.into() }
}
