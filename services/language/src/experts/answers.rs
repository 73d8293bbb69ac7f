//! What streams bring, for the engine that waits for it.

use std::sync::{Mutex, PoisonError};

use mesh::InstanceName;
use tokio::sync::Notify;

use super::replica::Failed;
use proto::v1;

/// What has become of a part of a step.
#[derive(Debug)]
pub(super) struct Answer {
    pub part: usize,
    pub from: InstanceName,
    pub outcome: Result<Piece, Failed>,
}

/// A part of the outputs of a batch.
#[derive(Debug)]
pub(super) struct Piece {
    /// Which row of the outputs it begins with.
    pub first: usize,
    pub rows: v1::Activations,
    /// Whether the replica has sent all of them now.
    pub last: bool,
}

/// The answers to one step that have come and were not looked at yet: no more than were asked for.
#[derive(Debug, Default)]
pub(super) struct Answers {
    come: Mutex<Vec<Answer>>,
    news: Notify,
}

impl Answers {
    pub fn put(&self, answer: Answer) {
        self.come.lock().unwrap_or_else(PoisonError::into_inner).push(answer);
        self.news.notify_one();
    }

    /// Waits until there are some.
    pub async fn take(&self) -> Vec<Answer> {
        loop {
            let come = std::mem::take(&mut *self.come.lock().unwrap_or_else(PoisonError::into_inner));
            if !come.is_empty() {
                return come;
            }
            self.news.notified().await;
        }
    }
}
