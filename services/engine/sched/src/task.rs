use domain::{Event, FinishReason, ImageSampling, Sampling};
use layers::{EngineError, FlowModel, Head};
use tracing::Span;

use crate::{
    Guide, JobError,
    flow::Flow,
    inbox::Ticket,
    pool::BlockPool,
    sampler::{self, History},
    sequence::Sequence,
    stream::Outlet,
};

/// A job on its way: its one sequence (or guidance pair), what has come out so far, and where it goes.
#[derive(Debug)]
pub(crate) struct Task {
    /// Order of arrival: the higher, the younger.
    pub order: u64,
    /// When this task was last given rows: the lower, the sooner it is its turn again. No two are equal, so ties cannot favour anybody.
    pub turn: u64,
    pub outlet: Outlet,
    /// Of whoever submitted the job.
    pub span: Span,
    /// One, or the conditional and the unconditional sequence. Those of codes are always of the same length.
    sequences: Vec<Sequence>,
    output: Output,
    /// Outputs so far, those of an earlier worker included.
    produced: usize,
    last: Option<u32>,
    /// Outputs at most.
    limit: usize,
    prompt_tokens: usize,
    /// Positions found in the prefix cache at the first admission.
    cached_tokens: usize,
    prefilled: bool,
    /// Positions that lost an expert and were not reported yet.
    degraded: u32,
    /// Held until the first admission.
    ticket: Option<Ticket>,
}

/// How a task's outputs are drawn.
#[derive(Debug)]
pub(crate) enum Output {
    Text { sampling: Box<Sampling>, eos_token_ids: Vec<u32>, history: History, guide: Option<Box<dyn Guide>> },
    Image { sampling: ImageSampling },
    Flow(Box<Flow>),
}

impl Task {
    /// A task whose sequences hold the prompt alone and which yields at most `limit` outputs. The inbox sets `order`.
    pub fn new(sequences: Vec<Sequence>, output: Output, limit: usize, outlet: Outlet, ticket: Ticket) -> Self {
        let prompt_tokens = sequences.first().map_or(0, Sequence::remaining);
        Self {
            order: 0,
            turn: 0,
            outlet,
            span: Span::current(),
            sequences,
            output,
            produced: 0,
            last: None,
            limit,
            prompt_tokens,
            cached_tokens: 0,
            prefilled: false,
            degraded: 0,
            ticket: Some(ticket),
        }
    }

    pub fn sequences(&self) -> &[Sequence] {
        &self.sequences
    }

    /// What this task wants of the next rows of one of its sequences; `samples`: they are the last before an output.
    pub fn wants(&self, sequence: &Sequence, samples: bool) -> Option<Head> {
        match self.output {
            Output::Text { .. } => samples.then_some(Head::Text),
            Output::Image { .. } => samples.then_some(Head::Image),
            Output::Flow(_) => sequence.is_in_tail().then_some(Head::Hidden),
        }
    }

    /// Rows to compute before the next output, over all sequences.
    pub fn remaining(&self) -> usize {
        self.sequences.iter().map(Sequence::remaining).sum()
    }

    /// Whether only the last input of each sequence is to be computed.
    pub fn is_decoding(&self) -> bool {
        self.remaining() == self.sequences.len()
    }

    /// Rows to take from each sequence when a step has room for `rows`: all that remain, or so many that each keeps its last row for later,
    /// because both logits of a pair must come out of the same step. Sequences of a flow give hidden states row by row: they take what they can.
    pub fn split(&self, rows: usize) -> Vec<usize> {
        let finishes = self.remaining() <= rows;
        let mut left = rows;
        if matches!(self.output, Output::Flow(_)) {
            let take = |sequence: &Sequence| {
                let taken = left.min(sequence.run());
                left -= taken;
                taken
            };
            return self.sequences.iter().map(take).collect();
        }
        let take = |sequence: &Sequence| {
            let taken = if finishes { sequence.remaining() } else { left.min(sequence.remaining() - 1) };
            left = left.saturating_sub(taken);
            taken
        };
        self.sequences.iter().map(take).collect()
    }

    /// Blocks needed beyond those held.
    pub fn missing_blocks(&self) -> usize {
        self.sequences.iter().map(Sequence::missing_blocks).sum()
    }

    /// Take what the prefix cache has and all blocks that the known inputs need, if at least `reserve` blocks are left after that.
    pub fn admit(&mut self, pool: &mut BlockPool, reserve: usize) -> bool {
        self.sequences.iter_mut().for_each(|sequence| sequence.attach_prefix(pool));
        if pool.available() < self.missing_blocks() + reserve {
            self.release(pool);
            return false;
        }
        self.grow(pool);
        if self.ticket.take().is_some() {
            self.cached_tokens = self.sequences.first().map_or(0, Sequence::computed).min(self.prompt_tokens);
        }
        true
    }

    /// Whether this task has never been admitted.
    pub fn is_new(&self) -> bool {
        self.ticket.is_some()
    }

    /// Positions found in the prefix cache at the first admission.
    pub fn cached_tokens(&self) -> usize {
        self.cached_tokens
    }

    /// Take the missing blocks, which must be available.
    pub fn grow(&mut self, pool: &mut BlockPool) {
        self.sequences.iter_mut().for_each(|sequence| sequence.allocate_missing(pool));
    }

    /// Give all blocks back; everything can be computed again.
    pub fn release(&mut self, pool: &mut BlockPool) {
        self.sequences.iter_mut().for_each(|sequence| sequence.release(pool));
        if let Output::Flow(flow) = &mut self.output {
            flow.reset();
        }
    }

    /// The next `rows` inputs of a sequence have been computed.
    pub fn advance(&mut self, sequence: usize, rows: usize, pool: &mut BlockPool) {
        self.sequences[sequence].advance(rows, pool);
    }

    /// So many of the rows of a sequence that were just computed lost an expert. Call it before they count as computed.
    pub fn degrade(&mut self, sequence: usize, lost: usize) {
        if lost > 0 {
            self.degraded += lost as u32;
            self.sequences[sequence].taint();
        }
    }

    /// Take over an output of an earlier worker. Fails when the task's constraint rules it out.
    pub fn resume(&mut self, id: u32) -> Result<(), String> {
        self.record(id)?;
        self.feed(id);
        Ok(())
    }

    /// Why there is nothing more to draw, if so.
    pub fn finish_reason(&self) -> Option<FinishReason> {
        let complete = self.produced >= self.limit;
        match &self.output {
            Output::Text { sampling, eos_token_ids, guide, .. } => {
                let ended = !sampling.ignore_eos && self.last.is_some_and(|id| eos_token_ids.contains(&id));
                let complete_text = guide.as_ref().is_some_and(|guide| guide.is_finished());
                (ended || complete_text).then_some(FinishReason::Stop).or(complete.then_some(FinishReason::Length))
            }
            Output::Image { .. } => complete.then_some(FinishReason::Stop),
            Output::Flow(flow) => flow.is_over().then_some(FinishReason::Stop),
        }
    }

    /// Announce that the prompt has been read; once.
    pub fn announce(&mut self) {
        if !std::mem::replace(&mut self.prefilled, true) {
            let (prompt_tokens, cached_tokens) = (self.prompt_tokens as u32, self.cached_tokens as u32);
            self.outlet.send(Event::Prefilled { prompt_tokens, cached_tokens });
        }
    }

    /// Draw and deliver the next output from the logits of each sequence's last row. Returns why the task ends, if it does.
    pub fn advance_output(&mut self, mut logits: Vec<Vec<f32>>) -> Result<Option<FinishReason>, JobError> {
        let index = self.produced as u64;
        let drawn = match (&mut self.output, logits.as_mut_slice()) {
            (Output::Text { sampling, history, guide, .. }, [logits]) => {
                guide.as_mut().map_or(Ok(()), |guide| guide.mask(logits)).map_err(JobError::Compute)?;
                sampler::text(logits, sampling, history, index)
            }
            (Output::Image { sampling }, [conditional, unconditional]) if conditional.len() == unconditional.len() => {
                sampler::code(conditional, unconditional, sampling, index).map(|code| (code, None))
            }
            _ => return Err(JobError::Compute("the model gave logits of another shape than asked for".into())),
        };
        let (id, logprobs) = drawn.map_err(|error| JobError::Compute(error.to_string()))?;
        self.record(id).map_err(JobError::Compute)?;
        self.announce();
        if self.degraded > 0 {
            self.outlet.send(Event::Degraded(std::mem::take(&mut self.degraded)));
        }
        self.outlet.send(Event::Output { id, logprobs });
        let reason = self.finish_reason();
        if reason.is_none() {
            self.feed(id);
        }
        Ok(reason)
    }

    /// Whether this task draws by a flow: then hidden states are collected, and [`Task::drive`] makes steps of them.
    pub fn is_flow(&self) -> bool {
        matches!(self.output, Output::Flow(_))
    }

    /// Hidden states of the next `rows` rows of a sequence of a flow. Call it before they count as computed.
    pub fn collect(&mut self, sequence: usize, rows: usize, hidden: Option<&[f32]>) -> Result<(), EngineError> {
        match &mut self.output {
            Output::Flow(flow) if self.sequences[sequence].is_in_tail() => flow.collect(sequence, rows, hidden.unwrap_or_default()),
            _ => Ok(()),
        }
    }

    /// Make a step of what the sequences have computed, deliver it, and give them the next rows. Returns whether a step was delivered.
    pub fn drive(&mut self, model: &dyn FlowModel) -> Result<bool, EngineError> {
        let Output::Flow(flow) = &mut self.output else { return Ok(false) };
        let event = flow.advance(model)?;
        if !flow.is_over()
            && let Some(rows) = flow.next_rows(model)?
        {
            self.sequences.iter_mut().for_each(|sequence| sequence.replace_tail(&rows));
        }
        let Some(event) = event else { return Ok(false) };
        self.announce();
        self.outlet.send(event);
        self.produced += 1;
        Ok(true)
    }

    fn record(&mut self, id: u32) -> Result<(), String> {
        self.produced += 1;
        self.last = Some(id);
        if let Output::Text { sampling, history, guide, .. } = &mut self.output {
            history.push(sampling, id);
            guide.as_mut().map_or(Ok(()), |guide| guide.accept(id))?;
        }
        Ok(())
    }

    fn feed(&mut self, id: u32) {
        for sequence in &mut self.sequences {
            match self.output {
                Output::Text { .. } => sequence.push_token(id),
                Output::Image { .. } => sequence.push_code(id),
                Output::Flow(_) => {}
            }
        }
    }
}
