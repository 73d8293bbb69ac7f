//! Which rows the next step computes.

use layers::{EngineError, FlowModel, StepOutput};
use tracing::Span;

use crate::{
    EngineConfig, EngineStats, JobError,
    plan::{Part, Plan},
    pool::BlockPool,
    sequence::Sequence,
    task::Task,
};

/// Smallest share of a step that a prefilling task is given while there is room: smaller chunks cost more per row.
const MIN_CHUNK: usize = 32;
/// Rows that any task can make progress with: one for each sequence of a pair.
const PAIR: usize = 2;

/// All tasks of an engine and the blocks they hold.
#[derive(Debug)]
pub(crate) struct Scheduler {
    config: EngineConfig,
    pool: BlockPool,
    /// Tasks that hold blocks, oldest first.
    running: Vec<Task>,
    /// Tasks that hold none, oldest first: new ones, and those that were preempted.
    waiting: Vec<Task>,
    /// Counts turns, see [`Task::turn`].
    turns: u64,
    counters: EngineStats,
}

impl Scheduler {
    pub fn new(config: EngineConfig, kv_blocks: usize) -> Self {
        let (running, waiting) = (Vec::new(), Vec::new());
        Self { config, pool: BlockPool::new(kv_blocks), running, waiting, turns: 0, counters: EngineStats::default() }
    }

    /// Let a new task wait its turn.
    pub fn enqueue(&mut self, task: Task) {
        insert(&mut self.waiting, task);
    }

    /// The next step; `None` when no task can go on before something happens outside. `flow` is what draws by a flow.
    pub fn plan(&mut self, flow: Option<&dyn FlowModel>) -> Option<Plan> {
        self.drop_cancelled();
        self.drive(flow);
        self.grow();
        self.admit();
        self.drive(flow);
        let plan = self.fill();
        (!plan.parts.is_empty()).then_some(plan)
    }

    /// A plan was computed: store its progress, draw and deliver outputs.
    pub fn commit(&mut self, plan: &Plan, mut output: StepOutput) {
        self.counters.steps += 1;
        self.counters.rows += plan.step.rows.len() as u64;
        output.logits.resize_with(plan.step.slices.len(), || None);
        output.hidden.resize_with(plan.step.slices.len(), || None);
        output.lost.resize(plan.step.slices.len(), 0);
        for part in &plan.parts {
            let logits = output.logits[part.slices.clone()].iter_mut().filter_map(Option::take).collect();
            let hidden = output.hidden[part.slices.clone()].iter_mut().map(Option::take).collect();
            self.commit_part(part, logits, hidden, &output.lost[part.slices.clone()]);
        }
    }

    /// Links the span of a step with those of its jobs.
    pub fn link(&self, plan: &Plan, step: &Span) {
        for part in &plan.parts {
            if let Ok(index) = self.running.binary_search_by_key(&part.order, |task| task.order) {
                let job = &self.running[index].span;
                step.follows_from(job);
                job.follows_from(step);
            }
        }
    }

    /// A plan could not be computed: its tasks end with the error.
    pub fn fail(&mut self, plan: &Plan, error: &JobError) {
        for part in &plan.parts {
            self.fail_task(part.order, error.clone());
        }
    }

    /// End every task.
    pub fn stop(&mut self) {
        for mut task in self.running.drain(..).chain(self.waiting.drain(..)) {
            task.release(&mut self.pool);
            task.outlet.fail(JobError::Stopped);
        }
    }

    pub fn stats(&mut self) -> EngineStats {
        EngineStats {
            running: self.running.len(),
            paused: self.running.iter_mut().map(|task| usize::from(task.outlet.is_paused())).sum(),
            waiting: self.waiting.len(),
            blocks: self.pool.total(),
            free_blocks: self.pool.free(),
            cached_blocks: self.pool.cached(),
            ..self.counters
        }
    }

    fn commit_part(&mut self, part: &Part, logits: Vec<Vec<f32>>, hidden: Vec<Option<Vec<f32>>>, lost: &[usize]) {
        let Ok(index) = self.running.binary_search_by_key(&part.order, |task| task.order) else { return };
        let task = &mut self.running[index];
        // A sequence without rows has no slice.
        let mut computed = part.rows.iter().enumerate().filter(|(_, rows)| **rows > 0).zip(&hidden);
        let collected = computed.try_for_each(|((sequence, &rows), hidden)| task.collect(sequence, rows, hidden.as_deref()));
        if let Err(error) = collected {
            return self.fail_task(part.order, JobError::Compute(error.to_string()));
        }
        let with_rows = part.rows.iter().enumerate().filter(|(_, rows)| **rows > 0);
        with_rows.zip(lost).for_each(|((sequence, _), &lost)| task.degrade(sequence, lost));
        for (sequence, &rows) in part.rows.iter().enumerate() {
            task.advance(sequence, rows, &mut self.pool);
        }
        if !part.samples || task.is_flow() {
            return;
        }
        match task.advance_output(logits) {
            Ok(reason) => {
                self.counters.outputs += 1;
                if let Some(reason) = reason {
                    self.remove(index).outlet.finish(reason);
                }
            }
            Err(error) => self.fail_task(part.order, error),
        }
    }

    /// Make steps of flows out of what was computed, and the rows that their sequences compute next.
    fn drive(&mut self, flow: Option<&dyn FlowModel>) {
        for order in self.running.iter().filter(|task| task.is_flow()).map(|task| task.order).collect::<Vec<_>>() {
            let Ok(index) = self.running.binary_search_by_key(&order, |task| task.order) else { continue };
            let task = &mut self.running[index];
            if task.outlet.is_paused() {
                continue;
            }
            let missing = || Err(EngineError::Compute("the model has no flow".into()));
            match flow.map_or_else(missing, |flow| task.drive(flow)) {
                Ok(delivered) => {
                    let reason = task.finish_reason();
                    self.counters.outputs += u64::from(delivered);
                    if let Some(reason) = reason {
                        self.remove(index).outlet.finish(reason);
                    }
                }
                Err(error) => self.fail_task(order, JobError::Compute(error.to_string())),
            }
        }
    }

    fn fail_task(&mut self, order: u64, error: JobError) {
        if let Ok(index) = self.running.binary_search_by_key(&order, |task| task.order) {
            self.counters.failed += 1;
            self.remove(index).outlet.fail(error);
        }
    }

    /// Take a running task out and its blocks back.
    fn remove(&mut self, index: usize) -> Task {
        let mut task = self.running.remove(index);
        task.release(&mut self.pool);
        task
    }

    fn drop_cancelled(&mut self) {
        let before = self.running.len() + self.waiting.len();
        for index in (0..self.running.len()).rev() {
            if self.running[index].outlet.is_closed() {
                self.remove(index);
            }
        }
        self.waiting.retain(|task| !task.outlet.is_closed());
        self.counters.cancelled += (before - self.running.len() - self.waiting.len()) as u64;
    }

    /// Give every task that is about to decode past its last block another one, oldest first; the youngest pay when there is none.
    fn grow(&mut self) {
        while let Some(index) = self.running.iter().position(|task| task.missing_blocks() > 0) {
            if self.running[index].missing_blocks() <= self.pool.available() {
                self.running[index].grow(&mut self.pool);
            } else {
                let victim = self.victim().unwrap_or(index);
                self.preempt(victim);
            }
        }
    }

    /// The task to preempt: the youngest whose reader is behind, else the youngest.
    fn victim(&mut self) -> Option<usize> {
        self.running.iter_mut().rposition(|task| task.outlet.is_paused()).or(self.running.len().checked_sub(1))
    }

    fn preempt(&mut self, index: usize) {
        let task = self.remove(index);
        self.counters.preemptions += 1;
        insert(&mut self.waiting, task);
    }

    /// Let waiting tasks in, oldest first, as long as there is room. Nobody overtakes a task that is only too big for now.
    fn admit(&mut self) {
        let mut index = 0;
        while index < self.waiting.len() {
            // A preempted task whose reader is behind has nothing to do here yet; and what another task is about to put into the prefix
            // cache is better waited for than computed twice (several choices for one prompt arrive together).
            if self.waiting[index].outlet.is_paused() || self.is_being_computed(index) {
                index += 1;
                continue;
            }
            if self.fits(index) {
                let mut task = self.waiting.remove(index);
                task.turn = self.next_turn();
                insert(&mut self.running, task);
                continue;
            }
            // Who holds blocks without using them makes room.
            match self.running.iter_mut().rposition(|task| task.outlet.is_paused()) {
                Some(paused) => self.preempt(paused),
                None => return,
            }
        }
    }

    /// Whether the first block that a waiting task misses in the prefix cache is the next one of a running task.
    fn is_being_computed(&self, index: usize) -> bool {
        let misses: Vec<_> = self.waiting[index].sequences().iter().filter_map(|sequence| sequence.first_miss(&self.pool)).collect();
        let mut coming = self.running.iter().flat_map(|task| task.sequences()).filter_map(Sequence::next_name);
        !misses.is_empty() && coming.any(|name| misses.contains(&name))
    }

    /// Whether there is room for a waiting task; if so it holds its blocks now.
    fn fits(&mut self, index: usize) -> bool {
        let running: usize = self.running.iter().map(|task| task.sequences().len()).sum();
        let task = &mut self.waiting[index];
        if running > 0 && running + task.sequences().len() > self.config.max_sequences {
            return false;
        }
        let first = task.is_new();
        // Every running sequence may soon want one more block; without this reserve a preempted task would come back only to be preempted again.
        let admitted = task.admit(&mut self.pool, running);
        if admitted && first {
            self.counters.cached_rows += task.cached_tokens() as u64;
        }
        admitted
    }

    /// Choose rows: decoding tasks first, then prefilling ones; within each, whoever has waited longest.
    fn fill(&mut self) -> Plan {
        let (decoding, prefilling): (Vec<usize>, Vec<usize>) =
            self.in_turn().into_iter().partition(|&index| self.running[index].is_decoding());
        let budget = self.config.max_batch_tokens;
        // Where even the decode rows do not fit in a step, both kinds get rows by their number of tasks, and at least enough for one task.
        let share = budget * prefilling.len() / (prefilling.len() + decoding.len()).max(1);
        let reserved = if prefilling.is_empty() { 0 } else { share.clamp(PAIR, budget - PAIR) };
        let mut plan = Plan::default();
        self.add_decoding(&mut plan, &decoding, budget - reserved);
        self.add_prefilling(&mut plan, &prefilling, budget);
        for part in &plan.parts {
            if let Ok(index) = self.running.binary_search_by_key(&part.order, |task| task.order) {
                self.running[index].turn = self.next_turn();
            }
        }
        plan
    }

    /// Running tasks whose readers keep up: those served longest ago first.
    fn in_turn(&mut self) -> Vec<usize> {
        let mut ready: Vec<usize> = (0..self.running.len()).filter(|&index| !self.running[index].outlet.is_paused()).collect();
        ready.sort_by_key(|&index| self.running[index].turn);
        ready
    }

    /// The end of the line.
    fn next_turn(&mut self) -> u64 {
        self.turns += 1;
        self.turns
    }

    fn add_decoding(&self, plan: &mut Plan, tasks: &[usize], budget: usize) {
        for task in tasks.iter().map(|&index| &self.running[index]) {
            if plan.step.rows.len() + task.remaining() > budget {
                return;
            }
            plan.add(task, task.remaining());
        }
    }

    fn add_prefilling(&self, plan: &mut Plan, tasks: &[usize], budget: usize) {
        let mut left = budget - plan.step.rows.len();
        let share = (left / tasks.len().max(1)).max(MIN_CHUNK);
        let mut chunks: Vec<usize> = Vec::with_capacity(tasks.len());
        for &index in tasks {
            let chunk = share.min(left).min(self.running[index].remaining());
            left -= chunk;
            chunks.push(chunk);
        }
        // What short prompts did not need goes to the others, in the same order.
        for (&index, chunk) in tasks.iter().zip(&mut chunks) {
            let more = left.min(self.running[index].remaining() - *chunk);
            left -= more;
            *chunk += more;
        }
        for (&index, &chunk) in tasks.iter().zip(&chunks) {
            plan.add(&self.running[index], chunk);
        }
    }
}

/// Insert in order of arrival.
fn insert(tasks: &mut Vec<Task>, task: Task) {
    let index = tasks.partition_point(|other| other.order < task.order);
    tasks.insert(index, task);
}
