use cpu::PagedKv;
use layers::{BLOCK_TOKENS, EngineError, KvShape};

/// The paged keys and values of one layer, f32.
#[derive(Debug)]
pub struct Kv {
    pub(crate) shape: cpu::KvShape,
    pub(crate) keys: Box<[f32]>,
    pub(crate) values: Box<[f32]>,
}

impl Kv {
    /// A cache of zeros. Memory is taken from the system as blocks are first written.
    pub(crate) fn new(shape: &KvShape) -> Result<Self, EngineError> {
        let shape = cpu::KvShape { blocks: shape.blocks, block_tokens: BLOCK_TOKENS, kv_heads: shape.kv_heads, head_dim: shape.head_dim };
        let zeros = || {
            let values = shape.len().and_then(|len| bytemuck::allocation::try_zeroed_slice_box(len).ok());
            values.ok_or_else(|| EngineError::Compute(format!("no memory for a KV cache of {} blocks", shape.blocks)))
        };
        Ok(Self { keys: zeros()?, values: zeros()?, shape })
    }

    pub(crate) fn paged(&self) -> PagedKv<'_> {
        PagedKv { shape: self.shape, keys: &self.keys, values: &self.values }
    }
}
