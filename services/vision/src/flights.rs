use std::collections::HashMap;
use std::future::Future;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use futures::FutureExt;
use futures::future::{BoxFuture, Shared, WeakShared};

/// Work under way, by key. Who asks for the same key meanwhile waits for the same work; when nobody waits any more, it is dropped.
pub(crate) struct Flights<T: Clone> {
    under_way: Arc<Mutex<UnderWay<T>>>,
}

struct UnderWay<T: Clone> {
    by_key: HashMap<String, (u64, WeakShared<BoxFuture<'static, T>>)>,
    /// Tells one flight from a later one with the same key.
    last: u64,
}

impl<T: Clone + Send + Sync + 'static> Flights<T> {
    pub(crate) fn new() -> Self {
        Self { under_way: Arc::new(Mutex::new(UnderWay { by_key: HashMap::new(), last: 0 })) }
    }

    /// The result of the work for `key`, and whether somebody else had begun it. Only then is `work` not used.
    pub(crate) async fn join(&self, key: &str, work: impl Future<Output = T> + Send + 'static) -> (T, bool) {
        let (flight, joined) = self.find_or_begin(key, work);
        (flight.await, joined)
    }

    fn find_or_begin(&self, key: &str, work: impl Future<Output = T> + Send + 'static) -> (Shared<BoxFuture<'static, T>>, bool) {
        let mut under_way = lock(&self.under_way);
        if let Some(flight) = under_way.by_key.get(key).and_then(|(_, flight)| flight.upgrade()) {
            return (flight, true);
        }
        under_way.last += 1;
        let landing = Landing { under_way: self.under_way.clone(), key: key.to_owned(), number: under_way.last };
        let work = async move {
            let _landing = landing; // also when the work is given up
            work.await
        };
        let flight = work.boxed().shared();
        if let Some(weak) = flight.downgrade() {
            let number = under_way.last;
            under_way.by_key.insert(key.to_owned(), (number, weak));
        }
        (flight, false)
    }
}

/// Takes a flight off the list when it ends.
struct Landing<T: Clone> {
    under_way: Arc<Mutex<UnderWay<T>>>,
    key: String,
    number: u64,
}

impl<T: Clone> Drop for Landing<T> {
    fn drop(&mut self) {
        let mut under_way = lock(&self.under_way);
        if under_way.by_key.get(&self.key).is_some_and(|(number, _)| *number == self.number) {
            under_way.by_key.remove(&self.key);
        }
    }
}

/// Nothing panics while the lock is held; if it did, the list would still be a list.
fn lock<T: Clone>(under_way: &Mutex<UnderWay<T>>) -> MutexGuard<'_, UnderWay<T>> {
    under_way.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use tokio::sync::oneshot;

    use super::*;

    #[tokio::test]
    async fn the_same_key_is_computed_once_at_a_time() {
        let (flights, runs) = (Arc::new(Flights::new()), Arc::new(AtomicUsize::new(0)));
        let (release, gate) = oneshot::channel::<()>();
        let gate = gate.shared();
        let ask = |key: &'static str| {
            let (flights, runs, gate) = (flights.clone(), runs.clone(), gate.clone());
            async move {
                let work = async move {
                    let run = runs.fetch_add(1, Ordering::SeqCst);
                    gate.await.ok();
                    run
                };
                flights.join(key, work).await
            }
        };
        let mut all = futures::future::join_all([ask("a"), ask("a"), ask("b"), ask("a")]).boxed();
        assert!(futures::poll!(&mut all).is_pending());
        release.send(()).unwrap();
        let results = all.await;
        assert_eq!(runs.load(Ordering::SeqCst), 2);
        assert_eq!(results.iter().filter(|(_, joined)| *joined).count(), 2);
        assert_eq!((results[0].0, results[1].0), (results[3].0, results[0].0));
        assert_eq!(ask("a").await, (2, false), "afterwards it is computed anew");
        assert!(lock(&flights.under_way).by_key.is_empty());
    }

    /// The one who began may leave; the work goes on for the others, and ends with the last of them.
    #[tokio::test]
    async fn whoever_waits_carries_the_work() {
        let flights = Flights::new();
        let (release, gate) = oneshot::channel::<()>();
        let mut first = Box::pin(flights.join("a", async move { gate.await.is_ok() }));
        assert!(futures::poll!(&mut first).is_pending());
        let mut second = Box::pin(flights.join("a", async { unreachable!() }));
        assert!(futures::poll!(&mut second).is_pending());
        drop(first);
        release.send(()).unwrap();
        assert_eq!(second.await, (true, true));

        let (release, gate) = oneshot::channel::<()>();
        let mut only = Box::pin(flights.join("a", async move { gate.await.is_ok() }));
        assert!(futures::poll!(&mut only).is_pending());
        drop(only);
        assert!(release.is_closed(), "the work is gone");
        assert!(lock(&flights.under_way).by_key.is_empty());
    }
}
