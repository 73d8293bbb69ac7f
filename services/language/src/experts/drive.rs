//! Who runs the streams to the replicas: whoever waits for them.
//!
//! An engine's thread that waits for experts would otherwise be woken by a thread that was woken by the socket, and would wake another one to send:
//! on a machine where a wake-up takes 20 microseconds, that is as long as the network takes. So all that belongs to a fleet lives on a runtime of
//! its own with one thread, and that thread is the engine's while it waits. In between, a thread of the fleet's own takes over, so that connections
//! stay alive and replicas are found.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use tokio::runtime::{Builder, Handle, Runtime};
use tokio::sync::Notify;

/// When the engine has not waited for so long, the fleet's own thread takes over: longer than a layer takes, shorter than anybody else waits.
const TAKE_OVER: Duration = Duration::from_millis(5);
/// How often ready tasks get a turn while a batch is sent: that of the stream, that of the connection, and some to spare.
const TURNS: usize = 4;

/// The runtime of a fleet. Dropping it ends its tasks.
pub(super) struct Drive {
    shared: Arc<Shared>,
}

struct Shared {
    /// Taken out in the end.
    runtime: Option<Runtime>,
    begun: Instant,
    /// When the engine has last waited, in microseconds since `begun`; [`u64::MAX`] while it does.
    waited: AtomicU64,
    /// Has the fleet's own thread step aside.
    aside: Notify,
    over: AtomicBool,
}

impl Drive {
    pub fn start() -> std::io::Result<Self> {
        let runtime = Some(Builder::new_current_thread().enable_all().build()?);
        let (waited, aside, over) = (AtomicU64::new(0), Notify::new(), AtomicBool::new(false));
        let shared = Arc::new(Shared { runtime, begun: Instant::now(), waited, aside, over });
        let own = shared.clone();
        std::thread::Builder::new().name("janua-fleet".into()).spawn(move || own.idle())?;
        Ok(Self { shared })
    }

    /// Where the tasks of the fleet belong.
    pub fn handle(&self) -> Option<Handle> {
        self.shared.runtime.as_ref().map(|runtime| runtime.handle().clone())
    }

    /// Runs the fleet's tasks on this thread until `work` is done. Not from inside a runtime.
    pub fn wait<T>(&self, work: impl Future<Output = T>) -> Option<T> {
        let runtime = self.shared.runtime.as_ref()?;
        self.shared.waited.store(u64::MAX, Ordering::Release);
        self.shared.aside.notify_one();
        let done = runtime.block_on(work);
        self.shared.waited.store(self.shared.now(), Ordering::Release);
        Some(done)
    }

    /// Lets what was handed to streams go out.
    pub fn flush(&self) {
        self.wait(async {
            for _ in 0..TURNS {
                tokio::task::yield_now().await;
            }
        });
    }
}

impl Shared {
    fn now(&self) -> u64 {
        self.begun.elapsed().as_micros() as u64
    }

    /// How long the fleet's own thread still keeps aside.
    fn aside_for(&self) -> Duration {
        match self.waited.load(Ordering::Acquire) {
            u64::MAX => TAKE_OVER,
            waited => (Duration::from_micros(waited) + TAKE_OVER).saturating_sub(Duration::from_micros(self.now())),
        }
    }

    /// What the fleet's own thread does.
    fn idle(&self) {
        let Some(runtime) = &self.runtime else { return };
        while !self.over.load(Ordering::Acquire) {
            match self.aside_for() {
                Duration::ZERO => runtime.block_on(self.aside.notified()),
                pause => std::thread::sleep(pause),
            }
        }
    }
}

impl Drop for Drive {
    fn drop(&mut self) {
        self.shared.over.store(true, Ordering::Release);
        self.shared.aside.notify_one();
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        // The last owner may be inside another runtime, where this one must not be waited for.
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}
