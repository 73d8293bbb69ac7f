use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use futures::stream::SelectAll;
use futures::{Stream, StreamExt};
use proto::v1;
use proto::v1::expert_reply::Reply;
use tokio_stream::wrappers::WatchStream;
use tonic::{Status, Streaming};

use crate::error::Failure;
use crate::stage::{Held, Stage, Waiting};
use crate::worker::{Answer, Piece};

/// One open stream: takes batches in, hands answers out as they come, and what is held first and whenever it changes.
///
/// It is polled by the call that it belongs to and has no task of its own: a batch costs no wake-up but that of the thread that computes it and
/// of the call that waits for it. No batch is taken before every answer that is ready has been handed out, so a reader that is slow holds at
/// most as many as wait in the queue.
pub struct Replies {
    stage: Stage,
    batches: Streaming<v1::ExpertBatch>,
    held: WatchStream<Option<Arc<Held>>>,
    waiting: SelectAll<Waiting>,
    /// What there still is to do.
    state: State,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Open,
    /// No more batches come; those that wait are answered.
    Finishing,
    /// Nothing is computed any more; what has been is handed out.
    Stopped,
    Over,
}

impl Replies {
    pub(crate) fn new(stage: Stage, batches: Streaming<v1::ExpertBatch>) -> Self {
        let held = WatchStream::new(stage.held());
        Self { stage, batches, held, waiting: SelectAll::new(), state: State::Open }
    }

    /// What is held, when it has changed.
    fn poll_held(&mut self, cx: &mut Context<'_>) -> Option<v1::ExpertReply> {
        if self.state == State::Stopped {
            return None;
        }
        match self.held.poll_next_unpin(cx) {
            Poll::Ready(Some(Some(held))) => return Some(reply(Reply::Holdings(held.holdings.clone()))),
            Poll::Ready(_) => self.state = State::Stopped,
            Poll::Pending => {}
        }
        None
    }

    /// The next answer, the end, or nothing yet.
    fn poll_answer(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<v1::ExpertReply, Status>>> {
        loop {
            match (self.waiting.poll_next_unpin(cx), self.state) {
                (Poll::Ready(Some(Some((id, answer)))), _) => return Poll::Ready(Some(Ok(answered(id, answer)))),
                (Poll::Ready(Some(None)), _) => self.state = State::Stopped,
                (Poll::Ready(None), State::Stopped) => {
                    self.state = State::Over;
                    return Poll::Ready(Some(Err(self.stage.crashed().into())));
                }
                (Poll::Ready(None), State::Finishing | State::Over) => {
                    self.state = State::Over;
                    return Poll::Ready(None);
                }
                (Poll::Ready(None), State::Open) | (Poll::Pending, _) => return Poll::Pending,
            }
        }
    }

    /// Takes the next batch; an answer if it is refused.
    fn poll_batch(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<v1::ExpertReply, Status>>> {
        match ready!(self.batches.poll_next_unpin(cx)) {
            Some(Ok(batch)) => match self.stage.submit(&batch) {
                Ok(waiting) => self.waiting.push(waiting),
                Err(failure) => return Poll::Ready(Some(Ok(failed(batch.id, failure)))),
            },
            Some(Err(status)) => {
                self.state = State::Over;
                return Poll::Ready(Some(Err(status)));
            }
            None => self.state = State::Finishing,
        }
        Poll::Ready(None)
    }
}

impl Stream for Replies {
    type Item = Result<v1::ExpertReply, Status>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = &mut *self;
        if this.state == State::Over {
            return Poll::Ready(None);
        }
        loop {
            if let Some(held) = this.poll_held(cx) {
                return Poll::Ready(Some(Ok(held)));
            }
            if let Poll::Ready(answer) = this.poll_answer(cx) {
                return Poll::Ready(answer);
            }
            if this.state != State::Open {
                return Poll::Pending;
            }
            if let Some(refusal) = ready!(this.poll_batch(cx)) {
                return Poll::Ready(Some(refusal));
            }
        }
    }
}

fn answered(id: u64, answer: Answer) -> v1::ExpertReply {
    match answer {
        Ok(Piece { first, rows }) => reply(Reply::Outputs(v1::ExpertOutputs { id, rows: Some(rows), first: first as u32 })),
        Err(failure) => failed(id, failure),
    }
}

fn failed(id: u64, failure: Failure) -> v1::ExpertReply {
    reply(Reply::Failure(v1::ExpertFailure { id, reason: failure.reason().into(), message: failure.to_string() }))
}

fn reply(reply: Reply) -> v1::ExpertReply {
    v1::ExpertReply { reply: Some(reply) }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::time::Duration;

    use checkpoint::Checkpoint;
    use mesh::{Channel, Mesh};
    use models::Shard;
    use placement::ExpertRange;
    use process::{Doors, Served};
    use proto::v1::activations::Encoding;
    use proto::v1::expert_failure::Reason;
    use proto::v1::experts_client::ExpertsClient;
    use tonic::Code;
    use tonic_health::pb::health_check_response::ServingStatus;
    use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};

    use super::*;
    use crate::batch::Batch;
    use crate::stage::Name;
    use crate::worker;

    /// Batches of two rows are its end.
    fn stumbling(shard: &Shard, batch: &mut Batch, send: &mut dyn FnMut(Piece)) -> Result<(), Failure> {
        assert!(batch.rows != 2, "two rows");
        worker::compute(shard, batch, send)
    }

    async fn serve() -> (Channel, Served) {
        let checkpoint = Arc::new(Checkpoint::open(&testkit::fixture("moe_v1")).unwrap());
        let own = ExpertRange { first: 0, last: 3 };
        let held = Held::new(models::load_shard(&checkpoint, own.experts(), 1).unwrap(), own, vec![1, 2].into());
        let stage = Stage::computing(Name { model: "moe".into(), shard: own }, held, 8, stumbling).unwrap();
        let mesh = Mesh::in_process();
        let offer = crate::offer(stage);
        let channel = mesh.channel(&offer.target);
        (channel, process::serve(&mesh, &Doors::default(), vec![offer]).await.unwrap())
    }

    fn batch(id: u64, rows: usize) -> v1::ExpertBatch {
        let rows = wire::activations::pack(vec![0.5; rows * 64], 64, Encoding::F32);
        v1::ExpertBatch { id, layer: 1, rows: Some(rows), experts: vec![2], counts: vec![1], places: vec![0], ..Default::default() }
    }

    async fn open(channel: &Channel, batches: Vec<v1::ExpertBatch>) -> tonic::Streaming<v1::ExpertReply> {
        // Stays open behind what is sent.
        let batches = futures::stream::iter(batches).chain(futures::stream::pending());
        let mut replies = ExpertsClient::new(channel.clone()).compute(batches).await.unwrap().into_inner();
        assert!(matches!(replies.next().await.unwrap().unwrap().reply, Some(Reply::Holdings(_))));
        replies
    }

    #[tokio::test]
    async fn a_crash_is_told_to_everybody() {
        let (channel, _served) = serve().await;
        let health = async || {
            let request = HealthCheckRequest { service: "janua.v1.Experts".into() };
            HealthClient::new(channel.clone()).check(request).await.unwrap().into_inner().status()
        };
        let mut idle = open(&channel, vec![]).await;
        let mut busy = open(&channel, vec![batch(1, 1), batch(2, 2), batch(3, 1)]).await;
        assert_eq!(health().await, ServingStatus::Serving);
        let mut replies = Vec::new();
        let status = loop {
            match tokio::time::timeout(Duration::from_secs(60), busy.next()).await.unwrap().unwrap() {
                Ok(reply) => replies.push(reply.reply.unwrap()),
                Err(status) => break status,
            }
        };
        assert!(matches!(&replies[0], Reply::Outputs(outputs) if outputs.id == 1));
        let Reply::Failure(failure) = &replies[1] else { panic!("a failure expected: {replies:?}") };
        assert_eq!((failure.id, failure.reason()), (2, Reason::Compute));
        assert_eq!(failure.message, "layer 1: the computation crashed: two rows");
        assert_eq!(replies.len(), 2, "{replies:?}");
        let gone = (Code::Unavailable, "the experts 0-3 of moe have stopped");
        assert_eq!((status.code(), status.message()), gone);
        let status = idle.next().await.unwrap().unwrap_err();
        assert_eq!((status.code(), status.message()), gone);
        testkit::wait_until("health follows", Duration::from_secs(60), async || health().await == ServingStatus::NotServing).await;
        let mut late = ExpertsClient::new(channel.clone()).compute(futures::stream::iter([batch(4, 1)])).await.unwrap().into_inner();
        assert_eq!(late.next().await.unwrap().unwrap_err().code(), Code::Unavailable);
        let status = ExpertsClient::new(channel.clone()).inspect(v1::InspectExpertsRequest {}).await.unwrap_err();
        assert_eq!((status.code(), status.message()), gone);
    }
}
