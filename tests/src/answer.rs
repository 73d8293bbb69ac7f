use std::collections::BTreeMap;

use proto::v1;
use proto::v1::generate_response::Event;
use tonic::{Status, Streaming};

/// Everything that one request was answered with.
#[derive(Debug, Default)]
pub struct Answer {
    /// Text of each choice.
    pub texts: BTreeMap<u32, String>,
    /// Token ids of each choice.
    pub ids: BTreeMap<u32, Vec<u32>>,
    pub logprobs: Vec<v1::TokenLogprobs>,
    pub reasons: BTreeMap<u32, v1::FinishReason>,
    pub images: Vec<v1::GeneratedImage>,
    pub previews: Vec<v1::ImagePreview>,
    /// The last progress of each image: done, total.
    pub progress: BTreeMap<u32, (u32, u32)>,
    pub started: Option<v1::Started>,
    pub usage: Option<v1::Usage>,
}

impl Answer {
    /// Reads a stream to its end, checking the order that the contract promises.
    pub async fn read(mut stream: Streaming<v1::GenerateResponse>) -> Result<Self, Status> {
        let mut answer = Self::default();
        while let Some(message) = stream.message().await? {
            answer.take(message.event.expect("a response holds an event"));
        }
        assert!(answer.started.is_some() && answer.usage.is_some(), "an answer begins with Started and ends with Completed: {answer:?}");
        Ok(answer)
    }

    /// Adds one event.
    pub fn take(&mut self, event: Event) {
        assert!(self.usage.is_none(), "an event after Completed: {event:?}");
        let first = matches!(event, Event::Started(_));
        assert_eq!(self.started.is_none(), first, "Started comes first and once: {event:?}");
        match event {
            Event::Started(started) => self.started = Some(started),
            Event::Text(delta) => {
                self.texts.entry(delta.choice).or_default().push_str(&delta.text);
                self.ids.entry(delta.choice).or_default().extend(delta.token_ids);
                self.logprobs.extend(delta.logprobs);
            }
            Event::ImageProgress(progress) => {
                let before = self.progress.insert(progress.image, (progress.done, progress.total));
                assert!(before.is_none_or(|(done, _)| done <= progress.done), "progress goes forward: {before:?} {progress:?}");
            }
            Event::ImagePreview(preview) => self.previews.push(preview),
            Event::Image(image) => self.images.push(image),
            Event::Finished(end) => {
                let before = self.reasons.insert(end.choice, end.reason());
                assert!(before.is_none(), "choice {} ended twice", end.choice);
            }
            Event::Completed(completed) => self.usage = completed.usage,
        }
    }

    /// Token ids of the first choice.
    pub fn ids(&self) -> &[u32] {
        self.ids.get(&0).map_or(&[], Vec::as_slice)
    }

    /// Text of the first choice.
    pub fn text(&self) -> &str {
        self.texts.get(&0).map_or("", String::as_str)
    }
}
