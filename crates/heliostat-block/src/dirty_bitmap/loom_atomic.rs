//! [`AtomicU64`] for the model checker: loom's, and a workaround.
//!
//! loom 0.7 decides which interleavings to try from the last access to an atomic only. A thread that loads an
//! atomic and then changes it, as almost everything in `dirty_bitmap.rs` and `in_flight.rs` does, thereby hides
//! the change from loom, and other threads' loads are never tried after it: whole classes of bugs go unseen
//! (<https://github.com/tokio-rs/loom/issues/166>, <https://github.com/tokio-rs/loom/issues/392>).
//!
//! So each load here first stores to a second atomic, which nobody reads. Stores depend on each other, so loom
//! tries all orders of them, and with them of the loads; and a relaxed store that is never read orders nothing
//! in memory, so it hides nothing. Changes need no such help: loom sees that they depend on what came last.

use std::sync::atomic::Ordering;

/// Stands for [`std::sync::atomic::AtomicU64`] under loom.
#[derive(Debug, Default)]
pub(crate) struct AtomicU64 {
    value: loom::sync::atomic::AtomicU64,
    order: loom::sync::atomic::AtomicU64,
}

impl AtomicU64 {
    pub(crate) fn new(value: u64) -> Self {
        Self {
            value: loom::sync::atomic::AtomicU64::new(value),
            order: loom::sync::atomic::AtomicU64::new(0),
        }
    }

    pub(crate) fn load(&self, ordering: Ordering) -> u64 {
        self.order.store(0, Ordering::Relaxed);
        self.value.load(ordering)
    }

    pub(crate) fn fetch_or(&self, bits: u64, ordering: Ordering) -> u64 {
        self.value.fetch_or(bits, ordering)
    }

    pub(crate) fn fetch_and(&self, bits: u64, ordering: Ordering) -> u64 {
        self.value.fetch_and(bits, ordering)
    }

    pub(crate) fn fetch_add(&self, value: u64, ordering: Ordering) -> u64 {
        self.value.fetch_add(value, ordering)
    }

    pub(crate) fn fetch_sub(&self, value: u64, ordering: Ordering) -> u64 {
        self.value.fetch_sub(value, ordering)
    }
}
