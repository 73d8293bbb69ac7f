//! The service through a mesh channel, as the router calls it.
#![allow(clippy::unwrap_used)]

mod support;

use std::sync::Arc;
use std::time::Duration;

use domain::{Constraint, Embeddings, Event, FinishReason, FlowState, Job, Mode, Prompt, Segment};
use futures::StreamExt;
use futures::future::join_all;
use mesh::{Mesh, Target};
use process::{Host, LoadedModel, Silent};
use proto::v1;
use sched::EngineConfig;
use support::{PATIENCE, client, drawing, endless, flow, greedy, ids, llama, maps, open, puppet, question, serve, serve_model, until};
use tonic::{Code, Request};
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};
use tonic_types::StatusExt;

#[tokio::test]
async fn llama_continues_as_the_reference_does() {
    let service = serve("llama").await;
    for (job, expected) in [llama(0), llama(1)] {
        let events = service.messages(&job).await.unwrap().concat();
        assert_eq!(events.first(), Some(&Event::Prefilled { prompt_tokens: job.prompt.len() as u32, cached_tokens: 0 }));
        assert_eq!(events.last(), Some(&Event::Finished(FinishReason::Length)));
        assert_eq!(ids(&events), expected);
        let resumed = domain::Job { emitted: expected[..5].to_vec(), ..job };
        assert_eq!(service.ids(&resumed).await, &expected[5..]);
    }
    service.wait_until_idle().await;
}

#[tokio::test]
async fn janus_answers_and_draws_in_company() {
    let service = serve("janus").await;
    let cases: Vec<_> = [question(), drawing()].into_iter().cycle().take(12).collect();
    let all = join_all(cases.iter().map(|(job, _)| service.ids(job))).await;
    for (actual, (_, expected)) in all.iter().zip(&cases) {
        assert_eq!(actual, expected);
    }
    service.wait_until_idle().await;
}

/// A greedy job that must satisfy a constraint.
fn constrained(constraint: Constraint, count: usize) -> Job {
    let mut job = greedy(llama(0).0.prompt, count);
    let Mode::Text { sampling, .. } = &mut job.mode else { unreachable!() };
    (sampling.constraint, sampling.ignore_eos) = (Some(constraint), false);
    job
}

#[tokio::test]
async fn constraints_hold_alone_in_company_and_on_another_instance() {
    let (service, other) = (serve("llama").await, serve("llama").await);
    let schema = r#"{"type": "object", "properties": {"a": {"type": "integer", "maximum": 99, "minimum": 0}}, "required": ["a"], "additionalProperties": false}"#;
    let jobs = [
        constrained(Constraint::JsonSchema(schema.into()), 400),
        constrained(Constraint::Regex("[a-z]{3,8}( [a-z]{3,8}){2}".into()), 100),
        constrained(Constraint::Lark("start: (\"a\" | \"b\"){5,9} \"c\"".into()), 100),
    ];
    let codec = text::TextCodec::load_dir(open("llama").dir()).unwrap();
    let mut alone = Vec::new();
    for job in &jobs {
        let events = service.messages(job).await.unwrap().concat();
        assert_eq!(events.last(), Some(&Event::Finished(FinishReason::Stop)));
        alone.push(ids(&events));
    }
    let texts: Vec<String> = alone.iter().map(|ids| codec.decode(ids, true)).collect();
    let value: serde_json::Value = serde_json::from_str(&texts[0]).unwrap();
    assert!((0..100).contains(&value["a"].as_i64().unwrap()), "{value}");
    assert!(texts[1].split(' ').all(|word| (3..=8).contains(&word.len())) && texts[1].split(' ').count() == 3, "{texts:?}");
    assert!(texts[2].ends_with('c') && texts[2][..texts[2].len() - 1].bytes().all(|b| b"ab".contains(&b)), "{texts:?}");

    // Beside each other and beside what has no constraint.
    let (free, expected) = llama(1);
    let mix: Vec<&Job> = jobs.iter().chain([&free]).cycle().take(16).collect();
    let all = join_all(mix.iter().map(|job| service.ids(job))).await;
    for (actual, expected) in all.iter().zip(alone.iter().chain([&expected]).cycle()) {
        assert_eq!(actual, expected);
    }
    // Cut off anywhere, another instance goes on.
    for (job, ids) in jobs.iter().zip(&alone) {
        for at in [1, ids.len() / 2, ids.len() - 1, ids.len()] {
            let resumed = Job { emitted: ids[..at].to_vec(), ..job.clone() };
            assert_eq!(other.ids(&resumed).await, ids[at..], "from {at}");
        }
    }
    service.wait_until_idle().await;
}

/// A model that says what the constraint allows is not disturbed: it says the same, in the same tokens.
#[tokio::test]
async fn a_constraint_that_allows_everything_changes_nothing() {
    let service = serve("llama").await;
    let codec = text::TextCodec::load_dir(open("llama").dir()).unwrap();
    let control: Vec<u32> = codec.control_token_ids().collect();
    // A constraint can only allow text: a random model says other things, too.
    let is_text = |id: &u32| !control.contains(id) && codec.token_bytes(*id).is_some_and(|bytes| std::str::from_utf8(&bytes).is_ok());
    let mut compared = 0;
    for number in 0..60 {
        let free = greedy(Prompt::tokens(vec![480, 3 + number, 300 - number, 7 * number]), 12);
        let said = service.ids(&free).await;
        let text = said.iter().take_while(|id| is_text(id)).count();
        if text > 0 {
            let mut job = constrained(Constraint::Regex("(?s:.*)".into()), text);
            job.prompt = free.prompt;
            assert_eq!(service.ids(&job).await, said[..text], "prompt {number}");
            compared += text;
        }
    }
    assert!(compared > 60, "{compared} tokens compared");
}

#[tokio::test]
async fn a_bad_constraint_is_refused_and_disturbs_nobody() {
    let service = serve("llama").await;
    let (good, expected) = llama(0);
    let beside = service.open(&good).await.unwrap();
    for (constraint, field) in [
        (Constraint::JsonSchema("{".into()), "sampling.constraint.json_schema"),
        (Constraint::Regex("(".into()), "sampling.constraint.regex"),
        (Constraint::Lark("start".into()), "sampling.constraint.lark"),
    ] {
        let status = service.open(&constrained(constraint, 5)).await.unwrap_err();
        let violation = status.get_details_bad_request().unwrap().field_violations.remove(0);
        assert_eq!((status.code(), violation.field.as_str()), (Code::InvalidArgument, field));
    }
    let strange = Job { emitted: vec![5], ..constrained(Constraint::Regex("[0-9]+".into()), 5) };
    let codec = text::TextCodec::load_dir(open("llama").dir()).unwrap();
    assert!(!codec.token_bytes(5).unwrap()[0].is_ascii_digit());
    let status = service.open(&strange).await.unwrap_err();
    assert!(status.code() == Code::InvalidArgument && status.message().starts_with("emitted[0]: "), "{status:?}");
    let messages: Vec<_> = beside.map(|message| wire::language::events(message.unwrap()).unwrap()).collect().await;
    assert_eq!(ids(&messages.concat()), expected);
    service.wait_until_idle().await;
}

#[tokio::test]
async fn janusflow_goes_from_noise_to_a_map() {
    let (service, expected) = (serve("janusflow").await, maps());
    let from = |done: usize| Some(FlowState { done: done as u32, z: expected[done].clone() });
    for begun in [0, 3, 4] {
        let events = service.messages(&flow(4, from(begun))).await.unwrap().concat();
        assert!(matches!(events.first(), Some(Event::Prefilled { prompt_tokens: 17, .. })), "{events:?}");
        assert_eq!(events.last(), Some(&Event::Finished(FinishReason::Stop)));
        let steps = &events[1..events.len() - 1];
        assert_eq!(steps.len(), 4 - begun);
        for (event, done) in steps.iter().zip(begun + 1..) {
            let Event::Flow { state, total: 4, estimate } = event else { panic!("{event:?}") };
            assert_eq!((state.done as usize, estimate.is_some()), (done, done == 2), "an estimate in the middle, none at the end");
            let worst = state.z.values.iter().zip(&*expected[done].values).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(worst <= 1e-4, "step {done} is off by {worst:e}");
        }
    }
    let mut stream = service.open(&flow(1000, None)).await.unwrap();
    assert!(stream.next().await.unwrap().is_ok());
    drop(stream);
    until("the engine has noticed", || service.engine.stats().cancelled == 1).await;
    service.wait_until_idle().await;
}

#[tokio::test]
async fn outputs_that_wait_for_the_reader_come_together() {
    let service = serve("llama").await;
    let mut job = greedy(llama(0).0.prompt, 100);
    let Mode::Text { sampling, .. } = &mut job.mode else { unreachable!() };
    sampling.top_logprobs = Some(2);
    let stream = service.open(&job).await.unwrap();
    until("everything has been computed", || service.engine.stats().outputs == 100).await;
    let messages: Vec<_> = stream.map(|message| wire::language::events(message.unwrap()).unwrap()).collect().await;
    assert!(messages.len() < 20, "{} messages", messages.len());
    let events = messages.concat();
    assert_eq!((events.len(), ids(&events).len()), (102, 100));
    for event in &events[1..101] {
        let Event::Output { id, logprobs: Some(logprobs) } = event else { panic!("{event:?}") };
        assert_eq!((logprobs.chosen.token_id, logprobs.top.len(), logprobs.top[0].token_id), (*id, 2, *id));
    }
}

#[tokio::test]
async fn a_dropped_stream_gives_its_blocks_back() {
    let service = serve("llama").await;
    let mut stream = service.open(&endless()).await.unwrap();
    assert!(stream.next().await.unwrap().is_ok());
    assert_eq!(service.engine.stats().cancelled, 0);
    drop(stream);
    until("the engine has noticed", || service.engine.stats().cancelled == 1).await;
    service.wait_until_idle().await;
}

#[tokio::test]
async fn a_deadline_ends_the_work_even_when_nobody_reads() {
    let service = serve("llama").await;
    let mut request = Request::new(wire::language::to_request(&endless()));
    request.set_timeout(Duration::from_millis(200));
    let mut stream = service.client.clone().generate(request).await.unwrap().into_inner();
    until("the deadline has ended the job", || service.engine.stats().cancelled == 1).await;
    service.wait_until_idle().await;
    let end = loop {
        if let Err(status) = stream.next().await.unwrap() {
            break status;
        }
    };
    assert_eq!(end.code(), Code::DeadlineExceeded, "{end}");
}

#[tokio::test]
async fn bad_requests_name_the_field() {
    let (texts, janus, flows) = (serve("llama").await, serve("janus").await, serve("janusflow").await);
    let job = llama(0).0;
    let of = wire::language::to_request;
    let sampled = |change: &dyn Fn(&mut v1::Sampling)| {
        let mut request = of(&job);
        let Some(v1::language_request::Mode::Text(mode)) = &mut request.mode else { unreachable!() };
        change(mode.sampling.as_mut().unwrap());
        request
    };
    let mut uneven = drawing().0;
    uneven.prompt = Prompt::tokens(vec![480; 3]);
    let wide = Segment::Embeddings(Embeddings { width: 65, values: vec![0.0; 65].into() });
    let rows = [
        (&texts, v1::LanguageRequest { mode: None, ..of(&job) }, "mode"),
        (&texts, v1::LanguageRequest { prompt: Vec::new(), ..of(&job) }, "prompt"),
        (&texts, of(&greedy(Prompt::tokens(vec![1; 4096]), 1)), "prompt"),
        (&texts, of(&greedy(Prompt::tokens(vec![1, 496]), 1)), "prompt[0]"),
        (&texts, of(&greedy(Prompt { segments: vec![wide] }, 1)), "prompt[0]"),
        (&texts, sampled(&|sampling| sampling.temperature = Some(f32::NAN)), "sampling.temperature"),
        (&texts, sampled(&|sampling| sampling.top_p = Some(-1.0)), "sampling.top_p"),
        (&texts, v1::LanguageRequest { emitted: vec![496], ..of(&job) }, "emitted"),
        (&texts, of(&drawing().0), "image"),
        (&janus, of(&uneven), "image.unconditional"),
        (&janus, of(&flow(4, None)), "flow"),
        (&flows, of(&drawing().0), "image"),
        (&flows, of(&flow(0, None)), "image.steps"),
        (&flows, of(&flow(2, Some(FlowState { done: 3, z: maps()[3].clone() }))), "flow.from.done"),
        (&flows, v1::LanguageRequest { emitted: vec![1], ..of(&flow(2, None)) }, "emitted"),
    ];
    for (service, request, field) in rows {
        let status = service.client.clone().generate(request).await.map(|_| ()).expect_err(field);
        assert_eq!(status.code(), Code::InvalidArgument, "{status}");
        assert_eq!(status.get_details_bad_request().unwrap().field_violations[0].field, field, "{status}");
    }
    assert_eq!(texts.ids(&job).await, llama(0).1, "nothing was disturbed");
}

#[tokio::test]
async fn the_process_offers_every_model_and_describes_it() {
    let models = ["llama", "janus", "janusflow"].map(|name| LoadedModel::new(name, open(name)));
    let host = host(&[("threads", "1"), ("kv_cache_bytes", "100000000")], models.to_vec());
    let offers = language::start(&host).await.unwrap();
    let served = process::serve(&host.mesh, &host.doors, offers).await.unwrap();
    for model in &models {
        let mut client = client(&host.mesh.channel(&Target::new("language", &model.name)));
        let card = wire::model::card(client.describe(v1::DescribeRequest {}).await.unwrap().into_inner()).unwrap();
        assert_eq!(card, models::card(&model.checkpoint).unwrap());
        assert_eq!((card.code_grid().is_some(), card.latent_grid().is_some()), (model.name == "janus", model.name == "janusflow"));
    }
    served.drain(PATIENCE).await;
}

#[tokio::test]
async fn settings_that_cannot_be_stop_the_start() {
    let model = || vec![LoadedModel::new("llama", open("llama"))];
    for (key, value) in [("kv_cache_bytes", "1000"), ("max_sequences", "0"), ("threads", "many"), ("treads", "1")] {
        let error = language::start(&host(&[(key, value)], model())).await.map(|_| ()).expect_err(key);
        assert!(format!("{error:#}").contains(&format!("language.{key}")), "{error:#}");
        assert_eq!(process::exit_code(&error), 64);
    }
}

fn host(settings: &[(&str, &str)], models: Vec<LoadedModel>) -> Host {
    let settings: Vec<_> = settings.iter().map(|(key, value)| (format!("language.{key}"), (*value).to_owned())).collect();
    Host::new(config::Config::resolve(None, [], &settings).unwrap(), Mesh::in_process(), models, Arc::new(Silent))
}

#[tokio::test]
async fn a_full_queue_says_when_to_come_again() {
    let (model, strings) = puppet();
    let service = serve_model(model, EngineConfig { max_sequences: 1, queue_limit: 1, ..EngineConfig::default() }).await;
    let job = greedy(Prompt::tokens(vec![5]), 2);
    let mut streams = Vec::new();
    // The first job leaves the queue when the engine has looked at it.
    let refusal = loop {
        match service.open(&job).await {
            Ok(stream) => streams.push(stream),
            Err(status) => break status,
        }
    };
    assert_eq!(refusal.code(), Code::ResourceExhausted, "{refusal}");
    assert!(refusal.get_details_retry_info().unwrap().retry_delay.unwrap() > Duration::ZERO);
    assert!(streams.len() <= 2);
    drop(strings);
    for stream in streams {
        assert!(stream.collect::<Vec<_>>().await.iter().all(Result::is_ok));
    }
}

#[tokio::test]
async fn failures_have_codes_and_a_dead_engine_is_not_servable() {
    let (model, strings) = puppet();
    drop(strings);
    let service = serve_model(model, EngineConfig::default()).await;
    let with = |token| greedy(Prompt::tokens(vec![token]), 2);
    let health = || async {
        let request = HealthCheckRequest { service: "janua.v1.Language".into() };
        HealthClient::new(service.channel.clone()).check(request).await.unwrap().into_inner().status()
    };

    let failed = service.messages(&with(1)).await.unwrap_err();
    assert_eq!((failed.code(), failed.message()), (Code::Internal, "compute: a string broke"));
    assert_eq!(service.ids(&with(5)).await, [0, 0], "the engine goes on");
    assert_eq!(health().await, ServingStatus::Serving);

    let crashed = service.messages(&with(2)).await.unwrap_err();
    assert_eq!((crashed.code(), crashed.message()), (Code::Internal, "the model crashed: the puppet fell"));
    let gone = async {
        while health().await != ServingStatus::NotServing {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(PATIENCE, gone).await.expect("health follows the engine");
    assert_eq!(service.open(&with(5)).await.map(|_| ()).unwrap_err().code(), Code::Unavailable);
}
