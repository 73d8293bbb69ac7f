//! Reference outputs of a fixture.

use std::{fs, path::Path};

use safetensors::{Dtype, SafeTensors};

/// `golden.safetensors` of a fixture.
pub struct Golden {
    file: Vec<u8>,
}

impl Golden {
    pub fn open(dir: &Path) -> Self {
        Self { file: fs::read(dir.join("golden.safetensors")).unwrap() }
    }

    fn tensors(&self) -> SafeTensors<'_> {
        SafeTensors::deserialize(&self.file).unwrap()
    }

    /// All values of an f32 tensor.
    pub fn values(&self, name: &str) -> Vec<f32> {
        let tensors = self.tensors();
        let tensor = tensors.tensor(name).unwrap_or_else(|_| panic!("no golden tensor {name}"));
        assert_eq!(tensor.dtype(), Dtype::F32, "{name}");
        tensor.data().as_chunks().0.iter().copied().map(f32::from_le_bytes).collect()
    }

    /// All values of an i32 tensor.
    pub fn ids(&self, name: &str) -> Vec<u32> {
        let tensors = self.tensors();
        let tensor = tensors.tensor(name).unwrap_or_else(|_| panic!("no golden tensor {name}"));
        assert_eq!(tensor.dtype(), Dtype::I32, "{name}");
        tensor.data().as_chunks().0.iter().map(|&bytes| u32::try_from(i32::from_le_bytes(bytes)).unwrap()).collect()
    }

    /// Names with a prefix, the prefix cut off.
    pub fn names(&self, prefix: &str) -> Vec<String> {
        self.tensors().names().into_iter().filter_map(|name| name.strip_prefix(prefix)).map(str::to_owned).collect()
    }
}
