use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use bytes::Bytes;
use futures::future::join_all;
use mesh::{InstanceName, Mesh, Target};
use placement::{ExpertRange, Manifest};
use proto::v1;
use proto::v1::experts_client::ExpertsClient;

use crate::Failure;
use crate::failure::REFUSED;

/// A look may miss a replica that is busy; twice in a row it seldom does.
const LOOKS: usize = 2;
/// How long a replica may take to say what it holds.
const ANSWER: Duration = Duration::from_secs(5);

/// The shards of one model and all their replicas.
#[derive(Debug)]
pub struct Survey {
    /// What there should be.
    pub manifest: Manifest,
    /// Entries of the model that say nothing.
    pub unreadable: Vec<String>,
    /// What there is; an entry for every shard.
    pub replicas: BTreeMap<ExpertRange, Vec<Replica>>,
}

/// One replica.
#[derive(Debug)]
pub struct Replica {
    pub name: InstanceName,
    /// What it says, or why it says nothing.
    pub report: Result<v1::InspectExpertsResponse, String>,
}

impl Survey {
    /// Asks every replica of every shard of `model` that the entries name.
    pub async fn of(mesh: &Mesh, model: &str, entries: &BTreeMap<String, Bytes>) -> Self {
        let (manifest, unreadable) = Manifest::read(model, entries);
        let shards = manifest.shards.keys().map(async |&range| (range, replicas(mesh, &target(model, range)).await));
        let replicas = join_all(shards).await.into_iter().collect();
        Self { manifest, unreadable, replicas }
    }

    /// As [`Survey::of`], for a model that must have a shard.
    pub async fn of_known(mesh: &Mesh, model: &str, entries: &BTreeMap<String, Bytes>) -> Result<Self, Failure> {
        let known = Manifest::models(entries);
        if known.contains(model) {
            return Ok(Self::of(mesh, model, entries).await);
        }
        let known = if known.is_empty() { "of none".to_owned() } else { known.into_iter().collect::<Vec<_>>().join(", ") };
        Err(Failure::new(REFUSED, format!("--model {model}: no expert shard of it has ever been started here (known: {known})")))
    }

    /// What the replicas that answer say.
    pub fn reports(&self) -> impl Iterator<Item = &v1::InspectExpertsResponse> {
        self.replicas.values().flatten().filter_map(|replica| replica.report.as_ref().ok())
    }

    /// How many experts a layer of the model has; without a replica, as many as the shards say.
    pub fn experts(&self) -> usize {
        let said = self.reports().map(|report| report.experts as usize).max();
        said.unwrap_or_else(|| self.manifest.shards.keys().map(|range| range.last + 1).max().unwrap_or(0))
    }

    /// Experts that no replica holds.
    pub fn unheld(&self) -> Vec<usize> {
        let held: BTreeSet<usize> = self.reports().filter_map(|report| report.holdings.as_ref()).flat_map(held).collect();
        (0..self.experts()).filter(|expert| !held.contains(expert)).collect()
    }

    /// Rows that went to each expert, over all layers and replicas, since these were started.
    pub fn rows(&self) -> Vec<u64> {
        let mut rows = vec![0; self.experts()];
        for report in self.reports() {
            let layers = report.rows_by_expert.chunks(rows.len().max(1));
            layers.for_each(|layer| rows.iter_mut().zip(layer).for_each(|(sum, count)| *sum += count));
        }
        rows
    }

    /// Whether all replicas have read the same weights.
    pub fn agrees(&self) -> bool {
        let prints = self.reports().filter_map(|report| report.holdings.as_ref()).map(|holdings| &holdings.fingerprint);
        prints.collect::<BTreeSet<_>>().len() <= 1
    }
}

/// Everything that a replica holds.
fn held(holdings: &v1::Holdings) -> impl Iterator<Item = usize> {
    (holdings.first..=holdings.last).chain(holdings.extra.iter().copied()).map(|expert| expert as usize)
}

/// The copies that a replica holds.
pub fn copies(report: &v1::InspectExpertsResponse) -> BTreeSet<usize> {
    report.holdings.iter().flat_map(|holdings| &holdings.extra).map(|&expert| expert as usize).collect()
}

/// What replicas of a shard serve.
pub fn target(model: &str, range: ExpertRange) -> Target {
    Target::new("experts", model).shard(range.to_string())
}

/// Everybody who serves `target`.
pub async fn instances(mesh: &Mesh, target: &Target) -> BTreeSet<InstanceName> {
    let mut names = BTreeSet::new();
    for _ in 0..LOOKS {
        names.extend(mesh.instances(target).await);
    }
    names
}

async fn replicas(mesh: &Mesh, target: &Target) -> Vec<Replica> {
    let ask = async |name: InstanceName| {
        let mut client = ExpertsClient::new(mesh.channel_to(target, &name));
        let answer = tokio::time::timeout(ANSWER, client.inspect(v1::InspectExpertsRequest {})).await;
        let report = match answer {
            Ok(Ok(report)) => Ok(report.into_inner()),
            Ok(Err(status)) => Err(status.message().to_owned()),
            Err(_) => Err(format!("no answer within {} s", ANSWER.as_secs())),
        };
        Replica { name, report }
    };
    join_all(instances(mesh, target).await.into_iter().map(ask)).await
}

/// Numbers as `0-3, 7`.
pub fn ranges(numbers: impl IntoIterator<Item = usize>) -> String {
    let mut ranges: Vec<(usize, usize)> = Vec::new();
    for number in numbers {
        match ranges.last_mut() {
            Some((_, last)) if *last + 1 == number => *last = number,
            _ => ranges.push((number, number)),
        }
    }
    let text = |(first, last): (usize, usize)| if first == last { first.to_string() } else { format!("{first}-{last}") };
    ranges.into_iter().map(text).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn replica(name: &str, first: u32, last: u32, extra: &[u32], rows: &[u64]) -> Replica {
        let holdings = v1::Holdings { first, last, extra: extra.to_vec(), fingerprint: vec![1].into() };
        let report =
            v1::InspectExpertsResponse { holdings: Some(holdings), experts: 4, rows_by_expert: rows.to_vec(), ..Default::default() };
        Replica { name: name.into(), report: Ok(report) }
    }

    #[test]
    fn what_replicas_say_adds_up() {
        let range = |first, last| ExpertRange { first, last };
        let silent = Replica { name: "c".into(), report: Err("gone".into()) };
        let shards = [(range(0, 1), vec![replica("a", 0, 1, &[2], &[1, 2, 3, 0, 1, 1, 1, 0])]), (range(2, 3), vec![silent])];
        let manifest = Manifest { shards: shards.iter().map(|(range, _)| (*range, BTreeSet::new())).collect() };
        let mut survey = Survey { manifest, unreadable: Vec::new(), replicas: shards.into() };
        assert_eq!((survey.experts(), survey.unheld(), survey.rows()), (4, vec![3], vec![2, 3, 4, 0]));
        survey.replicas.entry(range(2, 3)).or_default().push(replica("b", 2, 3, &[], &[0, 0, 5, 7, 0, 0, 0, 1]));
        assert_eq!((survey.unheld(), survey.rows()), (vec![], vec![2, 3, 9, 8]));
        assert!(survey.agrees());
        survey.replicas.clear();
        assert_eq!((survey.experts(), survey.unheld()), (4, vec![0, 1, 2, 3]));
    }

    #[test]
    fn neighbours_are_a_range() {
        for (numbers, expected) in [(vec![], ""), (vec![3], "3"), (vec![0, 1, 2, 5, 7, 8], "0-2, 5, 7-8")] {
            assert_eq!(ranges(numbers), expected);
        }
    }
}
