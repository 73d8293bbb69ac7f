use std::sync::Arc;
use std::time::Instant;

use domain::{Input, Invalid, OutputKind};
use text::{Detokenizer, Prepared, PreparedSegment, TextCodec};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use wire::input::InputLimits;

use crate::config::TokenizerConfig;
use crate::error::Error;
use crate::metrics;

/// Texts up to this many bytes are encoded at once, in the caller's task: a few milliseconds. Longer ones would hold up others too long.
const SMALL: usize = 4 << 10;

/// More ids than any context holds, and few enough that their text fits a message.
const MAX_IDS: usize = 1 << 20;

/// How much text may be encoded at once, and so how much memory that takes. Clones share it.
#[derive(Clone)]
pub struct Budget {
    kib: Arc<Semaphore>,
    all: usize,
}

impl Budget {
    /// Room for `bytes` of long texts.
    pub fn new(bytes: usize) -> Self {
        let all = bytes.div_ceil(1024).clamp(1, Semaphore::MAX_PERMITS);
        Self { kib: Arc::new(Semaphore::new(all)), all }
    }

    /// Waits for room for a text, in turn. One that is larger than all there is takes all.
    async fn take(&self, bytes: usize) -> Result<OwnedSemaphorePermit, Error> {
        let kib = bytes.div_ceil(1024).min(self.all) as u32; // the limits on messages are far below 4 TiB
        self.kib.clone().acquire_many_owned(kib).await.map_err(|error| Error::Stopped(error.to_string()))
    }
}

/// The work of the service for one model. Cheap to clone.
#[derive(Clone)]
pub struct Stage {
    model: Arc<str>,
    codec: Arc<TextCodec>,
    budget: Budget,
    limits: InputLimits,
}

impl Stage {
    pub fn new(model: &str, codec: TextCodec, budget: Budget, config: &TokenizerConfig) -> Self {
        Self { model: model.into(), codec: Arc::new(codec), budget, limits: config.input_limits() }
    }

    pub(crate) fn model(&self) -> Arc<str> {
        self.model.clone()
    }

    pub(crate) fn limits(&self) -> &InputLimits {
        &self.limits
    }

    /// Renders and encodes a request's input.
    pub async fn prepare(&self, input: Input, output: OutputKind) -> Result<Prepared, Error> {
        let bytes = input.texts().map(str::len).sum();
        self.encoded(bytes, move |codec| codec.prepare(&input, output), |prepared| tokens(&prepared.segments)).await
    }

    /// Token ids of one text.
    pub async fn encode(&self, text: String, bos: bool) -> Result<Vec<u32>, Error> {
        if text.len() > self.limits.text_bytes {
            let reason = format!("{} bytes of text, at most {} are taken", text.len(), self.limits.text_bytes);
            return Err(Invalid::new("text", reason).into());
        }
        self.encoded(text.len(), move |codec| codec.try_encode(&text, bos), Vec::len).await
    }

    /// Text of token ids.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String, Error> {
        check_count("ids", ids)?;
        metrics::decoded(&self.model, ids.len());
        Ok(self.codec.decode(ids, skip_special))
    }

    /// A stream of ids to be turned into text.
    pub fn detokenizer(&self, stop: Vec<String>) -> Detokenizer {
        self.codec.detokenizer(stop)
    }

    /// The next ids of a stream, and with `last` what the stream still holds back.
    pub fn detokenize(&self, detokenizer: &mut Detokenizer, ids: &[u32], last: bool) -> Result<text::Detokenized, Error> {
        check_count("tokens.ids", ids)?;
        let mut answer = detokenizer.push(ids);
        if last {
            let rest = detokenizer.finish();
            answer.text.push_str(&rest.text);
            answer.stopped = rest.stopped;
        }
        Ok(answer)
    }

    /// The bytes of one token; none for an unknown id.
    pub fn token_bytes(&self, id: u32) -> Vec<u8> {
        self.codec.token_bytes(id).unwrap_or_default()
    }

    /// Runs `encode` on a text of `bytes`: short ones here, long ones on a thread that may block, as many as the budget allows.
    async fn encoded<T: Send + 'static>(
        &self,
        bytes: usize,
        encode: impl FnOnce(&TextCodec) -> Result<T, text::TextError> + Send + 'static,
        count: impl FnOnce(&T) -> usize,
    ) -> Result<T, Error> {
        let start = Instant::now();
        let result = if bytes <= SMALL {
            encode(&self.codec)?
        } else {
            let permit = self.budget.take(bytes).await?;
            let codec = self.codec.clone();
            let work = move || {
                let _permit = permit; // given back when the work is done, also when nobody waits for it any more
                encode(&codec)
            };
            tokio::task::spawn_blocking(work).await.map_err(|error| Error::Stopped(error.to_string()))??
        };
        let tokens = count(&result);
        metrics::encoded(&self.model, bytes, tokens, start.elapsed());
        tracing::debug!(model = &*self.model, bytes, tokens, "encoded");
        Ok(result)
    }
}

fn tokens(segments: &[PreparedSegment]) -> usize {
    let count = |segment: &PreparedSegment| if let PreparedSegment::Tokens(ids) = segment { ids.len() } else { 0 };
    segments.iter().map(count).sum()
}

fn check_count(field: &str, ids: &[u32]) -> Result<(), Invalid> {
    if ids.len() > MAX_IDS {
        return Err(Invalid::new(field, format!("{} ids, at most {MAX_IDS} are taken", ids.len())));
    }
    Ok(())
}
