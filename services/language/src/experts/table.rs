//! Which replicas there are, and which of them a share goes to.

use std::collections::BTreeMap;
use std::sync::Arc;

use layers::Share;
use placement::ExpertRange;

use super::replica::Replica;

/// The replicas that take batches, as of a moment.
#[derive(Debug, Clone, Default)]
pub(super) struct Table {
    shards: BTreeMap<ExpertRange, Vec<Arc<Replica>>>,
    /// For every expert, the shards that hold it and have a replica; its own first.
    holders: Vec<Vec<ExpertRange>>,
}

impl Table {
    pub fn new(experts: usize, replicas: &[Arc<Replica>]) -> Self {
        let mut table = Self { shards: BTreeMap::new(), holders: vec![Vec::new(); experts] };
        for replica in replicas.iter().filter(|replica| replica.is_open()) {
            table.shards.entry(replica.shard).or_default().push(replica.clone());
            for expert in replica.held() {
                if let Some(holders) = table.holders.get_mut(expert)
                    && !holders.contains(&replica.shard)
                {
                    holders.push(replica.shard);
                }
            }
        }
        for (expert, holders) in table.holders.iter_mut().enumerate() {
            holders.sort_by_key(|range| (!range.contains(expert), *range));
        }
        table
    }

    /// The lowest expert that nobody holds.
    pub fn missing(&self) -> Option<usize> {
        self.holders.iter().position(Vec::is_empty)
    }

    /// Replicas of each shard.
    pub fn replicas(&self) -> impl Iterator<Item = (ExpertRange, usize)> {
        self.shards.iter().map(|(range, replicas)| (*range, replicas.len()))
    }

    /// A shard for each of some shares, by their number: the one holder there is, or the one with the fewest rows so far. The second list holds
    /// shares that nobody holds the expert of.
    pub fn assign(&self, shares: &[Share], which: impl Iterator<Item = usize>) -> (BTreeMap<ExpertRange, Vec<usize>>, Vec<usize>) {
        let (mut parts, mut lost) = (BTreeMap::<ExpertRange, Vec<usize>>::new(), Vec::new());
        let mut rows: BTreeMap<ExpertRange, usize> = BTreeMap::new();
        for number in which {
            let share = &shares[number];
            let holders = self.holders.get(share.expert).map_or(&[][..], Vec::as_slice).iter();
            match holders.filter(|range| self.answers(range)).min_by_key(|range| rows.get(range).copied().unwrap_or(0)) {
                Some(&range) => {
                    *rows.entry(range).or_default() += share.rows.len();
                    parts.entry(range).or_default().push(number);
                }
                None => lost.push(number),
            }
        }
        (parts, lost)
    }

    /// Whether a replica of the shard takes batches: it may have gone since this table was made.
    fn answers(&self, range: &ExpertRange) -> bool {
        self.shards.get(range).is_some_and(|replicas| replicas.iter().any(|replica| replica.is_open()))
    }

    /// The replica of a shard with the fewest batches under way, among those that are not `tried`; among equals the one whose turn is longest ago.
    pub fn replica(&self, shard: ExpertRange, experts: &[u32], tried: &[mesh::InstanceName]) -> Option<Arc<Replica>> {
        let replicas = self.shards.get(&shard)?.iter();
        let fit = replicas.filter(|replica| replica.is_open() && !tried.contains(&replica.name) && replica.holds(experts));
        fit.min_by_key(|replica| (replica.load(), replica.last_turn())).cloned()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    #[test]
    fn replicas_take_turns_however_many_shards_there_are() {
        let shards = [(0, 3), (4, 7)].map(|(first, last)| ExpertRange { first, last });
        let replica = |(name, shard): (&str, ExpertRange)| Arc::new(Replica::new(name.into(), shard, shard.experts().collect()).0);
        let replicas = [("a", shards[0]), ("b", shards[0]), ("c", shards[1]), ("d", shards[1])].map(replica);
        let table = Table::new(8, &replicas);
        let mut sent = BTreeMap::<String, usize>::new();
        let mut turns = 1..;
        for shard in (0..10).flat_map(|_| shards) {
            let replica = table.replica(shard, &[shard.first as u32], &[]).expect("a replica that holds it");
            replica.take_turn(turns.next().unwrap());
            *sent.entry(replica.name.to_string()).or_default() += 1;
        }
        assert_eq!(sent, ["a", "b", "c", "d"].map(|name| (name.to_owned(), 5)).into());
        assert!(table.replica(shards[0], &[4], &[]).is_none(), "the other shard's");
        let other = table.replica(shards[0], &[0], &[replicas[0].name.clone()]).expect("one that was not tried");
        assert_eq!(other.name, replicas[1].name);
    }
}
