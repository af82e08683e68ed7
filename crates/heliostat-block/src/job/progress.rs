//! [`Progress`]: how far a mirror is, how fast, and how long it will take, or why that cannot be said.
//!
//! Arithmetic over samples that the job takes; looks at no clock and no disk itself.

use std::collections::VecDeque;
use std::time::Duration;

use crate::clock::Moment;

/// The window over which rates are taken: long enough to be steady, short enough to follow a guest.
const WINDOW: Duration = Duration::from_secs(2);
/// A new sample is kept when the last is at least this old; 2 s then need 20 of them.
const SAMPLE_EVERY: Duration = Duration::from_millis(100);

/// What a job has counted, at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counted {
    /// Bytes whose copies have ended, doubled ones not counted.
    pub copied: u64,
    /// Dirty bytes, those on their way included: what is left.
    pub left: u64,
}

/// Rates over the last two seconds.
#[derive(Debug, Default)]
pub struct Progress {
    samples: VecDeque<(Moment, Counted)>,
}

/// When a job will be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TimeLeft {
    /// About so many seconds.
    Seconds(u64),
    /// Nothing has been copied yet that a rate could be taken from.
    NoRateYet,
    /// The guest dirties at least as fast as the target takes.
    NotConverging,
    /// The job is paused.
    Paused,
}

/// How fast it goes, in bytes a second.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Rates {
    /// What copies bring to the target.
    pub copy: u64,
    /// What becomes dirty, first pass and guest together, but for what the first pass finds at once.
    pub dirty: u64,
}

impl Progress {
    /// Takes a sample; keeps it if the last one is old enough.
    pub fn sample(&mut self, now: Moment, counted: Counted) {
        let due = self.samples.back().is_none_or(|(last, _)| now.since(*last) >= SAMPLE_EVERY);
        if due {
            self.samples.push_back((now, counted));
        }
        while self.samples.len() > 2 && now.since(self.samples[1].0) > WINDOW {
            self.samples.pop_front();
        }
    }

    /// Forgets the past, after a pause or when the first pass has found what there is.
    pub fn restart(&mut self) {
        self.samples.clear();
    }

    /// The rates, from the oldest sample in the window until `now`.
    #[must_use]
    pub fn rates(&self, now: Moment, counted: Counted) -> Rates {
        let Some((then, before)) = self.samples.front() else { return Rates::default() };
        let elapsed = now.since(*then);
        let per_second = |bytes: u64| -> u64 {
            let nanos = elapsed.as_nanos().max(1);
            u64::try_from(u128::from(bytes) * 1_000_000_000 / nanos).unwrap_or(u64::MAX)
        };
        if elapsed < Duration::from_millis(1) {
            return Rates::default();
        }
        let copied = counted.copied.saturating_sub(before.copied);
        // What is left changes by what became dirty less what was copied.
        let dirtied = (counted.left + copied).saturating_sub(before.left);
        Rates { copy: per_second(copied), dirty: per_second(dirtied) }
    }
}

impl Rates {
    /// How long `left` bytes will take at these rates.
    #[must_use]
    pub const fn time_left(self, left: u64) -> TimeLeft {
        if left == 0 {
            return TimeLeft::Seconds(0);
        }
        if self.copy == 0 {
            return TimeLeft::NoRateYet;
        }
        match self.copy.checked_sub(self.dirty) {
            None | Some(0) => TimeLeft::NotConverging,
            Some(net) => TimeLeft::Seconds(left.div_ceil(net)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(millis: u64) -> Moment {
        Moment::from_start(Duration::from_millis(millis))
    }

    #[test]
    fn rates_are_what_changed_in_the_window() {
        let mut progress = Progress::default();
        progress.sample(at(0), Counted { copied: 0, left: 1000 });
        let now = Counted { copied: 600, left: 500 };
        assert_eq!(progress.rates(at(1000), now), Rates { copy: 600, dirty: 100 });
        assert_eq!(progress.rates(at(1000), now).time_left(500), TimeLeft::Seconds(1));
    }

    #[test]
    fn old_samples_leave_the_window() {
        let mut progress = Progress::default();
        for step in 0..100 {
            progress.sample(at(step * 100), Counted { copied: step * 10, left: 0 });
        }
        assert!(progress.samples.len() <= 22, "{}", progress.samples.len());
        assert_eq!(progress.rates(at(9_900), Counted { copied: 990, left: 0 }).copy, 100);
    }

    #[test]
    fn the_reason_is_said_where_no_time_can_be() {
        assert_eq!(Rates { copy: 30, dirty: 40 }.time_left(1), TimeLeft::NotConverging);
        assert_eq!(Rates { copy: 0, dirty: 0 }.time_left(1), TimeLeft::NoRateYet);
        assert_eq!(Rates { copy: 0, dirty: 9 }.time_left(0), TimeLeft::Seconds(0));
    }
}
