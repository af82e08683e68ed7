//! [`Patience`]: whether to look at a socket a little longer before sleeping.
//!
//! Waking a thread costs more than a small write, so a client that asks one thing at a time is served twice
//! as fast by a server that is still awake when the next request comes. Looking in vain costs processor time
//! that the client or a guest may need. So it is done only while recent requests came soon after the answer
//! to the one before. Pure; called by the connection's loop.

use std::time::{Duration, Instant};

/// The longest look. The wake-up that it saves costs about 30 µs on the machines that we measured, so
/// looking for much longer than that loses more than it can win.
const LOOK_MAX: Duration = Duration::from_micros(50);

/// The look is given up after so many times the usual gap: the client is then most likely waiting for a
/// processor itself, perhaps for this one.
const LOOK_GAPS: u32 = 2;

/// A gap counts for no more than this, so that a client which comes back from a pause is trusted again after
/// few requests.
const GAP_MAX: Duration = Duration::from_micros(400);

/// A turn takes microseconds. One that took this long was interrupted: somebody else wants this processor.
const STALL_MIN: Duration = Duration::from_millis(1);

/// How long nobody is waited for awake after that. A thread that sleeps in between is put before those that
/// never do when it wakes; one that looks around is one of them, and waits for all of their time slices.
const REST: Duration = Duration::from_millis(20);

/// What is known of a client's gaps: the time from our last answer to its next request.
#[derive(Debug)]
pub(super) struct Patience {
    /// Moving average over about four gaps.
    gap: Duration,
    /// When the thread was last seen to have been interrupted.
    stalled: Option<Instant>,
}

impl Patience {
    /// Knows nothing yet, and so does not look.
    pub(super) const fn new() -> Self {
        Self { gap: GAP_MAX, stalled: None }
    }

    /// Takes note of a gap that has ended.
    pub(super) fn learn(&mut self, gap: Duration) {
        self.gap = (self.gap * 3 + gap.min(GAP_MAX)) / 4;
    }

    /// Takes note of a turn that went from `began` to `ended` without sleeping.
    pub(super) fn took(&mut self, began: Instant, ended: Instant) {
        if ended.saturating_duration_since(began) >= STALL_MIN {
            self.stalled = Some(ended);
        }
    }

    /// Says whether to look on at `now`, when the last answer was at `answered`.
    pub(super) fn looks_on(&self, answered: Instant, now: Instant) -> bool {
        let waited = now.saturating_duration_since(answered);
        self.gap < LOOK_MAX
            && waited < (self.gap * LOOK_GAPS).min(LOOK_MAX)
            && self.stalled.is_none_or(|stalled| now.saturating_duration_since(stalled) >= REST)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn us(us: u64) -> Duration {
        Duration::from_micros(us)
    }

    fn looks_after(patience: &Patience, waited: Duration) -> bool {
        let now = Instant::now();
        patience.looks_on(now, now + waited)
    }

    #[test]
    fn a_client_that_never_asked_is_not_waited_for() {
        assert!(!looks_after(&Patience::new(), us(0)));
    }

    #[test]
    fn a_client_that_asks_at_once_is_waited_for_but_not_long() {
        let mut patience = Patience::new();
        (0..20).for_each(|_| patience.learn(us(40)));
        assert!(looks_after(&patience, us(49)));
        assert!(!looks_after(&patience, us(50)));
        (0..20).for_each(|_| patience.learn(us(10)));
        assert!(looks_after(&patience, us(19)));
        assert!(!looks_after(&patience, us(21)));
    }

    #[test]
    fn a_client_that_asks_now_and_then_is_not_waited_for() {
        let mut patience = Patience::new();
        (0..12).for_each(|_| patience.learn(us(20)));
        patience.learn(us(1_000_000));
        assert!(!looks_after(&patience, us(0)), "one long pause is enough to sleep");
        (0..100).for_each(|_| patience.learn(us(200)));
        assert!(!looks_after(&patience, us(0)), "5000 requests a second");
        (0..12).for_each(|_| patience.learn(us(20)));
        assert!(looks_after(&patience, us(0)), "trusted again");
    }

    #[test]
    fn nobody_is_waited_for_while_others_want_the_processor() {
        let mut patience = Patience::new();
        (0..12).for_each(|_| patience.learn(us(20)));
        let began = Instant::now();
        patience.took(began, began + us(900));
        assert!(patience.looks_on(began + us(900), began + us(900)));
        let ended = began + us(3000);
        patience.took(began, ended);
        assert!(!patience.looks_on(ended, ended));
        assert!(!patience.looks_on(ended + us(19_000), ended + us(19_000)));
        assert!(patience.looks_on(ended + us(20_000), ended + us(20_000)));
    }
}
