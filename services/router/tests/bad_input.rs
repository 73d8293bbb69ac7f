//! What the router refuses: one status that names the field, before any stage has worked.
#![allow(clippy::unwrap_used)]

mod fakes;

use std::sync::atomic::Ordering;

use fakes::*;
use proto::v1;
use proto::v1::constraint::Constraint::{JsonSchema, Lark, Regex};
use tonic::Code;
use tonic_types::StatusExt;

fn sampled(change: impl FnOnce(&mut v1::Sampling)) -> v1::GenerateRequest {
    let mut request = chat(vec![text_part("x")], 3);
    change(request.sampling.as_mut().unwrap());
    request
}

fn drawn(change: impl FnOnce(&mut v1::ImageSampling)) -> v1::GenerateRequest {
    let mut image = v1::ImageSampling::default();
    change(&mut image);
    draw("x", image)
}

fn completion(parts: Vec<v1::Part>) -> v1::GenerateRequest {
    let input = v1::generate_request::Input::Completion(v1::Completion { parts, omit_bos: false });
    v1::GenerateRequest { input: Some(input), ..chat(Vec::new(), 3) }
}

fn fim(prefix: &str, suffix: &str) -> v1::GenerateRequest {
    let input = v1::generate_request::Input::Fim(v1::FillInTheMiddle { prefix: prefix.into(), suffix: suffix.into() });
    v1::GenerateRequest { input: Some(input), ..chat(Vec::new(), 3) }
}

fn constrained(constraint: Option<v1::constraint::Constraint>) -> v1::GenerateRequest {
    sampled(|s| s.constraint = Some(v1::Constraint { constraint }))
}

fn yes() -> Option<v1::Constraint> {
    Some(v1::Constraint { constraint: Some(Regex("yes".into())) })
}

#[tokio::test]
async fn each_refusal_names_its_field() {
    let bench =
        Bench::with(Script::new(), &[("max_images", "2"), ("max_text_bytes", "9000"), ("max_image_bytes", "8"), ("max_tokens", "100")])
            .await;
    let long = "x".repeat(4096);
    let cases: Vec<(v1::GenerateRequest, &str)> = vec![
        (v1::GenerateRequest { input: None, ..chat(Vec::new(), 1) }, "input: "),
        (chat(Vec::new(), 3), "chat.messages[0].parts: "),
        (chat(vec![text_part("")], 3), "chat: the prompt is empty"),
        (completion(Vec::new()), "completion.parts: "),
        (completion(vec![text_part("")]), "completion: the prompt is empty"),
        (chat(vec![v1::Part { part: None }], 3), "chat.messages[0].parts[0]: "),
        (chat(vec![text_part(&long)], 3), "chat: the prompt has 4096 tokens and at least 1 follow, the model's context holds 4096"),
        (draw(&long[10..], v1::ImageSampling::default()), "chat: the prompt has 4086 tokens and at least 12 follow"),
        (chat(vec![text_part(&long), text_part(&long), text_part(&long)], 3), "chat.text: 12288 bytes"),
        (chat(vec![image_part(b"a"), image_part(b"b"), image_part(b"c")], 3), "chat.image: 3 pictures, at most 2"),
        (chat(vec![image_part(b"123456789")], 3), "chat.image: picture 0 has 9 bytes, at most 8"),
        (chat(vec![image_part(b"a"), text_part("x"), image_part(b"?")], 3), "chat.messages[0].parts[2].image: not a picture"),
        (completion(vec![text_part("x"), image_part(b"?")]), "completion.parts[1].image: not a picture"),
        (sampled(|s| s.temperature = Some(f32::NAN)), "sampling.temperature: "),
        (sampled(|s| s.temperature = Some(-1.0)), "sampling.temperature: "),
        (sampled(|s| s.temperature = Some(f32::INFINITY)), "sampling.temperature: "),
        (sampled(|s| s.top_p = Some(0.0)), "sampling.top_p: "),
        (sampled(|s| s.top_p = Some(-0.5)), "sampling.top_p: "),
        (sampled(|s| s.top_p = Some(f32::NAN)), "sampling.top_p: "),
        (sampled(|s| s.min_p = Some(2.0)), "sampling.min_p: "),
        (sampled(|s| s.repetition_penalty = Some(-1.0)), "sampling.repetition_penalty: "),
        (sampled(|s| s.frequency_penalty = Some(f32::NAN)), "sampling.frequency_penalty: "),
        (sampled(|s| s.presence_penalty = Some(-3.0)), "sampling.presence_penalty: "),
        (sampled(|s| s.top_logprobs = Some(21)), "sampling.top_logprobs: "),
        (sampled(|s| s.max_tokens = Some(0)), "sampling.max_tokens: "),
        (sampled(|s| s.max_tokens = Some(101)), "sampling.max_tokens: 101 is more than the limit of 100"),
        (sampled(|s| s.n = Some(0)), "sampling.n: "),
        (sampled(|s| s.n = Some(17)), "sampling.n: "),
        (sampled(|s| s.stop = vec![String::new()]), "sampling.stop[0]: "),
        (drawn(|i| i.guidance = Some(f32::NAN)), "image.guidance: "),
        (drawn(|i| i.temperature = Some(-1.0)), "image.temperature: "),
        (drawn(|i| i.n = Some(99)), "image.n: "),
        (drawn(|i| i.format = 9), "image.format: "),
        (drawn(|i| i.steps = Some(0)), "image.steps: "),
        (drawn(|i| i.steps = Some(30)), "image.steps: this model draws code by code"),
        (drawn(|i| i.solver = 1), "image.solver: this model draws code by code"),
        (v1::GenerateRequest { output: 9, ..chat(vec![text_part("x")], 3) }, "output: "),
        (
            v1::GenerateRequest { output: v1::OutputKind::Image.into(), ..chat(vec![image_part(b"?")], 3) },
            "chat.messages[0].parts[0].image: not a picture",
        ),
        (fim("", ""), "fim: the prompt is empty"),
        (fim(&long, &long), "fim: the prompt has 8193 tokens"),
        (fim(&long, &long.repeat(2)), "fim.text: 12288 bytes"),
        (v1::GenerateRequest { output: v1::OutputKind::Image.into(), ..fim("a", "b") }, "output: what fills a gap in a text is text"),
        (constrained(None), "sampling.constraint: one of"),
        (constrained(Some(JsonSchema(String::new()))), "sampling.constraint.json_schema: empty"),
        (constrained(Some(Regex("x".repeat(65_537)))), "sampling.constraint.regex: 65537 bytes, at most 65536"),
        (constrained(Some(Lark("x".repeat(65_537)))), "sampling.constraint.lark: 65537 bytes, at most 65536"),
        (sampled(|s| (s.ignore_eos, s.constraint) = (true, yes())), "sampling.ignore_eos: "),
        (
            v1::GenerateRequest { output: v1::OutputKind::Image.into(), ..sampled(|s| s.constraint = yes()) },
            "sampling.constraint: an image takes no constraint",
        ),
    ];
    for (request, expected) in cases {
        let status = bench.ask(request).await.unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument, "{expected}: {status:?}");
        assert!(status.message().starts_with(expected), "{:?} does not begin with {expected:?}", status.message());
        let violations = status.get_details_bad_request().unwrap().field_violations;
        assert!(expected.starts_with(&violations[0].field), "{violations:?}");
    }
    assert_eq!((bench.script.made(), bench.script.alive()), (0, 0), "nothing was generated");
    bench.ask(chat(vec![text_part("x")], 3)).await.unwrap();
}

#[tokio::test]
async fn a_model_that_neither_sees_nor_draws() {
    let script = Script::new();
    {
        let mut card = script.card.lock().unwrap();
        card.tokens_per_image = None;
        card.canvas = None;
    }
    let bench = Bench::new(script.clone()).await;
    for (request, expected) in [
        (chat(vec![text_part("x"), image_part(b"a")], 3), "chat.messages[0].parts[1].image: the model takes no pictures"),
        (completion(vec![image_part(b"a")]), "completion.parts[0].image: the model takes no pictures"),
        (draw("x", v1::ImageSampling::default()), "output: the model draws no images"),
    ] {
        let status = bench.ask(request).await.unwrap_err();
        assert_eq!((status.code(), status.message()), (Code::InvalidArgument, expected));
    }
    assert_eq!(script.encoded.load(Ordering::SeqCst), 0);
}

#[tokio::test]
async fn an_unknown_model_is_told_the_known_ones() {
    let bench = Bench::new(Script::new()).await;
    let status = bench.ask(v1::GenerateRequest { model: "large".to_owned(), ..chat(vec![text_part("x")], 3) }).await.unwrap_err();
    assert_eq!((status.code(), status.message()), (Code::NotFound, "model: \"large\" is not served here; known: tiny"));
}

#[tokio::test]
async fn tokenize_refuses_by_field() {
    let mut bench = Bench::with(Script::new(), &[("max_text_bytes", "8")]).await;
    let chat = |parts| {
        let message = v1::Message { role: v1::Role::User.into(), parts };
        Some(v1::tokenize_request::Input::Chat(v1::Conversation { messages: vec![message] }))
    };
    for (input, expected) in [
        (None, "input: "),
        (Some(v1::tokenize_request::Input::Text("123456789".to_owned())), "text: 9 bytes of text"),
        (chat(vec![text_part("x"), image_part(b"a")]), "chat.messages[0].parts[1].image: only text"),
        (chat(Vec::new()), "chat.messages[0].parts: "),
    ] {
        let status = bench.client.tokenize(v1::TokenizeRequest { input, ..Default::default() }).await.unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument);
        assert!(status.message().starts_with(expected), "{:?} does not begin with {expected:?}", status.message());
    }
}
