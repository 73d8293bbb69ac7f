use cpu::{LatentKv, LatentShape, PagedKv};
use layers::{BLOCK_TOKENS, EngineError, KvEntry, KvShape};

/// The paged cache of one layer, f32.
#[derive(Debug)]
pub enum Kv {
    /// Keys and values.
    Heads(HeadsKv),
    /// What they are made of.
    Latent(CompressedKv),
}

/// Keys and values of one layer.
#[derive(Debug)]
pub struct HeadsKv {
    pub(crate) shape: cpu::KvShape,
    pub(crate) keys: Box<[f32]>,
    pub(crate) values: Box<[f32]>,
}

/// The compressed rows of one layer.
#[derive(Debug)]
pub struct CompressedKv {
    pub(crate) shape: LatentShape,
    pub(crate) rows: Box<[f32]>,
}

impl Kv {
    /// A cache of zeros. Memory is taken from the system as blocks are first written.
    pub(crate) fn new(shape: &KvShape) -> Result<Self, EngineError> {
        let blocks = shape.blocks;
        let zeros = |len: Option<usize>| {
            let values = len.and_then(|len| bytemuck::allocation::try_zeroed_slice_box(len).ok());
            values.ok_or_else(|| EngineError::Compute(format!("no memory for a KV cache of {blocks} blocks")))
        };
        Ok(match shape.entry {
            KvEntry::Heads { kv_heads, head_dim } => {
                let shape = cpu::KvShape { blocks, block_tokens: BLOCK_TOKENS, kv_heads, head_dim };
                Self::Heads(HeadsKv { keys: zeros(shape.len())?, values: zeros(shape.len())?, shape })
            }
            KvEntry::Latent { rank, rope } => {
                let shape = LatentShape { blocks, block_tokens: BLOCK_TOKENS, rank, rope };
                Self::Latent(CompressedKv { rows: zeros(shape.len())?, shape })
            }
        })
    }

    pub(crate) fn heads(&mut self) -> Result<&mut HeadsKv, EngineError> {
        match self {
            Self::Heads(kv) => Ok(kv),
            Self::Latent(_) => Err(EngineError::Compute("attention with heads on a compressed cache".into())),
        }
    }

    pub(crate) fn latent(&mut self) -> Result<&mut CompressedKv, EngineError> {
        match self {
            Self::Latent(kv) => Ok(kv),
            Self::Heads(_) => Err(EngineError::Compute("latent attention on a cache of keys and values".into())),
        }
    }
}

impl HeadsKv {
    pub(crate) fn paged(&self) -> PagedKv<'_> {
        PagedKv { shape: self.shape, keys: &self.keys, values: &self.values }
    }
}

impl CompressedKv {
    pub(crate) fn paged(&self) -> LatentKv<'_> {
        LatentKv { shape: self.shape, rows: &self.rows }
    }
}
