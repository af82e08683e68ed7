//! [`Pace`]: a limit of bytes a second that is kept evenly. [`Rest`]: time off after an error.
//!
//! Each byte takes its share of a second; the next copy may start when the time of the last ones is over. No
//! allowance is saved up while idle, so there are no bursts. Looks at no clock itself.

use std::time::Duration;

use crate::clock::Moment;
use crate::limits::{REST_FIRST, REST_LAST};

/// The longest time that one copy may take up under a limit. Keeps the pace even: ten steps a second.
const STEP: Duration = Duration::from_millis(100);

/// The longest time by which doubled writes hold copies back: as much as shows in the rates of a job.
const DEBT_MAX: Duration = Duration::from_secs(1);

/// A limit, and when the next copy may start.
#[derive(Debug, Default)]
pub(crate) struct Pace {
    /// Bytes a second; 0 is no limit.
    speed: u64,
    free_at: Moment,
}

impl Pace {
    /// Sets the limit. What the old limit still holds back is let go: the new one begins now.
    pub(crate) fn set_speed(&mut self, speed: u64, now: Moment) {
        if speed != self.speed {
            self.speed = speed;
            self.free_at = now;
        }
    }

    /// When the next copy may start; `None` when at once.
    pub(crate) fn wait_until(&self, now: Moment) -> Option<Moment> {
        (self.speed > 0 && self.free_at > now).then_some(self.free_at)
    }

    /// Counts `bytes` that are doubled from `now` on. They wait for nothing, so a busy guest can go over any
    /// limit; the copies behind them are held back for a while only, or they would never come to their end.
    pub(crate) fn spend_unasked(&mut self, bytes: u64, now: Moment) {
        let before = self.free_at;
        self.spend(bytes, now);
        self.free_at = self.free_at.min(before.max(now + DEBT_MAX));
    }

    /// Counts `bytes` that are copied from `now` on.
    pub(crate) fn spend(&mut self, bytes: u64, now: Moment) {
        if self.speed > 0 {
            self.free_at = self.free_at.max(now) + self.takes(bytes);
        }
    }

    /// Takes back what was counted for `bytes` that turned out to be no data.
    pub(crate) fn give_back(&mut self, bytes: u64, now: Moment) {
        if self.speed > 0 {
            self.free_at = Moment::from_start(self.free_at.since(now).saturating_sub(self.takes(bytes)))
                + now.since_start();
        }
    }

    fn takes(&self, bytes: u64) -> Duration {
        let nanos = u128::from(bytes) * 1_000_000_000 / u128::from(self.speed);
        Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
    }

    /// The longest copy that keeps the pace even, at most `max`.
    pub(crate) fn copy_len(&self, max: u64) -> u64 {
        if self.speed == 0 {
            return max;
        }
        let step = u128::from(self.speed) * STEP.as_millis() / 1000;
        u64::try_from(step).unwrap_or(u64::MAX).clamp(1, max)
    }
}

/// The time off after an error that is ignored: one that stays must not spin, so each is twice as long as the
/// last.
#[derive(Debug)]
pub(crate) struct Rest {
    until: Option<Moment>,
    next: Duration,
}

impl Default for Rest {
    fn default() -> Self {
        Self { until: None, next: REST_FIRST }
    }
}

impl Rest {
    /// Begins one. Errors that come together share one.
    pub(crate) fn begin(&mut self, now: Moment) {
        if self.until(now).is_none() {
            self.until = Some(now + self.next);
            self.next = (self.next * 2).min(REST_LAST);
        }
    }

    /// Something has succeeded: the next rest is a short one again.
    pub(crate) const fn shorten(&mut self) {
        self.next = REST_FIRST;
    }

    /// When it ends; `None` when there is none.
    pub(crate) fn until(&self, now: Moment) -> Option<Moment> {
        self.until.filter(|until| *until > now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(millis: u64) -> Moment {
        Moment::from_start(Duration::from_millis(millis))
    }

    #[test]
    fn no_second_has_more_than_the_limit_and_one_step() {
        let mut pace = Pace::default();
        pace.set_speed(1 << 20, at(0));
        let mut copied = vec![0; 10];
        let mut now = at(0);
        while now < at(10_000) {
            match pace.wait_until(now) {
                Some(until) => now = until,
                None => {
                    let len = pace.copy_len(1 << 20);
                    let second = usize::try_from(now.since_start().as_secs()).unwrap();
                    copied[second.min(9)] += len;
                    pace.spend(len, now);
                }
            }
        }
        for bytes in copied {
            assert!(((1 << 20) * 9 / 10..=(1 << 20) * 12 / 10).contains(&bytes), "{bytes}");
        }
    }

    #[test]
    fn what_was_no_data_is_given_back_but_never_saved_up() {
        let mut pace = Pace::default();
        pace.set_speed(1000, at(0));
        pace.spend(500, at(0));
        pace.give_back(200, at(100));
        assert_eq!(pace.wait_until(at(100)), Some(at(300)));
        pace.give_back(5000, at(100));
        assert_eq!(pace.wait_until(at(100)), None);
        pace.spend(10, at(100));
        assert_eq!(pace.wait_until(at(100)), Some(at(110)));
    }

    #[test]
    fn idle_time_is_not_saved_up() {
        let mut pace = Pace::default();
        pace.set_speed(1000, at(0));
        pace.spend(100, at(50_000));
        assert_eq!(pace.wait_until(at(50_000)), Some(at(50_100)));
    }

    #[test]
    fn doubled_writes_hold_copies_back_for_a_while_only() {
        let mut pace = Pace::default();
        pace.set_speed(1000, at(0));
        pace.spend_unasked(1 << 30, at(0));
        assert_eq!(pace.wait_until(at(0)), Some(at(1000)));
        pace.spend(5000, at(1000));
        pace.spend_unasked(1 << 30, at(1000));
        assert_eq!(pace.wait_until(at(1000)), Some(at(6000)), "what copies cost stays");
    }

    #[test]
    fn a_new_limit_begins_at_once() {
        let mut pace = Pace::default();
        pace.set_speed(1, at(0));
        pace.spend(1000, at(0));
        pace.set_speed(1000, at(5));
        assert_eq!(pace.wait_until(at(5)), None);
    }

    #[test]
    fn each_rest_is_longer_and_errors_that_come_together_share_one() {
        let mut rest = Rest::default();
        rest.begin(at(0));
        rest.begin(at(10));
        assert_eq!(rest.until(at(10)), Some(at(100)));
        assert_eq!(rest.until(at(100)), None);
        rest.begin(at(100));
        assert_eq!(rest.until(at(100)), Some(at(300)));
    }
}
