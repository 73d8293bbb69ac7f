use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};

use futures::future::BoxFuture;
use proto::v1;
use proto::v1::generate_response::Event;
use tokio::sync::mpsc;
use tonic::Status;

use crate::error::Error;

/// Events that may wait for a slow client before the work behind them pauses.
const EVENTS_AHEAD: usize = 16;

/// Where the stages put what the client shall see.
#[derive(Debug, Clone)]
pub(crate) struct Events(mpsc::Sender<v1::GenerateResponse>);

impl Events {
    pub(crate) async fn send(&self, event: Event) -> Result<(), Error> {
        self.0.send(v1::GenerateResponse { event: Some(event) }).await.map_err(|_| Error::ClientGone)
    }
}

/// What one choice or image took.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Spent {
    pub(crate) output_tokens: u32,
    pub(crate) cached_tokens: u32,
    pub(crate) degraded_tokens: u32,
}

/// The stream a client reads. Reading it is what drives the request: nothing is spawned, so a client that reads slowly slows its own
/// request down, and dropping the stream drops every call under it at once.
pub struct Answer {
    work: Option<BoxFuture<'static, Result<(), Error>>>,
    events: mpsc::Receiver<v1::GenerateResponse>,
    failure: Option<Error>,
}

impl Answer {
    /// The stream of the events that `work` sends, and of its error at the end.
    pub(crate) fn new<W>(work: impl FnOnce(Events) -> W) -> Self
    where
        W: Future<Output = Result<(), Error>> + Send + 'static,
    {
        let (sender, events) = mpsc::channel(EVENTS_AHEAD);
        Self { work: Some(Box::pin(work(Events(sender)))), events, failure: None }
    }
}

impl futures::Stream for Answer {
    type Item = Result<v1::GenerateResponse, Status>;

    fn poll_next(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = self.get_mut();
        // What is ready goes out first, which also makes room for the work to go on.
        if let Poll::Ready(Some(event)) = this.events.poll_recv(context) {
            return Poll::Ready(Some(Ok(event)));
        }
        if let Some(work) = &mut this.work
            && let Poll::Ready(result) = work.as_mut().poll(context)
        {
            this.work = None;
            this.failure = result.err();
        }
        match this.events.poll_recv(context) {
            Poll::Ready(Some(event)) => Poll::Ready(Some(Ok(event))),
            // The sender went with the work.
            Poll::Ready(None) => Poll::Ready(this.failure.take().map(|error| Err(error.into()))),
            Poll::Pending => Poll::Pending,
        }
    }
}
