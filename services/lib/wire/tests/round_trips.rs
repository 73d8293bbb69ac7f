//! What one service sends, the other reads as the same thing.
#![allow(clippy::unwrap_used)]

use bytes::Bytes;
use domain::{
    Canvas, CodeGrid, Constraint, Drawing, Embeddings, Event, FinishReason, FlowState, ImageSampling, Input, Job, Latent, LatentGrid,
    Logprob, Message, Mode, ModelCard, OutputKind, Part, Prompt, Role, Sampling, Segment, Solver, TokenLogprobs,
};
use wire::{
    input::InputLimits,
    tokenizer::{Prepared, PreparedSegment},
};

fn sampling() -> Sampling {
    Sampling { temperature: 0.5, top_k: 7, seed: 42, max_tokens: Some(9), top_logprobs: Some(3), ignore_eos: true, ..Sampling::default() }
}

#[test]
fn jobs() {
    let embeddings = Embeddings { width: 2, values: vec![1.0, -2.0, 3.5, 0.0].into() };
    let prompt = Prompt { segments: vec![Segment::Tokens(vec![1, 2]), Segment::Embeddings(embeddings), Segment::Tokens(vec![3])] };
    let constrained = |constraint| Sampling { ignore_eos: false, constraint: Some(constraint), ..sampling() };
    let modes = [
        Mode::Text { sampling: sampling(), eos_token_ids: vec![5] },
        Mode::Text { sampling: constrained(Constraint::JsonSchema("{}".into())), eos_token_ids: vec![5] },
        Mode::Text { sampling: constrained(Constraint::Regex("a+".into())), eos_token_ids: vec![5] },
        Mode::Text { sampling: constrained(Constraint::Lark("start: \"a\"".into())), eos_token_ids: vec![5] },
        Mode::Image {
            unconditional: prompt.clone(),
            sampling: ImageSampling { guidance: 2.0, temperature: 0.0, seed: 1, ..ImageSampling::default() },
        },
    ];
    for mode in modes {
        let job = Job { prompt: prompt.clone(), mode, emitted: vec![8, 9] };
        assert_eq!(wire::language::job(wire::language::to_request(&job)).unwrap(), job);
    }
    for (from, estimate_every, solver) in
        [(None, None, Solver::Euler), (Some(state()), Some(4), Solver::Heun), (None, None, Solver::Midpoint)]
    {
        let sampling = ImageSampling { guidance: 2.0, seed: u64::MAX, steps: 1000, solver, ..ImageSampling::default() };
        let mode = Mode::Flow { unconditional: Prompt::tokens(vec![7]), sampling, estimate_every, from };
        let job = Job { prompt: prompt.clone(), mode, emitted: Vec::new() };
        assert_eq!(wire::language::job(wire::language::to_request(&job)).unwrap(), job);
    }
}

fn state() -> FlowState {
    FlowState { done: 3, z: latent() }
}

fn latent() -> Latent {
    Latent { channels: 2, rows: 1, columns: 3, values: vec![1.0, -2.0, 0.5, f32::MIN_POSITIVE, -0.0, 1e30].into() }
}

#[test]
fn events() {
    let logprob = Logprob { token_id: 4, logprob: -0.5 };
    let rows = [
        Event::Prefilled { prompt_tokens: 10, cached_tokens: 3 },
        Event::Output { id: 4, logprobs: None },
        Event::Output { id: 4, logprobs: Some(TokenLogprobs { chosen: logprob, top: vec![logprob] }) },
        Event::Flow { state: state(), total: 9, estimate: None },
        Event::Flow { state: state(), total: 9, estimate: Some(latent()) },
        Event::Finished(FinishReason::Length),
    ];
    for event in rows {
        assert_eq!(wire::language::events(wire::language::to_response(event.clone())).unwrap(), [event]);
    }
}

#[test]
fn neighbouring_outputs_travel_together() {
    let output = |id| Event::Output { id, logprobs: None };
    let prefilled = Event::Prefilled { prompt_tokens: 1, cached_tokens: 0 };
    let events = vec![output(1), output(2), prefilled, output(3), output(4), output(5), Event::Finished(FinishReason::Stop)];
    let responses = wire::language::to_responses(events.clone());
    let read: Vec<_> = responses.into_iter().map(|response| wire::language::events(response).unwrap()).collect();
    assert_eq!(read.iter().map(Vec::len).collect::<Vec<_>>(), [2, 1, 3, 1]);
    assert_eq!(read.concat(), events);
}

#[test]
fn prepare_carries_everything_but_pixels() {
    let input = Input::Chat(vec![
        Message { role: Role::System, parts: vec![Part::Text("s".into())] },
        Message { role: Role::User, parts: vec![Part::Image(Bytes::from_static(b"png")), Part::Text("q".into())] },
    ]);
    let sent = wire::tokenizer::to_prepare_request(&input, OutputKind::Image);
    let (read, kind) = wire::tokenizer::prepare_request(sent, &InputLimits::default()).unwrap();
    assert_eq!((read, kind), (wire::input::without_pixels(&input), OutputKind::Image));

    let fim = Input::Fim { prefix: "a".into(), suffix: String::new() };
    let sent = wire::tokenizer::to_prepare_request(&fim, OutputKind::Text);
    assert_eq!(wire::tokenizer::prepare_request(sent, &InputLimits::default()).unwrap(), (fim, OutputKind::Text));

    let prepared = Prepared {
        segments: vec![PreparedSegment::Tokens(vec![1]), PreparedSegment::Image(0)],
        unconditional: vec![PreparedSegment::Tokens(vec![2]), PreparedSegment::Padding { image: 0, id: 3 }],
        eos_token_ids: vec![3],
    };
    assert_eq!(wire::tokenizer::prepared(wire::tokenizer::to_prepared(prepared.clone())).unwrap(), prepared);
}

#[test]
fn cards() {
    let card = ModelCard {
        family: "janus".into(),
        context_length: 4096,
        vocabulary_size: 102_400,
        hidden_size: 2048,
        canvas: Some(Canvas::Codes(CodeGrid { rows: 24, columns: 24, codebook_size: 16_384 })),
        tokens_per_image: Some(576),
        default_sampling: Sampling { temperature: 0.0, ..Sampling::default() },
        default_image_sampling: ImageSampling::default(),
    };
    assert_eq!(wire::model::card(wire::model::to_card(&card)).unwrap(), card);
    let grid = LatentGrid { channels: 4, rows: 48, columns: 40, positions: 481 };
    let drawing = ImageSampling { guidance: 2.0, steps: 50, solver: Solver::Midpoint, ..ImageSampling::default() };
    let card = ModelCard { canvas: Some(Canvas::Latent(grid)), default_image_sampling: drawing, ..card };
    assert_eq!(wire::model::card(wire::model::to_card(&card)).unwrap(), card);
}

#[test]
fn latent_maps() {
    let grid = LatentGrid { channels: 2, rows: 1, columns: 3, positions: 4 };
    let message = wire::latent::to_latent(&latent());
    assert_eq!(wire::images::drawing(Vec::new(), Some(&message), Canvas::Latent(grid)).unwrap(), Drawing::Latent(latent()));
    // Values are sent as they are, to the bit.
    let bits = |latent: &Latent| latent.values.iter().map(|value| value.to_bits()).collect::<Vec<_>>();
    assert_eq!(bits(&wire::latent::latent(&message, "latent").unwrap()), bits(&latent()));
}
