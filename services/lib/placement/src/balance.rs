use std::collections::{BTreeMap, BTreeSet};

use crate::{ExpertRange, Manifest};

/// A proposal to hold copies of hot experts, and what it is expected to do.
#[derive(Debug, Clone, PartialEq)]
pub struct Balance {
    pub manifest: Manifest,
    /// What is new in it, in the order in which it was chosen.
    pub copies: Vec<Copy>,
    /// Rows per shard before and after, an expert's rows spread evenly over the shards that hold it.
    pub before: BTreeMap<ExpertRange, f64>,
    pub after: BTreeMap<ExpertRange, f64>,
}

/// One expert that a shard is to hold beside its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Copy {
    pub expert: usize,
    pub to: ExpertRange,
}

/// Chooses at most `copies` copies, so that the busiest shard has as little to do as can be: again and again, of all ways to copy an expert
/// of the busiest shard to another one, the way that leaves the busiest of the two the least. Copies that are there already are given up
/// first: the proposal is for the counts at hand.
///
/// `rows[e]` is how many rows went to expert `e`.
pub fn balance(shards: &BTreeSet<ExpertRange>, rows: &[u64], copies: usize) -> Balance {
    let mut manifest = Manifest { shards: shards.iter().map(|&range| (range, BTreeSet::new())).collect() };
    let before = loads(&manifest, rows);
    let mut chosen = Vec::new();
    while chosen.len() < copies {
        let Some(copy) = best_copy(&manifest, rows) else { break };
        manifest.shards.entry(copy.to).or_default().insert(copy.expert);
        chosen.push(copy);
    }
    let after = loads(&manifest, rows);
    Balance { manifest, copies: chosen, before, after }
}

/// Rows that each shard computes, an expert's rows spread evenly over the shards that hold it.
pub fn loads(manifest: &Manifest, rows: &[u64]) -> BTreeMap<ExpertRange, f64> {
    let mut loads: BTreeMap<_, _> = manifest.shards.keys().map(|&range| (range, 0.0)).collect();
    for (expert, &rows) in rows.iter().enumerate() {
        let holders = holders(manifest, expert);
        for range in &holders {
            *loads.entry(*range).or_default() += rows as f64 / holders.len() as f64;
        }
    }
    loads
}

/// The shards that hold an expert, as their own or as a copy.
fn holders(manifest: &Manifest, expert: usize) -> Vec<ExpertRange> {
    let holds = |(range, extra): &(&ExpertRange, &BTreeSet<usize>)| range.contains(expert) || extra.contains(&expert);
    manifest.shards.iter().filter(holds).map(|(range, _)| *range).collect()
}

/// The copy that helps the busiest shard most; `None` where none helps.
fn best_copy(manifest: &Manifest, rows: &[u64]) -> Option<Copy> {
    let loads = loads(manifest, rows);
    let (&busiest, &most) = loads.iter().max_by(|a, b| a.1.total_cmp(b.1))?;
    let mut best: Option<(f64, Copy)> = None;
    for (expert, &rows) in rows.iter().enumerate() {
        let holders = holders(manifest, expert);
        if rows == 0 || !holders.contains(&busiest) {
            continue;
        }
        let (now, then) = (rows as f64 / holders.len() as f64, rows as f64 / (holders.len() + 1) as f64);
        for (&to, load) in loads.iter().filter(|(range, _)| !holders.contains(range)) {
            let peak = (most - now + then).max(load + then);
            if peak < most && best.is_none_or(|(least, _)| peak < least) {
                best = Some((peak, Copy { expert, to }));
            }
        }
    }
    best.map(|(_, copy)| copy)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(first: usize, last: usize) -> ExpertRange {
        ExpertRange { first, last }
    }

    #[test]
    fn a_hot_expert_is_shared_with_the_idle_shard() {
        let shards = BTreeSet::from([range(0, 1), range(2, 3)]);
        let balance = balance(&shards, &[100, 20, 10, 10], 4);
        assert_eq!(balance.copies, [Copy { expert: 0, to: range(2, 3) }]);
        assert_eq!(balance.before, BTreeMap::from([(range(0, 1), 120.0), (range(2, 3), 20.0)]));
        assert_eq!(balance.after, BTreeMap::from([(range(0, 1), 70.0), (range(2, 3), 70.0)]));
    }

    #[test]
    fn no_more_copies_than_asked_for_and_none_that_do_not_help() {
        let shards = BTreeSet::from([range(0, 1), range(2, 3), range(4, 5)]);
        let rows = [90, 80, 5, 5, 5, 5];
        for copies in 0..5 {
            let balance = balance(&shards, &rows, copies);
            assert!(balance.copies.len() <= copies);
            let most = |loads: &BTreeMap<_, f64>| loads.values().copied().fold(0.0, f64::max);
            assert!(most(&balance.after) <= most(&balance.before));
            let (before, after): (f64, f64) = (balance.before.values().sum(), balance.after.values().sum());
            assert!((before - after).abs() < 1e-9, "rows are not lost");
        }
        assert!(balance(&shards, &[7; 6], 3).copies.is_empty(), "what is even stays");
        assert!(balance(&shards, &[0; 6], 3).copies.is_empty());
        assert!(balance(&BTreeSet::from([range(0, 5)]), &rows, 3).copies.is_empty(), "there is nobody to share with");
    }
}
