use std::{
    fmt,
    sync::{Arc, Mutex, PoisonError},
    thread::JoinHandle,
};

use domain::{Job, ModelCard};
use futures::{FutureExt, channel::oneshot, future::Shared};
use layers::LanguageModel;

use crate::{
    EngineConfig, EngineStats, Guides, JobStream, SubmitError, inbox::Inbox, intake::Limits, scheduler::Scheduler, stream, worker::Worker,
};

/// A language model at work on a thread of its own.
///
/// Dropping the engine ends its jobs with [`JobError::Stopped`](crate::JobError::Stopped) and waits for the step in progress.
pub struct Engine {
    limits: Limits,
    inbox: Arc<Inbox>,
    stats: Arc<Mutex<EngineStats>>,
    stopped: Shared<oneshot::Receiver<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Engine {
    /// Start the thread. It sleeps while there is no job.
    pub fn start(model: Box<dyn LanguageModel>, config: EngineConfig) -> Self {
        let config = config.bounded();
        let limits = Limits { card: model.card().clone(), kv_blocks: model.kv_blocks(), prefix_cache: config.prefix_cache, guides: None };
        let inbox = Arc::new(Inbox::new(config.queue_limit));
        let mut scheduler = Scheduler::new(config, model.kv_blocks());
        let stats = Arc::new(Mutex::new(scheduler.stats()));
        let worker = Worker { model, scheduler, inbox: inbox.clone(), stats: stats.clone() };
        let (running, stopped) = oneshot::channel::<()>();
        let work = move || {
            worker.run();
            drop(running);
        };
        let thread = std::thread::Builder::new().name("janua-engine".into()).spawn(work).expect("the system can start a thread");
        Self { limits, inbox, stats, stopped: stopped.shared(), thread: Some(thread) }
    }

    /// The same engine, able to keep outputs to constraints.
    pub fn with_guides(mut self, guides: Arc<dyn Guides>) -> Self {
        self.limits.guides = Some(guides);
        self
    }

    /// What the model is and can do.
    pub fn card(&self) -> &ModelCard {
        &self.limits.card
    }

    /// Queue a job. Its outputs depend on the job alone, not on what else runs.
    ///
    /// Hashes the prompt's pictures (about 1 GB/s), so the call takes milliseconds when there are many. A constraint is compiled here, which
    /// can take longer: submit such a job where blocking is allowed.
    pub fn submit(&self, job: Job) -> Result<JobStream, SubmitError> {
        let ticket = self.inbox.ticket()?;
        let (outlet, stream) = stream::channel(self.inbox.clone());
        let mut task = self.limits.task(job, ticket, outlet)?;
        match task.finish_reason() {
            // An earlier worker has emitted everything and died before it could say so.
            Some(reason) => {
                task.announce();
                task.outlet.finish(reason);
            }
            None => self.inbox.submit(task)?,
        }
        Ok(stream)
    }

    /// What the engine is doing, as of its last step.
    pub fn stats(&self) -> EngineStats {
        *self.stats.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether jobs are taken: false once the model has crashed.
    pub fn is_serving(&self) -> bool {
        self.inbox.is_open()
    }

    /// Completes when the engine has stopped, by itself or because it was dropped.
    pub fn stopped(&self) -> impl Future<Output = ()> + Send + 'static {
        self.stopped.clone().map(|_| ())
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        for task in self.inbox.close() {
            task.outlet.fail(crate::JobError::Stopped);
        }
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the engine thread ended with a panic");
        }
    }
}

impl fmt::Debug for Engine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Engine").field("limits", &self.limits).field("stats", &self.stats()).finish_non_exhaustive()
    }
}
