//! Names for the contents of KV blocks.

use domain::Embeddings;
use layers::BLOCK_TOKENS;

/// Names what a full block holds: a 256-bit hash over every input from position 0 to the block's end, so two sequences share a block only
/// when everything that its values depend on is equal.
pub(crate) type BlockKey = [u8; 32];

/// Hash of a picture's rows.
pub(crate) type Digest = [u8; 32];

/// Keys of the full blocks of one sequence, extended input by input.
#[derive(Debug)]
pub(crate) struct Chain {
    keys: Vec<BlockKey>,
    /// Hash state of the block that is being filled; begins with the key of the block before it.
    open: blake3::Hasher,
    filled: usize,
}

impl Chain {
    /// A sequence without inputs.
    pub fn new() -> Self {
        Self { keys: Vec::new(), open: blake3::Hasher::new(), filled: 0 }
    }

    /// Keys of the full blocks so far, first block first.
    pub fn keys(&self) -> &[BlockKey] {
        &self.keys
    }

    pub fn token(&mut self, id: u32) {
        self.item(0, &id.to_le_bytes());
    }

    pub fn code(&mut self, code: u32) {
        self.item(1, &code.to_le_bytes());
    }

    /// Row `row` of the picture with this digest.
    pub fn embedding(&mut self, picture: &Digest, row: usize) {
        let mut bytes = [0; 40];
        bytes[..32].copy_from_slice(picture);
        bytes[32..].copy_from_slice(&(row as u64).to_le_bytes());
        self.item(2, &bytes);
    }

    /// `tag` fixes the length of `bytes`, so no two different runs of items give the same bytes.
    fn item(&mut self, tag: u8, bytes: &[u8]) {
        self.open.update(&[tag]);
        self.open.update(bytes);
        self.filled += 1;
        if self.filled == BLOCK_TOKENS {
            let key = *self.open.finalize().as_bytes();
            self.keys.push(key);
            self.open = blake3::Hasher::new();
            self.open.update(&key);
            self.filled = 0;
        }
    }
}

/// Hash of all rows of a picture and their width.
pub(crate) fn digest(embeddings: &Embeddings) -> Digest {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&(embeddings.width as u64).to_le_bytes());
    hasher.update(bytemuck::cast_slice(&embeddings.values));
    *hasher.finalize().as_bytes()
}
