//! [`Stint`]: how long a connection has been at work while others sleep.
//!
//! Looks at the clock now and then only. Called by the connection's loop.

use std::time::{Duration, Instant};

/// How long a connection may go on while others sleep: so long, the thread looks neither at its ring nor at
/// other sockets. Short beside a disk's request, long beside the cost of that look.
const STINT_MAX: Duration = Duration::from_micros(50);

/// So many requests are started between two looks at the clock: a look costs a tenth of the cheapest request.
const REQUESTS_BETWEEN_LOOKS: u32 = 16;

/// A time of work without a look at others.
#[derive(Debug)]
pub(super) struct Stint {
    began: Instant,
    /// Requests that were started since.
    requests: u32,
}

impl Stint {
    /// One that begins now.
    pub(super) const fn new(now: Instant) -> Self {
        Self { began: now, requests: 0 }
    }

    /// Says whether it is time to give way.
    pub(super) fn is_over(&self, now: Instant) -> bool {
        now.duration_since(self.began) >= STINT_MAX
    }

    /// Counts one more request, and says whether it is time to give way. Asks for the time now and then.
    pub(super) fn is_over_after_one_more(&mut self, now: impl FnOnce() -> Instant) -> bool {
        self.requests = self.requests.wrapping_add(1);
        self.requests.is_multiple_of(REQUESTS_BETWEEN_LOOKS) && self.is_over(now())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn many_requests_are_broken_off_when_the_time_is_over() {
        let began = Instant::now();
        let mut stint = Stint::new(began);
        let mut looks = 0;
        // Each takes a microsecond.
        let over = (1..1000).find(|done| {
            stint.is_over_after_one_more(|| {
                looks += 1;
                began + Duration::from_micros(*done)
            })
        });
        assert_eq!((over, looks), (Some(64), 4), "at the first look from 50 on");
    }
}
