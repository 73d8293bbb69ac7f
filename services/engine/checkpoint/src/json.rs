use std::fs::File;
use std::io::Read;
use std::path::Path;

use serde_json::Value;

use crate::CheckpointError;
use crate::error::shown;

/// No JSON file of a model folder comes near: the index of a 236B model with one tensor per expert has about 4 MB.
const LARGEST: u64 = 64 << 20; // bytes

/// Reads a JSON file of bounded size; `None` when there is none.
pub fn read_json(path: &Path) -> Result<Option<Value>, CheckpointError> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(CheckpointError::file(path, format!("cannot be opened: {error}"))),
    };
    let mut data = Vec::new();
    file.take(LARGEST + 1).read_to_end(&mut data).map_err(|error| CheckpointError::file(path, format!("cannot be read: {error}")))?;
    if data.len() as u64 > LARGEST {
        return Err(CheckpointError::file(path, format!("larger than {LARGEST} bytes")));
    }
    let value = serde_json::from_slice(&data)
        .map_err(|error| CheckpointError::file(path, format!("invalid JSON: {}", shown(&error.to_string()))))?;
    Ok(Some(value))
}
