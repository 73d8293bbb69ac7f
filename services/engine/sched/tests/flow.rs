//! Flows in the engine over a toy model: the map after every step depends on the job alone.

#![allow(clippy::unwrap_used)]

mod toy;

use domain::{Canvas, Event, FinishReason, FlowState, ImageSampling, Invalid, Job, Latent, LatentGrid, Mode, Prompt, Solver};
use futures::{StreamExt, executor::block_on, future::join_all};
use layers::{EngineError, FlowInput, FlowModel, Head, Observer, RowInput};
use proptest::prelude::*;
use sched::solver::{Integrator, guide, noise};
use sched::{Engine, EngineConfig, JobError, JobStream, SubmitError};
use toy::*;

const GRID: LatentGrid = LatentGrid { channels: 2, rows: 2, columns: 3, positions: 21 };
/// Maps that hold this value cannot be encoded.
const BAD: f32 = 1234.0;

/// Hashes for networks.
struct Hashes;

impl FlowModel for Hashes {
    fn encode(&self, z: &[f32], time: f32, _observer: &mut dyn Observer) -> Result<FlowInput, EngineError> {
        if z.contains(&BAD) {
            return Err(EngineError::Compute("the toy dislikes this map".into()));
        }
        let state = fold(z, u64::from(time.to_bits()));
        let rows: Vec<f32> = (0..GRID.positions).flat_map(|row| hidden(mix(state, row as u64))).collect();
        Ok(FlowInput { rows: rows.into(), skip: hidden(mix(state, 99)).to_vec() })
    }

    fn decode(&self, states: &[f32], input: &FlowInput, _observer: &mut dyn Observer) -> Result<Vec<f32>, EngineError> {
        assert_eq!(states.len(), (GRID.positions - 1) * WIDTH, "the row of the time is no part of the map");
        let state = fold(states, fold(&input.skip, 5));
        Ok((0..GRID.len()).map(|i| hidden(mix(state, i as u64))[0]).collect())
    }
}

fn fold(values: &[f32], seed: u64) -> u64 {
    values.iter().fold(seed, |state, value| mix(state, u64::from(value.to_bits())))
}

fn start_flowing(blocks: usize, config: EngineConfig) -> (Engine, Watcher) {
    start_toy(Toy::flowing(blocks, Canvas::Latent(GRID), Box::new(Hashes)), config)
}

fn flow(seed: u64, prompt: usize, unconditional: usize, steps: u32, solver: Solver) -> Job {
    let sampling = ImageSampling { seed, steps, solver, guidance: 2.0, ..ImageSampling::default() };
    let ids = ids(seed % 3, prompt);
    let unconditional = Prompt::tokens(ids[..unconditional.min(prompt)].to_vec());
    let mode = Mode::Flow { unconditional, sampling, estimate_every: None, from: None };
    Job { prompt: Prompt::tokens(ids), mode, emitted: Vec::new() }
}

/// What a flow yields: (steps done, map, estimate) for each step, and how it ends.
#[derive(Debug, Clone, PartialEq)]
struct Flown {
    steps: Vec<(u32, Vec<f32>, Option<Vec<f32>>)>,
    end: Result<FinishReason, JobError>,
}

async fn read(mut stream: JobStream) -> Flown {
    let (mut steps, mut prefilled) = (Vec::new(), false);
    loop {
        match stream.next().await.expect("a stream ends with a last word") {
            Ok(Event::Prefilled { .. }) => assert!(!std::mem::replace(&mut prefilled, true), "announced twice"),
            Ok(Event::Flow { state, estimate, .. }) => {
                assert!(prefilled, "a step before the announcement");
                assert!(state.z.fits(GRID));
                steps.push((state.done, state.z.values.to_vec(), estimate.map(|estimate| estimate.values.to_vec())));
            }
            Ok(Event::Finished(reason)) => return Flown { steps, end: Ok(reason) },
            Err(error) => return Flown { steps, end: Err(error) },
            Ok(Event::Output { .. } | Event::Degraded(_)) => panic!("an output of a flow"),
        }
    }
}

fn fly(engine: &Engine, job: Job) -> Flown {
    block_on(read(engine.submit(job).unwrap()))
}

/// The plain loop over plain lists, without blocks, batches or caches: the map after every step.
fn flown(job: &Job) -> Vec<Vec<f32>> {
    let Mode::Flow { unconditional, sampling, from, .. } = &job.mode else { unreachable!() };
    let (done, z) = from.as_ref().map_or_else(|| (0, noise(sampling.seed, GRID.len())), |state| (state.done, state.z.values.to_vec()));
    let mut integrator = Integrator::new(sampling.solver, sampling.steps, done, z);
    let mut maps = Vec::new();
    while !integrator.is_over() {
        let (z, time) = integrator.point();
        let input = Hashes.encode(&z, time, &mut layers::NoObserver).unwrap();
        let half = |prompt: &Prompt| {
            let (prompt, place) = (rows(prompt), job.prompt.len());
            let tail = (0..GRID.positions).map(|row| RowInput::Embedding { values: input.rows.clone(), row });
            let placed = prompt.into_iter().enumerate().chain((place..).zip(tail));
            let mut state = 0;
            let states: Vec<u64> = placed
                .map(|(position, row)| {
                    state = mix(state, mix(state, mix(position as u64, toy::input(&row))));
                    state
                })
                .collect();
            let hidden: Vec<f32> = states[states.len() + 1 - GRID.positions..].iter().flat_map(|&state| hidden(state)).collect();
            Hashes.decode(&hidden, &input, &mut layers::NoObserver).unwrap()
        };
        let mut velocity = half(&job.prompt);
        guide(&mut velocity, &half(unconditional), sampling.guidance);
        if integrator.advance(velocity).is_some() {
            maps.push(integrator.z().to_vec());
        }
    }
    maps
}

fn assert_flown(outcome: &Flown, job: &Job) {
    let maps: Vec<Vec<f32>> = outcome.steps.iter().map(|(_, map, _)| map.clone()).collect();
    assert_eq!(maps, flown(job));
    assert_eq!(outcome.end, Ok(FinishReason::Stop));
}

fn jobs() -> impl Strategy<Value = Vec<Job>> {
    let solver = prop_oneof![Just(Solver::Euler), Just(Solver::Heun), Just(Solver::Midpoint)];
    let flows = (0..6u64, 1..70usize, 1..40usize, 1..5u32, solver).prop_map(|(seed, p, u, steps, solver)| flow(seed, p, u, steps, solver));
    let texts = (0..3u64, 1..90usize, 1..30u32).prop_map(|(seed, length, count)| plain(seed, length, count));
    prop::collection::vec(prop_oneof![2 => flows, 1 => texts], 1..8)
}

fn configs() -> impl Strategy<Value = EngineConfig> {
    (16..120usize, 1..10usize, any::<bool>()).prop_map(|(max_batch_tokens, max_sequences, prefix_cache)| EngineConfig {
        max_batch_tokens,
        max_sequences,
        queue_limit: 64,
        prefix_cache,
    })
}

async fn check(engine: &Engine, job: &Job) {
    let stream = engine.submit(job.clone()).unwrap();
    match job.mode {
        Mode::Flow { .. } => assert_flown(&read(stream).await, job),
        Mode::Text { .. } | Mode::Image { .. } => assert_eq!(outcome(stream).await.ids, expected(job)),
    }
}

proptest! {
    /// 12 blocks hold the longest flow alone and little beside it, so mixes are preempted often.
    #[test]
    fn any_mix_yields_what_each_job_yields_alone(jobs in jobs(), config in configs(), blocks in 12..60usize) {
        let (engine, watch) = start_flowing(blocks, config);
        block_on(join_all(jobs.iter().map(|job| check(&engine, job))));
        assert_all_blocks_back(&engine);
        for step in watch.steps() {
            prop_assert!(step.iter().map(|slice| slice.rows.len()).sum::<usize>() <= config.max_batch_tokens);
        }
    }

    #[test]
    fn a_flow_goes_on_from_any_step(seed in 0..9u64, prompt in 1..60usize, steps in 1..6u32, cut in 0..6u32, heun in any::<bool>()) {
        let job = flow(seed, prompt, 1, steps, if heun { Solver::Heun } else { Solver::Euler });
        let whole = flown(&job);
        let done = cut.min(steps);
        let z = if done == 0 { noise(seed, GRID.len()) } else { whole[done as usize - 1].clone() };
        let mut resumed = job;
        let Mode::Flow { from, .. } = &mut resumed.mode else { unreachable!() };
        *from = Some(FlowState { done, z: Latent::new(GRID, z) });
        let (engine, _watch) = start_flowing(64, EngineConfig::default());
        let outcome = fly(&engine, resumed);
        prop_assert_eq!(outcome.end, Ok(FinishReason::Stop));
        prop_assert_eq!(outcome.steps.iter().map(|(_, map, _)| map.clone()).collect::<Vec<_>>(), &whole[done as usize..]);
        prop_assert_eq!(outcome.steps.first().map(|step| step.0), (done < steps).then_some(done + 1));
    }
}

#[test]
fn chunks_of_any_size_give_the_same() {
    let job = flow(1, 50, 1, 3, Solver::Euler);
    for max_batch_tokens in [16, 17, 21, 42, 72, 93, 512] {
        let (engine, _watch) = start_flowing(16, EngineConfig { max_batch_tokens, ..EngineConfig::default() });
        assert_flown(&fly(&engine, job.clone()), &job);
    }
}

/// Only the prompt is worth keeping: it is computed once, for all steps and for the next request.
#[test]
fn the_prompt_is_read_once_and_nothing_behind_it_is_kept() {
    let (engine, watch) = start_flowing(64, EngineConfig::default());
    let job = flow(1, 40, 1, 5, Solver::Heun);
    assert_flown(&fly(&engine, job.clone()), &job);
    let computed: usize = watch.steps().iter().flatten().map(|slice| slice.rows.len()).sum();
    assert_eq!(computed, 40 + 1 + 5 * 2 * 2 * GRID.positions);
    assert_all_blocks_back(&engine);
    assert_eq!(engine.stats().cached_blocks, 2, "the full blocks of the prompt");
    assert_flown(&fly(&engine, job.clone()), &job);
    let again: usize = watch.steps().iter().flatten().map(|slice| slice.rows.len()).sum::<usize>() - computed;
    assert_eq!(again, computed - 32);
}

/// The rows behind the unconditional prompt stand where those behind the whole prompt do; the prompts themselves are not moved.
#[test]
fn only_what_follows_the_shorter_prompt_is_shifted() {
    let (engine, watch) = start_flowing(64, EngineConfig { prefix_cache: false, ..EngineConfig::default() });
    fly(&engine, flow(1, 40, 3, 1, Solver::Euler));
    let slices: Vec<_> = watch.steps().into_iter().flatten().map(|slice| (slice.start, slice.rows.len(), slice.shift)).collect();
    assert_eq!(slices, [(0, 40, 0), (0, 3, 0), (40, GRID.positions, 0), (3, GRID.positions, 37)]);
}

#[test]
fn estimates_come_when_they_are_due() {
    let mut job = flow(2, 10, 1, 7, Solver::Euler);
    let Mode::Flow { estimate_every, .. } = &mut job.mode else { unreachable!() };
    *estimate_every = Some(3);
    let (engine, _watch) = start_flowing(32, EngineConfig::default());
    let outcome = fly(&engine, job.clone());
    assert_flown(&outcome, &job);
    let due: Vec<u32> = outcome.steps.iter().filter(|(_, _, estimate)| estimate.is_some()).map(|(done, ..)| *done).collect();
    assert_eq!(due, [3, 6]);
    // With a velocity that stays, four more steps of one seventh lead from the third map to the estimate.
    let ((_, second, _), (_, third, estimate)) = (&outcome.steps[1], &outcome.steps[2]);
    for ((a, b), estimate) in second.iter().zip(third).zip(estimate.as_ref().unwrap()) {
        assert!((b + 4.0 * (b - a) - estimate).abs() < 1e-4);
    }
}

#[test]
fn a_text_goes_on_beside_a_flow() {
    let (engine, watch) = start_flowing(64, EngineConfig { max_batch_tokens: 16, ..EngineConfig::default() });
    watch.allow(0);
    let (drawing, writing) = (flow(1, 30, 1, 100, Solver::Euler), plain(2, 5, 40));
    let (drawn, written) = (engine.submit(drawing.clone()).unwrap(), engine.submit(writing.clone()).unwrap());
    watch.open();
    assert_eq!(block_on(outcome(written)).ids, expected(&writing));
    assert_flown(&block_on(read(drawn)), &drawing);
    let steps = watch.steps();
    let last = steps.iter().rposition(|slices| slices.iter().any(|slice| slice.head == Some(Head::Text))).unwrap();
    assert!(last < 80, "40 tokens took {last} steps beside a flow");
    assert!(steps.len() > 200, "the flow is longer than the text");
}

#[test]
fn a_cancelled_flow_leaves_nothing_behind() {
    let (engine, _watch) = start_flowing(32, EngineConfig::default());
    let mut stream = engine.submit(flow(1, 30, 1, 1000, Solver::Euler)).unwrap();
    block_on(async { while !matches!(stream.next().await, Some(Ok(Event::Flow { state, .. })) if state.done == 3) {} });
    drop(stream);
    wait_until("the cancellation is counted", || engine.stats().cancelled == 1);
    assert_all_blocks_back(&engine);
    let job = flow(2, 30, 1, 2, Solver::Euler);
    assert_flown(&fly(&engine, job.clone()), &job);
}

/// A reader that does not read pauses its flow, and only its own.
#[test]
fn a_slow_reader_pauses_its_flow() {
    let (engine, _watch) = start_flowing(64, EngineConfig::default());
    let job = flow(1, 20, 1, 600, Solver::Euler);
    let slow = engine.submit(job.clone()).unwrap();
    wait_until("the flow is paused", || engine.stats().paused == 1);
    let other = flow(2, 20, 1, 3, Solver::Midpoint);
    assert_flown(&fly(&engine, other.clone()), &other);
    assert_flown(&block_on(read(slow)), &job);
}

#[test]
fn what_goes_wrong_ends_that_flow_alone() {
    let (engine, _watch) = start_flowing(64, EngineConfig::default());
    let good = flow(1, 20, 1, 40, Solver::Euler);
    let beside = engine.submit(good.clone()).unwrap();
    let mut wild = flow(2, 20, 1, 5, Solver::Euler);
    let Mode::Flow { sampling, .. } = &mut wild.mode else { unreachable!() };
    sampling.guidance = f32::MAX;
    let error = fly(&engine, wild).end.unwrap_err();
    assert_eq!(error, JobError::Compute("compute: the latent map is not finite after step 1 of 5".into()));
    let mut bad = flow(3, 20, 1, 5, Solver::Euler);
    let Mode::Flow { from, .. } = &mut bad.mode else { unreachable!() };
    *from = Some(FlowState { done: 2, z: Latent::new(GRID, vec![BAD; GRID.len()]) });
    let error = fly(&engine, bad).end.unwrap_err();
    assert_eq!(error, JobError::Compute("compute: the toy dislikes this map".into()));
    assert_flown(&block_on(read(beside)), &good);
    assert_all_blocks_back(&engine);
    wait_until("both failures are counted", || engine.stats().failed == 2);
}

#[test]
fn a_model_that_gives_no_hidden_states_fails_the_job() {
    let mut toy = Toy::flowing(32, Canvas::Latent(GRID), Box::new(Hashes));
    toy.mute = true;
    let (engine, _watch) = start_toy(toy, EngineConfig::default());
    let error = fly(&engine, flow(1, 20, 1, 5, Solver::Euler)).end.unwrap_err();
    assert!(matches!(&error, JobError::Compute(reason) if reason.contains("0 hidden values for 21 rows of 2")), "{error}");
    assert_all_blocks_back(&engine);
}

#[test]
fn jobs_that_cannot_be_are_refused_by_field() {
    let (engine, _watch) = start_flowing(8, EngineConfig::default());
    type Spoil = fn(&mut Job);
    let state =
        |done, values: usize| FlowState { done, z: Latent { channels: values, rows: 1, columns: 1, values: vec![0.0; values].into() } };
    let rows: [(&str, Spoil); 5] = [
        ("prompt", |job| job.prompt = Prompt::default()),
        ("emitted", |job| job.emitted = vec![1]),
        ("flow.unconditional", |job| set(job, |u, _| *u = Prompt::tokens(vec![1; 11]))),
        ("flow.unconditional", |job| set(job, |u, _| *u = Prompt::default())),
        ("flow.unconditional[0]", |job| set(job, |u, _| *u = Prompt::tokens(vec![VOCABULARY as u32]))),
    ];
    let refused = |job: Job| match engine.submit(job).unwrap_err() {
        SubmitError::Invalid(Invalid { field, .. }) => field,
        other => panic!("{other}"),
    };
    for (field, spoil) in rows {
        let mut job = flow(1, 10, 1, 5, Solver::Euler);
        spoil(&mut job);
        assert_eq!(refused(job), field);
    }
    for (field, state) in [("flow.from.done", state(6, GRID.len())), ("flow.from.z", state(2, GRID.len())), ("flow.from.z", state(2, 1))] {
        let mut job = flow(1, 10, 1, 5, Solver::Euler);
        set(&mut job, |_, from| *from = Some(state));
        assert_eq!(refused(job), field);
    }
    // 8 blocks are 64 positions for each half.
    let error = engine.submit(flow(1, 44, 1, 5, Solver::Euler)).unwrap_err();
    assert_eq!(error, SubmitError::TooLong { prompt: 44, output: 21, context: 64 });
    let longest = flow(1, 43, 43, 2, Solver::Euler);
    assert_flown(&fly(&engine, longest.clone()), &longest);
    let (writer, _watch) = start(8, EngineConfig::default());
    let error = writer.submit(flow(1, 10, 1, 5, Solver::Euler)).unwrap_err();
    assert!(matches!(error, SubmitError::Invalid(invalid) if invalid.field == "flow"));
    let error = engine.submit(drawing(1, 10)).unwrap_err();
    assert!(matches!(error, SubmitError::Invalid(invalid) if invalid.field == "image"));
}

fn set(job: &mut Job, change: impl FnOnce(&mut Prompt, &mut Option<FlowState>)) {
    let Mode::Flow { unconditional, from, .. } = &mut job.mode else { unreachable!() };
    change(unconditional, from);
}
