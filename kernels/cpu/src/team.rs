//! The threads that large operations are spread over.
//!
//! The caller always takes part, and the helpers claim tasks from the same counter: a helper that wakes up late takes fewer tasks and nobody
//! waits for a task that has not begun. Waking a sleeping thread costs tens of microseconds on virtual machines, so small operations stay on the caller.

use std::{
    slice::ChunksMut,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
};

/// Work below this runs on the caller alone: about twice what a wake-up costs.
const PARALLEL_FROM: Cost = Cost { picoseconds: 80_000_000 };

/// Pieces per thread: enough to even out threads that are late or disturbed.
const TASKS_PER_THREAD: usize = 4;

/// How often a caller that has run out of tasks looks again before it sleeps until the helpers are done.
const SPINS: usize = 20_000;

/// What an operation roughly costs on one thread. Only its order of magnitude counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Cost {
    picoseconds: usize,
}

impl Cost {
    /// The larger of arithmetic (at 50 GFLOP/s) and memory (at 10 GB/s).
    pub fn new(flops: usize, bytes: usize) -> Self {
        Self { picoseconds: flops.saturating_mul(20).max(bytes.saturating_mul(100)) }
    }

    /// For `elements` values at 4 ns per eight of them.
    pub fn elements(elements: usize) -> Self {
        Self { picoseconds: elements.saturating_mul(500) }
    }

    /// `count` times as much.
    pub fn times(self, count: usize) -> Self {
        Self { picoseconds: self.picoseconds.saturating_mul(count) }
    }
}

/// A fixed number of threads, the caller being one of them.
pub(crate) struct Team {
    /// One thread less than the team has; `None` when the caller is alone.
    helpers: Option<rayon::ThreadPool>,
}

impl Team {
    /// A team of `threads` (0: one per core that the process may use). Where helpers cannot be started the caller works alone.
    pub fn new(threads: usize) -> Self {
        let threads = if threads == 0 { std::thread::available_parallelism().map_or(1, usize::from) } else { threads };
        let build = || rayon::ThreadPoolBuilder::new().num_threads(threads - 1).thread_name(|i| format!("kernel-{i}")).build();
        Self { helpers: (threads > 1).then(build).and_then(Result::ok) }
    }

    /// Number of threads, the caller included.
    pub fn threads(&self) -> usize {
        1 + self.helpers.as_ref().map_or(0, rayon::ThreadPool::current_num_threads)
    }

    /// How many of `items` one task should take, as a multiple of `granule`.
    pub fn share(&self, items: usize, granule: usize) -> usize {
        items.div_ceil(self.threads() * TASKS_PER_THREAD).next_multiple_of(granule).max(granule)
    }

    /// Calls `task` once for every index below `tasks`, in any order, on several threads when `cost` (of all tasks) is worth it.
    pub fn run(&self, tasks: usize, cost: Cost, task: impl Fn(usize) + Sync) {
        match &self.helpers {
            Some(helpers) if tasks > 1 && cost >= PARALLEL_FROM => spread(helpers, tasks, &task),
            _ => (0..tasks).for_each(task),
        }
    }

    /// Calls `task` once for every piece of `values` of `length` (the last may be shorter), with the index of the piece.
    pub fn chunks(&self, values: &mut [f32], length: usize, cost: Cost, task: impl Fn(usize, &mut [f32]) + Sync) {
        let tasks = values.len().div_ceil(length);
        let pieces = Mutex::new(values.chunks_mut(length).enumerate());
        self.run(tasks, cost, |_| {
            if let Some((index, piece)) = next(&pieces) {
                task(index, piece);
            }
        });
    }
}

/// Takes the next piece. A poisoned lock only means that another task panicked; that panic reaches the caller by itself.
fn next<'a>(pieces: &Mutex<std::iter::Enumerate<ChunksMut<'a, f32>>>) -> Option<(usize, &'a mut [f32])> {
    pieces.lock().unwrap_or_else(PoisonError::into_inner).next()
}

/// Runs the tasks on the helpers and the calling thread.
fn spread(helpers: &rayon::ThreadPool, tasks: usize, task: &(impl Fn(usize) + Sync)) {
    let claimed = AtomicUsize::new(0);
    let finished = AtomicUsize::new(0);
    let work = || {
        loop {
            let index = claimed.fetch_add(1, Ordering::Relaxed);
            if index >= tasks {
                return;
            }
            task(index);
            finished.fetch_add(1, Ordering::Release);
        }
    };
    helpers.in_place_scope(|scope| {
        for _ in 0..helpers.current_num_threads().min(tasks - 1) {
            scope.spawn(|_| work());
        }
        work();
        // A helper in its last task is nearly done: looking again is cheaper than sleeping and being woken. Leaving the scope waits in any case.
        for _ in 0..SPINS {
            if finished.load(Ordering::Acquire) == tasks {
                break;
            }
            std::hint::spin_loop();
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    const LARGE: Cost = Cost { picoseconds: usize::MAX };

    #[test]
    fn every_task_runs_once_whatever_the_number_of_threads() {
        for threads in 1..5 {
            let team = Team::new(threads);
            assert_eq!(team.threads(), threads);
            for tasks in [0, 1, 2, 3, 100] {
                let runs: Vec<_> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
                team.run(tasks, LARGE, |index| {
                    runs[index].fetch_add(1, Ordering::Relaxed);
                });
                assert!(runs.iter().all(|run| run.load(Ordering::Relaxed) == 1));
            }
        }
    }

    #[test]
    fn pieces_cover_the_values_with_their_own_index() {
        let mut values = vec![0.0; 1003];
        Team::new(3).chunks(&mut values, 10, LARGE, |index, piece| {
            for (offset, value) in piece.iter_mut().enumerate() {
                *value += (index * 10 + offset) as f32;
            }
        });
        assert!(values.iter().enumerate().all(|(index, &value)| value == index as f32));
    }

    #[test]
    fn small_work_stays_on_the_caller() {
        let caller = std::thread::current().id();
        Team::new(4).run(64, Cost::new(1000, 1000), |_| assert_eq!(std::thread::current().id(), caller));
    }
}
