//! What is refused at the door, and under which name.
#![allow(clippy::unwrap_used)]

use bytes::Bytes;
use domain::{Canvas, CodeGrid, ImageSampling, Invalid, LatentGrid, Sampling};
use proto::v1;
use proto::v1::constraint::Constraint::{JsonSchema, Lark, Regex};
use wire::input::InputLimits;

fn field<T: std::fmt::Debug>(result: Result<T, Invalid>) -> String {
    result.unwrap_err().field
}

fn constraint(form: fn(String) -> v1::constraint::Constraint, text: &str) -> Option<v1::Constraint> {
    Some(v1::Constraint { constraint: Some(form(text.to_owned())) })
}

#[test]
fn sampling_outside_its_range_names_the_field() {
    type Set = fn(&mut v1::Sampling);
    let rows: &[(&str, Set)] = &[
        ("sampling.temperature", |s| s.temperature = Some(-0.1)),
        ("sampling.temperature", |s| s.temperature = Some(f32::NAN)),
        ("sampling.temperature", |s| s.temperature = Some(f32::INFINITY)),
        ("sampling.top_p", |s| s.top_p = Some(0.0)),
        ("sampling.top_p", |s| s.top_p = Some(1.1)),
        ("sampling.top_p", |s| s.top_p = Some(f32::NAN)),
        ("sampling.min_p", |s| s.min_p = Some(-1.0)),
        ("sampling.max_tokens", |s| s.max_tokens = Some(0)),
        ("sampling.top_logprobs", |s| s.top_logprobs = Some(21)),
        ("sampling.repetition_penalty", |s| s.repetition_penalty = Some(0.0)),
        ("sampling.frequency_penalty", |s| s.frequency_penalty = Some(-2.5)),
        ("sampling.presence_penalty", |s| s.presence_penalty = Some(f32::NAN)),
        ("sampling.n", |s| s.n = Some(0)),
        ("sampling.n", |s| s.n = Some(17)),
        ("sampling.stop[1]", |s| s.stop = vec!["a".into(), String::new()]),
        ("sampling.stop", |s| s.stop = vec!["a".into(); 17]),
        ("sampling.constraint", |s| s.constraint = Some(v1::Constraint { constraint: None })),
        ("sampling.constraint.json_schema", |s| s.constraint = constraint(JsonSchema, "")),
        ("sampling.constraint.regex", |s| s.constraint = constraint(Regex, "")),
        ("sampling.constraint.lark", |s| s.constraint = constraint(Lark, "")),
        ("sampling.constraint.json_schema", |s| s.constraint = constraint(JsonSchema, &"x".repeat(65_537))),
        ("sampling.ignore_eos", |s| (s.ignore_eos, s.constraint) = (true, constraint(Regex, "x"))),
    ];
    for (name, set) in rows {
        let mut sampling = v1::Sampling::default();
        set(&mut sampling);
        assert_eq!(&field(wire::sampling::text(Some(sampling), &Sampling::default())), name);
    }
}

#[test]
fn image_sampling_outside_its_range_names_the_field() {
    let rows = [
        ("image.guidance", v1::ImageSampling { guidance: Some(f32::NAN), ..Default::default() }),
        ("image.guidance", v1::ImageSampling { guidance: Some(-1.0), ..Default::default() }),
        ("image.temperature", v1::ImageSampling { temperature: Some(101.0), ..Default::default() }),
        ("image.n", v1::ImageSampling { n: Some(0), ..Default::default() }),
        ("image.format", v1::ImageSampling { format: 9, ..Default::default() }),
        ("image.steps", v1::ImageSampling { steps: Some(0), ..Default::default() }),
        ("image.steps", v1::ImageSampling { steps: Some(1001), ..Default::default() }),
        ("image.solver", v1::ImageSampling { solver: 9, ..Default::default() }),
    ];
    for (name, sampling) in rows {
        assert_eq!(field(wire::sampling::image(Some(sampling), &ImageSampling::default())), name);
    }
}

const CODES: Canvas = Canvas::Codes(CodeGrid { rows: 2, columns: 2, codebook_size: 9 });
const LATENT: Canvas = Canvas::Latent(LatentGrid { channels: 1, rows: 2, columns: 2, positions: 2 });

/// What means nothing to a model is refused rather than ignored.
#[test]
fn sampling_of_the_other_kind_of_model_names_the_field() {
    let of = |set: fn(&mut v1::ImageSampling)| {
        let mut sampling = v1::ImageSampling::default();
        set(&mut sampling);
        sampling
    };
    let (steps, solver) = (of(|s| s.steps = Some(30)), of(|s| s.solver = v1::FlowSolver::Euler.into()));
    let temperature = of(|s| s.temperature = Some(1.0));
    for (name, sampling, other, own) in [
        ("image.steps", &steps, CODES, LATENT),
        ("image.solver", &solver, CODES, LATENT),
        ("image.temperature", &temperature, LATENT, CODES),
    ] {
        assert_eq!(field(wire::sampling::suits(sampling, other)), name);
        assert_eq!(wire::sampling::suits(sampling, own), Ok(()), "{name}");
    }
    assert_eq!(wire::sampling::suits(&v1::ImageSampling::default(), CODES), Ok(()));
}

#[test]
fn drawings_must_be_of_the_model_and_whole() {
    let good = v1::Latent { channels: 1, rows: 2, columns: 2, data: Bytes::from(vec![0; 16]) };
    let nan = Bytes::from([f32::NAN.to_le_bytes(); 4].concat());
    let rows = [
        ("latent", vec![1], Some(good.clone()), CODES),
        ("codes", vec![1], Some(good.clone()), LATENT),
        ("codes", vec![1], None, LATENT),
        ("latent", vec![], None, LATENT),
        ("latent.data", vec![], Some(v1::Latent { rows: 3, ..good.clone() }), LATENT),
        ("latent.data", vec![], Some(v1::Latent { channels: u32::MAX, rows: u32::MAX, columns: u32::MAX, ..good.clone() }), LATENT),
        ("latent.data", vec![], Some(v1::Latent { data: nan, ..good.clone() }), LATENT),
        ("latent.data", vec![], Some(v1::Latent { channels: 0, data: Bytes::new(), ..good.clone() }), LATENT),
        ("latent", vec![], Some(v1::Latent { rows: 4, columns: 1, ..good.clone() }), LATENT),
    ];
    for (name, codes, latent, canvas) in rows {
        assert_eq!(field(wire::images::drawing(codes, latent.as_ref(), canvas)), name);
    }
    wire::images::drawing(Vec::new(), Some(&good), LATENT).unwrap();
}

#[test]
fn absent_sampling_takes_the_model_defaults() {
    let defaults = Sampling { temperature: 0.7, top_p: 0.95, ..Sampling::default() };
    let request = wire::sampling::text(Some(v1::Sampling { top_p: Some(0.5), ..Default::default() }), &defaults).unwrap();
    assert_eq!((request.sampling.temperature, request.sampling.top_p, request.n), (0.7, 0.5, 1));
}

fn text(text: &str) -> v1::Part {
    v1::Part { part: Some(v1::part::Part::Text(text.into())) }
}

fn image(bytes: usize) -> v1::Part {
    v1::Part { part: Some(v1::part::Part::Image(v1::ImagePart { data: Bytes::from(vec![0; bytes]) })) }
}

fn chat(role: i32, parts: Vec<v1::Part>) -> v1::generate_request::Input {
    v1::generate_request::Input::Chat(v1::Conversation { messages: vec![v1::Message { role, parts }] })
}

#[test]
fn bad_input_names_the_field() {
    let limits = InputLimits { messages: 4, images: 2, text_bytes: 8, image_bytes: 16 };
    let user = v1::Role::User as i32;
    let rows = [
        ("input", None),
        ("chat.messages", Some(v1::generate_request::Input::Chat(v1::Conversation { messages: vec![] }))),
        ("chat.messages[0].role", Some(chat(0, vec![text("a")]))),
        ("chat.messages[0].role", Some(chat(77, vec![text("a")]))),
        ("chat.messages[0].parts", Some(chat(user, vec![]))),
        ("chat.messages[0].parts[1]", Some(chat(user, vec![text("a"), v1::Part { part: None }]))),
        ("chat", Some(chat(user, vec![text("")]))),
        ("chat.text", Some(chat(user, vec![text("123456789")]))),
        ("chat.image", Some(chat(user, vec![image(1), image(1), image(1)]))),
        ("chat.image", Some(chat(user, vec![image(17)]))),
        ("completion.parts", Some(v1::generate_request::Input::Completion(v1::Completion::default()))),
        ("fim", Some(v1::generate_request::Input::Fim(v1::FillInTheMiddle::default()))),
        ("fim.text", Some(v1::generate_request::Input::Fim(v1::FillInTheMiddle { prefix: "12345".into(), suffix: "6789".into() }))),
    ];
    for (name, input) in rows {
        assert_eq!(field(wire::input::generate(input, &limits)), name);
    }
}

#[test]
fn embeddings_must_fill_their_shape_with_numbers() {
    let good = v1::Embeddings { rows: 1, width: 2, data: Bytes::from(vec![0; 8]) };
    assert_eq!(wire::vision::embeddings(&good, "e").unwrap().rows(), 1);
    let nan = f32::NAN.to_le_bytes();
    let rows = [
        v1::Embeddings { rows: 2, ..good.clone() },
        v1::Embeddings { rows: 0, ..good.clone() },
        v1::Embeddings { rows: u32::MAX, width: u32::MAX, ..good.clone() },
        v1::Embeddings { data: Bytes::from([nan, nan].concat()), ..good },
    ];
    for message in rows {
        assert_eq!(field(wire::vision::embeddings(&message, "e")), "e.data");
    }
}
