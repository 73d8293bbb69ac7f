//! Latent maps.

use domain::{Invalid, Latent};
use proto::v1;

/// A latent map from the wire; `field` names where it stands in the message.
pub fn latent(message: &v1::Latent, field: &str) -> Result<Latent, Invalid> {
    let [channels, rows, columns] = [message.channels, message.rows, message.columns].map(|size| size as usize);
    let sizes = [channels, rows, columns, size_of::<f32>()];
    let expected = sizes.into_iter().try_fold(1usize, |product, size| product.checked_mul(size));
    if message.data.is_empty() || expected != Some(message.data.len()) {
        let reason = format!("{} bytes cannot be {channels} x {rows} x {columns} float32 values", message.data.len());
        return Err(Invalid::new(format!("{field}.data"), reason));
    }
    let values: Vec<f32> = message.data.as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect();
    if values.iter().any(|value| !value.is_finite()) {
        return Err(Invalid::new(format!("{field}.data"), "NaN or infinity among the values"));
    }
    Ok(Latent { channels, rows, columns, values: values.into() })
}

/// A latent map for the wire.
pub fn to_latent(latent: &Latent) -> v1::Latent {
    let data = latent.values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<u8>>();
    v1::Latent { channels: latent.channels as u32, rows: latent.rows as u32, columns: latent.columns as u32, data: data.into() }
}
