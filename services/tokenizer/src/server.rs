use std::pin::Pin;

use domain::Invalid;
use futures::{Stream, StreamExt, stream};
use proto::v1;
use proto::v1::tokenizer_server::Tokenizer;
use text::{Detokenizer, PreparedSegment};
use tonic::{Request, Response, Status, Streaming};
use wire::tokenizer::Detokenize;

use crate::error::Error;
use crate::metrics::OpenStream;
use crate::stage::Stage;

/// The tonic service of one model.
pub struct Server {
    stage: Stage,
}

impl Server {
    pub fn new(stage: Stage) -> Self {
        Self { stage }
    }
}

#[tonic::async_trait]
impl Tokenizer for Server {
    type DetokenizeStream = Pin<Box<dyn Stream<Item = Result<v1::DetokenizeResponse, Status>> + Send>>;

    async fn prepare(&self, request: Request<v1::PrepareRequest>) -> Result<Response<v1::PrepareResponse>, Status> {
        let (input, output) = wire::tokenizer::prepare_request(request.into_inner(), self.stage.limits()).map_err(Error::from)?;
        let prepared = self.stage.prepare(input, output).await?;
        let prepared = wire::tokenizer::Prepared {
            segments: segments(prepared.segments),
            unconditional: segments(prepared.unconditional),
            eos_token_ids: prepared.eos_token_ids,
        };
        Ok(Response::new(wire::tokenizer::to_prepared(prepared)))
    }

    async fn encode(&self, request: Request<v1::EncodeTextRequest>) -> Result<Response<v1::EncodeTextResponse>, Status> {
        let v1::EncodeTextRequest { text, omit_bos } = request.into_inner();
        let ids = self.stage.encode(text, !omit_bos).await?;
        Ok(Response::new(v1::EncodeTextResponse { ids }))
    }

    async fn decode(&self, request: Request<v1::DecodeTextRequest>) -> Result<Response<v1::DecodeTextResponse>, Status> {
        let v1::DecodeTextRequest { ids, skip_special } = request.into_inner();
        let text = self.stage.decode(&ids, skip_special)?;
        Ok(Response::new(v1::DecodeTextResponse { text }))
    }

    async fn detokenize(&self, request: Request<Streaming<v1::DetokenizeRequest>>) -> Result<Response<Self::DetokenizeStream>, Status> {
        let dialogue = Dialogue { stage: self.stage.clone(), turn: Turn::Opening, open: OpenStream::new(self.stage.model()) };
        // The response begins before the first message: a client may wait for it before it sends anything.
        let answers = stream::try_unfold((request.into_inner(), dialogue), |(mut requests, mut dialogue)| async move {
            while let Some(message) = requests.next().await.transpose()? {
                if let Some(answer) = dialogue.answer(message)? {
                    return Ok(Some((answer, (requests, dialogue))));
                }
            }
            Ok(None)
        });
        Ok(Response::new(Box::pin(answers)))
    }
}

/// One detokenising stream.
struct Dialogue {
    stage: Stage,
    turn: Turn,
    open: OpenStream,
}

/// What a stream waits for.
enum Turn {
    Opening,
    Tokens(Detokenizer),
    /// Nothing: the last tokens have come.
    Over,
}

impl Dialogue {
    /// The answer to `message`; none to the opening.
    fn answer(&mut self, message: v1::DetokenizeRequest) -> Result<Option<v1::DetokenizeResponse>, Error> {
        match (wire::tokenizer::detokenize(message)?, &mut self.turn) {
            (Detokenize::Open(stop), Turn::Opening) => {
                self.turn = Turn::Tokens(self.stage.detokenizer(stop));
                Ok(None)
            }
            (Detokenize::Tokens { ids, mut logprobs, last }, Turn::Tokens(detokenizer)) => {
                let answer = self.stage.detokenize(detokenizer, &ids, last)?;
                self.open.tokens += ids.len();
                if last {
                    self.turn = Turn::Over;
                }
                logprobs.truncate(answer.accepted);
                let logprobs = wire::tokenizer::with_bytes(logprobs, |id| self.stage.token_bytes(id).into());
                Ok(Some(v1::DetokenizeResponse { text: answer.text, accepted: answer.accepted as u32, stopped: answer.stopped, logprobs }))
            }
            (Detokenize::Open(_), _) => Err(Invalid::new("open", "the stream is open already").into()),
            (Detokenize::Tokens { .. }, Turn::Opening) => Err(Invalid::new("tokens", "the first message must be `open`").into()),
            (Detokenize::Tokens { .. }, Turn::Over) => Err(Invalid::new("tokens", "tokens after the last ones").into()),
        }
    }
}

fn segments(segments: Vec<PreparedSegment>) -> Vec<wire::tokenizer::PreparedSegment> {
    let segment = |segment| match segment {
        PreparedSegment::Tokens(ids) => wire::tokenizer::PreparedSegment::Tokens(ids),
        PreparedSegment::Image(index) => wire::tokenizer::PreparedSegment::Image(index),
        PreparedSegment::Padding { image, id } => wire::tokenizer::PreparedSegment::Padding { image, id },
    };
    segments.into_iter().map(segment).collect()
}
