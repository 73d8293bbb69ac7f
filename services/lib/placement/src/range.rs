use std::fmt;
use std::ops::RangeInclusive;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Neighbouring experts of every layer: what one shard is made of. Its name is the range, as `0-31`: two processes that hold the same experts
/// are replicas of one shard, and a model that is split in another way has other shards.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct ExpertRange {
    pub first: usize,
    /// At least `first`.
    pub last: usize,
}

/// Why there is no such range.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RangeError {
    #[error("{0:?} is no range of experts, as 0-31")]
    Malformed(String),
    #[error("{shards} shards of {experts} experts: some would be empty")]
    TooMany { shards: usize, experts: usize },
    #[error("shard {index} of {shards}: they are counted from 0")]
    NoSuchShard { index: usize, shards: usize },
    #[error("{0}")]
    Starts(String),
}

impl ExpertRange {
    /// Shard `index` of `shards` that are as equal as can be; the first ones are larger by one where they cannot be equal.
    pub fn even(experts: usize, shards: usize, index: usize) -> Result<Self, RangeError> {
        if shards == 0 || shards > experts {
            return Err(RangeError::TooMany { shards, experts });
        }
        if index >= shards {
            return Err(RangeError::NoSuchShard { index, shards });
        }
        let (size, larger) = (experts / shards, experts % shards);
        let first = index * size + index.min(larger);
        Ok(Self { first, last: first + size + usize::from(index < larger) - 1 })
    }

    /// Shard `index` of those that begin at the experts `starts`: 0, then ascending.
    pub fn between(experts: usize, starts: &[usize], index: usize) -> Result<Self, RangeError> {
        let refuse = |reason: &str| Err(RangeError::Starts(format!("{starts:?}: {reason}")));
        match () {
            () if starts.first() != Some(&0) => refuse("the first shard begins at expert 0"),
            () if !starts.is_sorted_by(|a, b| a < b) => refuse("each shard begins after the one before it"),
            () if starts.iter().any(|&start| start >= experts) => refuse(&format!("the model has {experts} experts")),
            () if index >= starts.len() => Err(RangeError::NoSuchShard { index, shards: starts.len() }),
            () => Ok(Self { first: starts[index], last: starts.get(index + 1).unwrap_or(&experts) - 1 }),
        }
    }

    pub fn contains(&self, expert: usize) -> bool {
        self.experts().contains(&expert)
    }

    pub fn experts(&self) -> RangeInclusive<usize> {
        self.first..=self.last
    }
}

impl fmt::Display for ExpertRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.first, self.last)
    }
}

impl FromStr for ExpertRange {
    type Err = RangeError;

    fn from_str(text: &str) -> Result<Self, RangeError> {
        let malformed = || RangeError::Malformed(text.to_owned());
        let (first, last) = text.split_once('-').ok_or_else(malformed)?;
        let range = Self { first: first.parse().map_err(|_| malformed())?, last: last.parse().map_err(|_| malformed())? };
        if range.first <= range.last { Ok(range) } else { Err(malformed()) }
    }
}

impl From<ExpertRange> for String {
    fn from(range: ExpertRange) -> Self {
        range.to_string()
    }
}

impl TryFrom<String> for ExpertRange {
    type Error = RangeError;

    fn try_from(text: String) -> Result<Self, RangeError> {
        text.parse()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn even_shards_cover_everything_once() {
        for experts in [1, 2, 7, 8, 64, 160] {
            for shards in (1..=experts).filter(|shards| *shards <= 9 || *shards == experts) {
                let ranges: Vec<_> = (0..shards).map(|index| ExpertRange::even(experts, shards, index).unwrap()).collect();
                let covered: Vec<_> = ranges.iter().flat_map(ExpertRange::experts).collect();
                assert_eq!(covered, (0..experts).collect::<Vec<_>>(), "{shards} shards");
                let sizes = ranges.iter().map(|range| range.last - range.first);
                assert!(sizes.clone().max().unwrap() - sizes.min().unwrap() <= 1);
            }
        }
        assert!(ExpertRange::even(4, 5, 0).is_err() && ExpertRange::even(4, 0, 0).is_err() && ExpertRange::even(4, 2, 2).is_err());
    }

    #[test]
    fn uneven_shards_begin_where_they_are_told() {
        let range = |index| ExpertRange::between(64, &[0, 10, 40], index).unwrap().to_string();
        assert_eq!([range(0), range(1), range(2)], ["0-9", "10-39", "40-63"]);
        for starts in [&[][..], &[1, 2], &[0, 5, 5], &[0, 64]] {
            assert!(ExpertRange::between(64, starts, 0).is_err(), "{starts:?}");
        }
        assert!(ExpertRange::between(64, &[0], 1).is_err());
    }

    #[test]
    fn names_are_read_back() {
        assert_eq!("3-17".parse(), Ok(ExpertRange { first: 3, last: 17 }));
        for text in ["", "3", "-", "4-3", "a-b", "1-2-3", "-1-3"] {
            assert!(text.parse::<ExpertRange>().is_err(), "{text}");
        }
    }
}
