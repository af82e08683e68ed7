//! [`InFlight`]: the gate of a node, and the count of requests behind it.
//!
//! A request enters before it touches anything and leaves when it has been answered for; the last one to
//! leave a closed gate wakes whoever waits for quiet. It never knows what the requests do. Called by `node`.
//!
//! One word holds both the gate and the count, so that entering is one addition: there is no moment between
//! "the gate is open" and "I am counted" in which a drain could find the node quiet. Checked by loom in
//! `loom_tests`.

#[cfg(all(test, loom))]
mod loom_tests;

#[cfg(not(loom))]
use std::sync::atomic::AtomicU64;
#[cfg(not(loom))]
use std::sync::{Mutex, MutexGuard};
use std::sync::{PoisonError, atomic::Ordering};

use event_listener::Event;
#[cfg(loom)]
use loom::sync::{Mutex, MutexGuard};

#[cfg(loom)]
use crate::dirty_bitmap::loom_atomic::AtomicU64;

/// The bit that says that the gate is closed. The bits below count requests; 2^63 of them cannot be in memory.
const CLOSED: u64 = 1 << 63;

/// The gate and the count.
#[derive(Debug, Default)]
pub(crate) struct InFlight {
    state: AtomicU64,
    /// How many want the gate closed. Held only while it and the bit change together.
    closers: Mutex<u32>,
    opened: Event,
    quiet: Event,
}

impl InFlight {
    /// Enters if the gate is open. Who enters must call [`InFlight::leave`] once.
    pub(crate) fn try_enter(&self) -> bool {
        if self.state.fetch_add(1, Ordering::SeqCst) & CLOSED == 0 {
            return true;
        }
        self.leave();
        false
    }

    /// Waits for the gate and enters.
    ///
    /// # Cancel safety
    /// Dropped before it returns, it has not entered.
    pub(crate) async fn enter(&self) {
        while !self.try_enter() {
            let opened = self.opened.listen();
            if self.is_closed() {
                opened.await;
            }
        }
    }

    /// Enters a gate that the caller holds closed. It must call [`InFlight::leave`] once, at whatever time.
    pub(crate) fn enter_closed(&self) {
        let before = self.state.fetch_add(1, Ordering::SeqCst);
        debug_assert!(before & CLOSED != 0, "only who holds the gate closed knows that nobody minds");
    }

    /// Leaves. The last one out of a closed gate says so.
    pub(crate) fn leave(&self) {
        let before = self.state.fetch_sub(1, Ordering::SeqCst);
        debug_assert!(before & !CLOSED > 0, "left more often than entered");
        if before == CLOSED | 1 {
            self.quiet.notify(usize::MAX);
        }
    }

    /// Closes the gate for one more holder.
    pub(crate) fn close(&self) {
        let mut closers = self.closers();
        *closers += 1;
        self.state.fetch_or(CLOSED, Ordering::SeqCst);
    }

    /// Takes back one [`InFlight::close`]; the last one opens the gate.
    pub(crate) fn open(&self) {
        let mut closers = self.closers();
        debug_assert!(*closers > 0, "opened more often than closed");
        *closers -= 1;
        if *closers == 0 {
            self.state.fetch_and(!CLOSED, Ordering::SeqCst);
            self.opened.notify(usize::MAX);
        }
    }

    /// Waits until nothing is in flight. Means something only while the caller holds the gate closed.
    ///
    /// # Cancel safety
    /// Dropping it leaves nothing behind.
    pub(crate) async fn wait_quiet(&self) {
        while self.count() > 0 {
            let quiet = self.quiet.listen();
            if self.count() > 0 {
                quiet.await;
            }
        }
    }

    /// Requests that have entered and not left.
    pub(crate) fn count(&self) -> u64 {
        self.state.load(Ordering::SeqCst) & !CLOSED
    }

    /// Says whether somebody holds the gate closed.
    pub(crate) fn is_closed(&self) -> bool {
        self.state.load(Ordering::SeqCst) & CLOSED != 0
    }

    fn closers(&self) -> MutexGuard<'_, u32> {
        self.closers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use std::pin::pin;

    use futures_util::FutureExt;

    use super::*;

    #[test]
    fn a_request_waits_at_a_closed_gate() {
        let in_flight = InFlight::default();
        in_flight.close();
        let mut entering = pin!(in_flight.enter());
        assert!(entering.as_mut().now_or_never().is_none());
        assert_eq!(in_flight.count(), 0);
        in_flight.open();
        assert!(entering.now_or_never().is_some());
        assert_eq!(in_flight.count(), 1);
    }

    #[test]
    fn quiet_comes_when_the_last_one_leaves() {
        let in_flight = InFlight::default();
        assert!(in_flight.try_enter() && in_flight.try_enter());
        in_flight.close();
        let mut quiet = pin!(in_flight.wait_quiet());
        in_flight.leave();
        assert!(quiet.as_mut().now_or_never().is_none());
        in_flight.leave();
        assert!(quiet.now_or_never().is_some());
    }

    #[test]
    fn the_gate_opens_with_its_last_holder() {
        let in_flight = InFlight::default();
        in_flight.close();
        in_flight.close();
        in_flight.open();
        assert!(!in_flight.try_enter());
        in_flight.open();
        assert!(in_flight.try_enter());
    }

    #[test]
    fn what_its_holder_lets_in_is_waited_for_by_the_next_one() {
        let in_flight = InFlight::default();
        in_flight.close();
        in_flight.enter_closed();
        in_flight.open();
        assert!(in_flight.try_enter(), "others go on beside it");
        in_flight.leave();
        in_flight.close();
        let mut quiet = pin!(in_flight.wait_quiet());
        assert!(quiet.as_mut().now_or_never().is_none());
        in_flight.leave();
        assert!(quiet.now_or_never().is_some());
    }

    #[test]
    fn requests_on_many_threads_never_pass_a_drained_gate() {
        let in_flight = InFlight::default();
        let inside = AtomicU64::new(0);
        std::thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| {
                    for _ in 0..20_000 {
                        if in_flight.try_enter() {
                            inside.fetch_add(1, Ordering::SeqCst);
                            inside.fetch_sub(1, Ordering::SeqCst);
                            in_flight.leave();
                        }
                    }
                });
            }
            for _ in 0..2_000 {
                in_flight.close();
                while in_flight.count() > 0 {
                    std::hint::spin_loop();
                }
                // A refused request counts for an instant, but it never gets inside.
                assert_eq!(inside.load(Ordering::SeqCst), 0);
                in_flight.open();
            }
        });
    }
}
