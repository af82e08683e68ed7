//! [`RealClock`]: the host's monotonic clock.
//!
//! The program hands it to whatever takes a [`Clock`]; it must not be used where a simulated one could be.

use std::time::{Duration, Instant};

use heliostat_block::clock::{Clock, LocalFuture, Moment};

/// The host's monotonic clock. Its start is the moment at which it was made; clones share it.
#[derive(Clone, Copy, Debug)]
pub struct RealClock {
    start: Instant,
}

impl RealClock {
    /// Makes a clock that starts now.
    #[must_use]
    pub fn new() -> Self {
        Self { start: Instant::now() }
    }

    /// Waits for `duration`. As [`Clock::sleep_until`].
    pub fn sleep(&self, duration: Duration) -> LocalFuture<'static, ()> {
        self.sleep_until(self.now() + duration)
    }
}

impl Default for RealClock {
    fn default() -> Self {
        Self::new()
    }
}

impl Clock for RealClock {
    fn now(&self) -> Moment {
        Moment::from_start(self.start.elapsed())
    }

    /// Waits on the runtime of the thread that awaits it.
    ///
    /// # Panics
    /// When awaited outside of a thread that runs [`crate::runtime`]; the control plane has a timer of its own.
    fn sleep_until(&self, deadline: Moment) -> LocalFuture<'static, ()> {
        match self.start.checked_add(deadline.since_start()) {
            Some(instant) => Box::pin(async move { compio::runtime::time::sleep_until(instant).await }),
            // Further away than the clock can count.
            None => Box::pin(std::future::pending()),
        }
    }
}
