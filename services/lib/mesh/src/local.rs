//! The in-process wire: a call is a function call. The handler runs in the caller's task, message bytes are never copied by the
//! wire, and back-pressure is that nobody polls.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use tonic::Status;
use tonic::body::Body;

use crate::call::{self, Call};
use crate::gate::Instance;
use crate::target::Target;

/// The targets served in this process.
#[derive(Default)]
pub(crate) struct Registry {
    served: RwLock<HashMap<Target, Vec<Arc<Instance>>>>,
    turn: AtomicUsize,
}

impl Registry {
    pub(crate) fn add(&self, target: Target, instance: Arc<Instance>) {
        let mut served = self.served.write().unwrap_or_else(PoisonError::into_inner);
        served.entry(target).or_default().push(instance);
    }

    pub(crate) fn remove(&self, target: &Target, instance: &Arc<Instance>) {
        let mut served = self.served.write().unwrap_or_else(PoisonError::into_inner);
        if let Some(instances) = served.get_mut(target) {
            instances.retain(|other| !Arc::ptr_eq(other, instance));
            if instances.is_empty() {
                served.remove(target);
            }
        }
    }

    pub(crate) fn is_served(&self, target: &Target) -> bool {
        self.served.read().unwrap_or_else(PoisonError::into_inner).contains_key(target)
    }

    /// Starts `request` on one of the target's instances, each in its turn.
    pub(crate) fn call(&self, target: &Target, request: http::Request<Body>) -> Result<Call, Status> {
        let instance = {
            let served = self.served.read().unwrap_or_else(PoisonError::into_inner);
            let instances = served.get(target).ok_or_else(|| no_instance(target))?;
            let turn = if instances.len() == 1 { 0 } else { self.turn.fetch_add(1, Ordering::Relaxed) % instances.len() };
            instances[turn].clone()
        };
        Ok(call::start(&instance.table, &instance.gate, request))
    }
}

/// The answer of every wire when nobody serves the target.
pub(crate) fn no_instance(target: &Target) -> Status {
    Status::unavailable(format!("no instance of `{target}` is running"))
}
