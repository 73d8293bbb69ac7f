//! Streams whose ids are known, running all the time.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use futures::future::join_all;
use proto::v1;
use proto::v1::generate_response::Event;
use proto::v1::janua_client::JanuaClient;
use tokio::task::JoinSet;
use tonic::transport::Channel;
use tonic::{Status, Streaming};

use crate::installation::LIMIT;

pub type Client = JanuaClient<Channel>;

/// Request number `i`: its own prompt, seed and length; every other one is greedy.
pub fn request(i: usize, tokens: u32) -> v1::GenerateRequest {
    let text = format!("The bright lantern measures the quiet harbor, and teacher {i} counts {} planets.", i * 7 % 31);
    let part = v1::Part { part: Some(v1::part::Part::Text(text)) };
    v1::GenerateRequest {
        input: Some(v1::generate_request::Input::Completion(v1::Completion { parts: vec![part], omit_bos: false })),
        sampling: Some(v1::Sampling {
            temperature: Some((i % 2) as f32),
            seed: Some(i as u64),
            max_tokens: Some(tokens),
            ignore_eos: true,
            ..v1::Sampling::default()
        }),
        ..v1::GenerateRequest::default()
    }
}

/// What a stream brought until it ended.
#[derive(Debug)]
pub struct Outcome {
    pub ids: Vec<u32>,
    pub end: Result<(), Status>,
}

/// A stream that is being read.
pub struct Reading {
    stream: Streaming<v1::GenerateResponse>,
    ids: Vec<u32>,
}

impl Reading {
    pub async fn begin(client: &Client, request: v1::GenerateRequest) -> Result<Self, Status> {
        let stream = client.clone().generate(request).await?.into_inner();
        Ok(Self { stream, ids: Vec::new() })
    }

    /// Reads until there are `goal` ids, or to the end; `false` at the end.
    pub async fn until(&mut self, goal: usize) -> Result<bool, Status> {
        while self.ids.len() < goal {
            match tokio::time::timeout(LIMIT, self.stream.message()).await.expect("the stream goes on")? {
                Some(v1::GenerateResponse { event: Some(Event::Text(delta)) }) => self.ids.extend(delta.token_ids),
                Some(_) => {}
                None => return Ok(false),
            }
        }
        Ok(true)
    }

    pub async fn rest(mut self) -> Outcome {
        let end = self.until(usize::MAX).await.map(drop);
        Outcome { ids: self.ids, end }
    }
}

/// The whole of a stream.
pub async fn whole(client: &Client, request: v1::GenerateRequest) -> Outcome {
    match Reading::begin(client, request).await {
        Ok(reading) => reading.rest().await,
        Err(status) => Outcome { ids: Vec::new(), end: Err(status) },
    }
}

/// Ids of each request when nothing disturbs it.
pub async fn undisturbed(client: &Client, requests: &[v1::GenerateRequest]) -> Vec<Vec<u32>> {
    let outcomes = join_all(requests.iter().map(|request| whole(client, request.clone()))).await;
    let checked = outcomes.into_iter().zip(requests).map(|(outcome, request)| {
        outcome.end.expect("nothing disturbs it");
        assert_eq!(outcome.ids.len() as u32, request.sampling.as_ref().unwrap().max_tokens.unwrap());
        outcome.ids
    });
    checked.collect()
}

/// Requests that are sent again whenever they are answered; every answer is compared with what it must be.
pub struct Load {
    streams: JoinSet<()>,
    stop: Arc<AtomicBool>,
    done: Arc<AtomicUsize>,
}

impl Load {
    pub fn start(client: &Client, requests: Vec<v1::GenerateRequest>, expected: &[Vec<u32>]) -> Self {
        let mut load = Self { streams: JoinSet::new(), stop: Arc::default(), done: Arc::default() };
        for (number, (request, expected)) in requests.into_iter().zip(expected.iter().cloned()).enumerate() {
            let (client, stop, done) = (client.clone(), load.stop.clone(), load.done.clone());
            load.streams.spawn(async move {
                while !stop.load(Ordering::Relaxed) {
                    let outcome = whole(&client, request.clone()).await;
                    outcome.end.unwrap_or_else(|status| panic!("stream {number} failed after {} ids: {status:?}", outcome.ids.len()));
                    assert_eq!(outcome.ids, expected, "stream {number}: no id lost, none repeated, none changed");
                    done.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        load
    }

    /// Streams that have come to their end so far.
    pub fn done(&self) -> usize {
        self.done.load(Ordering::Relaxed)
    }

    /// Fails when a stream has failed already.
    pub fn check(&mut self) {
        while let Some(ended) = self.streams.try_join_next() {
            ended.unwrap();
        }
    }

    /// Waits until the streams that run now have come to their end, and counts all.
    pub async fn stop(mut self) -> usize {
        self.stop.store(true, Ordering::Relaxed);
        while let Some(ended) = self.streams.join_next().await {
            ended.unwrap();
        }
        self.done()
    }
}
