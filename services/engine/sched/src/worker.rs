use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Arc, Mutex, PoisonError},
};

use layers::{EngineError, LanguageModel, NoObserver, Step, StepOutput};

use crate::{EngineStats, JobError, inbox::Inbox, plan::Plan, scheduler::Scheduler};

/// The engine thread: take jobs, plan, compute, sample and deliver, until the inbox closes or the model crashes.
pub(crate) struct Worker {
    pub model: Box<dyn LanguageModel>,
    pub scheduler: Scheduler,
    pub inbox: Arc<Inbox>,
    pub stats: Arc<Mutex<EngineStats>>,
}

/// Why a step has no result.
enum Failure {
    /// The model said so; it can go on with other work.
    Error(EngineError),
    /// The model panicked; what state it is in nobody knows.
    Crash(String),
}

impl Worker {
    /// Work until there is nothing to work for; then no task is left and the inbox is closed.
    pub fn run(mut self) {
        if catch_unwind(AssertUnwindSafe(|| self.serve())).is_err() {
            tracing::error!("the scheduler crashed; its engine stops");
        }
        for task in self.inbox.close() {
            task.outlet.fail(JobError::Stopped);
        }
        self.scheduler.stop();
        self.publish();
    }

    fn serve(&mut self) {
        let mut idle = false;
        while let Some(tasks) = self.inbox.take(idle) {
            tasks.into_iter().for_each(|task| self.scheduler.enqueue(task));
            let plan = self.scheduler.plan(self.model.flow());
            idle = plan.is_none();
            if let Some(plan) = plan
                && self.step(&plan).is_err()
            {
                return;
            }
            self.publish();
        }
    }

    /// Compute a plan and hand out what comes of it. Fails when the model has crashed.
    fn step(&mut self, plan: &Plan) -> Result<(), Crashed> {
        let error = match self.compute(plan) {
            Ok(output) => {
                self.scheduler.commit(plan, output);
                return Ok(());
            }
            Err(Failure::Crash(message)) => {
                tracing::error!(%message, "the model crashed; its engine stops");
                self.scheduler.fail(plan, &JobError::Compute(format!("the model crashed: {message}")));
                return Err(Crashed);
            }
            Err(Failure::Error(error)) => error,
        };
        if let EngineError::Unavailable(missing) = &error {
            return self.step_without(plan, missing);
        }
        if plan.parts.len() == 1 {
            tracing::warn!(%error, "a job failed");
            self.scheduler.fail(plan, &JobError::Compute(error.to_string()));
            return Ok(());
        }
        // One of them is at fault, or the model is: compute them one by one, so that the others do not suffer. Writing the same positions
        // of the KV cache again with the same values does no harm.
        plan.apart().iter().try_for_each(|plan| self.step(plan))
    }

    /// A part of the model is missing. Jobs that may do without it are computed by themselves, the others end.
    fn step_without(&mut self, plan: &Plan, missing: &str) -> Result<(), Crashed> {
        let (may, must_not): (Vec<_>, Vec<_>) =
            plan.apart().into_iter().partition(|plan| plan.step.slices.iter().all(|s| s.may_lose_experts));
        tracing::warn!(missing, jobs = must_not.len(), "jobs end for want of a part of the model");
        must_not.iter().for_each(|plan| self.scheduler.fail(plan, &JobError::Unavailable(missing.to_owned())));
        if must_not.is_empty() {
            // Even those that may do without something cannot do without this.
            may.iter().for_each(|plan| self.scheduler.fail(plan, &JobError::Unavailable(missing.to_owned())));
            return Ok(());
        }
        may.iter().try_for_each(|plan| self.step(plan))
    }

    /// Computes a step inside a span that is linked with those of its jobs, both ways: a step belongs to no one request.
    fn compute(&mut self, plan: &Plan) -> Result<StepOutput, Failure> {
        let span = tracing::info_span!(parent: None, "language.step", janua.rows = plan.step.rows.len(), janua.jobs = plan.parts.len());
        if !span.is_disabled() {
            self.scheduler.link(plan, &span);
        }
        span.in_scope(|| self.forward(&plan.step))
    }

    fn forward(&mut self, step: &Step) -> Result<StepOutput, Failure> {
        match catch_unwind(AssertUnwindSafe(|| self.model.forward(step, &mut NoObserver))) {
            Ok(Ok(output)) => Ok(output),
            Ok(Err(error)) => Err(Failure::Error(error)),
            Err(payload) => {
                let text = payload.downcast_ref::<&str>().copied().or(payload.downcast_ref::<String>().map(String::as_str));
                Err(Failure::Crash(text.unwrap_or("panic").to_owned()))
            }
        }
    }

    fn publish(&mut self) {
        *self.stats.lock().unwrap_or_else(PoisonError::into_inner) = self.scheduler.stats();
    }
}

/// The model cannot be used any more.
struct Crashed;
