//! What a node is, for those to whom that makes a difference: an image, a filter, or bytes alone.

use std::sync::Arc;

use super::Node;
use crate::driver::fault::FaultInjector;
use crate::driver::preallocate::Preallocate;
use crate::driver::throttle::Throttle;
use crate::driver::{Driver, Filter, Qcow2};

impl Node {
    /// The image that it is in, where it is in one.
    #[must_use]
    pub fn image(&self) -> Option<&Arc<Qcow2>> {
        match self.driver() {
            Driver::Qcow2(image) => Some(image),
            Driver::Raw(_) | Driver::Filter(_) => None,
        }
    }

    /// Bytes that it allocates at once, where it allocates at all.
    #[must_use]
    pub fn cluster_size(&self) -> Option<u64> {
        match self.driver() {
            Driver::Raw(_) => None,
            Driver::Qcow2(image) => Some(image.layout().cluster_size()),
            Driver::Filter(filter) => filter.child().cluster_size(),
        }
    }

    /// Says whether it names a node below it that is not there: what it does not hold may read otherwise later.
    #[must_use]
    pub fn lacks_backing(&self) -> bool {
        match self.driver() {
            Driver::Raw(_) => false,
            Driver::Qcow2(image) => image.lacks_backing(),
            Driver::Filter(filter) => filter.child().lacks_backing(),
        }
    }

    /// The node to which it passes its requests on as they are, where it is a filter.
    #[must_use]
    pub fn passes_on_to(&self) -> Option<Arc<Self>> {
        match self.driver() {
            Driver::Filter(filter) => Some(filter.child()),
            Driver::Raw(_) | Driver::Qcow2(_) => None,
        }
    }

    /// The node whose layer it shows: itself, or one below that is no filter.
    pub(super) fn owner(self: &Arc<Self>) -> Arc<Self> {
        let mut owner = Arc::clone(self);
        while let Some(below) = owner.passes_on_to() {
            owner = below;
        }
        owner
    }

    /// The filter that makes room ahead of writes, if it is one.
    #[must_use]
    pub fn preallocate(&self) -> Option<&Preallocate> {
        match self.driver() {
            Driver::Filter(Filter::Preallocate(preallocate)) => Some(preallocate),
            Driver::Raw(_) | Driver::Qcow2(_) | Driver::Filter(_) => None,
        }
    }

    /// The throttling that it is, where it is one.
    #[must_use]
    pub fn throttle(&self) -> Option<&Throttle> {
        match self.driver() {
            Driver::Filter(Filter::Throttle(throttle)) => Some(throttle),
            Driver::Raw(_) | Driver::Qcow2(_) | Driver::Filter(_) => None,
        }
    }

    /// The fault injector that it is, where it is one.
    #[must_use]
    pub fn fault_injector(&self) -> Option<&Arc<FaultInjector>> {
        match self.driver() {
            Driver::Filter(Filter::Faults(injector)) => Some(injector),
            Driver::Raw(_) | Driver::Qcow2(_) | Driver::Filter(_) => None,
        }
    }
}
