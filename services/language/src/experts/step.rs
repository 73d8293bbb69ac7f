//! One layer of one step: its shares sent to the replicas that hold their experts, and the outputs waited for.
//!
//! A batch is pure, so it may be sent twice: to another replica when one fails, and to a second one when the first is late. Outputs are put in
//! their places by what was asked, never by when they came, so neither changes a result.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use layers::{EngineError, Mixture, Rows, Share, Term};
use mesh::InstanceName;
use placement::ExpertRange;
use proto::v1;
use tracing::Span;

use super::Fleet;
use super::answers::{Answer, Answers};
use super::batch::{self, Packed};
use super::replica::{Failed, Waiter};

/// How long the replicas of a shard are asked before the step gives up.
const LIMIT: Duration = Duration::from_secs(30);
/// Before a batch is offered again to replicas that were busy or about to hold other experts.
const PAUSE: Duration = Duration::from_millis(2);

/// Shares of a step on their way.
pub(super) struct Step<'a> {
    fleet: &'a Fleet,
    layer: usize,
    shares: &'a [Share],
    may_lose: Vec<bool>,
    rows: Packed,
    parts: Vec<Part>,
    lost: Vec<usize>,
    answers: Arc<Answers>,
    begun: Instant,
}

/// What one shard computes of it.
struct Part {
    shard: ExpertRange,
    /// By their number; ascending.
    shares: Vec<usize>,
    batch: v1::ExpertBatch,
    /// Those asked so far.
    asked: Vec<InstanceName>,
    /// How many of them may still answer.
    open: usize,
    sent: Instant,
    /// When a second replica is asked; `None` when it has been.
    hedge_at: Option<Instant>,
    /// Whether a replica was busy, or did not hold what it should: then it is worth to wait a moment.
    patient: bool,
    /// When its shares are given out anew.
    again_at: Option<Instant>,
    state: State,
    /// By the row of the outputs that each begins with. The same from whatever replica.
    pieces: BTreeMap<usize, v1::Activations>,
    span: Span,
}

enum State {
    Waiting,
    Done,
    /// Its shares are in other parts now.
    Replaced,
}

impl<'a> Step<'a> {
    /// Sends every share on its way.
    pub fn begin(fleet: &'a Fleet, layer: usize, rows: Rows, shares: &'a [Share], may_lose: &[bool]) -> Result<Self, EngineError> {
        let rows = Packed::new(rows, fleet.encoding);
        let may_lose = may_lose.to_vec();
        let begun = Instant::now();
        let mut step = Self { fleet, layer, shares, may_lose, rows, parts: Vec::new(), lost: Vec::new(), answers: Arc::default(), begun };
        step.assign(&(0..shares.len()).collect::<Vec<_>>())?;
        fleet.drive.flush();
        Ok(step)
    }

    /// Waits for all outputs.
    pub fn finish(mut self) -> Result<Mixture<Vec<f32>>, EngineError> {
        let stopped = || EngineError::Unavailable(format!("the experts of {} have stopped", self.fleet.model));
        let fleet = self.fleet;
        fleet.drive.wait(self.wait()).ok_or_else(stopped)??;
        self.mixture()
    }

    async fn wait(&mut self) -> Result<(), EngineError> {
        let answers = self.answers.clone();
        while self.parts.iter().any(|part| matches!(part.state, State::Waiting)) {
            match tokio::time::timeout(self.next_event(), answers.take()).await {
                Ok(come) => come.into_iter().try_for_each(|answer| self.take(answer))?,
                Err(_) => self.overdue()?,
            }
        }
        Ok(())
    }

    /// Gives shares to shards, and each shard's to one of its replicas.
    fn assign(&mut self, numbers: &[usize]) -> Result<(), EngineError> {
        let (parts, lost) = self.fleet.table().assign(self.shares, numbers.iter().copied());
        for number in lost {
            self.lose(number)?;
        }
        for (shard, shares) in parts {
            let batch = batch::build(self.layer, &self.rows, shares.iter().map(|&number| &self.shares[number]));
            let rows = batch.places.len();
            let span = self.fleet.span(shard, self.layer, rows);
            let batch = v1::ExpertBatch { traceparent: telemetry::traceparent(&span).unwrap_or_default(), ..batch };
            let now = Instant::now();
            let hedge_at = Some(now + self.fleet.delays.hedge_after(shard, rows));
            let part = Part {
                shard,
                shares,
                batch,
                asked: Vec::new(),
                open: 0,
                sent: now,
                hedge_at,
                patient: false,
                again_at: None,
                state: State::Waiting,
                pieces: BTreeMap::new(),
                span,
            };
            self.parts.push(part);
            self.send(self.parts.len() - 1)?;
        }
        Ok(())
    }

    /// Nobody holds the expert of this share.
    fn lose(&mut self, number: usize) -> Result<(), EngineError> {
        let share = &self.shares[number];
        if share.rows.iter().all(|&row| self.may_lose.get(row) == Some(&true)) {
            self.lost.push(number);
            return Ok(());
        }
        Err(EngineError::Unavailable(self.fleet.unheld(share.expert)))
    }

    /// Sends a part to a replica that has not been asked yet; without one its shares are given out anew.
    fn send(&mut self, index: usize) -> Result<(), EngineError> {
        let table = self.fleet.table();
        loop {
            let part = &mut self.parts[index];
            let Some(replica) = table.replica(part.shard, &part.batch.experts, &part.asked) else { break };
            replica.take_turn(self.fleet.turn());
            part.asked.push(replica.name.clone());
            part.sent = Instant::now();
            match replica.send(part.batch.clone(), Waiter { part: index, answers: self.answers.clone(), left: batch::outputs(&part.batch) })
            {
                Ok(()) => {
                    part.open += 1;
                    return Ok(());
                }
                Err(failed) => part.patient |= failed == Failed::Busy,
            }
        }
        let part = &mut self.parts[index];
        if part.open > 0 {
            return Ok(()); // somebody is still at it
        }
        if part.patient {
            part.again_at = Some(Instant::now() + PAUSE);
            return Ok(());
        }
        self.replace(index)
    }

    /// Gives the shares of a part out anew: other replicas may hold its experts, or have room now.
    fn replace(&mut self, index: usize) -> Result<(), EngineError> {
        self.fleet.look_again();
        let part = &mut self.parts[index];
        part.state = State::Replaced;
        let shares = std::mem::take(&mut part.shares);
        self.assign(&shares)
    }

    fn take(&mut self, answer: Answer) -> Result<(), EngineError> {
        let part = &mut self.parts[answer.part];
        if !matches!(part.state, State::Waiting) {
            return Ok(()); // the other one was faster
        }
        if answer.outcome.as_ref().map_or(true, |piece| piece.last) {
            part.open = part.open.saturating_sub(1);
        }
        match answer.outcome {
            Ok(piece) => {
                part.pieces.insert(piece.first, piece.rows);
                if piece.last {
                    self.fleet.delays.note(part.shard, part.batch.places.len(), part.sent.elapsed());
                    part.state = State::Done;
                    part.span = Span::none();
                }
                Ok(())
            }
            Err(Failed::Fatal(message)) => {
                Err(EngineError::Compute(format!("expert shard {} of {}: {message}", part.shard, self.fleet.model)))
            }
            Err(failed) => {
                tracing::debug!(parent: &part.span, shard = %part.shard, replica = %answer.from, ?failed, "a batch goes to another replica");
                self.fleet.count_failed(part.shard, &failed);
                part.patient |= matches!(failed, Failed::Busy | Failed::NotHeld);
                self.send(answer.part)
            }
        }
    }

    /// The time until something is to be done without an answer.
    fn next_event(&self) -> Duration {
        let waiting = self.parts.iter().filter(|part| matches!(part.state, State::Waiting));
        let soonest = waiting.flat_map(|part| [part.hedge_at, part.again_at]).flatten().chain([self.begun + LIMIT]).min();
        soonest.unwrap_or_else(Instant::now).saturating_duration_since(Instant::now())
    }

    /// Asks a second replica for what is late, and gives up what is too late.
    fn overdue(&mut self) -> Result<(), EngineError> {
        let now = Instant::now();
        for index in 0..self.parts.len() {
            let part = &mut self.parts[index];
            if !matches!(part.state, State::Waiting) {
                continue;
            }
            if now >= self.begun + LIMIT {
                let (shard, model) = (part.shard, &self.fleet.model);
                return Err(EngineError::Unavailable(format!(
                    "expert shard {shard} of {model} has not answered for {} s",
                    LIMIT.as_secs()
                )));
            }
            if part.again_at.take_if(|at| *at <= now).is_some() {
                self.replace(index)?;
            } else if part.hedge_at.take_if(|at| *at <= now).is_some() && self.has_other(index) {
                self.fleet.count_hedged(self.parts[index].shard);
                self.send(index)?;
            }
        }
        Ok(())
    }

    /// Whether there is a replica that has not been asked for this part.
    fn has_other(&self, index: usize) -> bool {
        let part = &self.parts[index];
        self.fleet.table().replica(part.shard, &part.batch.experts, &part.asked).is_some()
    }

    /// The outputs as terms of the sum: of single shares by ascending expert, or of shards by ascending range.
    fn mixture(self) -> Result<Mixture<Vec<f32>>, EngineError> {
        let mut terms: BTreeMap<usize, Term<Vec<f32>>> = BTreeMap::new();
        for part in self.parts {
            if !matches!(part.state, State::Done) {
                continue;
            }
            let shares: Vec<_> = part.shares.iter().map(|&number| &self.shares[number]).collect();
            let read = batch::read(&part.batch, &shares, part.pieces, self.rows.width());
            let read = read.map_err(|invalid| {
                EngineError::Compute(format!(
                    "expert shard {} of {} answered against the contract: {invalid}",
                    part.shard, self.fleet.model
                ))
            })?;
            terms.extend(part.shares.iter().copied().zip(read));
        }
        Ok(Mixture { terms: terms.into_values().collect(), lost: self.lost })
    }
}
