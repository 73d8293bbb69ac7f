//! Instances that die, clients that leave, deadlines that pass, lines that are full.
#![allow(clippy::unwrap_used)]

mod fakes;

use std::sync::atomic::Ordering;
use std::time::Duration;

use fakes::*;
use futures::StreamExt;
use proto::v1;
use proto::v1::generate_response::Event;
use tokio::sync::Semaphore;
use tonic::Code;
use tonic_types::StatusExt;

fn fault(after: usize, code: impl Into<Option<Code>>) -> Fault {
    Fault { after, code: code.into() }
}

/// No token is lost or repeated, whenever and however often the language model dies, and the client sees nothing of it.
#[tokio::test]
async fn a_sequence_goes_on_at_another_instance() {
    let gone = Code::Unavailable;
    for (faults, calls) in [
        (vec![fault(0, gone)], 2),
        (vec![fault(1, gone)], 2),
        (vec![fault(7, gone)], 2),
        (vec![fault(7, None)], 2),
        (vec![fault(3, gone), fault(4, gone), fault(2, None), fault(1, gone)], 5),
        (vec![fault(0, gone), fault(0, gone), fault(5, gone), fault(0, gone)], 5),
        (vec![fault(20, gone)], 1),
        (vec![fault(20, None)], 1),
    ] {
        for chunk in [1, 3] {
            let bench = Bench::new(Script::new()).await;
            bench.script.chunk.store(chunk, Ordering::SeqCst);
            *bench.script.language_faults.lock().unwrap() = faults.iter().copied().collect();
            let events = bench.ask(chat(vec![text_part("x")], 20)).await.unwrap();
            assert_eq!(text_of(&events, 0), answer(0, 20), "{faults:?}");
            assert_eq!(ids_of(&events, 0).len(), 20);
            assert_eq!(finish_of(&events, 0), Some(v1::FinishReason::Length));
            assert_eq!(usage_of(&events).output_tokens, 20);
            assert_eq!(events.iter().filter(|event| matches!(event, Event::Started(_))).count(), 1);
            let asked = bench.script.language_requests.lock().unwrap();
            assert_eq!(asked.len(), calls, "{faults:?}");
            for request in asked.iter() {
                assert_eq!(request.emitted, (0..request.emitted.len()).map(|i| letter(0, i)).collect::<Vec<_>>());
                assert_eq!(request.prompt, asked[0].prompt);
            }
        }
    }
}

#[tokio::test]
async fn an_image_goes_on_at_another_instance() {
    let bench = Bench::new(Script::new()).await;
    *bench.script.language_faults.lock().unwrap() = [fault(5, Code::Unavailable), fault(7, None)].into();
    let events = bench.ask(draw("x", v1::ImageSampling { seed: Some(0), ..v1::ImageSampling::default() })).await.unwrap();
    let codes = events.iter().find_map(|event| match event {
        Event::Image(image) => Some(image.codes.clone()),
        _ => None,
    });
    assert_eq!(codes.unwrap(), (0..12).map(|i| code(0, i)).collect::<Vec<_>>());
    assert_eq!(bench.script.language_requests.lock().unwrap().len(), 2, "after the last code there is nothing to carry over");
}

#[tokio::test]
async fn a_flow_goes_on_at_another_instance() {
    let bench = Bench::new(Script::new()).await;
    bench.script.card.lock().unwrap().canvas = Some(FLOW);
    *bench.script.language_faults.lock().unwrap() = [fault(5, Code::Unavailable), fault(0, Code::Unavailable), fault(7, None)].into();
    let image = v1::ImageSampling { seed: Some(0), steps: Some(12), ..v1::ImageSampling::default() };
    let events = bench.ask(draw("x", image)).await.unwrap();
    let data = events.iter().find_map(|event| match event {
        Event::Image(image) => Some(image.data.clone()),
        _ => None,
    });
    assert_eq!(data.unwrap(), map(0, 12).data);
    let begun: Vec<Option<u32>> = bench
        .script
        .language_requests
        .lock()
        .unwrap()
        .iter()
        .map(|request| match &request.mode {
            Some(v1::language_request::Mode::Flow(mode)) => mode.from.as_ref().map(|state| state.done),
            other => panic!("{other:?}"),
        })
        .collect();
    assert_eq!(begun, [None, Some(5), Some(5)], "after the last step there is nothing to carry over");
}

#[tokio::test]
async fn an_end_of_sentence_is_not_asked_for_twice() {
    let bench = Bench::new(Script::new()).await;
    *bench.script.eos_at.lock().unwrap() = Some(4);
    *bench.script.language_faults.lock().unwrap() = [fault(5, Code::Unavailable)].into();
    let events = bench.ask(chat(vec![text_part("x")], 20)).await.unwrap();
    assert_eq!((text_of(&events, 0).as_str(), finish_of(&events, 0)), ("abcd", Some(v1::FinishReason::Stop)));
    assert_eq!(bench.script.language_requests.lock().unwrap().len(), 1);
}

#[tokio::test]
async fn attempts_are_bounded_and_other_errors_are_not_tried_again() {
    for (code, calls) in [(Code::Unavailable, 3), (Code::Internal, 1), (Code::ResourceExhausted, 1)] {
        let bench = Bench::new(Script::new()).await;
        *bench.script.language_faults.lock().unwrap() = [fault(0, code); 9].into();
        let status = bench.ask(chat(vec![text_part("x")], 20)).await.unwrap_err();
        assert_eq!((status.code(), status.message()), (code, "language: told to fail"));
        assert_eq!(bench.script.language_requests.lock().unwrap().len(), calls);
    }
}

#[tokio::test]
async fn an_error_in_the_middle_comes_after_what_was_made() {
    let bench = Bench::new(Script::new()).await;
    *bench.script.language_faults.lock().unwrap() = [fault(4, Code::Internal)].into();
    let mut stream = bench.open(chat(vec![text_part("x")], 20)).await.unwrap();
    let (mut text, mut failure) = (String::new(), None);
    while let Some(response) = stream.next().await {
        match response {
            Ok(response) => text.push_str(&text_of(&[response.event.unwrap()], 0)),
            Err(status) => failure = Some(status.code()),
        }
    }
    assert_eq!((text.as_str(), failure), ("abcd", Some(Code::Internal)));
}

#[tokio::test]
async fn a_detokenizer_is_replaced_without_a_seam() {
    for faults in [
        vec![fault(0, Code::Unavailable)],
        vec![fault(3, None)],
        vec![fault(2, Code::Unavailable), fault(4, None), fault(2, Code::Unavailable)],
    ] {
        let bench = Bench::new(Script::new()).await;
        // One token at a time, so that each is an exchange of its own.
        bench.script.steps.forget_permits(Semaphore::MAX_PERMITS);
        *bench.script.detokenize_faults.lock().unwrap() = faults.iter().copied().collect();
        let mut request = chat(vec![text_part("x")], 20);
        request.sampling.as_mut().unwrap().stop = vec!["cdX".to_owned()];
        let mut stream = bench.open(request).await.unwrap();
        let reader = async {
            let mut events = Vec::new();
            while let Some(response) = stream.next().await {
                events.push(response.unwrap().event.unwrap());
                bench.script.steps.add_permits(1);
            }
            events
        };
        let events = tokio::time::timeout(LIMIT, reader).await.unwrap();
        assert_eq!(text_of(&events, 0), answer(0, 20), "{faults:?}");
        assert_eq!(ids_of(&events, 0).len(), 20);
    }
}

#[tokio::test]
async fn short_calls_are_tried_again() {
    let gone = Code::Unavailable;
    let script = Script::new();
    let bench = Bench::new(script.clone()).await;
    for (faults, expected) in [
        (vec![gone], Ok(())),
        (vec![gone, gone], Ok(())),
        (vec![gone, gone, gone], Err(gone)),
        (vec![Code::Internal], Err(Code::Internal)),
        (vec![Code::FailedPrecondition], Err(Code::FailedPrecondition)),
    ] {
        *script.unary_faults.lock().unwrap() = faults.iter().copied().collect();
        let got = bench.ask(chat(vec![text_part("x")], 3)).await;
        assert_eq!(got.map(|_| ()).map_err(|status| status.code()), expected, "{faults:?}");
        script.unary_faults.lock().unwrap().clear();
    }
    // Prepare, then the finished image.
    *script.unary_faults.lock().unwrap() = [Code::Ok, gone, gone].into();
    bench.ask(draw("x", v1::ImageSampling::default())).await.unwrap();
    // Prepare and both pictures.
    *script.unary_faults.lock().unwrap() = [gone, gone, gone].into();
    bench.ask(chat(vec![image_part(b"a"), image_part(b"b")], 3)).await.unwrap();
    assert_eq!(script.encoded.load(Ordering::SeqCst), 2);
}

#[tokio::test]
async fn a_client_that_leaves_ends_the_work() {
    let bench = Bench::new(Script::new()).await;
    let mut request = chat(vec![text_part("x")], 4000);
    request.sampling.as_mut().unwrap().n = Some(4);
    let mut stream = bench.open(request).await.unwrap();
    for choice in 0..4 {
        until(&mut stream, |event| matches!(event, Event::Text(delta) if delta.choice == choice)).await;
    }
    assert_eq!(bench.script.alive(), 4);
    drop(stream);
    testkit::wait_until("every sequence is dropped", LIMIT, async || bench.script.alive() == 0).await;
}

#[tokio::test]
async fn a_client_that_does_not_read_holds_up_only_itself() {
    let bench = Bench::new(Script::new()).await;
    let mut slow = bench.open(chat(vec![text_part("x")], 4000)).await.unwrap();
    slow.next().await.unwrap().unwrap();
    let events = bench.ask(chat(vec![text_part("x")], 100)).await.unwrap();
    assert_eq!(text_of(&events, 0).len(), 100);
    assert!(bench.script.made() < 2000, "{} outputs for a reader that took one event", bench.script.made());
    let rest: Vec<_> = slow.map(|response| response.unwrap().event.unwrap()).collect().await;
    assert_eq!(text_of(&rest, 0), answer(0, 4000));
}

#[tokio::test]
async fn a_deadline_ends_a_request_that_hangs() {
    let bench = Bench::new(Script::new()).await;
    bench.script.steps.forget_permits(Semaphore::MAX_PERMITS);
    let mut request = tonic::Request::new(chat(vec![text_part("x")], 20));
    request.set_timeout(Duration::from_millis(100));
    let mut stream = bench.client.clone().generate(request).await.unwrap().into_inner();
    let mut last = None;
    while let Some(response) = stream.next().await {
        last = Some(response.map_err(|status| status.code()));
    }
    assert_eq!(last.unwrap().unwrap_err(), Code::DeadlineExceeded);
    testkit::wait_until("the sequence is dropped", LIMIT, async || bench.script.alive() == 0).await;
}

#[tokio::test]
async fn places_and_the_line_are_bounded() {
    let bench = Bench::with(Script::new(), &[("max_concurrent", "1"), ("max_waiting", "1")]).await;
    bench.script.steps.forget_permits(Semaphore::MAX_PERMITS);
    let running = bench.open(chat(vec![text_part("x")], 5)).await.unwrap();
    let mut waiting = Box::pin(bench.open(chat(vec![text_part("x")], 5)));
    assert!(futures::poll!(&mut waiting).is_pending());
    let refused = bench.open(chat(vec![text_part("x")], 5)).await.unwrap_err();
    assert_eq!(refused.code(), Code::ResourceExhausted);
    assert!(refused.get_details_retry_info().unwrap().retry_delay.is_some());
    drop(running);
    let mut next = tokio::time::timeout(LIMIT, waiting).await.unwrap().unwrap();
    bench.script.steps.add_permits(100);
    let events: Vec<_> = (&mut next).map(|response| response.unwrap().event.unwrap()).collect().await;
    assert_eq!(text_of(&events, 0), "abcde");
    // A place is given back with the stream, the line with the wait.
    drop(next);
    bench.ask(chat(vec![text_part("x")], 5)).await.unwrap();
}

#[tokio::test]
async fn a_stage_without_instances_is_named() {
    for (service, request) in [
        ("tokenizer", chat(vec![text_part("x")], 3)),
        ("language", chat(vec![text_part("x")], 3)),
        ("vision", chat(vec![image_part(b"a")], 3)),
        ("images", draw("x", v1::ImageSampling::default())),
    ] {
        let mut bench = Bench::new(Script::new()).await;
        bench.serving.retain(|serving| serving.target().service != service);
        let status = bench.ask(request).await.unwrap_err();
        assert_eq!(status.code(), Code::Unavailable);
        assert!(status.message().starts_with(service), "{}", status.message());
    }
}
