//! Who holds which KV block.

use std::collections::{BTreeMap, HashMap};

use layers::BlockId;

use crate::prefix::BlockKey;

/// The blocks of the KV cache. Each is in exactly one state: free (holds nothing), in use (referred to), or cached (nobody refers to it,
/// but its contents have a name and can be asked for until the block is needed for something else).
#[derive(Debug)]
pub(crate) struct BlockPool {
    blocks: Vec<Block>,
    free: Vec<BlockId>,
    /// Cached blocks by the time of their last release: the first is reused first.
    cached: BTreeMap<u64, BlockId>,
    /// Every block that has a name, in use or cached.
    named: HashMap<BlockKey, BlockId>,
    clock: u64,
}

#[derive(Debug, Clone, Default)]
struct Block {
    references: u32,
    key: Option<BlockKey>,
    /// Time of the last release; meaningful while cached.
    released: u64,
}

impl BlockPool {
    /// `count` free blocks.
    pub fn new(count: usize) -> Self {
        let free = (0..count as BlockId).rev().collect();
        Self { blocks: vec![Block::default(); count], free, cached: BTreeMap::new(), named: HashMap::new(), clock: 0 }
    }

    pub fn total(&self) -> usize {
        self.blocks.len()
    }

    pub fn free(&self) -> usize {
        self.free.len()
    }

    pub fn cached(&self) -> usize {
        self.cached.len()
    }

    /// How many blocks [`allocate`](Self::allocate) can still hand out.
    pub fn available(&self) -> usize {
        self.free.len() + self.cached.len()
    }

    /// Refer to a block without contents: a free one, else the cached one that was released first.
    pub fn allocate(&mut self) -> Option<BlockId> {
        let id = match self.free.pop() {
            Some(id) => id,
            None => self.evict()?,
        };
        self.blocks[id as usize].references = 1;
        Some(id)
    }

    /// Whether a block holds what `key` names.
    pub fn holds(&self, key: &BlockKey) -> bool {
        self.named.contains_key(key)
    }

    /// Refer to the block that holds what `key` names, if there is one.
    pub fn share(&mut self, key: &BlockKey) -> Option<BlockId> {
        let id = *self.named.get(key)?;
        let block = &mut self.blocks[id as usize];
        if block.references == 0 {
            self.cached.remove(&block.released);
        }
        block.references += 1;
        Some(id)
    }

    /// Name the contents of a block in use. Where another block has the name already, this one stays nameless and is free when released.
    pub fn name(&mut self, id: BlockId, key: BlockKey) {
        let block = &mut self.blocks[id as usize];
        debug_assert!(block.references > 0 && block.key.is_none(), "block {id} cannot be named");
        if let std::collections::hash_map::Entry::Vacant(entry) = self.named.entry(key) {
            entry.insert(id);
            block.key = Some(key);
        }
    }

    /// Give a reference back. Release a sequence's blocks last to first: then its end is reused before its beginning.
    pub fn release(&mut self, id: BlockId) {
        let block = &mut self.blocks[id as usize];
        assert!(block.references > 0, "block {id} is released more often than it was taken");
        block.references -= 1;
        if block.references > 0 {
            return;
        }
        if block.key.is_some() {
            self.clock += 1;
            block.released = self.clock;
            self.cached.insert(self.clock, id);
        } else {
            self.free.push(id);
        }
    }

    fn evict(&mut self) -> Option<BlockId> {
        let (_, id) = self.cached.pop_first()?;
        if let Some(key) = self.blocks[id as usize].key.take() {
            self.named.remove(&key);
        }
        Some(id)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(n: u8) -> BlockKey {
        [n; 32]
    }

    #[test]
    fn hands_out_every_block_once() {
        let mut pool = BlockPool::new(3);
        let mut ids: Vec<_> = (0..3).filter_map(|_| pool.allocate()).collect();
        assert_eq!(pool.allocate(), None);
        ids.sort_unstable();
        assert_eq!(ids, [0, 1, 2]);
        ids.into_iter().for_each(|id| pool.release(id));
        assert_eq!((pool.free(), pool.cached(), pool.available()), (3, 0, 3));
    }

    #[test]
    fn shares_named_blocks_in_use_and_after() {
        let mut pool = BlockPool::new(2);
        let id = pool.allocate().unwrap();
        assert_eq!(pool.share(&key(1)), None);
        pool.name(id, key(1));
        assert_eq!(pool.share(&key(1)), Some(id));
        pool.release(id);
        assert_eq!(pool.cached(), 0, "one reference is left");
        pool.release(id);
        assert_eq!((pool.free(), pool.cached()), (1, 1));
        assert_eq!(pool.share(&key(1)), Some(id));
        assert_eq!((pool.free(), pool.cached()), (1, 0));
    }

    #[test]
    fn reuses_the_block_released_first_and_forgets_its_name() {
        let mut pool = BlockPool::new(2);
        let (a, b) = (pool.allocate().unwrap(), pool.allocate().unwrap());
        pool.name(a, key(1));
        pool.name(b, key(2));
        pool.release(b);
        pool.release(a);
        assert_eq!(pool.allocate(), Some(b));
        assert_eq!(pool.share(&key(2)), None);
        assert_eq!(pool.share(&key(1)), Some(a));
    }

    #[test]
    fn a_second_block_with_the_same_contents_stays_nameless() {
        let mut pool = BlockPool::new(2);
        let (a, b) = (pool.allocate().unwrap(), pool.allocate().unwrap());
        pool.name(a, key(1));
        pool.name(b, key(1));
        pool.release(b);
        assert_eq!((pool.free(), pool.cached()), (1, 0));
        assert_eq!(pool.share(&key(1)), Some(a));
    }

    #[test]
    #[should_panic(expected = "released more often")]
    fn refuses_to_release_twice() {
        let mut pool = BlockPool::new(1);
        let id = pool.allocate().unwrap();
        pool.release(id);
        pool.release(id);
    }
}
