//! The engine over a toy model: what a job yields never depends on its company.

#![allow(clippy::unwrap_used)]

mod toy;

use domain::{Event, FinishReason, Job, Mode, Prompt, Sampling, Segment};
use futures::{FutureExt, StreamExt, executor::block_on};
use layers::Head;
use proptest::prelude::*;
use sched::{BUFFERED_EVENTS, Engine, EngineConfig, JobError, JobStream, SubmitError};
use toy::*;

fn jobs() -> impl Strategy<Value = Vec<Job>> {
    // Few seeds and a common alphabet, so that prompts share beginnings.
    let prompt = (0..3u64, 1..90usize, prop::option::of((0..2u8, 1..40usize))).prop_map(|(seed, length, image)| {
        let mut segments = vec![Segment::Tokens(ids(seed, length))];
        if let Some((seed, rows)) = image {
            segments.push(picture(f32::from(seed), rows));
            segments.push(Segment::Tokens(ids(9, 3)));
        }
        Prompt { segments }
    });
    let sampling =
        (0..4u64, 1..60u32, prop_oneof![Just(0.0f32), Just(1.0), Just(0.3)], prop_oneof![Just(1.0f32), Just(1.3)], any::<bool>());
    let sampling = sampling.prop_map(|(seed, count, temperature, penalty, eos)| Sampling {
        seed,
        max_tokens: Some(count),
        temperature,
        repetition_penalty: penalty,
        frequency_penalty: penalty - 1.0,
        ignore_eos: eos,
        ..Sampling::default()
    });
    let text = (prompt, sampling).prop_map(|(prompt, sampling)| text(prompt, sampling));
    let image = (0..3u64, 1..60usize).prop_map(|(seed, length)| drawing(seed, length));
    prop::collection::vec(prop_oneof![3 => text, 1 => image], 1..12)
}

fn configs() -> impl Strategy<Value = EngineConfig> {
    (4..200usize, 1..12usize, any::<bool>()).prop_map(|(max_batch_tokens, max_sequences, prefix_cache)| EngineConfig {
        max_batch_tokens,
        max_sequences,
        queue_limit: 64,
        prefix_cache,
    })
}

proptest! {
    /// 16 blocks hold the longest job alone and little beside it, so mixes are preempted often.
    #[test]
    fn any_mix_yields_what_each_job_yields_alone(jobs in jobs(), config in configs(), blocks in 16..80usize) {
        let (engine, watch) = start(blocks, config);
        for (job, outcome) in jobs.iter().zip(run_all(&engine, &jobs)) {
            prop_assert_eq!(&outcome.ids, &expected(job));
            prop_assert!(outcome.end.is_ok());
        }
        assert_all_blocks_back(&engine);
        for step in watch.steps() {
            prop_assert!(step.iter().map(|slice| slice.rows.len()).sum::<usize>() <= config.max_batch_tokens);
        }
    }

    #[test]
    fn a_job_goes_on_from_what_was_emitted(jobs in jobs(), cut in 0.0..1.0f64, config in configs()) {
        let (engine, _) = start(64, config);
        let whole: Vec<Vec<u32>> = jobs.iter().map(expected).collect();
        let cuts: Vec<usize> = whole.iter().map(|ids| (ids.len() as f64 * cut) as usize).collect();
        let resumed: Vec<Job> = jobs.iter().zip(&whole).zip(&cuts).map(|((job, ids), &at)| Job { emitted: ids[..at].to_vec(), ..job.clone() }).collect();
        for ((outcome, ids), &at) in run_all(&engine, &resumed).iter().zip(&whole).zip(&cuts) {
            prop_assert_eq!(&outcome.ids, &ids[at..]);
        }
        assert_all_blocks_back(&engine);
    }
}

#[test]
fn a_job_whose_outputs_were_all_emitted_just_ends() {
    let (engine, watch) = start(8, EngineConfig::default());
    let job = plain(1, 10, 5);
    let emitted = expected(&job);
    let done = run(&engine, Job { emitted: emitted.clone(), ..job.clone() });
    assert_eq!((done.ids, done.end), (vec![], Ok(FinishReason::Length)));
    let mut stopped = Job { emitted: vec![3], ..job };
    let Mode::Text { sampling, .. } = &mut stopped.mode else { unreachable!() };
    sampling.ignore_eos = false;
    assert_eq!(run(&engine, stopped).end, Ok(FinishReason::Stop));
    assert!(watch.steps().is_empty());
}

#[test]
fn chunks_of_any_size_give_the_same() {
    let job = plain(1, 300, 20);
    for max_batch_tokens in [4, 7, 16, 17, 31, 32, 100, 299, 300, 512] {
        let (engine, watch) = start(64, EngineConfig { max_batch_tokens, ..EngineConfig::default() });
        assert_eq!(run(&engine, job.clone()).ids, expected(&job));
        assert_eq!(watch.steps().len(), 300usize.div_ceil(max_batch_tokens) + 19);
    }
}

#[test]
fn the_prefix_cache_saves_work_and_changes_nothing() {
    let long = plain(1, 100, 30);
    let rows = [(true, 96), (false, 0)];
    for (prefix_cache, cached) in rows {
        let (engine, _) = start(64, EngineConfig { prefix_cache, ..EngineConfig::default() });
        let first = run(&engine, long.clone());
        assert_all_blocks_back(&engine);
        let second = run(&engine, long.clone());
        assert_eq!((first.cached, second.cached), (0, cached));
        assert_eq!(first.ids, second.ids);
        assert_eq!(first.ids, expected(&long));
        assert_all_blocks_back(&engine);
        assert_eq!(engine.stats().cached_rows, u64::from(cached));
    }
}

#[test]
fn equal_prompts_that_arrive_together_are_read_once() {
    let (engine, watch) = start(256, EngineConfig { max_batch_tokens: 64, ..EngineConfig::default() });
    watch.allow(0);
    let choice = |seed| {
        let mut job = plain(1, 200, 10);
        let Mode::Text { sampling, .. } = &mut job.mode else { unreachable!() };
        sampling.seed = seed;
        job
    };
    let streams: Vec<_> = (0..8).map(|seed| engine.submit(choice(seed)).unwrap()).collect();
    watch.open();
    for (seed, outcome) in (0..).zip(block_on(futures::future::join_all(streams.into_iter().map(outcome)))) {
        assert_eq!(outcome.ids, expected(&choice(seed)));
        assert_eq!(outcome.cached, if seed == 0 { 0 } else { 192 });
    }
    let prefilled: usize = watch.steps().iter().flatten().map(|slice| slice.rows.len()).sum::<usize>() - 8 * 9;
    assert_eq!(prefilled, 200 + 7 * 8);
    assert_all_blocks_back(&engine);
}

#[test]
fn a_conversation_finds_its_own_answers_in_the_cache() {
    let (engine, _) = start(64, EngineConfig::default());
    let first = plain(1, 40, 30);
    let answer = run(&engine, first.clone()).ids;
    let Segment::Tokens(mut prompt) = first.prompt.segments[0].clone() else { unreachable!() };
    prompt.extend(answer);
    prompt.extend(ids(2, 10));
    let next = text(Prompt::tokens(prompt), Sampling { max_tokens: Some(5), ..Sampling::greedy() });
    let outcome = run(&engine, next.clone());
    assert_eq!(outcome.ids, expected(&next));
    assert_eq!(outcome.cached, 64, "70 positions were known, 69 computed, 4 blocks full");
}

#[test]
fn the_cache_forgets_what_was_used_longest_ago() {
    let (engine, _) = start(12, EngineConfig::default());
    let job = |seed| plain(seed, 49, 1); // 4 blocks, 3 of them named
    assert_eq!([run(&engine, job(1)).cached, run(&engine, job(2)).cached], [0, 0]);
    assert_eq!(run(&engine, job(1)).cached, 48);
    assert_eq!([run(&engine, job(3)).cached, run(&engine, job(4)).cached], [0, 0]);
    // 3 blocks were free and one had to go: the end of what seed 2 left, the oldest.
    assert_eq!([run(&engine, job(2)).cached, run(&engine, job(4)).cached], [32, 48]);
    assert_all_blocks_back(&engine);
}

#[test]
fn preempted_jobs_yield_the_same() {
    let jobs: Vec<Job> = (0..6).map(|seed| plain(seed, 30, 100)).chain((6..8).map(|seed| drawing(seed, 30))).collect();
    for prefix_cache in [true, false] {
        let (engine, _) = start(14, EngineConfig { prefix_cache, ..EngineConfig::default() });
        for (job, outcome) in jobs.iter().zip(run_all(&engine, &jobs)) {
            assert_eq!(outcome.ids, expected(job));
        }
        assert_all_blocks_back(&engine);
        let stats = engine.stats();
        assert!(stats.preemptions > 0, "14 blocks cannot hold 8 jobs of up to 9 blocks");
        assert!(stats.preemptions < 20, "{} times a job came back too early", stats.preemptions);
    }
}

#[test]
fn seeds_decide() {
    let (engine, _) = start(64, EngineConfig::default());
    let seeded = |seed| text(Prompt::tokens(ids(1, 10)), Sampling { max_tokens: Some(30), seed, ignore_eos: true, ..Sampling::default() });
    let outcomes = run_all(&engine, &[seeded(7), seeded(8), seeded(7)]);
    assert_eq!(outcomes[0].ids, outcomes[2].ids);
    assert_ne!(outcomes[0].ids, outcomes[1].ids);
    assert_eq!(outcomes[0].ids, expected(&seeded(7)));
}

#[test]
fn a_pair_is_always_in_step() {
    let (engine, watch) = start(64, EngineConfig { max_batch_tokens: 16, ..EngineConfig::default() });
    let job = drawing(3, 45);
    assert_eq!(run(&engine, job.clone()).ids, expected(&job));
    // Again, with different parts of the two prompts in the cache: the unconditional one is the same for every drawing of this length.
    let other = drawing(4, 45);
    assert_eq!(run(&engine, other.clone()).ids, expected(&other));
    for step in watch.steps() {
        let asked: Vec<_> = step.iter().filter(|slice| slice.head == Some(Head::Image)).collect();
        assert!(matches!(asked.len(), 0 | 2));
        assert!(asked.iter().all(|slice| slice.end() == asked[0].end()));
    }
    assert_all_blocks_back(&engine);
}

#[test]
fn outputs_end_where_they_should() {
    let (engine, _) = start(64, EngineConfig::default());
    let sampling = |max_tokens, ignore_eos| Sampling { max_tokens, ignore_eos, seed: 5, ..Sampling::default() };
    let endless = text(Prompt::tokens(ids(1, 10)), sampling(Some(400), true));
    let whole = run(&engine, endless);
    assert_eq!((whole.ids.len(), whole.end), (400, Ok(FinishReason::Length)));
    let at = whole.ids.iter().position(|&id| id == 3).expect("400 draws of 47 tokens hit each");
    let stopped = run(&engine, text(Prompt::tokens(ids(1, 10)), sampling(Some(400), false)));
    assert_eq!((stopped.ids.as_slice(), stopped.end), (&whole.ids[..=at], Ok(FinishReason::Stop)));
    assert_eq!(run(&engine, drawing(1, 10)).end, Ok(FinishReason::Stop));
}

#[test]
fn context_and_cache_bound_the_output() {
    let unbounded = |length| text(Prompt::tokens(ids(1, length)), Sampling { ignore_eos: true, ..Sampling::default() });
    // 100 positions of context; or 5 blocks of 16.
    for (blocks, context, positions) in [(64, 100, 100), (5, 4096, 80)] {
        let engine = Engine::start(Box::new(Toy::text_only(blocks, context)), EngineConfig::default());
        let outcome = run(&engine, unbounded(30));
        assert_eq!((outcome.ids.len(), outcome.end), (positions - 30, Ok(FinishReason::Length)));
        assert_eq!(run(&engine, unbounded(positions - 1)).ids.len(), 1);
        let too_long = engine.submit(unbounded(positions)).unwrap_err();
        assert_eq!(too_long, SubmitError::TooLong { prompt: positions, output: 1, context: positions });
        assert_all_blocks_back(&engine);
    }
    let (engine, _) = start(10, EngineConfig::default());
    // A pair has 5 blocks for each half: 80 positions, 20 of them for codes.
    assert_eq!(run(&engine, drawing(1, 60)).ids.len(), 21);
    assert_eq!(engine.submit(drawing(1, 61)).unwrap_err(), SubmitError::TooLong { prompt: 61, output: 20, context: 80 });
}

#[test]
fn wrong_jobs_are_refused_with_the_field() {
    let (engine, _) = start(64, EngineConfig::default());
    let text_only = Engine::start(Box::new(Toy::text_only(64, 4096)), EngineConfig::default());
    let good = plain(1, 10, 5);
    let with = |prompt: Prompt| Job { prompt, ..good.clone() };
    let mut uneven = drawing(1, 10);
    uneven.prompt = Prompt::tokens(ids(1, 9));
    let wide = Segment::Embeddings(domain::Embeddings { width: 3, values: vec![0.0; 6].into() });
    let rows = [
        (&engine, with(Prompt::default()), "prompt"),
        (&engine, with(Prompt::tokens(vec![1, 50])), "prompt[0]"),
        (&engine, with(Prompt { segments: vec![Segment::Tokens(vec![1]), wide] }), "prompt[1]"),
        (&engine, Job { emitted: vec![50], ..good.clone() }, "emitted"),
        (&engine, Job { emitted: vec![1; 6], ..good.clone() }, "emitted"),
        (&engine, Job { emitted: vec![24], ..drawing(1, 10) }, "emitted"),
        (&engine, uneven, "image.unconditional"),
        (&text_only, drawing(1, 10), "image"),
    ];
    for (engine, job, field) in rows {
        match engine.submit(job).unwrap_err() {
            SubmitError::Invalid(invalid) => assert_eq!(invalid.field, field),
            other => panic!("{field}: {other}"),
        }
    }
    assert_eq!(run(&engine, good.clone()).ids, expected(&good), "nothing was disturbed");
}

#[test]
fn the_queue_is_bounded_and_recovers() {
    let (engine, watch) = start(64, EngineConfig { max_sequences: 1, queue_limit: 3, ..EngineConfig::default() });
    watch.allow(0);
    let mut streams = vec![engine.submit(plain(0, 5, 3)).unwrap()];
    wait_until("the first job runs", || watch.steps().len() == 1);
    streams.extend((1..4).map(|seed| engine.submit(plain(seed, 5, 3)).unwrap()));
    assert_eq!(engine.submit(plain(9, 5, 3)).unwrap_err(), SubmitError::QueueFull { limit: 3 });
    watch.open();
    for (seed, stream) in (0..).zip(streams) {
        assert_eq!(block_on(outcome(stream)).ids, expected(&plain(seed, 5, 3)));
    }
    assert_eq!(run(&engine, plain(9, 5, 3)).ids, expected(&plain(9, 5, 3)));
}

#[test]
fn a_cancelled_job_is_gone_after_the_step() {
    let (engine, watch) = start(64, EngineConfig::default());
    watch.allow(0);
    let cancelled = [plain(1, 40, 1000), drawing(2, 40), plain(3, 700, 10)].map(|job| engine.submit(job).unwrap());
    let kept = engine.submit(plain(4, 10, 8)).unwrap();
    wait_until("a step has begun", || watch.steps().len() == 1);
    drop(cancelled);
    watch.open();
    assert_eq!(block_on(outcome(kept)).ids, expected(&plain(4, 10, 8)));
    assert!(watch.steps()[1..].iter().all(|step| step.len() <= 1), "only the kept job was worked on");
    assert_all_blocks_back(&engine);
    assert_eq!(engine.stats().cancelled, 3);
}

#[test]
fn cancelling_an_idle_or_waiting_job_frees_it_too() {
    let (engine, watch) = start(64, EngineConfig { max_sequences: 1, ..EngineConfig::default() });
    let slow = engine.submit(plain(1, 10, 2000)).unwrap();
    wait_until("its reader is behind", || engine.stats().paused == 1);
    drop(slow);
    assert_all_blocks_back(&engine);
    watch.allow(0);
    let before = watch.steps().len();
    let running = engine.submit(plain(1, 10, 5)).unwrap();
    wait_until("it runs", || watch.steps().len() > before);
    drop(engine.submit(plain(2, 10, 5)).unwrap());
    watch.open();
    assert_eq!(block_on(outcome(running)).ids.len(), 5);
    assert_all_blocks_back(&engine);
    assert_eq!(engine.stats().cancelled, 2);
}

#[test]
fn a_slow_reader_pauses_only_itself() {
    let (engine, _) = start(256, EngineConfig::default());
    let (slow, quick) = (plain(1, 10, 1000), plain(2, 10, 1000));
    let mut unread = engine.submit(slow.clone()).unwrap();
    assert_eq!(run(&engine, quick.clone()).ids, expected(&quick));
    wait_until("the slow reader's job is all that is left", || engine.stats().running == 1 && engine.stats().paused == 1);
    let delivered = engine.stats().outputs - 1000;
    assert_eq!(delivered as usize, BUFFERED_EVENTS - 1, "the first event announces the prompt");
    // Half of the events must be read before the job goes on.
    for _ in 0..BUFFERED_EVENTS / 2 - 1 {
        assert!(block_on(unread.next()).unwrap().is_ok());
    }
    assert_eq!(run(&engine, plain(3, 10, 3)).ids.len(), 3);
    wait_until("the last job is gone", || engine.stats().running == 1);
    assert_eq!(engine.stats().outputs - 1003, delivered);
    let rest = block_on(unread.map(Result::unwrap).collect::<Vec<_>>());
    assert_eq!(rest.len(), 1 + 1000 + 1 - (BUFFERED_EVENTS / 2 - 1));
    assert_eq!(rest.last(), Some(&Event::Finished(FinishReason::Length)));
    let tail: Vec<u32> = rest.iter().filter_map(|event| if let Event::Output { id, .. } = event { Some(*id) } else { None }).collect();
    assert!(expected(&slow).ends_with(&tail));
    assert_all_blocks_back(&engine);
}

#[test]
fn readers_that_never_read_do_not_keep_others_out() {
    let (engine, _) = start(40, EngineConfig { max_sequences: 2, ..EngineConfig::default() });
    let unread: Vec<_> = (0..2).map(|seed| engine.submit(plain(seed, 10, 500)).unwrap()).collect();
    wait_until("both are paused", || engine.stats().paused == 2);
    assert_eq!(run(&engine, plain(5, 10, 300)).ids, expected(&plain(5, 10, 300)));
    for (seed, stream) in (0..).zip(unread) {
        assert_eq!(block_on(outcome(stream)).ids, expected(&plain(seed, 10, 500)));
    }
    assert_all_blocks_back(&engine);
}

#[test]
fn stalled_readers_and_scarce_blocks_change_nothing() {
    // 60 blocks hold one and a half of these jobs; all but one reader at a time stand still.
    for prefix_cache in [true, false] {
        let (engine, _) = start(60, EngineConfig { prefix_cache, ..EngineConfig::default() });
        let jobs: Vec<Job> = (0..6).map(|seed| plain(seed, 10 + seed as usize, 600)).collect();
        let mut streams: Vec<_> = jobs.iter().map(|job| engine.submit(job.clone()).unwrap()).collect();
        let mut ids: Vec<Vec<u32>> = vec![Vec::new(); jobs.len()];
        for turn in [5, 2, 4, 0, 3, 1, 5, 0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5] {
            for event in block_on(streams[turn].by_ref().take(201).collect::<Vec<_>>()) {
                ids[turn].extend(if let Event::Output { id, .. } = event.unwrap() { Some(id) } else { None });
            }
        }
        for (job, ids) in jobs.iter().zip(&ids) {
            assert_eq!(*ids, expected(job));
        }
        drop(streams);
        assert_all_blocks_back(&engine);
        assert!(engine.stats().preemptions > 0);
    }
}

#[test]
fn sixty_four_streams_share_evenly() {
    for (max_batch_tokens, window) in [(16, 800), (48, 300), (512, 200)] {
        let (engine, watch) = start(64 * 40, EngineConfig { max_batch_tokens, ..EngineConfig::default() });
        watch.allow(0);
        let mut streams: Vec<_> = (0..64).map(|seed| engine.submit(plain(seed, 20 + 8 * (seed as usize % 5), 600)).unwrap()).collect();
        let mut after = |steps| {
            let target = watch.steps().len().max(1) + steps;
            watch.allow(steps);
            wait_until("these steps are done", || watch.steps().len() == target);
            let delivered = |stream: &mut JobStream| std::iter::from_fn(|| stream.next().now_or_never()).count();
            streams.iter_mut().map(delivered).collect::<Vec<usize>>()
        };
        wait_until("the first step has begun", || watch.steps().len() == 1);
        let mut started = [false; 64];
        while started.contains(&false) {
            started.iter_mut().zip(after(20)).for_each(|(started, events)| *started |= events > 0);
        }
        let counts = after(window);
        let (least, most) = (counts.iter().min().unwrap(), counts.iter().max().unwrap());
        assert!(*least > 100 && *most < BUFFERED_EVENTS, "nobody was paused: {counts:?}");
        assert!(most - least <= 1, "{max_batch_tokens} rows per step: {counts:?}");
        watch.open();
        drop(streams);
        assert_all_blocks_back(&engine);
    }
}

#[test]
fn a_long_prompt_does_not_stop_the_others() {
    let (engine, watch) = start(512, EngineConfig { max_batch_tokens: 64, ..EngineConfig::default() });
    watch.allow(3);
    let decoding = engine.submit(plain(1, 10, 80)).unwrap();
    wait_until("three steps are done", || watch.steps().len() == 4);
    let long: Vec<_> = (2..4).map(|seed| engine.submit(plain(seed, 1500, 2)).unwrap()).collect();
    watch.open();
    assert_eq!(block_on(outcome(decoding)).ids, expected(&plain(1, 10, 80)));
    for (seed, stream) in (2..).zip(long) {
        assert_eq!(block_on(outcome(stream)).ids, expected(&plain(seed, 1500, 2)));
    }
    // While there is a prompt to read, every step also decodes, and both prompts get their share.
    let mixed: Vec<_> = watch.steps().into_iter().filter(|step| step.iter().any(|slice| slice.rows.len() > 1 && slice.start > 0)).collect();
    assert!(mixed.len() > 40);
    for step in &mixed {
        assert!(step.iter().any(|slice| slice.rows.len() == 1 && slice.head.is_some()));
    }
    let shared = mixed.iter().filter(|step| step.iter().filter(|slice| slice.rows.len() > 16).count() == 2).count();
    assert!(shared > 40, "{shared} of {} steps read both prompts", mixed.len());
}

#[test]
fn one_bad_job_disturbs_nobody() {
    let (engine, _) = start(256, EngineConfig::default());
    let bad = |token| {
        let mut job = plain(1, 20, 5);
        job.prompt.segments.push(Segment::Tokens(vec![token]));
        job
    };
    let jobs = [plain(1, 30, 40), bad(NAN), plain(2, 30, 40), bad(FAIL), drawing(3, 30), plain(1, 30, 40)];
    let outcomes = run_all(&engine, &jobs);
    for (i, (job, outcome)) in jobs.iter().zip(&outcomes).enumerate() {
        let reason = match i {
            1 => "the model's logits are not finite numbers",
            3 => "compute: the toy dislikes this token",
            _ => {
                assert_eq!(outcome.ids, expected(job));
                continue;
            }
        };
        assert_eq!(outcome.end, Err(JobError::Compute(reason.into())));
    }
    assert_all_blocks_back(&engine);
    assert_eq!(engine.stats().failed, 2);
    assert!(engine.is_serving());
}

#[test]
fn a_crash_of_the_model_ends_the_engine_with_words() {
    let (engine, watch) = start(256, EngineConfig { max_sequences: 2, ..EngineConfig::default() });
    watch.allow(0);
    let beside = engine.submit(plain(1, 30, 40)).unwrap();
    let crash = engine.submit(text(Prompt::tokens(vec![1, CRASH]), Sampling::default())).unwrap();
    let waiting = engine.submit(plain(2, 30, 40)).unwrap();
    watch.open();
    let ends = [beside, crash, waiting].map(|stream| block_on(outcome(stream)).end.unwrap_err());
    assert!(ends.contains(&JobError::Compute("the model crashed: the toy broke".into())), "{ends:?}");
    assert_eq!(ends[2], JobError::Stopped);
    block_on(engine.stopped());
    assert!(!engine.is_serving());
    assert_eq!(engine.submit(plain(1, 1, 1)).unwrap_err(), SubmitError::Stopped);
}

#[test]
fn dropping_the_engine_ends_its_jobs() {
    let (engine, watch) = start(64, EngineConfig { max_sequences: 1, ..EngineConfig::default() });
    // Unread, neither can finish: it would be paused first.
    watch.allow(1);
    let jobs = [engine.submit(plain(1, 10, 900)).unwrap(), engine.submit(plain(2, 10, 900)).unwrap()];
    wait_until("the second step has begun", || watch.steps().len() == 2);
    let stopped = engine.stopped();
    let dropping = std::thread::spawn(move || drop(engine));
    watch.open();
    dropping.join().unwrap();
    block_on(stopped);
    for stream in jobs {
        assert_eq!(block_on(outcome(stream)).end, Err(JobError::Stopped));
    }
}
