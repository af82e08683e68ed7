//! [`Meter`]: how long a request has to wait so that limits are kept. Arithmetic only.
//!
//! Leaky buckets, as QEMU's `docs/throttle.txt` describes them: what is done fills a bucket, which leaks at the
//! average rate; while it is over full, requests wait. A bucket holds a tenth of a second at the average rate, or, where
//! bursts are allowed, the burst rate for the length of a burst; a second bucket then keeps the burst rate itself.
//!
//! Levels are counted in billionths of a byte or a request, so that a rate times nanoseconds is a level without
//! rounding.

use std::time::Duration;

use crate::clock::Moment;

/// Billionths in one.
const NANO: u128 = 1_000_000_000;

/// The most that a rate may be, as in QEMU.
pub const RATE_MAX: u64 = 1_000_000_000_000_000;

/// Which way a request goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// It reads.
    Read,
    /// It writes, zeroes or discards.
    Write,
}

/// What a limit counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Counted {
    /// Bytes both ways.
    BytesTotal,
    /// Bytes that are read.
    BytesRead,
    /// Bytes that are written.
    BytesWrite,
    /// Requests both ways.
    RequestsTotal,
    /// Requests that read.
    RequestsRead,
    /// Requests that write.
    RequestsWrite,
}

impl Counted {
    /// All of them.
    pub const ALL: [Self; 6] = [
        Self::BytesTotal,
        Self::BytesRead,
        Self::BytesWrite,
        Self::RequestsTotal,
        Self::RequestsRead,
        Self::RequestsWrite,
    ];

    const fn index(self) -> usize {
        match self {
            Self::BytesTotal => 0,
            Self::BytesRead => 1,
            Self::BytesWrite => 2,
            Self::RequestsTotal => 3,
            Self::RequestsRead => 4,
            Self::RequestsWrite => 5,
        }
    }

    const fn counts_requests(self) -> bool {
        matches!(self, Self::RequestsTotal | Self::RequestsRead | Self::RequestsWrite)
    }

    /// What is counted of requests that go one way.
    const fn of(direction: Direction) -> [Self; 4] {
        match direction {
            Direction::Read => [Self::BytesTotal, Self::BytesRead, Self::RequestsTotal, Self::RequestsRead],
            Direction::Write => {
                [Self::BytesTotal, Self::BytesWrite, Self::RequestsTotal, Self::RequestsWrite]
            }
        }
    }
}

/// One limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limit {
    /// Bytes or requests a second; 0 is no limit.
    pub rate: u64,
    /// The same while a burst lasts; 0 allows no bursts.
    pub burst_rate: u64,
    /// How many seconds a burst may last.
    pub burst_seconds: u64,
}

impl Default for Limit {
    fn default() -> Self {
        Self { rate: 0, burst_rate: 0, burst_seconds: 1 }
    }
}

/// All limits of a group.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    limits: [Limit; 6],
    /// A longer request counts as several, one for each of this many bytes; 0: never.
    pub request_size: u64,
}

/// Why limits make no sense. The texts are QEMU's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidLimits {
    /// For both ways together and for one of them.
    #[error("bps/iops/max total values and read/write values cannot be used at the same time")]
    TotalAndOneWay,
    /// A size of requests, of which none are counted.
    #[error("iops size requires an iops value to be set")]
    SizeAlone,
    /// Too much.
    #[error("bps/iops/max values must be within [0, {RATE_MAX}]")]
    Rate,
    /// A burst of no length.
    #[error("the burst length cannot be 0")]
    NoBurst,
    /// A burst's length without its rate.
    #[error("burst length set without burst rate")]
    BurstAlone,
    /// A burst that would fill a bucket beyond what can be counted.
    #[error("burst length too high for this burst rate")]
    BurstLength,
    /// A burst's rate without an average.
    #[error("bps_max/iops_max require corresponding bps/iops values")]
    NoAverage,
    /// A burst slower than the average.
    #[error("bps_max/iops_max cannot be lower than bps/iops")]
    SlowBurst,
}

impl Limits {
    /// One of them.
    #[must_use]
    pub const fn get(&self, counted: Counted) -> Limit {
        self.limits[counted.index()]
    }

    /// One of them, to be changed.
    pub const fn get_mut(&mut self, counted: Counted) -> &mut Limit {
        &mut self.limits[counted.index()]
    }

    /// Says what makes no sense.
    ///
    /// # Errors
    /// [`InvalidLimits`], the first that QEMU would say.
    pub fn check(&self) -> Result<(), InvalidLimits> {
        let both = |total: Counted, ways: [Counted; 2]| {
            let any = |is_set: fn(Limit) -> bool| {
                is_set(self.get(total)) && ways.iter().any(|way| is_set(self.get(*way)))
            };
            any(|limit| limit.rate > 0) || any(|limit| limit.burst_rate > 0)
        };
        if both(Counted::BytesTotal, [Counted::BytesRead, Counted::BytesWrite])
            || both(Counted::RequestsTotal, [Counted::RequestsRead, Counted::RequestsWrite])
        {
            return Err(InvalidLimits::TotalAndOneWay);
        }
        let counts_requests =
            Counted::ALL.iter().any(|counted| counted.counts_requests() && self.get(*counted).rate > 0);
        if self.request_size > 0 && !counts_requests {
            return Err(InvalidLimits::SizeAlone);
        }
        self.limits.iter().try_for_each(Limit::check)
    }

    const fn is_limited(&self, direction: Direction) -> bool {
        let [one, two, three, four] = Counted::of(direction);
        self.get(one).rate > 0
            || self.get(two).rate > 0
            || self.get(three).rate > 0
            || self.get(four).rate > 0
    }
}

impl Limit {
    const fn check(&self) -> Result<(), InvalidLimits> {
        if self.rate > RATE_MAX || self.burst_rate > RATE_MAX {
            return Err(InvalidLimits::Rate);
        }
        if self.burst_seconds == 0 {
            return Err(InvalidLimits::NoBurst);
        }
        if self.burst_seconds > 1 && self.burst_rate == 0 {
            return Err(InvalidLimits::BurstAlone);
        }
        if self.burst_rate > 0 && self.burst_seconds > RATE_MAX / self.burst_rate {
            return Err(InvalidLimits::BurstLength);
        }
        if self.burst_rate > 0 && self.rate == 0 {
            return Err(InvalidLimits::NoAverage);
        }
        if self.burst_rate > 0 && self.burst_rate < self.rate {
            return Err(InvalidLimits::SlowBurst);
        }
        Ok(())
    }
}

/// How full the buckets of one limit are, in billionths.
#[derive(Clone, Copy, Debug, Default)]
struct Level {
    main: u128,
    burst: u128,
}

/// What has been done of late, against limits.
#[derive(Debug, Default)]
pub(super) struct Meter {
    limits: Limits,
    levels: [Level; 6],
    /// Until when the buckets have leaked.
    leaked: Moment,
}

impl Meter {
    pub(super) const fn new(limits: Limits) -> Self {
        Self { limits, levels: [Level { main: 0, burst: 0 }; 6], leaked: Moment::START }
    }

    pub(super) const fn limits(&self) -> Limits {
        self.limits
    }

    pub(super) const fn is_limited(&self, direction: Direction) -> bool {
        self.limits.is_limited(direction)
    }

    /// How long a request has to wait from `now` on. Nothing when that has passed, whatever its length: what it
    /// is too long for, the next one waits for.
    pub(super) fn wait(&mut self, direction: Direction, now: Moment) -> Duration {
        self.leak(now);
        let waits = Counted::of(direction)
            .map(|counted| wait_for(self.limits.get(counted), self.levels[counted.index()]));
        let nanoseconds = waits.into_iter().max().unwrap_or(0);
        Duration::from_nanos(u64::try_from(nanoseconds).unwrap_or(u64::MAX))
    }

    /// A request of `bytes` goes on.
    pub(super) fn charge(&mut self, direction: Direction, bytes: u64, now: Moment) {
        self.leak(now);
        let size = self.limits.request_size;
        let requests = match size {
            0 => NANO,
            size if bytes <= size => NANO,
            size => u128::from(bytes) * NANO / u128::from(size),
        };
        for counted in Counted::of(direction) {
            let amount = if counted.counts_requests() { requests } else { u128::from(bytes) * NANO };
            let limit = self.limits.get(counted);
            let level = &mut self.levels[counted.index()];
            if limit.rate > 0 {
                level.main += amount;
            }
            if limit.burst_seconds > 1 {
                level.burst += amount;
            }
        }
    }

    fn leak(&mut self, now: Moment) {
        let elapsed = now.since(self.leaked).as_nanos();
        self.leaked = self.leaked.max(now);
        for counted in Counted::ALL {
            let limit = self.limits.get(counted);
            let level = &mut self.levels[counted.index()];
            level.main = level.main.saturating_sub(u128::from(limit.rate) * elapsed);
            level.burst = level.burst.saturating_sub(u128::from(limit.burst_rate) * elapsed);
        }
    }
}

/// Nanoseconds until there is room again.
fn wait_for(limit: Limit, level: Level) -> u128 {
    if limit.rate == 0 {
        return 0;
    }
    let (rate, burst_rate) = (u128::from(limit.rate), u128::from(limit.burst_rate));
    let room = match burst_rate {
        0 => rate * NANO / 10,
        rate => rate * u128::from(limit.burst_seconds) * NANO,
    };
    if level.main > room {
        return (level.main - room).div_ceil(rate);
    }
    if limit.burst_seconds > 1 {
        return level.burst.saturating_sub(burst_rate * NANO / 10).div_ceil(burst_rate);
    }
    0
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limits(counted: Counted, limit: Limit) -> Limits {
        let mut limits = Limits::default();
        *limits.get_mut(counted) = limit;
        limits
    }

    /// What passes within `seconds` when there is always another request of `bytes`.
    fn passed(limits: Limits, bytes: u64, seconds: u64) -> u64 {
        let mut meter = Meter::new(limits);
        let (mut now, end) = (Moment::START, Moment::from_start(Duration::from_secs(seconds)));
        let mut requests = 0;
        loop {
            now = now + meter.wait(Direction::Write, now);
            if now >= end {
                return requests;
            }
            meter.charge(Direction::Write, bytes, now);
            requests += 1;
        }
    }

    fn assert_about(found: u64, expected: u64) {
        assert!(found.abs_diff(expected) * 50 <= expected, "{found} and not {expected}");
    }

    #[test]
    fn the_average_is_kept_within_two_per_cent() {
        let rate = |rate| Limit { rate, ..Limit::default() };
        for bytes in [512, 4096, 65_536] {
            let found = passed(limits(Counted::BytesTotal, rate(10_000_000)), bytes, 60);
            assert_about(found * bytes, 600_000_000);
        }
        assert_about(passed(limits(Counted::RequestsWrite, rate(1000)), 4096, 60), 60_000);
        assert_about(passed(limits(Counted::BytesTotal, rate(100_000)), 1 << 20, 600) << 20, 60_000_000);
    }

    #[test]
    fn a_burst_lasts_as_long_as_it_may() {
        let burst = Limit { rate: 100, burst_rate: 1000, burst_seconds: 10 };
        let with = limits(Counted::RequestsTotal, burst);
        assert_about(passed(with, 512, 10), 10_000);
        // The bucket of ten thousand leaks a hundred a second all the while.
        assert_about(passed(with, 512, 100), 10_000 + 100 * 100);
    }

    #[test]
    fn a_long_request_counts_as_several() {
        let rate = Limit { rate: 100, ..Limit::default() };
        let with = Limits { request_size: 4096, ..limits(Counted::RequestsTotal, rate) };
        assert_about(passed(with, 4096, 60), 6000);
        assert_about(passed(with, 16_384, 60), 1500);
        assert_about(passed(with, 6144, 60), 4000);
    }

    #[test]
    fn the_other_way_is_not_limited() {
        let mut meter = Meter::new(limits(Counted::BytesRead, Limit { rate: 1, ..Limit::default() }));
        meter.charge(Direction::Read, 1 << 20, Moment::START);
        assert_eq!(meter.wait(Direction::Write, Moment::START), Duration::ZERO);
        assert!(meter.wait(Direction::Read, Moment::START) > Duration::from_secs(1));
        assert!(!meter.is_limited(Direction::Write));
    }

    #[test]
    fn what_makes_no_sense_is_said_in_qemus_order() {
        let of = |rate, burst_rate, burst_seconds| {
            limits(Counted::RequestsTotal, Limit { rate, burst_rate, burst_seconds }).check().err()
        };
        assert_eq!(of(10, 20, 5), None);
        assert_eq!(of(RATE_MAX + 1, 0, 0), Some(InvalidLimits::Rate));
        assert_eq!(of(0, 0, 0), Some(InvalidLimits::NoBurst));
        assert_eq!(of(10, 0, 5), Some(InvalidLimits::BurstAlone));
        assert_eq!(of(0, 5, 1), Some(InvalidLimits::NoAverage));
        assert_eq!(of(10, 5, 1), Some(InvalidLimits::SlowBurst));
        assert_eq!(of(10, RATE_MAX, 2), Some(InvalidLimits::BurstLength));
        let size = Limits { request_size: 1, ..Limits::default() };
        assert_eq!(size.check(), Err(InvalidLimits::SizeAlone));
    }
}
