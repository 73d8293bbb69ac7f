//! The order of stages: what the client sees, and what each stage was asked.
#![allow(clippy::unwrap_used)]

mod fakes;

use std::sync::atomic::Ordering;

use domain::{Canvas, CodeGrid};
use fakes::*;
use futures::StreamExt;
use proto::v1;
use proto::v1::generate_response::Event;
use tokio::sync::Semaphore;
use tonic::Code;

#[tokio::test]
async fn a_text_answer_from_start_to_end() {
    let bench = Bench::new(Script::new()).await;
    let events = bench.ask(chat(vec![text_part("hello")], 10)).await.unwrap();
    let started = v1::Started { model: "tiny".to_owned(), prompt_tokens: 5, seed: 0 };
    assert_eq!(events[0], Event::Started(started));
    assert_eq!(text_of(&events, 0), "abcdefghij");
    assert_eq!(ids_of(&events, 0), (0..10).map(|i| letter(0, i)).collect::<Vec<_>>());
    assert_eq!(finish_of(&events, 0), Some(v1::FinishReason::Length));
    assert_eq!(usage_of(&events), v1::Usage { prompt_tokens: 5, image_tokens: 0, output_tokens: 10, cached_tokens: 1, degraded_tokens: 0 });
    assert_eq!(bench.script.alive(), 0);
}

#[tokio::test]
async fn end_of_sentence_stops_and_the_only_model_needs_no_name() {
    let bench = Bench::new(Script::new()).await;
    *bench.script.eos_at.lock().unwrap() = Some(3);
    let request = v1::GenerateRequest { model: String::new(), ..chat(vec![text_part("x")], 10) };
    let events = bench.ask(request.clone()).await.unwrap();
    assert_eq!((text_of(&events, 0).as_str(), ids_of(&events, 0).len()), ("abc", 4));
    assert_eq!(finish_of(&events, 0), Some(v1::FinishReason::Stop));

    let on = v1::Sampling { ignore_eos: true, ..request.sampling.clone().unwrap() };
    let events = bench.ask(v1::GenerateRequest { sampling: Some(on), ..request }).await.unwrap();
    assert_eq!(text_of(&events, 0), "abcdefghij");
}

#[tokio::test]
async fn pictures_stand_where_the_client_put_them() {
    let bench = Bench::new(Script::new()).await;
    let parts = vec![image_part(b"\x07"), text_part("ab"), image_part(b"\x09"), image_part(b"\x07"), text_part("c")];
    let events = bench.ask(chat(parts, 2)).await.unwrap();
    assert_eq!(usage_of(&events), v1::Usage { prompt_tokens: 12, image_tokens: 9, output_tokens: 2, cached_tokens: 1, degraded_tokens: 0 });
    let request = bench.script.language_requests.lock().unwrap()[0].clone();
    let kinds: Vec<String> = request
        .prompt
        .iter()
        .map(|segment| match segment.segment.as_ref().unwrap() {
            v1::prompt_segment::Segment::Tokens(tokens) => format!("{:?}", tokens.ids),
            v1::prompt_segment::Segment::Embeddings(e) => format!("picture {}", f32::from_le_bytes(e.data[..4].try_into().unwrap())),
        })
        .collect();
    assert_eq!(kinds, ["picture 7", "[97, 98]", "picture 9", "picture 7", "[99]"]);
}

#[tokio::test]
async fn a_drawing_may_follow_pictures() {
    let bench = Bench::new(Script::new()).await;
    let parts = vec![text_part("ab"), image_part(b"\x07"), text_part("c")];
    let request = v1::GenerateRequest { output: v1::OutputKind::Image.into(), ..chat(parts, 1) };
    let events = bench.ask(request).await.unwrap();
    let usage = usage_of(&events);
    assert_eq!((usage.prompt_tokens, usage.image_tokens), (6, 3));
    let request = bench.script.language_requests.lock().unwrap()[0].clone();
    let Some(v1::language_request::Mode::Image(mode)) = request.mode else { panic!("{request:?}") };
    let tokens = |segment: &v1::PromptSegment| match segment.segment.as_ref().unwrap() {
        v1::prompt_segment::Segment::Tokens(tokens) => Some(tokens.ids.clone()),
        v1::prompt_segment::Segment::Embeddings(_) => None,
    };
    // The pair is as long as the prompt: padding for every position of the picture.
    assert_eq!(request.prompt.iter().map(tokens).collect::<Vec<_>>(), [Some(vec![97, 98]), None, Some(vec![99])]);
    assert_eq!(mode.unconditional.iter().map(tokens).collect::<Vec<_>>(), [Some(vec![97, 98]), Some(vec![PAD; ROWS]), Some(vec![99])]);
}

#[tokio::test]
async fn a_gap_is_filled_with_text() {
    let bench = Bench::new(Script::new()).await;
    let input = v1::generate_request::Input::Fim(v1::FillInTheMiddle { prefix: "ab".into(), suffix: "c".into() });
    let events = bench.ask(v1::GenerateRequest { input: Some(input), ..chat(Vec::new(), 3) }).await.unwrap();
    assert_eq!((text_of(&events, 0).as_str(), usage_of(&events).prompt_tokens), ("abc", 4));
}

#[tokio::test]
async fn what_the_language_service_refuses_is_refused_before_the_answer_begins() {
    let bench = Bench::new(Script::new()).await;
    bench.script.language_faults.lock().unwrap().push_back(Fault { after: 0, code: Some(Code::InvalidArgument) });
    let mut stream = bench.open(chat(vec![text_part("x")], 3)).await.unwrap();
    let status = stream.next().await.unwrap().unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument, "the first thing that the client hears");
}

#[tokio::test]
async fn constraints_reach_every_choice() {
    let bench = Bench::new(Script::new()).await;
    let constraint = v1::Constraint { constraint: Some(v1::constraint::Constraint::Regex("[a-z]+".into())) };
    let mut request = chat(vec![text_part("x")], 3);
    let sampling = request.sampling.as_mut().unwrap();
    (sampling.n, sampling.constraint) = (Some(2), Some(constraint.clone()));
    bench.ask(request).await.unwrap();
    let requests = bench.script.language_requests.lock().unwrap();
    for request in requests.iter() {
        let Some(v1::language_request::Mode::Text(text)) = &request.mode else { panic!("{request:?}") };
        assert_eq!(text.sampling.as_ref().unwrap().constraint, Some(constraint.clone()));
    }
    assert_eq!(requests.len(), 2);
}

#[tokio::test]
async fn choices_differ_by_their_seeds() {
    let bench = Bench::new(Script::new()).await;
    let mut request = chat(vec![text_part("x")], 6);
    request.sampling.as_mut().unwrap().n = Some(3);
    request.sampling.as_mut().unwrap().seed = Some(u64::MAX);
    let events = bench.ask(request).await.unwrap();
    for (choice, seed) in [(0, u64::MAX), (1, 0), (2, 1)] {
        assert_eq!(text_of(&events, choice), answer(seed, 6), "choice {choice}");
        assert_eq!(finish_of(&events, choice), Some(v1::FinishReason::Length));
    }
    assert_eq!(usage_of(&events).output_tokens, 18);
}

/// They share a task, and a model that always has an output ready must not make it one's own.
#[tokio::test]
async fn choices_take_turns() {
    let bench = Bench::new(Script::new()).await;
    let mut request = chat(vec![text_part("x")], 4000);
    request.sampling.as_mut().unwrap().n = Some(4);
    let events = bench.ask(request).await.unwrap();
    let first = events.iter().position(|event| matches!(event, Event::Finished(_))).unwrap();
    for choice in 0..4 {
        let tokens = ids_of(&events[..first], choice).len();
        assert!(tokens >= 2000, "choice {choice} has {tokens} of 4000 tokens when the first choice is complete");
    }
}

#[tokio::test]
async fn a_drawn_seed_is_reported_and_used() {
    let bench = Bench::new(Script::new()).await;
    let mut seeds = Vec::new();
    for _ in 0..4 {
        let mut request = chat(vec![text_part("x")], 6);
        request.sampling.as_mut().unwrap().seed = None;
        let events = bench.ask(request).await.unwrap();
        let Event::Started(started) = &events[0] else { panic!("{events:?}") };
        assert_eq!(text_of(&events, 0), answer(started.seed, 6));
        seeds.push(started.seed);
    }
    seeds.dedup();
    assert_eq!(seeds.len(), 4, "{seeds:?}");
}

#[tokio::test]
async fn a_stop_string_cuts_the_text_and_ends_the_sequence() {
    for (stop, chunk, text, ids) in
        [("d", 1, "abc", 3), ("cde", 1, "ab", 2), ("cde", 4, "ab", 2), ("yz", 1, &*answer(0, 24), 24), ("zz", 3, &*answer(0, 50), 50)]
    {
        let bench = Bench::new(Script::new()).await;
        bench.script.chunk.store(chunk, Ordering::SeqCst);
        let mut request = chat(vec![text_part("x")], 50);
        request.sampling.as_mut().unwrap().stop = vec!["never".to_owned(), stop.to_owned()];
        let events = bench.ask(request).await.unwrap();
        assert_eq!(text_of(&events, 0), text, "stop {stop}");
        let reason = if ids < 50 { v1::FinishReason::Stop } else { v1::FinishReason::Length };
        assert_eq!(finish_of(&events, 0), Some(reason), "stop {stop}");
        assert_eq!(bench.script.alive(), 0, "stop {stop}");
    }
}

#[tokio::test]
async fn log_probabilities_come_with_the_bytes_of_their_tokens() {
    let bench = Bench::new(Script::new()).await;
    bench.script.chunk.store(3, Ordering::SeqCst);
    let mut request = chat(vec![text_part("x")], 7);
    request.sampling.as_mut().unwrap().top_logprobs = Some(0);
    let events = bench.ask(request).await.unwrap();
    let logprobs: Vec<_> = events
        .iter()
        .flat_map(|event| match event {
            Event::Text(delta) => delta.logprobs.clone(),
            _ => Vec::new(),
        })
        .map(|entry| entry.chosen.unwrap())
        .collect();
    assert_eq!(logprobs.iter().map(|chosen| chosen.bytes[0] as char).collect::<String>(), "abcdefg");
    assert!(logprobs.iter().all(|chosen| chosen.logprob == -0.5));
}

#[tokio::test]
async fn an_image_answer_from_start_to_end() {
    let bench = Bench::new(Script::new()).await;
    let request = draw("a hut", v1::ImageSampling { seed: Some(5), n: Some(2), guidance: Some(3.5), ..v1::ImageSampling::default() });
    let events = bench.ask(request).await.unwrap();
    for image in 0..2 {
        let progress: Vec<u32> = events
            .iter()
            .filter_map(|event| match event {
                Event::ImageProgress(p) if p.image == image => Some((p.done, p.total)),
                _ => None,
            })
            .map(|(done, total)| {
                assert_eq!(total, 12);
                done
            })
            .collect();
        assert_eq!(progress, (1..=12).collect::<Vec<_>>(), "a small image reports every code");
        let finished = events.iter().find_map(|event| match event {
            Event::Image(finished) if finished.image == image => Some(finished.clone()),
            _ => None,
        });
        let finished = finished.unwrap();
        let seed = 5 + u64::from(image);
        assert_eq!(finished.codes, (0..12).map(|i| code(seed, i)).collect::<Vec<_>>());
        assert_eq!((finished.seed, finished.width, finished.height, finished.media_type.as_str()), (seed, 4, 3, "image/png"));
        assert_eq!(finished.data.len(), 12);
    }
    assert_eq!(usage_of(&events), v1::Usage { prompt_tokens: 5, image_tokens: 0, output_tokens: 24, cached_tokens: 1, degraded_tokens: 0 });
    let decoded = bench.script.decode_requests.lock().unwrap();
    assert_eq!(decoded.len(), 2);
    let notes = &decoded.iter().find(|request| request.metadata["seed"] == "5").unwrap().metadata;
    for (key, value) in [("prompt", "a hut"), ("model", "tiny"), ("guidance", "3.5"), ("temperature", "1")] {
        assert_eq!(notes[key], value);
    }
    assert!(notes["software"].starts_with("janua "));
    let asked = &bench.script.language_requests.lock().unwrap()[0];
    let Some(v1::language_request::Mode::Image(mode)) = &asked.mode else { panic!("{asked:?}") };
    assert_eq!(mode.unconditional, asked.prompt);
}

#[tokio::test]
async fn a_flow_looks_like_codes_from_outside() {
    let bench = Bench::new(Script::new()).await;
    bench.script.card.lock().unwrap().canvas = Some(FLOW);
    let image =
        v1::ImageSampling { seed: Some(5), n: Some(2), guidance: Some(3.5), steps: Some(7), solver: 2, ..v1::ImageSampling::default() };
    let events = bench.ask(draw("a hut", image)).await.unwrap();
    for image in 0..2 {
        let progress = events.iter().filter_map(|event| match event {
            Event::ImageProgress(p) if p.image == image => Some((p.done, p.total)),
            _ => None,
        });
        assert_eq!(progress.collect::<Vec<_>>(), (1..=7).map(|done| (done, 7)).collect::<Vec<_>>());
        let finished = events.iter().find_map(|event| match event {
            Event::Image(finished) if finished.image == image => Some(finished.clone()),
            _ => None,
        });
        let (finished, seed) = (finished.unwrap(), 5 + u64::from(image));
        assert_eq!((finished.data, finished.codes, finished.seed), (map(seed, 7).data, Vec::new(), seed));
    }
    assert_eq!(usage_of(&events), v1::Usage { prompt_tokens: 5, image_tokens: 0, output_tokens: 14, cached_tokens: 1, degraded_tokens: 0 });
    let decoded = bench.script.decode_requests.lock().unwrap();
    let notes = &decoded.iter().find(|request| request.metadata["seed"] == "5").unwrap().metadata;
    for (key, value) in [("prompt", "a hut"), ("model", "tiny"), ("guidance", "3.5"), ("steps", "7"), ("solver", "heun")] {
        assert_eq!(notes[key], value);
    }
    assert!(!notes.contains_key("temperature"));
    let asked = &bench.script.language_requests.lock().unwrap()[0];
    let Some(v1::language_request::Mode::Flow(mode)) = &asked.mode else { panic!("{asked:?}") };
    assert_eq!((mode.estimate_every, mode.from.is_none()), (0, true));
}

#[tokio::test]
async fn previews_of_a_flow_show_where_it_leads() {
    let bench = Bench::new(Script::new()).await;
    bench.script.card.lock().unwrap().canvas = Some(FLOW);
    bench.script.steps.forget_permits(Semaphore::MAX_PERMITS);
    let image = v1::ImageSampling { preview_every: Some(3), steps: Some(6), seed: Some(1), ..v1::ImageSampling::default() };
    let mut stream = bench.open(draw("x", image)).await.unwrap();
    bench.script.steps.add_permits(3);
    let event = until(&mut stream, |event| matches!(event, Event::ImagePreview(_))).await;
    let Event::ImagePreview(preview) = event else { panic!("{event:?}") };
    assert_eq!((preview.done, preview.data), (3, map(1, 103).data));
    bench.script.steps.add_permits(3);
    let last = until(&mut stream, |event| matches!(event, Event::ImagePreview(_) | Event::Completed(_))).await;
    assert!(matches!(last, Event::Completed(_)), "a finished image needs no preview");
}

#[tokio::test]
async fn previews_come_in_between_and_grey() {
    let bench = Bench::new(Script::new()).await;
    bench.script.card.lock().unwrap().canvas = Some(Canvas::Codes(CodeGrid { rows: 30, columns: 30, codebook_size: 10 }));
    bench.script.steps.forget_permits(Semaphore::MAX_PERMITS);
    let mut stream = bench.open(draw("x", v1::ImageSampling { preview_every: Some(300), ..v1::ImageSampling::default() })).await.unwrap();
    for done in [300, 600] {
        bench.script.steps.add_permits(300);
        let event = until(&mut stream, |event| matches!(event, Event::ImagePreview(_))).await;
        let Event::ImagePreview(preview) = event else { panic!("{event:?}") };
        assert_eq!((preview.done, preview.data.len(), preview.media_type.as_str()), (done, done as usize, "image/png"));
    }
    bench.script.steps.add_permits(300);
    let last = until(&mut stream, |event| matches!(event, Event::ImagePreview(_) | Event::Completed(_))).await;
    assert!(matches!(last, Event::Completed(_)), "a finished image needs no preview");
}

#[tokio::test]
async fn a_slow_preview_does_not_hold_up_the_image() {
    let bench = Bench::new(Script::new()).await;
    bench.script.previews.forget_permits(Semaphore::MAX_PERMITS);
    bench.script.steps.forget_permits(Semaphore::MAX_PERMITS);
    let mut stream = bench.open(draw("x", v1::ImageSampling { preview_every: Some(2), ..v1::ImageSampling::default() })).await.unwrap();
    for code in 1..=12 {
        bench.script.steps.add_permits(1);
        until(&mut stream, |event| matches!(event, Event::ImageProgress(progress) if progress.done == code)).await;
    }
    until(&mut stream, |event| matches!(event, Event::Image(_))).await;
    let sizes: Vec<usize> = bench.script.decode_requests.lock().unwrap().iter().map(|request| request.codes.len()).collect();
    assert_eq!(sizes, [2, 12], "one preview was begun, the others were left out");
}

#[tokio::test]
async fn progress_of_a_large_image_is_coalesced() {
    let bench = Bench::new(Script::new()).await;
    bench.script.card.lock().unwrap().canvas = Some(Canvas::Codes(CodeGrid { rows: 40, columns: 50, codebook_size: 10 }));
    let events = bench.ask(draw("x", v1::ImageSampling::default())).await.unwrap();
    let done: Vec<u32> = events
        .iter()
        .filter_map(|event| match event {
            Event::ImageProgress(progress) => Some(progress.done),
            _ => None,
        })
        .collect();
    assert!(done.is_sorted() && done.last() == Some(&2000), "{done:?}");
    assert!(done.len() < 1000, "{} events for 2000 codes", done.len());
}

#[tokio::test]
async fn models_and_their_readiness() {
    let mut bench = Bench::new(Script::new()).await;
    let models = bench.client.list_models(v1::ListModelsRequest {}).await.unwrap().into_inner().models;
    let expected = v1::Model {
        name: "tiny".to_owned(),
        family: "fake".to_owned(),
        context_length: 4096,
        text_output: true,
        image_input: true,
        image_output: true,
        ready: true,
    };
    assert_eq!(models, std::slice::from_ref(&expected));
    bench.serving.retain(|serving| serving.target().service != "images");
    let models = bench.client.list_models(v1::ListModelsRequest {}).await.unwrap().into_inner().models;
    assert_eq!(models, [v1::Model { ready: false, ..expected }], "a model that draws needs the images service");
}

#[tokio::test]
async fn tokenizing_texts_and_conversations() {
    let mut bench = Bench::new(Script::new()).await;
    let input = v1::tokenize_request::Input::Text("ab".to_owned());
    let ids = bench.client.tokenize(v1::TokenizeRequest { input: Some(input), ..Default::default() }).await.unwrap().into_inner().token_ids;
    assert_eq!(ids, [97, 98]);
    let message = v1::Message { role: v1::Role::User.into(), parts: vec![text_part("a"), text_part("b")] };
    let input = v1::tokenize_request::Input::Chat(v1::Conversation { messages: vec![message] });
    let ids = bench.client.tokenize(v1::TokenizeRequest { input: Some(input), ..Default::default() }).await.unwrap().into_inner().token_ids;
    assert_eq!(ids, [97, 98]);
}
