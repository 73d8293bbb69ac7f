use std::future::Future;
use std::pin::pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures::future::join_all;
use mesh::{Mesh, Routes, Serving, Target};
use serde::Deserialize;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::Instant;

/// The service that takes requests from outside.
const ENTRANCE: &str = "router";

/// Section `[process]`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ProcessConfig {
    /// Longest time in seconds that calls in flight get to finish after SIGTERM; at most a day.
    pub grace_s: u64,
}

impl Default for ProcessConfig {
    fn default() -> Self {
        Self { grace_s: 30 }
    }
}

impl ProcessConfig {
    pub fn grace(&self) -> Duration {
        Duration::from_secs(self.grace_s.min(24 * 3600))
    }
}

/// Something to serve on the mesh.
#[derive(Clone)]
pub struct Offer {
    pub target: Target,
    pub routes: Routes,
}

/// Listeners beside the mesh: told to close when the process drains, and waited for.
#[derive(Clone)]
pub struct Doors {
    closing: Arc<watch::Sender<bool>>,
    open: Arc<Mutex<Vec<JoinHandle<()>>>>,
}

impl Default for Doors {
    fn default() -> Self {
        Self { closing: Arc::new(watch::Sender::new(false)), open: Arc::default() }
    }
}

impl Doors {
    /// Ends when the doors close.
    pub fn closing(&self) -> impl Future<Output = ()> + Send + 'static {
        let mut closing = self.closing.subscribe();
        async move {
            // An error means that the last handle is gone, which closes the doors as well.
            let _ = closing.wait_for(|closing| *closing).await;
        }
    }

    /// Runs `door`, which must end soon after [`Doors::closing`] does.
    pub fn open(&self, door: impl Future<Output = ()> + Send + 'static) {
        self.open.lock().unwrap_or_else(PoisonError::into_inner).push(tokio::spawn(door));
    }

    /// Closes all doors and waits, at most `grace`, until they are shut.
    pub async fn close(&self, grace: Duration) {
        self.closing.send_replace(true);
        let doors = std::mem::take(&mut *self.open.lock().unwrap_or_else(PoisonError::into_inner));
        let stop: Vec<_> = doors.iter().map(JoinHandle::abort_handle).collect();
        if tokio::time::timeout(grace, join_all(doors)).await.is_err() {
            tracing::warn!(grace_s = grace.as_secs(), "calls from outside did not finish in time and are cut off");
            stop.iter().for_each(|door| door.abort());
        }
    }
}

/// Offers on the mesh, being served.
pub struct Served {
    offers: Vec<Offered>,
    doors: Doors,
}

struct Offered {
    routes: Routes,
    serving: Serving,
    /// Takes requests from outside and needs the other services to finish them.
    entrance: bool,
}

/// Puts every offer on the mesh. Health is the offers' own: routes are servable unless their service has said otherwise.
pub async fn serve(mesh: &Mesh, doors: &Doors, offers: Vec<Offer>) -> anyhow::Result<Served> {
    let mut serving = Vec::with_capacity(offers.len());
    for Offer { target, routes } in offers {
        let entrance = target.service == ENTRANCE;
        let registered = mesh.serve(target, routes.clone()).await?;
        serving.push(Offered { routes, serving: registered, entrance });
    }
    Ok(Served { offers: serving, doors: doors.clone() })
}

impl Served {
    /// Unready first, so that nothing new is sent here. Then the entrances (the router's offer and the doors) close and finish what they
    /// took, while the stages behind them still answer; the stages go last. All of it takes at most `grace`.
    pub async fn drain(self, grace: Duration) {
        self.offers.iter().for_each(|offer| offer.routes.set_serving(false));
        let end = Instant::now() + grace;
        let (entrances, stages): (Vec<_>, Vec<_>) = self.offers.into_iter().partition(|offer| offer.entrance);
        let let_go = |offers: Vec<Offered>, left| join_all(offers.into_iter().map(move |offer| offer.serving.drain(left)));
        tokio::join!(self.doors.close(grace), let_go(entrances, grace));
        let_go(stages, end.saturating_duration_since(Instant::now())).await;
    }
}

/// Waits, ready for requests, for SIGTERM or SIGINT. A second one ends the process at once with code 130.
pub async fn until_signal() -> std::io::Result<()> {
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let mut any = async move || {
        let (terminate, interrupt) = (pin!(terminate.recv()), pin!(interrupt.recv()));
        futures::future::select(terminate, interrupt).await;
    };
    telemetry::set_ready(true);
    any().await;
    telemetry::set_ready(false);
    tracing::info!("draining; a second signal ends the process at once");
    tokio::spawn(async move {
        any().await;
        std::process::exit(130);
    });
    Ok(())
}
