use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use safetensors::{Dtype, SafeTensors};
use serde_json::Value;

use crate::Failure;

/// What the reference computed for a folder: `golden.json` and, where there are tensors, `golden.safetensors`.
///
/// Remembers which tensors were asked for, so that the ones nobody knows can be told.
pub struct Golden {
    pub json: Value,
    tensors: BTreeMap<String, Tensor>,
    asked: RefCell<BTreeSet<String>>,
}

/// A reference tensor.
#[derive(Debug, Clone, PartialEq)]
pub struct Tensor {
    pub shape: Vec<usize>,
    pub values: Values,
}

/// Row-major values of a tensor.
#[derive(Debug, Clone, PartialEq)]
pub enum Values {
    F32(Vec<f32>),
    /// Token ids and codes.
    Ids(Vec<u32>),
    U8(Vec<u8>),
}

impl Golden {
    /// Reads the golden files of `dir`.
    pub fn read(dir: &Path) -> Result<Self, Failure> {
        let file = dir.join("golden.json");
        let text = std::fs::read(&file)
            .map_err(|error| Failure::input(format!("{}: {error}: there is nothing to compare with", file.display())))?;
        let json = serde_json::from_slice(&text).map_err(|error| Failure::input(format!("{}: {error}", file.display())))?;
        let file = dir.join("golden.safetensors");
        let tensors = match std::fs::read(&file) {
            Ok(bytes) => tensors(&bytes).map_err(|reason| Failure::input(format!("{}: {reason}", file.display())))?,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => BTreeMap::new(),
            Err(error) => return Err(Failure::input(format!("{}: {error}", file.display()))),
        };
        Ok(Self { json, tensors, asked: RefCell::default() })
    }

    /// The tensor called `key`, which from now on counts as known.
    pub fn tensor(&self, key: &str) -> Option<&Tensor> {
        self.asked.borrow_mut().insert(key.to_owned());
        self.tensors.get(key)
    }

    /// The ids in tensor `key`.
    pub fn ids(&self, key: &str) -> Option<&[u32]> {
        match &self.tensor(key)?.values {
            Values::Ids(ids) => Some(ids),
            Values::F32(_) | Values::U8(_) => None,
        }
    }

    /// The keys of tensors that nobody has asked for yet.
    pub fn unasked(&self) -> Vec<&str> {
        let asked = self.asked.borrow();
        self.tensors.keys().filter(|key| !asked.contains(*key)).map(String::as_str).collect()
    }

    /// The list at `key` of `golden.json`; empty when absent.
    pub fn list(&self, key: &str) -> &[Value] {
        self.json.get(key).and_then(Value::as_array).map_or(&[], Vec::as_slice)
    }
}

/// Token ids in a JSON array.
pub fn ids(value: &Value) -> Option<Vec<u32>> {
    value.as_array()?.iter().map(|id| id.as_u64().and_then(|id| u32::try_from(id).ok())).collect()
}

fn tensors(bytes: &[u8]) -> Result<BTreeMap<String, Tensor>, String> {
    let file = SafeTensors::deserialize(bytes).map_err(|error| error.to_string())?;
    let tensor = |(name, view): (String, safetensors::tensor::TensorView<'_>)| {
        let data = view.data();
        let values = match view.dtype() {
            Dtype::F32 => Values::F32(data.as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect()),
            Dtype::I32 => Values::Ids(data.as_chunks().0.iter().map(|bytes| u32::from_le_bytes(*bytes)).collect()),
            Dtype::U8 => Values::U8(data.to_vec()),
            other => return Err(format!("tensor {name}: {other:?} is not a kind that golden files hold")),
        };
        Ok((name, Tensor { shape: view.shape().to_vec(), values }))
    };
    file.tensors().into_iter().map(tensor).collect()
}

/// A token id or another count, as a list of one; empty when it is no such number.
pub fn id(value: &Value) -> Vec<u32> {
    value.as_u64().and_then(|id| u32::try_from(id).ok()).into_iter().collect()
}
