//! The in-process wire: a call is a function call. The handler runs in the caller's task, message bytes are never copied by the
//! wire, and back-pressure is that nobody polls.

use std::collections::{BTreeSet, HashMap};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use tokio::sync::watch;
use tonic::Status;
use tonic::body::Body;

use crate::bucket::Entries;
use crate::call::{self, Call, lock};
use crate::gate::Instance;
use crate::target::{InstanceName, Target};

/// The targets served in this process, and its buckets.
#[derive(Default)]
pub(crate) struct Registry {
    served: RwLock<HashMap<Target, Vec<Served>>>,
    turn: AtomicUsize,
    /// How many instances have been added so far.
    added: AtomicUsize,
    buckets: Mutex<HashMap<String, Arc<watch::Sender<Entries>>>>,
}

type Served = (InstanceName, Arc<Instance>);

impl Registry {
    pub(crate) fn add(&self, target: Target, instance: Arc<Instance>) -> InstanceName {
        let name = InstanceName::from(format!("local-{}", self.added.fetch_add(1, Ordering::Relaxed)).as_str());
        let mut served = self.served.write().unwrap_or_else(PoisonError::into_inner);
        served.entry(target).or_default().push((name.clone(), instance));
        name
    }

    pub(crate) fn remove(&self, target: &Target, name: &InstanceName) {
        let mut served = self.served.write().unwrap_or_else(PoisonError::into_inner);
        if let Some(instances) = served.get_mut(target) {
            instances.retain(|(other, _)| other != name);
            if instances.is_empty() {
                served.remove(target);
            }
        }
    }

    pub(crate) fn is_served(&self, target: &Target) -> bool {
        self.served.read().unwrap_or_else(PoisonError::into_inner).contains_key(target)
    }

    pub(crate) fn instances(&self, target: &Target) -> BTreeSet<InstanceName> {
        let served = self.served.read().unwrap_or_else(PoisonError::into_inner);
        served.get(target).into_iter().flatten().map(|(name, _)| name.clone()).collect()
    }

    /// Starts `request` on one of the target's instances, each in its turn, or on the one that is named.
    pub(crate) fn call(&self, target: &Target, name: Option<&InstanceName>, request: http::Request<Body>) -> Result<Call, Status> {
        let served = self.served.read().unwrap_or_else(PoisonError::into_inner);
        let instance = served.get(target).and_then(|instances| self.pick(instances, name)).ok_or_else(|| nobody(target, name))?;
        // Begun while the list is held: an instance that leaves it afterwards waits for the call.
        Ok(call::start(&instance.table, &instance.gate, request))
    }

    fn pick<'s>(&self, instances: &'s [Served], name: Option<&InstanceName>) -> Option<&'s Instance> {
        let place = match name {
            Some(name) => instances.iter().position(|(other, _)| other == name)?,
            None if instances.len() == 1 => 0,
            None => self.turn.fetch_add(1, Ordering::Relaxed) % instances.len(),
        };
        instances.get(place).map(|(_, instance)| instance.as_ref())
    }

    /// The bucket of this name, empty at first.
    pub(crate) fn bucket(&self, name: &str) -> Arc<watch::Sender<Entries>> {
        lock(&self.buckets).entry(name.to_owned()).or_insert_with(|| Arc::new(watch::Sender::default())).clone()
    }
}

/// The answer of every wire when nobody serves the target, or not the instance that is named.
pub(crate) fn nobody(target: &Target, instance: Option<&InstanceName>) -> Status {
    Status::unavailable(match instance {
        None => format!("no instance of `{target}` is running"),
        Some(instance) => format!("instance `{instance}` of `{target}` is gone"),
    })
}
