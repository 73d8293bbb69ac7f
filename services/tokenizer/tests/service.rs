//! The service through a mesh channel, as other services call it.
#![allow(clippy::unwrap_used)]

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use checkpoint::Checkpoint;
use config::Config;
use futures::stream::FuturesUnordered;
use futures::{StreamExt, stream};
use mesh::{Channel, MAX_MESSAGE_BYTES, Mesh, Target};
use process::{Doors, Host, LoadedModel, Served, Silent};
use proto::v1;
use proto::v1::tokenizer_client::TokenizerClient;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status, Streaming};
use tonic_types::StatusExt;

/// Limit of everything that is waited for.
const PATIENCE: Duration = Duration::from_secs(60);

struct Service {
    client: TokenizerClient<Channel>,
    _served: Served,
}

/// The service of one fixture with these settings.
async fn serve(fixture: &str, settings: &[(&str, &str)]) -> Service {
    let dir = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/fixtures")).join(fixture);
    let checkpoint = Arc::new(Checkpoint::open(&dir).unwrap());
    let settings = settings.iter().map(|(key, value)| (format!("tokenizer.{key}"), value.to_string())).collect::<Vec<_>>();
    let config = Config::resolve(None, [], &settings).unwrap();
    let models = vec![LoadedModel::new("tiny", checkpoint)];
    let host = Host::new(config, Mesh::in_process(), models, Arc::new(Silent));
    let offers = tokenizer::start(&host).await.unwrap();
    assert_eq!(offers.len(), 1);
    let served = process::serve(&host.mesh, &Doors::default(), offers).await.unwrap();
    let client = TokenizerClient::new(host.mesh.channel(&Target::new("tokenizer", "tiny")));
    let client = client.max_decoding_message_size(MAX_MESSAGE_BYTES).max_encoding_message_size(MAX_MESSAGE_BYTES);
    Service { client, _served: served }
}

fn text(text: &str) -> v1::Part {
    v1::Part { part: Some(v1::part::Part::Text(text.to_owned())) }
}

fn image() -> v1::Part {
    v1::Part { part: Some(v1::part::Part::Image(v1::ImagePart::default())) }
}

fn message(role: v1::Role, parts: Vec<v1::Part>) -> v1::Message {
    v1::Message { role: role.into(), parts }
}

fn chat(messages: Vec<v1::Message>) -> v1::PrepareRequest {
    let input = Some(v1::prepare_request::Input::Chat(v1::Conversation { messages }));
    v1::PrepareRequest { input, output: v1::OutputKind::Text.into() }
}

fn completion(parts: Vec<v1::Part>) -> v1::PrepareRequest {
    let input = Some(v1::prepare_request::Input::Completion(v1::Completion { parts, omit_bos: false }));
    v1::PrepareRequest { input, output: v1::OutputKind::Text.into() }
}

/// The fields that a refusal names in its details.
fn fields(status: &Status) -> Vec<String> {
    let violations = status.get_details_bad_request().map(|details| details.field_violations).unwrap_or_default();
    violations.into_iter().map(|violation| violation.field).collect()
}

fn check_refusal(status: &Status, field: &str, reason: &str) {
    assert_eq!(status.code(), Code::InvalidArgument, "{status}");
    assert_eq!(fields(status), [field], "{status}");
    assert!(status.message().starts_with(&format!("{field}: ")) && status.message().contains(reason), "{status}");
}

/// A detokenising stream, one message at a time.
struct Dialogue {
    requests: mpsc::Sender<v1::DetokenizeRequest>,
    answers: Streaming<v1::DetokenizeResponse>,
}

impl Dialogue {
    /// Opens the call without sending anything.
    async fn start(service: &Service) -> Self {
        let (requests, receiver) = mpsc::channel(4);
        let answers = service.client.clone().detokenize(ReceiverStream::new(receiver)).await.unwrap().into_inner();
        Self { requests, answers }
    }

    async fn open(service: &Service, stop: &[&str]) -> Self {
        let dialogue = Self::start(service).await;
        dialogue.send_open(stop).await;
        dialogue
    }

    async fn send_open(&self, stop: &[&str]) {
        let open = v1::DetokenizeOpen { stop: stop.iter().map(|text| text.to_string()).collect() };
        self.requests.send(v1::DetokenizeRequest { request: Some(v1::detokenize_request::Request::Open(open)) }).await.unwrap();
    }

    async fn send(&self, tokens: v1::DetokenizeTokens) {
        self.requests.send(v1::DetokenizeRequest { request: Some(v1::detokenize_request::Request::Tokens(tokens)) }).await.unwrap();
    }

    async fn answer(&mut self) -> Result<v1::DetokenizeResponse, Status> {
        tokio::time::timeout(PATIENCE, self.answers.next()).await.unwrap().unwrap()
    }

    async fn ask(&mut self, ids: &[u32], last: bool) -> (String, u32, bool) {
        self.send(v1::DetokenizeTokens { ids: ids.to_vec(), logprobs: vec![], last }).await;
        let answer = self.answer().await.unwrap();
        (answer.text, answer.accepted, answer.stopped)
    }
}

fn fim(prefix: &str, suffix: &str) -> v1::PrepareRequest {
    let input = v1::prepare_request::Input::Fim(v1::FillInTheMiddle { prefix: prefix.into(), suffix: suffix.into() });
    v1::PrepareRequest { input: Some(input), output: 0 }
}

#[tokio::test]
async fn prompts_are_prepared_with_slots_for_pictures() {
    let mut service = serve("janus", &[]).await;
    let user = message(v1::Role::User, vec![image(), text("What is in the image?")]);
    let prepared = service.client.prepare(chat(vec![message(v1::Role::System, vec![text("Be brief.")]), user])).await.unwrap().into_inner();
    let prepared = wire::tokenizer::prepared(prepared).unwrap();
    let golden: serde_json::Value =
        serde_json::from_str(include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/fixtures/janus/golden.json"))).unwrap();
    let expected: Vec<u64> = golden["prompts"][0]["input_ids"].as_array().unwrap().iter().map(|id| id.as_u64().unwrap()).collect();
    let mut ids = Vec::new();
    for segment in &prepared.segments {
        match segment {
            wire::tokenizer::PreparedSegment::Tokens(tokens) => ids.extend(tokens.iter().map(|id| u64::from(*id))),
            wire::tokenizer::PreparedSegment::Image(index) => ids.extend([488 + u64::from(*index); 36]),
            wire::tokenizer::PreparedSegment::Padding { .. } => panic!("padding in a prompt for text"),
        }
    }
    assert_eq!(ids, expected);
    assert_eq!((prepared.unconditional.len(), prepared.eos_token_ids.as_slice()), (0, &[481][..]));

    let mut drawing = chat(vec![message(v1::Role::User, vec![text("a red lantern by the quiet river")])]);
    drawing.output = v1::OutputKind::Image.into();
    let prepared = wire::tokenizer::prepared(service.client.prepare(drawing).await.unwrap().into_inner()).unwrap();
    let expected: Vec<u32> =
        golden["text_to_image"][0]["cond_ids"].as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect();
    let mut padded = vec![482; expected.len()];
    (padded[0], padded[expected.len() - 1]) = (480, 489);
    assert_eq!(prepared.segments, [wire::tokenizer::PreparedSegment::Tokens(expected)]);
    assert_eq!(prepared.unconditional, [wire::tokenizer::PreparedSegment::Tokens(padded)]);
}

#[tokio::test]
async fn texts_are_encoded_and_decoded() {
    let mut service = serve("llama", &[]).await;
    let encode = |text: &str, omit_bos| v1::EncodeTextRequest { text: text.to_owned(), omit_bos };
    let with_bos = service.client.encode(encode("The quick river compiles a small theorem.", false)).await.unwrap().into_inner().ids;
    assert_eq!(with_bos, [480, 250, 344, 66, 74, 423, 335, 416, 248, 375, 249, 279, 13]);
    let without = service.client.encode(encode("The quick river compiles a small theorem.", true)).await.unwrap().into_inner().ids;
    assert_eq!(without, with_bos[1..]);
    for (skip_special, expected) in [(true, ""), (false, "<｜begin▁of▁sentence｜>")] {
        let decoded = service.client.decode(v1::DecodeTextRequest { ids: with_bos.clone(), skip_special }).await.unwrap().into_inner();
        assert_eq!(decoded.text, format!("{expected}The quick river compiles a small theorem."));
    }
    // Half a character, and an id that no token has.
    let decoded = service.client.decode(v1::DecodeTextRequest { ids: vec![158, 4_000_000_000], skip_special: true }).await.unwrap();
    assert_eq!(decoded.into_inner().text, "\u{FFFD}");
}

#[tokio::test]
async fn streams_are_detokenised_up_to_a_stop_string() {
    let mut service = serve("llama", &[]).await;
    let encode = |text: &str| v1::EncodeTextRequest { text: text.to_owned(), omit_bos: true };
    let ids = service.client.encode(encode("One 你好.\n\nUser: two")).await.unwrap().into_inner().ids;

    // Without stop strings, one id at a time: the concatenation is the text, whatever the ids split.
    let mut dialogue = Dialogue::open(&service, &[]).await;
    let mut whole = String::new();
    for (index, id) in ids.iter().enumerate() {
        let (piece, accepted, stopped) = dialogue.ask(&[*id], index + 1 == ids.len()).await;
        assert_eq!((accepted, stopped), (1, false));
        whole += &piece;
    }
    assert_eq!(whole, "One 你好.\n\nUser: two");

    // With one, the text ends before it, and nothing comes after.
    let mut dialogue = Dialogue::open(&service, &["\n\nUser:", "never"]).await;
    let (mut whole, mut accepted, mut stops) = (String::new(), 0, 0);
    for chunk in ids.chunks(2) {
        let (piece, taken, stopped) = dialogue.ask(chunk, false).await;
        whole += &piece;
        accepted += taken;
        stops += u32::from(stopped);
        assert!(stops < 2 || (piece.is_empty() && taken == 0 && stopped));
    }
    assert_eq!(whole, "One 你好.");
    assert!(stops >= 1 && (accepted as usize) < ids.len());
    assert_eq!(dialogue.ask(&[], true).await, (String::new(), 0, true));

    // What could be the beginning of a stop string is given out at the end, half characters as U+FFFD.
    let mut dialogue = Dialogue::open(&service, &["\n\nUser:"]).await;
    let ids = service.client.encode(encode("x\n\nUse")).await.unwrap().into_inner().ids;
    assert_eq!(dialogue.ask(&ids, false).await, ("x".to_owned(), ids.len() as u32, false));
    assert_eq!(dialogue.ask(&[158], true).await, ("\n\nUse\u{FFFD}".to_owned(), 1, false));
    drop(dialogue.requests);
    assert!(tokio::time::timeout(PATIENCE, dialogue.answers.next()).await.unwrap().is_none(), "the stream ends when the client's does");
}

#[tokio::test]
async fn log_probabilities_come_back_with_bytes() {
    let service = serve("llama", &[]).await;
    let logprob = |token_id| v1::Logprob { token_id, logprob: -0.5, bytes: bytes::Bytes::new() };
    let position =
        |chosen, top: &[u32]| v1::TokenLogprobs { chosen: Some(logprob(chosen)), top: top.iter().map(|id| logprob(*id)).collect() };
    let mut dialogue = Dialogue::open(&service, &["!"]).await;
    let logprobs = vec![position(158, &[250, 481]), position(13, &[u32::MAX]), position(0, &[])]; // 0 is "!"
    dialogue.send(v1::DetokenizeTokens { ids: vec![158, 13, 0], logprobs, last: false }).await;
    let answer = dialogue.answer().await.unwrap();
    assert_eq!((answer.text.as_str(), answer.accepted, answer.stopped), ("\u{FFFD}.", 2, true));
    let bytes = |position: &v1::TokenLogprobs| {
        let top = position.top.iter().map(|entry| entry.bytes.to_vec());
        position.chosen.iter().map(|entry| entry.bytes.to_vec()).chain(top).collect::<Vec<_>>()
    };
    let answered: Vec<_> = answer.logprobs.iter().map(bytes).collect();
    let eos = "<｜end▁of▁sentence｜>".as_bytes().to_vec();
    assert_eq!(answered, [vec![vec![0xE4], b"The".to_vec(), eos], vec![b".".to_vec(), vec![]]]);
    assert!(answer.logprobs.iter().flat_map(|position| &position.chosen).all(|entry| entry.logprob == -0.5));
}

#[tokio::test]
async fn bad_input_is_refused_by_field() {
    let mut service = serve("llama", &[("max_text_bytes", "1000")]).await;
    let user = |parts| chat(vec![message(v1::Role::User, parts)]);
    let unknown_output = v1::PrepareRequest { output: 77, ..user(vec![text("hi")]) };
    let drawing = v1::PrepareRequest { output: v1::OutputKind::Image.into(), ..user(vec![text("hi")]) };
    let rows = [
        (v1::PrepareRequest::default(), "input", "one of `chat`, `completion` and `fim`"),
        (chat(vec![]), "chat.messages", "at least one message"),
        (user(vec![]), "chat.messages[0].parts", "at least one part"),
        (chat(vec![message(v1::Role::Unspecified, vec![text("hi")])]), "chat.messages[0].role", "system, user or assistant"),
        (chat(vec![v1::Message { role: 9, parts: vec![text("hi")] }]), "chat.messages[0].role", "system, user or assistant"),
        (user(vec![v1::Part { part: None }]), "chat.messages[0].parts[0]", "text or an image"),
        (user(vec![text("see"), image()]), "chat.messages[0].parts[1].image", "cannot see"),
        (completion(vec![image()]), "completion.parts[0].image", "cannot see"),
        (drawing, "output", "cannot draw"),
        (fim("", ""), "fim", "empty"),
        (fim("a", "b"), "fim", "cannot fill gaps"),
        (unknown_output, "output", "77 is not"),
    ];
    for (request, field, reason) in rows {
        check_refusal(&service.client.prepare(request).await.unwrap_err(), field, reason);
    }
    let empty = service.client.prepare(completion(vec![text("")])).await.unwrap_err();
    assert_eq!((empty.code(), empty.message().contains("the prompt is empty")), (Code::InvalidArgument, true), "{empty}");
    let long = service.client.prepare(user(vec![text(&"x".repeat(600)), text(&"y".repeat(401))])).await.unwrap_err();
    assert_eq!(
        (long.code(), long.message().contains("1001"), long.message().contains("1000")),
        (Code::InvalidArgument, true, true),
        "{long}"
    );
    let long = service.client.encode(v1::EncodeTextRequest { text: "x".repeat(1001), omit_bos: false }).await.unwrap_err();
    check_refusal(&long, "text", "1001 bytes of text, at most 1000 are taken");
    let many = service.client.decode(v1::DecodeTextRequest { ids: vec![0; (1 << 20) + 1], skip_special: false }).await.unwrap_err();
    check_refusal(&many, "ids", "1048577 ids");
}

#[tokio::test]
async fn bad_detokenising_streams_end_with_a_status() {
    let service = serve("llama", &[]).await;
    let tokens = |ids: &[u32]| v1::DetokenizeTokens { ids: ids.to_vec(), logprobs: vec![], last: false };

    let mut dialogue = Dialogue::start(&service).await;
    dialogue.send(tokens(&[1])).await;
    check_refusal(&dialogue.answer().await.unwrap_err(), "tokens", "the first message must be `open`");

    let mut dialogue = Dialogue::open(&service, &[]).await;
    dialogue.send_open(&[]).await;
    check_refusal(&dialogue.answer().await.unwrap_err(), "open", "open already");

    let mut dialogue = Dialogue::open(&service, &[]).await;
    dialogue.ask(&[1], true).await;
    dialogue.send(tokens(&[1])).await;
    check_refusal(&dialogue.answer().await.unwrap_err(), "tokens", "after the last");

    let mut dialogue = Dialogue::open(&service, &["fine", ""]).await;
    check_refusal(&dialogue.answer().await.unwrap_err(), "open.stop[1]", "1 to 256 bytes");

    let mut dialogue = Dialogue::open(&service, &["x"; 17]).await;
    check_refusal(&dialogue.answer().await.unwrap_err(), "open.stop", "17 stop strings");

    let mut dialogue = Dialogue::open(&service, &[]).await;
    dialogue.send(v1::DetokenizeTokens { logprobs: vec![v1::TokenLogprobs::default()], ..tokens(&[1, 2]) }).await;
    check_refusal(&dialogue.answer().await.unwrap_err(), "tokens.logprobs", "1 entries for 2 ids");

    let mut dialogue = Dialogue::start(&service).await;
    dialogue.requests.send(v1::DetokenizeRequest::default()).await.unwrap();
    check_refusal(&dialogue.answer().await.unwrap_err(), "request", "one of `open` and `tokens`");

    // A client that leaves at once is no error.
    let mut dialogue = Dialogue::start(&service).await;
    drop(dialogue.requests);
    assert!(tokio::time::timeout(PATIENCE, dialogue.answers.next()).await.unwrap().is_none());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn long_texts_do_not_hold_up_short_ones() {
    // One long text at a time: the budget is smaller than any of them.
    let service = serve("llama", &[("parallel_text_bytes", "1024")]).await;
    let encode = |text: String| {
        let mut client = service.client.clone();
        async move { client.encode(v1::EncodeTextRequest { text, omit_bos: true }).await.unwrap().into_inner().ids.len() }
    };
    let line = "def twice(x): return 2 * x\n";
    let per_line = encode(line.to_owned()).await;
    let long: FuturesUnordered<_> = (0..3).map(|_| encode(line.repeat(20_000))).collect();
    let mut long = long;
    let short = stream::iter(0..50).then(|_| encode(line.to_owned()));
    let mut short = Box::pin(short);
    let (mut long_done, mut short_done) = (0, 0);
    tokio::time::timeout(PATIENCE, async {
        while long_done < 3 || short_done < 50 {
            tokio::select! {
                Some(count) = long.next() => {
                    assert_eq!(count, 20_000 * per_line);
                    long_done += 1;
                    assert!(long_done < 3 || short_done == 50, "the short texts came last");
                }
                Some(count) = short.next() => {
                    assert_eq!(count, per_line);
                    short_done += 1;
                }
            }
        }
    })
    .await
    .unwrap();
}

#[tokio::test]
async fn a_folder_without_a_tokenizer_stops_the_start() {
    let dir = tempfile::tempdir().unwrap();
    let fixture = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/fixtures/llama"));
    for file in ["config.json", "model.safetensors", "tokenizer_config.json"] {
        std::fs::copy(fixture.join(file), dir.path().join(file)).unwrap();
    }
    let checkpoint = Arc::new(Checkpoint::open(dir.path()).unwrap());
    let models = vec![LoadedModel::new("tiny", checkpoint)];
    let host = Host::new(Config::default(), Mesh::in_process(), models, Arc::new(Silent));
    let error = tokenizer::start(&host).await.err().unwrap();
    assert_eq!(format!("{error:#}"), format!("model tiny: {}: missing", dir.path().join("tokenizer.json").display()));
    assert_eq!(process::exit_code(&error), 66);

    let config = Config::resolve(None, [], &[("tokenizer.max_text_bytes".to_owned(), "0".to_owned())]).unwrap();
    let host = Host::new(config, Mesh::in_process(), vec![], Arc::new(Silent));
    let error = tokenizer::start(&host).await.err().unwrap();
    assert_eq!(process::exit_code(&error), 64);
    assert!(format!("{error:#}").contains("max_text_bytes"), "{error:#}");
}
