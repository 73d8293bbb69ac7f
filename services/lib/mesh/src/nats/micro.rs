//! The NATS services API (ADR-32): `nats micro ls`, `ping`, `info` and `stats` see every offered target.
//!
//! Spoken here rather than taken from the client library, whose endpoints would also own the subscription that brings the calls
//! and could not be left without losing some (see `offer.rs`).

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use async_nats::Subject;
use bytes::Bytes;
use futures::StreamExt as _;
use futures::stream::select_all;
use serde_json::{Value, json};
use tokio::task::JoinSet;

use super::node::Node;
use super::offer::{Located, QUEUE};
use crate::error::MeshError;
use crate::gate::Instance;
use crate::target::Named;

/// What the services API says of one offered target.
pub(crate) struct Card {
    /// `janua-tokenizer`: the API allows letters, digits, `-` and `_`.
    name: String,
    id: String,
    subject: String,
    metadata: BTreeMap<&'static str, String>,
    started: String,
    instance: Arc<Instance>,
}

impl Card {
    pub(crate) fn new(target: &Named, located: &Located, instance: Arc<Instance>) -> Self {
        let parts = &target.target;
        let mut metadata = BTreeMap::from([
            ("service", parts.service.clone()),
            ("model", parts.model.clone()),
            ("instance", located.instance.clone()),
            ("process", std::process::id().to_string()),
        ]);
        metadata.extend(parts.shard.clone().map(|shard| ("shard", shard)));
        metadata.extend(located.address.map(|address| ("address", address.to_string())));
        let name: String = parts.service.chars().map(|letter| if letter.is_ascii_alphanumeric() { letter } else { '-' }).collect();
        Self {
            name: format!("janua-{name}"),
            id: located.instance.clone(),
            subject: target.subject.to_string(),
            metadata,
            started: rfc3339(SystemTime::now()),
            instance,
        }
    }

    /// The answer to `$SRV.<verb>`.
    fn answer(&self, verb: &str) -> Option<Value> {
        let kind = match verb {
            "PING" => "ping",
            "INFO" => "info",
            "STATS" => "stats",
            _ => return None,
        };
        let mut answer = json!({
            "type": format!("io.nats.micro.v1.{kind}_response"),
            "name": self.name,
            "id": self.id,
            "version": env!("CARGO_PKG_VERSION"),
            "metadata": self.metadata,
        });
        let mut endpoint = json!({ "name": "calls", "subject": self.subject, "queue_group": QUEUE });
        match verb {
            "INFO" => {
                answer["description"] = json!(format!("gRPC: {}", self.instance.table.routes.names().join(", ")));
                endpoint["metadata"] = json!({});
                answer["endpoints"] = json!([endpoint]);
            }
            "STATS" => {
                let counts = self.instance.gate.counts();
                endpoint["num_requests"] = json!(counts.calls);
                endpoint["num_errors"] = json!(counts.errors);
                endpoint["last_error"] = json!("");
                endpoint["processing_time"] = json!(nanoseconds(counts.busy));
                endpoint["average_processing_time"] = json!(nanoseconds(counts.busy) / counts.calls.max(1));
                answer["started"] = json!(self.started);
                answer["endpoints"] = json!([endpoint]);
            }
            _ => {}
        }
        Some(answer)
    }
}

/// Answers the services API until the target is withdrawn.
pub(crate) async fn announce(node: &Arc<Node>, card: Arc<Card>, tasks: &mut JoinSet<()>) -> Result<(), MeshError> {
    let mut asked = Vec::new();
    for subject in ["$SRV.*".to_owned(), format!("$SRV.*.{}", card.name), format!("$SRV.*.{}.{}", card.name, card.id)] {
        asked.push(node.subscribe(Subject::from(subject), None).await?);
    }
    let node = node.clone();
    tasks.spawn(async move {
        let mut asked = select_all(asked).take_until(Box::pin(withdrawn(card.instance.clone())));
        while let Some(message) = asked.next().await {
            let answer = message.subject.split('.').nth(1).and_then(|verb| card.answer(verb));
            if let (Some(reply), Some(answer)) = (message.reply, answer) {
                node.post(&reply, Bytes::from(answer.to_string()));
            }
        }
    });
    Ok(())
}

async fn withdrawn(instance: Arc<Instance>) {
    instance.gate.withdrawn().await;
}

fn nanoseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

/// `2026-11-24T03:28:58Z`. The calendar is Howard Hinnant's `civil_from_days`, for days since 1970.
fn rfc3339(time: SystemTime) -> String {
    let seconds = time.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    let (days, second) = (seconds / 86_400, seconds % 86_400);
    let shifted = days + 719_468;
    let (era, day_of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 { shifted_month + 3 } else { shifted_month - 9 };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    format!("{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}Z", second / 3600, second / 60 % 60, second % 60)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_spelled_as_rfc_3339() {
        for (seconds, text) in [
            (0, "1970-01-01T00:00:00Z"),
            (951_782_399, "2000-02-28T23:59:59Z"),
            (951_782_400, "2000-02-29T00:00:00Z"),
            (1_795_490_938, "2026-11-24T03:28:58Z"),
            (4_107_542_400, "2100-03-01T00:00:00Z"),
        ] {
            assert_eq!(rfc3339(UNIX_EPOCH + Duration::from_secs(seconds)), text);
        }
    }
}
