//! [`Pace`]: whether a client gets on with what only it can end: reading its answers, sending its data.
//!
//! Knows no clock and ends nothing. Called by the connection's loop.

use std::time::{Duration, Instant};

/// What a client must move to count as getting on. Every network that is used for disks moves that in a second;
/// a byte now and then does not keep memory.
const PROGRESS_MIN: usize = 64 << 10;

/// How a client gets on with one thing.
#[derive(Debug, Default)]
pub(super) struct Pace {
    /// Since when it has not got on, as far as anybody has looked.
    since: Option<Instant>,
    /// How many bytes it has moved since then.
    moved: usize,
}

impl Pace {
    /// Takes note that it has moved so many bytes.
    pub(super) const fn moved(&mut self, bytes: usize) {
        self.moved = self.moved.saturating_add(bytes);
        if self.moved >= PROGRESS_MIN {
            self.rest();
        }
    }

    /// It has nothing to do, or is kept from doing it.
    pub(super) const fn rest(&mut self) {
        *self = Self { since: None, moved: 0 };
    }

    /// For how long it has not got on.
    pub(super) fn lag(&mut self, now: Instant) -> Duration {
        now.duration_since(*self.since.get_or_insert(now))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn a_byte_now_and_then_is_no_progress() {
        let (mut pace, began) = (Pace::default(), Instant::now());
        assert_eq!(pace.lag(began), Duration::ZERO, "nobody has looked before");
        for second in 1..100 {
            pace.moved(1);
            assert_eq!(pace.lag(began + SECOND * second), SECOND * second);
        }
    }

    #[test]
    fn enough_bytes_in_all_are_progress() {
        let (mut pace, began) = (Pace::default(), Instant::now());
        assert_eq!(pace.lag(began), Duration::ZERO);
        pace.moved(PROGRESS_MIN - 1);
        assert_eq!(pace.lag(began + SECOND), SECOND);
        pace.moved(1);
        assert_eq!(pace.lag(began + SECOND * 2), Duration::ZERO);
        assert_eq!(pace.lag(began + SECOND * 3), SECOND, "and again from there");
    }

    #[test]
    fn who_has_nothing_to_do_does_not_lag() {
        let (mut pace, began) = (Pace::default(), Instant::now());
        assert_eq!(pace.lag(began), Duration::ZERO);
        pace.moved(PROGRESS_MIN - 1);
        pace.rest();
        assert_eq!(pace.lag(began + SECOND), Duration::ZERO);
        pace.moved(1);
        assert_eq!(pace.lag(began + SECOND * 2), SECOND, "what was moved before does not count");
    }
}
