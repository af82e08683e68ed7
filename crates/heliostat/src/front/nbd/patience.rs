//! [`Patience`]: whether to look at a socket a little longer before sleeping.
//!
//! Waking a thread costs more than a small write, so a client that asks one thing at a time is served twice
//! as fast by a server that is still awake when the next request comes. Looking in vain costs processor time
//! that the client or a guest may need. So it is done only while recent requests came soon after the answer
//! to the one before. Pure; called by the connection's loop.

use std::time::Duration;

/// The longest look. The wake-up that it saves costs about 30 µs on the machines that we measured, so
/// looking for much longer than that loses more than it can win.
const LOOK_MAX: Duration = Duration::from_micros(50);

/// The look is given up after so many times the usual gap: the client is then most likely waiting for a
/// processor itself, perhaps for this one.
const LOOK_GAPS: u32 = 2;

/// A gap counts for no more than this, so that a client which comes back from a pause is trusted again after
/// few requests.
const GAP_MAX: Duration = Duration::from_micros(400);

/// What is known of a client's gaps: the time from our last answer to its next request.
#[derive(Debug)]
pub(super) struct Patience {
    /// Moving average over about four gaps.
    gap: Duration,
}

impl Patience {
    /// Knows nothing yet, and so does not look.
    pub(super) const fn new() -> Self {
        Self { gap: GAP_MAX }
    }

    /// Takes note of a gap that has ended.
    pub(super) fn learn(&mut self, gap: Duration) {
        self.gap = (self.gap * 3 + gap.min(GAP_MAX)) / 4;
    }

    /// Says whether to look on, `waited` after the last answer.
    pub(super) fn looks_on(&self, waited: Duration) -> bool {
        self.gap < LOOK_MAX && waited < (self.gap * LOOK_GAPS).min(LOOK_MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn us(us: u64) -> Duration {
        Duration::from_micros(us)
    }

    #[test]
    fn a_client_that_never_asked_is_not_waited_for() {
        assert!(!Patience::new().looks_on(us(0)));
    }

    #[test]
    fn a_client_that_asks_at_once_is_waited_for_but_not_long() {
        let mut patience = Patience::new();
        (0..20).for_each(|_| patience.learn(us(40)));
        assert!(patience.looks_on(us(49)));
        assert!(!patience.looks_on(us(50)));
        (0..20).for_each(|_| patience.learn(us(10)));
        assert!(patience.looks_on(us(19)));
        assert!(!patience.looks_on(us(21)));
    }

    #[test]
    fn a_client_that_asks_now_and_then_is_not_waited_for() {
        let mut patience = Patience::new();
        (0..12).for_each(|_| patience.learn(us(20)));
        patience.learn(us(1_000_000));
        assert!(!patience.looks_on(us(0)), "one long pause is enough to sleep");
        (0..100).for_each(|_| patience.learn(us(200)));
        assert!(!patience.looks_on(us(0)), "5000 requests a second");
        (0..12).for_each(|_| patience.learn(us(20)));
        assert!(patience.looks_on(us(0)), "trusted again");
    }
}
