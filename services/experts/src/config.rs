use ::config::ConfigError;
use placement::{ExpertRange, RangeError};
use serde::Deserialize;

/// Section `[experts]`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ExpertsConfig {
    /// The shard that this process holds, counted from 0.
    pub shard: usize,
    /// Shards of every model. Absent: as many as `starts` has entries, or 1. A process that runs all services has all shards; 0: none, they
    /// are elsewhere.
    pub shards: Option<usize>,
    /// The expert that each shard begins with: 0, then ascending. Empty: shards that are as equal as can be.
    pub starts: Vec<usize>,
    /// Threads that compute. 0: one per core that the process may use.
    pub threads: usize,
    /// Most batches that wait for each model; more are answered with BUSY.
    pub queue_limit: usize,
}

impl Default for ExpertsConfig {
    fn default() -> Self {
        Self { shard: 0, shards: None, starts: Vec::new(), threads: 0, queue_limit: 64 }
    }
}

impl ExpertsConfig {
    /// Refuses what no model could be served with.
    pub fn check(&self) -> Result<(), ConfigError> {
        if !(1..=1 << 20).contains(&self.queue_limit) {
            return Err(ConfigError::invalid("experts", "queue_limit", format!("must be in 1..={}", 1 << 20)));
        }
        match self.shards {
            Some(shards) if !self.starts.is_empty() && shards != self.starts.len() => {
                let reason = format!("{shards} shards, but experts.starts has {} entries", self.starts.len());
                Err(ConfigError::invalid("experts", "shards", reason))
            }
            _ => self.split(usize::MAX).map(drop).map_err(|error| invalid(&error, "")),
        }
    }

    /// Shards of every model.
    pub fn count(&self) -> usize {
        self.shards.unwrap_or(self.starts.len().max(1))
    }

    /// The own shard of a model with so many experts.
    pub fn range(&self, model: &str, experts: usize) -> Result<ExpertRange, ConfigError> {
        self.split(experts).map_err(|error| invalid(&error, &format!(" (model {model})")))
    }

    fn split(&self, experts: usize) -> Result<ExpertRange, RangeError> {
        match self.starts.as_slice() {
            [] => ExpertRange::even(experts, self.count(), self.shard),
            starts => ExpertRange::between(experts, starts, self.shard),
        }
    }
}

fn invalid(error: &RangeError, of: &str) -> ConfigError {
    let key = match error {
        RangeError::TooMany { .. } => "shards",
        RangeError::NoSuchShard { .. } => "shard",
        RangeError::Starts(_) | RangeError::Malformed(_) => "starts",
    };
    let reason = match error {
        RangeError::TooMany { shards: 0, .. } => "must be at least 1".to_owned(),
        error => format!("{error}{of}"),
    };
    ConfigError::invalid("experts", key, reason)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(shard: usize, shards: Option<usize>, starts: &[usize]) -> ExpertsConfig {
        ExpertsConfig { shard, shards, starts: starts.to_vec(), ..ExpertsConfig::default() }
    }

    #[test]
    fn a_shard_is_a_range() {
        for (config, expected) in [
            (config(0, None, &[]), "0-15"),
            (config(1, Some(2), &[]), "8-15"),
            (config(2, Some(3), &[]), "11-15"),
            (config(0, None, &[0, 1, 9]), "0-0"),
            (config(1, Some(3), &[0, 1, 9]), "1-8"),
            (config(2, None, &[0, 1, 9]), "9-15"),
        ] {
            config.check().unwrap_or_else(|error| panic!("{error}"));
            assert_eq!(config.range("moe", 16).map(|range| range.to_string()).map_err(|error| error.to_string()), Ok(expected.to_owned()));
        }
    }

    #[test]
    fn bad_values_are_refused_by_name() {
        let base = ExpertsConfig::default();
        for (config, said) in [
            (ExpertsConfig { queue_limit: 0, ..base.clone() }, "experts.queue_limit: must be in"),
            (ExpertsConfig { queue_limit: 1 << 21, ..base }, "experts.queue_limit: must be in"),
            (config(0, Some(0), &[]), "experts.shards: must be at least 1"),
            (config(2, Some(2), &[]), "experts.shard: shard 2 of 2"),
            (config(1, None, &[]), "experts.shard: shard 1 of 1"),
            (config(0, Some(3), &[0, 4]), "experts.shards: 3 shards, but experts.starts has 2"),
            (config(2, None, &[0, 4]), "experts.shard: shard 2 of 2"),
            (config(0, None, &[1, 4]), "experts.starts: [1, 4]: the first shard"),
            (config(0, None, &[0, 4, 4]), "experts.starts: [0, 4, 4]: each shard"),
        ] {
            let error = config.check().err().map(|error| error.to_string()).unwrap_or_default();
            assert!(error.starts_with(said), "{error}: {said} expected");
        }
    }

    #[test]
    fn what_does_not_fit_a_model_names_it() {
        for (config, said) in [
            (config(0, Some(17), &[]), "experts.shards: 17 shards of 16 experts: some would be empty (model moe)"),
            (config(0, None, &[0, 16]), "experts.starts: [0, 16]: the model has 16 experts (model moe)"),
        ] {
            config.check().unwrap_or_else(|error| panic!("{error}"));
            let error = config.range("moe", 16).err().map(|error| error.to_string()).unwrap_or_default();
            assert!(error.starts_with(said), "{error}: {said} expected");
        }
    }
}
