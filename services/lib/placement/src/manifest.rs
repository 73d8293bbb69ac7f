use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use crate::ExpertRange;

/// The key-value bucket that holds one entry for each shard of each model.
pub const BUCKET: &str = "janua-experts";

/// The shards of one model: for each the experts of other shards that its replicas hold copies of.
///
/// It says what there is to look for, and what replicas should hold. What they do hold they say themselves.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Manifest {
    pub shards: BTreeMap<ExpertRange, BTreeSet<usize>>,
}

/// The value of an entry.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Entry {
    extra: BTreeSet<usize>,
}

impl Manifest {
    /// The shards of `model` among the entries of the bucket. What cannot be read is left out and named.
    pub fn read(model: &str, entries: &BTreeMap<String, Bytes>) -> (Self, Vec<String>) {
        let (mut manifest, mut bad) = (Self::default(), Vec::new());
        for (key, value) in entries {
            let Some(range) = key.strip_prefix(model).and_then(|rest| rest.strip_prefix('/')) else { continue };
            match (range.parse(), serde_json::from_slice::<Entry>(value)) {
                (Ok(range), Ok(entry)) => drop(manifest.shards.insert(range, entry.extra)),
                _ => bad.push(key.clone()),
            }
        }
        (manifest, bad)
    }

    /// The models that the bucket has entries of; any text may be a model's name.
    pub fn models(entries: &BTreeMap<String, Bytes>) -> BTreeSet<String> {
        entries.keys().filter_map(|key| key.rsplit_once('/')).map(|(model, _)| model.to_owned()).collect()
    }

    /// Where the shard `range` of `model` stands in the bucket.
    pub fn key(model: &str, range: ExpertRange) -> String {
        format!("{model}/{range}")
    }

    /// What stands there.
    pub fn value(extra: &BTreeSet<usize>) -> Bytes {
        // A set of numbers always has a JSON form.
        Bytes::from(serde_json::to_vec(&Entry { extra: extra.clone() }).unwrap_or_default())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_and_other_models_are_not_seen() {
        let range = |first, last| ExpertRange { first, last };
        let extra = BTreeSet::from([40, 3]);
        let mut entries = BTreeMap::from([
            (Manifest::key("tiny", range(0, 1)), Manifest::value(&extra)),
            (Manifest::key("tiny", range(2, 7)), Manifest::value(&BTreeSet::new())),
            (Manifest::key("tiny2", range(0, 7)), Manifest::value(&BTreeSet::new())),
        ]);
        let (manifest, bad) = Manifest::read("tiny", &entries);
        assert_eq!(manifest.shards, BTreeMap::from([(range(0, 1), extra), (range(2, 7), BTreeSet::new())]));
        assert_eq!(Manifest::models(&entries), BTreeSet::from(["tiny".to_owned(), "tiny2".to_owned()]));
        assert!(bad.is_empty());
        entries.insert("tiny/7-2".into(), Manifest::value(&BTreeSet::new()));
        entries.insert("tiny/0-7".into(), Bytes::from_static(b"{"));
        assert_eq!(Manifest::read("tiny", &entries).1, ["tiny/0-7", "tiny/7-2"]);
    }
}
