//! How long the batches of a shard take, and when one is late.

use std::collections::{HashMap, VecDeque};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use placement::ExpertRange;

/// Batches that are remembered of each kind.
const REMEMBERED: usize = 64;
/// Before so many are known, a batch is late after [`UNKNOWN`].
const ENOUGH: usize = 16;
const UNKNOWN: Duration = Duration::from_millis(500);
/// A batch is late when it takes so many times as long as 19 of 20 like it have, and this much at least: scheduling alone takes some time.
const FACTOR: u32 = 2;
const LEAST: Duration = Duration::from_millis(10);

/// Measured round trips by shard and size, sizes in powers of two.
#[derive(Debug, Default)]
pub(super) struct Delays {
    known: Mutex<HashMap<(ExpertRange, u32), VecDeque<Duration>>>,
}

impl Delays {
    /// A batch of so many rows was answered after `took`.
    pub fn note(&self, shard: ExpertRange, rows: usize, took: Duration) {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let known = known.entry((shard, size(rows))).or_default();
        if known.len() == REMEMBERED {
            known.pop_front();
        }
        known.push_back(took);
    }

    /// When a second replica is asked for a batch of so many rows.
    pub fn hedge_after(&self, shard: ExpertRange, rows: usize) -> Duration {
        let known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(known) = known.get(&(shard, size(rows))).filter(|known| known.len() >= ENOUGH) else { return UNKNOWN };
        let mut sorted: Vec<_> = known.iter().copied().collect();
        sorted.sort_unstable();
        LEAST.max(sorted[sorted.len() * 19 / 20] * FACTOR)
    }
}

fn size(rows: usize) -> u32 {
    rows.max(1).ilog2()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn late_is_what_takes_twice_as_long_as_others_of_its_size() {
        let (delays, shard, other) = (Delays::default(), ExpertRange { first: 0, last: 3 }, ExpertRange { first: 4, last: 7 });
        assert_eq!(delays.hedge_after(shard, 1), UNKNOWN);
        (1..=100).for_each(|ms| delays.note(shard, 100, Duration::from_millis(ms)));
        assert_eq!(delays.hedge_after(shard, 64), Duration::from_millis(2 * 97), "of the last 64, 37 to 100");
        assert_eq!(delays.hedge_after(shard, 1), UNKNOWN);
        assert_eq!(delays.hedge_after(other, 100), UNKNOWN);
        (0..REMEMBERED).for_each(|_| delays.note(shard, 100, Duration::from_micros(10)));
        assert_eq!(delays.hedge_after(shard, 100), LEAST);
    }
}
