//! [`Latencies`]: how long requests took, as a histogram that any thread may add to.
//!
//! Adding is two relaxed additions; reading takes a copy, and the difference of two copies is a window.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::clock::Moment;
use crate::convert::usize_from;

/// Buckets for each doubling of the time: an answer is at most an eighth too high.
const STEPS: u64 = 8;
/// 8 exact buckets below 8 µs and 8 for each doubling up to 2^36 µs (19 hours).
const BUCKETS: usize = 8 * 35;

/// A histogram of times, in microseconds.
#[derive(Debug)]
pub struct Latencies {
    buckets: [AtomicU64; BUCKETS],
    longest_us: AtomicU64,
    /// When the last one was added, in microseconds of the clock; 0 is never.
    last_us: AtomicU64,
}

impl Default for Latencies {
    fn default() -> Self {
        Self {
            buckets: [const { AtomicU64::new(0) }; BUCKETS],
            longest_us: AtomicU64::new(0),
            last_us: AtomicU64::new(0),
        }
    }
}

/// What a histogram held at one moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LatencySnapshot {
    buckets: Vec<u64>,
}

fn microseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

fn bucket_of(us: u64) -> usize {
    if us < STEPS {
        return usize_from(us);
    }
    let doubling = u64::from(us.ilog2()) - 3;
    let step = (us >> doubling) - STEPS;
    usize_from(STEPS + doubling * STEPS + step).min(BUCKETS - 1)
}

/// The largest time that falls into `bucket`.
fn upper_us(bucket: usize) -> u64 {
    let bucket = crate::convert::u64_from(bucket);
    if bucket < STEPS {
        return bucket;
    }
    let doubling = bucket / STEPS - 1;
    ((bucket % STEPS + STEPS + 1) << doubling) - 1
}

impl Latencies {
    /// Adds the time of a request that has ended `now`.
    pub fn record(&self, took: Duration, now: Moment) {
        self.last_us.store(microseconds(now.since_start()).max(1), Ordering::Relaxed);
        let us = microseconds(took);
        self.buckets[bucket_of(us)].fetch_add(1, Ordering::Relaxed);
        if us > self.longest_us.load(Ordering::Relaxed) {
            self.longest_us.fetch_max(us, Ordering::Relaxed);
        }
    }

    /// Says whether none has been added for `quiet`.
    #[must_use]
    pub fn are_quiet(&self, now: Moment, quiet: Duration) -> bool {
        let last = self.last_us.load(Ordering::Relaxed);
        last == 0 || microseconds(now.since_start()).saturating_sub(last) >= microseconds(quiet)
    }

    /// The longest time so far.
    #[must_use]
    pub fn longest(&self) -> Duration {
        Duration::from_micros(self.longest_us.load(Ordering::Relaxed))
    }

    /// What it holds now.
    #[must_use]
    pub fn snapshot(&self) -> LatencySnapshot {
        LatencySnapshot { buckets: self.buckets.iter().map(|b| b.load(Ordering::Relaxed)).collect() }
    }
}

impl LatencySnapshot {
    /// What was added since `earlier`.
    #[must_use]
    pub fn since(&self, earlier: &Self) -> Self {
        let pairs = self.buckets.iter().zip(&earlier.buckets);
        Self { buckets: pairs.map(|(now, then)| now.saturating_sub(*then)).collect() }
    }

    /// How many times it holds.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.buckets.iter().sum()
    }

    /// The time that `per_thousand` of 1,000 requests stayed within; `None` when it is empty.
    #[must_use]
    pub fn quantile(&self, per_thousand: u64) -> Option<Duration> {
        let count = self.count();
        let rank = (count * per_thousand).div_ceil(1000).max(1);
        let mut seen = 0;
        for (bucket, held) in self.buckets.iter().enumerate() {
            seen += held;
            if count > 0 && seen >= rank {
                return Some(Duration::from_micros(upper_us(bucket)));
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_time_falls_into_a_bucket_at_most_an_eighth_too_high() {
        for us in (0..5000).chain([65_535, 65_536, 1 << 30, (1 << 36) - 1]) {
            let upper = upper_us(bucket_of(us));
            assert!(upper >= us && upper - us <= us / 8, "{us} -> {upper}");
        }
        assert_eq!(bucket_of(u64::MAX), BUCKETS - 1);
    }

    #[test]
    fn a_window_is_the_difference_of_two_snapshots() {
        let latencies = Latencies::default();
        latencies.record(Duration::from_micros(3), Moment::START);
        let before = latencies.snapshot();
        for _ in 0..99 {
            latencies.record(Duration::from_micros(100), Moment::START);
        }
        latencies.record(Duration::from_millis(9), Moment::START);
        let window = latencies.snapshot().since(&before);
        assert_eq!(window.count(), 100);
        assert!(window.quantile(990).unwrap() < Duration::from_micros(113));
        assert!(window.quantile(1000).unwrap() >= Duration::from_millis(9));
        assert_eq!(before.since(&before).quantile(500), None);
    }

    #[test]
    fn requests_that_ended_a_while_ago_leave_it_quiet() {
        let latencies = Latencies::default();
        let (at, quiet) = (|ms| Moment::from_start(Duration::from_millis(ms)), Duration::from_millis(100));
        assert!(latencies.are_quiet(at(0), quiet), "there never was one");
        latencies.record(Duration::ZERO, at(500));
        assert!(!latencies.are_quiet(at(599), quiet));
        assert!(latencies.are_quiet(at(600), quiet));
    }
}
