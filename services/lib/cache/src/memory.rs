use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;

use crate::metrics;

/// What an entry costs beside its key and value: two map entries and the allocations behind them.
const OVERHEAD: usize = 160; // bytes

/// The least recently used entries give way when there is no room.
pub(crate) struct Memory {
    max_bytes: usize,
    entries: Mutex<Entries>,
}

#[derive(Default)]
struct Entries {
    by_key: HashMap<Arc<str>, Entry>,
    /// Keys by their last use, the oldest first.
    by_use: BTreeMap<u64, Arc<str>>,
    /// Counts uses.
    clock: u64,
    bytes: usize,
}

struct Entry {
    value: Bytes,
    used: u64,
}

impl Memory {
    pub(crate) fn new(max_bytes: usize) -> Self {
        Self { max_bytes, entries: Mutex::default() }
    }

    pub(crate) fn get(&self, key: &str) -> Option<Bytes> {
        let mut guard = self.lock();
        let entries = &mut *guard;
        let entry = entries.by_key.get_mut(key)?;
        entries.clock += 1;
        if let Some(name) = entries.by_use.remove(&std::mem::replace(&mut entry.used, entries.clock)) {
            entries.by_use.insert(entries.clock, name);
        }
        Some(entry.value.clone())
    }

    /// A value that is larger than all there is room for is not kept.
    pub(crate) fn put(&self, key: &str, value: Bytes) {
        if cost(key, &value) > self.max_bytes {
            return;
        }
        let mut guard = self.lock();
        let entries = &mut *guard;
        entries.remove(key);
        entries.bytes += cost(key, &value);
        entries.clock += 1;
        let name: Arc<str> = key.into();
        entries.by_use.insert(entries.clock, name.clone());
        entries.by_key.insert(name, Entry { value, used: entries.clock });
        let mut evicted = 0;
        while entries.bytes > self.max_bytes {
            let Some((_, oldest)) = entries.by_use.first_key_value().map(|(used, name)| (*used, name.clone())) else { break };
            entries.remove(&oldest);
            evicted += 1;
        }
        metrics::memory(entries.bytes, evicted);
    }

    /// A panic while the lock was held leaves at worst an entry that is never evicted; the cache goes on.
    fn lock(&self) -> MutexGuard<'_, Entries> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Entries {
    fn remove(&mut self, key: &str) {
        if let Some(entry) = self.by_key.remove(key) {
            self.by_use.remove(&entry.used);
            self.bytes -= cost(key, &entry.value);
        }
    }
}

fn cost(key: &str, value: &Bytes) -> usize {
    key.len() + value.len() + OVERHEAD
}

#[cfg(test)]
mod tests {
    use super::*;

    fn value(bytes: usize) -> Bytes {
        vec![7; bytes].into()
    }

    #[test]
    fn the_least_recently_used_gives_way() {
        let memory = Memory::new(3 * cost("a", &value(100)));
        for key in ["a", "b", "c"] {
            memory.put(key, value(100));
        }
        assert!(memory.get("a").is_some()); // now b is the oldest
        memory.put("d", value(100));
        let there = ["a", "b", "c", "d"].map(|key| memory.get(key).is_some());
        assert_eq!(there, [true, false, true, true]);
    }

    #[test]
    fn bytes_are_counted() {
        let memory = Memory::new(100_000);
        for round in 0..10_000_usize {
            memory.put(&format!("key {}", round % 777), value(round % 5000));
            if round % 3 == 0 {
                memory.get(&format!("key {}", round % 500));
            }
            let entries = memory.lock();
            let counted: usize = entries.by_key.iter().map(|(key, entry)| cost(key, &entry.value)).sum();
            assert_eq!((counted, entries.by_key.len()), (entries.bytes, entries.by_use.len()));
            assert!(entries.bytes <= 100_000);
        }
        memory.put("huge", value(100_000));
        assert!(memory.get("huge").is_none());
        assert!(memory.lock().bytes > 50_000, "a value that cannot be kept evicts nothing");
    }

    #[test]
    fn a_new_value_replaces_the_old_one() {
        let memory = Memory::new(10_000);
        memory.put("a", value(1));
        memory.put("a", value(2));
        assert_eq!(memory.get("a").unwrap().len(), 2);
        assert_eq!(memory.lock().bytes, cost("a", &value(2)));
    }
}
