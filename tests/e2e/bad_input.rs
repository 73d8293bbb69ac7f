//! What a client may get wrong: each mistake gives one status that names the field, and disturbs nobody else.

use bytes::{Buf, BufMut, Bytes};
use proto::v1;
use proto::v1::constraint::Constraint::{JsonSchema, Lark, Regex};
use proto::v1::generate_request::Input;
use tests::request::{chat, completion, for_image, for_text, greedy, picture, text};
use tests::{Golden, Wire, World};
use tonic::codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder};
use tonic::{Code, Status};
use tonic_types::StatusExt;

/// A mistake: its name, the request, the code, and the field that the status must name.
type Row = (&'static str, v1::GenerateRequest, Code, &'static str);

/// Tokens of the good request that runs beside the bad ones.
const BESIDE: u32 = 400;

#[tokio::test(flavor = "multi_thread")]
async fn each_mistake_is_refused_by_its_field() {
    let world = World::start(Wire::InProcess, &["llama", "janus", "janusflow"]).await;
    let good = for_text("llama", completion(vec![text("Beside the bad ones.")]), greedy(BESIDE));
    let alone = world.ask(good.clone()).await.unwrap();
    let (mut client, beside) = (world.client(), good);
    let beside = tokio::spawn(async move { tests::Answer::read(client.generate(beside).await?.into_inner()).await });

    for (name, request, code, field) in rows() {
        let status = world.ask(request).await.expect_err(name);
        assert_refused(name, &status, code, field);
    }
    invalid_utf8_is_refused(&world).await;

    let answer = beside.await.unwrap().unwrap();
    assert_eq!(answer.ids(), alone.ids(), "a good request goes on as if it were alone");
    for prompt in Golden::read("janus").prompts.into_iter().chain(Golden::read("janusflow").prompts) {
        assert_eq!(world.ask(prompt.request).await.unwrap().ids(), prompt.ids, "and the next one is served");
    }
    world.stop().await;
}

fn assert_refused(name: &str, status: &Status, code: Code, field: &str) {
    assert_eq!(status.code(), code, "{name}: {status:?}");
    assert!(status.message().contains(field), "{name}: {:?} does not name {field}", status.message());
    if code == Code::InvalidArgument {
        let violations = status.get_details_bad_request().unwrap_or_else(|| panic!("{name}: no BadRequest in {status:?}")).field_violations;
        assert!(violations.iter().any(|violation| violation.field.starts_with(field)), "{name}: {violations:?}");
    }
}

fn rows() -> Vec<Row> {
    [requests(), sampling(), drawing(), pictures()].concat()
}

fn constraint(form: fn(String) -> v1::constraint::Constraint, text: &str) -> Option<v1::Constraint> {
    Some(v1::Constraint { constraint: Some(form(text.to_owned())) })
}

/// Few rules for a text of 2^40 letters.
fn doubling() -> String {
    let rules: String = (0..40).map(|i| format!("T{i}: T{} T{}\n", i + 1, i + 1)).collect();
    format!("start: T0\n{rules}T40: \"a\"\n")
}

fn requests() -> Vec<Row> {
    let ask = |input: Input| for_text("llama", input, greedy(4));
    let said = |role: i32, parts: Vec<v1::Part>| Input::Chat(v1::Conversation { messages: vec![v1::Message { role, parts }] });
    let gap = |prefix: &str, suffix: &str| Input::Fim(v1::FillInTheMiddle { prefix: prefix.into(), suffix: suffix.into() });
    let user = v1::Role::User as i32;
    vec![
        ("unknown model", for_text("nobody", completion(vec![text("a")]), greedy(1)), Code::NotFound, "model"),
        ("no model among several", for_text("", completion(vec![text("a")]), greedy(1)), Code::NotFound, "model"),
        ("no input", v1::GenerateRequest { model: "llama".into(), ..Default::default() }, Code::InvalidArgument, "input"),
        ("no message", ask(Input::Chat(v1::Conversation::default())), Code::InvalidArgument, "chat.messages"),
        ("no role", ask(said(0, vec![text("a")])), Code::InvalidArgument, "chat.messages[0].role"),
        ("unknown role", ask(said(99, vec![text("a")])), Code::InvalidArgument, "chat.messages[0].role"),
        ("no part", ask(said(user, vec![])), Code::InvalidArgument, "chat.messages[0].parts"),
        ("an empty part", ask(said(user, vec![v1::Part::default()])), Code::InvalidArgument, "chat.messages[0].parts[0]"),
        ("no parts", ask(completion(vec![])), Code::InvalidArgument, "completion.parts"),
        ("zero-length prompt", ask(completion(vec![text("")])), Code::InvalidArgument, "completion"),
        ("zero-length chat", ask(chat(vec![text("")])), Code::InvalidArgument, "chat"),
        ("beyond the context", ask(completion(vec![text(&"word ".repeat(40_000))])), Code::InvalidArgument, "completion"),
        ("beyond the text limit", ask(chat(vec![text(&"x".repeat(5 << 20))])), Code::InvalidArgument, "chat"),
        ("unknown output", v1::GenerateRequest { output: 77, ..ask(completion(vec![text("a")])) }, Code::InvalidArgument, "output"),
        (
            "a picture for a text-only model",
            ask(chat(vec![picture(vec![1, 2, 3]), text("a")])),
            Code::InvalidArgument,
            "chat.messages[0].parts[0].image",
        ),
        ("no gap", ask(gap("", "")), Code::InvalidArgument, "fim"),
        ("a gap in a text beyond the limit", ask(gap(&"x".repeat(5 << 20), "")), Code::InvalidArgument, "fim.text"),
        ("a gap for a model that fills none", ask(gap("a", "b")), Code::InvalidArgument, "fim"),
    ]
}

fn sampling() -> Vec<Row> {
    let with = |change: &dyn Fn(&mut v1::Sampling)| {
        let mut sampling = greedy(4);
        change(&mut sampling);
        for_text("llama", completion(vec![text("a")]), sampling)
    };
    let under = |form, text: &str| with(&|s| (s.ignore_eos, s.constraint) = (false, constraint(form, text)));
    let row = |name, field, request| (name, request, Code::InvalidArgument, field);
    vec![
        row("temperature NaN", "sampling.temperature", with(&|s| s.temperature = Some(f32::NAN))),
        row("temperature negative", "sampling.temperature", with(&|s| s.temperature = Some(-0.5))),
        row("temperature infinite", "sampling.temperature", with(&|s| s.temperature = Some(f32::INFINITY))),
        row("top_p NaN", "sampling.top_p", with(&|s| s.top_p = Some(f32::NAN))),
        row("top_p zero", "sampling.top_p", with(&|s| s.top_p = Some(0.0))),
        row("top_p above one", "sampling.top_p", with(&|s| s.top_p = Some(1.5))),
        row("min_p NaN", "sampling.min_p", with(&|s| s.min_p = Some(f32::NAN))),
        row("min_p negative", "sampling.min_p", with(&|s| s.min_p = Some(-0.1))),
        row("repetition NaN", "sampling.repetition_penalty", with(&|s| s.repetition_penalty = Some(f32::NAN))),
        row("repetition zero", "sampling.repetition_penalty", with(&|s| s.repetition_penalty = Some(0.0))),
        row("frequency out of range", "sampling.frequency_penalty", with(&|s| s.frequency_penalty = Some(2.5))),
        row("presence NaN", "sampling.presence_penalty", with(&|s| s.presence_penalty = Some(f32::NAN))),
        row("no tokens", "sampling.max_tokens", with(&|s| s.max_tokens = Some(0))),
        row("too many choices", "sampling.n", with(&|s| s.n = Some(17))),
        row("no choices", "sampling.n", with(&|s| s.n = Some(0))),
        row("too many alternatives", "sampling.top_logprobs", with(&|s| s.top_logprobs = Some(21))),
        row("an empty stop string", "sampling.stop[1]", with(&|s| s.stop = vec!["a".into(), String::new()])),
        row("too many stop strings", "sampling.stop", with(&|s| s.stop = vec!["a".into(); 17])),
        row("a constraint of no form", "sampling.constraint", with(&|s| s.constraint = Some(v1::Constraint { constraint: None }))),
        row("an empty schema", "sampling.constraint.json_schema", under(JsonSchema, "")),
        row("an empty regex", "sampling.constraint.regex", under(Regex, "")),
        row("an empty grammar", "sampling.constraint.lark", under(Lark, "")),
        row("a schema beyond the limit", "sampling.constraint.json_schema", under(JsonSchema, &" ".repeat(65_537))),
        row("a schema that is no JSON", "sampling.constraint.json_schema", under(JsonSchema, "{type: object}")),
        row("a schema that is no object", "sampling.constraint.json_schema", under(JsonSchema, "7")),
        row("a schema with an unknown type", "sampling.constraint.json_schema", under(JsonSchema, r#"{"type": "strin"}"#)),
        row("a schema beyond reach", "sampling.constraint.json_schema", under(JsonSchema, r#"{"$ref": "https://example.org/s"}"#)),
        row("an unclosed regex", "sampling.constraint.regex", under(Regex, "(a")),
        row("a regex that looks ahead", "sampling.constraint.regex", under(Regex, "a(?=b)")),
        row("a grammar without bounds", "sampling.constraint.lark", under(Lark, &doubling())),
        row("a grammar without a start", "sampling.constraint.lark", under(Lark, "rule: \"a\"")),
        row("a grammar with a missing rule", "sampling.constraint.lark", under(Lark, "start: missing")),
        row("a constraint and no end", "sampling.ignore_eos", with(&|s| (s.ignore_eos, s.constraint) = (true, constraint(Regex, "a")))),
    ]
}

fn drawing() -> Vec<Row> {
    let draw = |model: &str, image: v1::ImageSampling| for_image(model, chat(vec![text("a lantern")]), image);
    let row = |name, field, request| (name, request, Code::InvalidArgument, field);
    vec![
        row("a picture from a text-only model", "output", draw("llama", v1::ImageSampling::default())),
        row("guidance NaN", "image.guidance", draw("janus", v1::ImageSampling { guidance: Some(f32::NAN), ..Default::default() })),
        row("guidance negative", "image.guidance", draw("janus", v1::ImageSampling { guidance: Some(-1.0), ..Default::default() })),
        row(
            "temperature negative",
            "image.temperature",
            draw("janus", v1::ImageSampling { temperature: Some(-1.0), ..Default::default() }),
        ),
        row("too many pictures", "image.n", draw("janus", v1::ImageSampling { n: Some(17), ..Default::default() })),
        row("unknown format", "image.format", draw("janus", v1::ImageSampling { format: 9, ..Default::default() })),
        row("no steps", "image.steps", draw("janusflow", v1::ImageSampling { steps: Some(0), ..Default::default() })),
        row("too many steps", "image.steps", draw("janusflow", v1::ImageSampling { steps: Some(1001), ..Default::default() })),
        row("an unknown solver", "image.solver", draw("janusflow", v1::ImageSampling { solver: 9, ..Default::default() })),
        row(
            "guidance NaN for a flow",
            "image.guidance",
            draw("janusflow", v1::ImageSampling { guidance: Some(f32::NAN), ..Default::default() }),
        ),
        row("steps for codes", "image.steps", draw("janus", v1::ImageSampling { steps: Some(30), ..Default::default() })),
        row("a solver for codes", "image.solver", draw("janus", v1::ImageSampling { solver: 1, ..Default::default() })),
        row(
            "a temperature for a flow",
            "image.temperature",
            draw("janusflow", v1::ImageSampling { temperature: Some(1.0), ..Default::default() }),
        ),
        row(
            "not an image in a drawing's prompt",
            "chat.messages[0].parts[0].image",
            for_image("janus", chat(vec![picture(vec![1]), text("a")]), v1::ImageSampling::default()),
        ),
        row(
            "a gap to be filled with an image",
            "output",
            for_image("janus", Input::Fim(v1::FillInTheMiddle { prefix: "a".into(), suffix: "b".into() }), v1::ImageSampling::default()),
        ),
        row(
            "a constraint on an image",
            "sampling.constraint",
            v1::GenerateRequest {
                sampling: Some(v1::Sampling { constraint: constraint(Regex, "a"), ..Default::default() }),
                ..draw("janus", v1::ImageSampling::default())
            },
        ),
    ]
}

fn pictures() -> Vec<Row> {
    let show = |data: Vec<u8>| for_text("janus", chat(vec![text("look:"), picture(data), text("what?")]), greedy(2));
    let field = "chat.messages[0].parts[1].image";
    let row = |name, data| (name, show(data), Code::InvalidArgument, field);
    let many = (0..40).map(|_| picture(crate::pictures::png(4, 4))).collect();
    vec![
        row("not an image", b"this is a text, not a picture".to_vec()),
        row("an empty file", Vec::new()),
        row("a PNG of a billion pixels", png_header(32_000, 32_000)),
        row("a PNG one pixel high and a billion wide", png_header(1_000_000_000, 1)),
        row("a truncated JPEG", truncated(crate::pictures::jpeg(64, 48))),
        row("a truncated PNG", truncated(crate::pictures::png(64, 48))),
        ("more than the allowed images", for_text("janus", chat(many), greedy(2)), Code::InvalidArgument, "chat"),
    ]
}

/// A valid header that promises `width x height` pixels, and nothing behind it.
fn png_header(width: u32, height: u32) -> Vec<u8> {
    let mut png = crate::pictures::png(4, 4);
    png[16..20].copy_from_slice(&width.to_be_bytes());
    png[20..24].copy_from_slice(&height.to_be_bytes());
    let checksum = crc32(&png[12..29]);
    png[29..33].copy_from_slice(&checksum.to_be_bytes());
    png
}

/// The checksum of PNG chunks, bit by bit.
fn crc32(data: &[u8]) -> u32 {
    !data.iter().fold(u32::MAX, |crc, &byte| {
        (0..8).fold(crc ^ u32::from(byte), |crc, _| if crc & 1 == 1 { (crc >> 1) ^ 0xEDB8_8320 } else { crc >> 1 })
    })
}

fn truncated(mut file: Vec<u8>) -> Vec<u8> {
    file.truncate(file.len() / 2);
    file
}

/// A picture that would take gigabytes is refused before memory is taken for it.
#[tokio::test(flavor = "multi_thread")]
async fn an_image_bomb_takes_no_memory() {
    let world = World::start(Wire::InProcess, &["janus"]).await;
    for prompt in Golden::read("janus").prompts {
        world.ask(prompt.request).await.unwrap();
    }
    let before = address_space();
    for _ in 0..8 {
        let request = for_text("janus", chat(vec![picture(png_header(32_000, 32_000)), text("what?")]), greedy(2));
        world.ask(request).await.expect_err("a bomb");
    }
    let grown = address_space().saturating_sub(before);
    // One such picture is 3 GB.
    assert!(grown < 512 << 20, "the address space has grown by {grown} bytes");
    world.stop().await;
}

/// The largest address space that this process has had, in bytes.
fn address_space() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmPeak:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() * 1024
}

/// Protobuf strings are UTF-8: a client that sends other bytes is told so, and the connection lives on.
async fn invalid_utf8_is_refused(world: &World) {
    // GenerateRequest { model (field 1): 0xFF 0xFE }
    let message = Bytes::from_static(&[0x0A, 0x02, 0xFF, 0xFE]);
    let mut grpc = tonic::client::Grpc::new(world.channel());
    grpc.ready().await.unwrap();
    let path = http::uri::PathAndQuery::from_static("/janua.v1.Janua/Generate");
    let status = grpc.server_streaming(tonic::Request::new(message), path, Raw).await.map(drop).expect_err("bytes that are no text");
    assert!(matches!(status.code(), Code::InvalidArgument | Code::Internal), "{status:?}");
    assert!(status.message().contains("model"), "{status:?}");
    assert!(status.message().to_lowercase().contains("utf"), "{status:?}");
}

/// Bytes as they are, without protobuf around them.
#[derive(Debug, Clone, Copy, Default)]
struct Raw;

impl Codec for Raw {
    type Encode = Bytes;
    type Decode = Bytes;
    type Encoder = Self;
    type Decoder = Self;

    fn encoder(&mut self) -> Self {
        Self
    }

    fn decoder(&mut self) -> Self {
        Self
    }
}

impl Encoder for Raw {
    type Item = Bytes;
    type Error = Status;

    fn encode(&mut self, item: Bytes, out: &mut EncodeBuf<'_>) -> Result<(), Status> {
        out.put(item);
        Ok(())
    }
}

impl Decoder for Raw {
    type Item = Bytes;
    type Error = Status;

    fn decode(&mut self, data: &mut DecodeBuf<'_>) -> Result<Option<Bytes>, Status> {
        Ok(Some(data.copy_to_bytes(data.remaining())))
    }
}
