//! [`Report`]: what a guest has to say at the end.

use std::time::Duration;

use heliostat_block::clock::Moment;
use heliostat_block::convert::u64_from;

use super::findings::Findings;
use super::record::Record;

/// A request's time, whatever it was.
#[derive(Clone, Copy, Debug)]
pub struct Timing {
    /// When it was sent.
    pub sent: Moment,
    /// How long the answer took.
    pub took: Duration,
}

/// What a guest has to say at the end.
#[derive(Debug)]
pub struct Report {
    /// What it did.
    pub record: Record,
    /// Every request's time, in the order of the answers.
    pub timings: Vec<Timing>,
    /// Reads whose data were compared with the record.
    pub reads: u64,
    /// Flushes that were answered with success.
    pub flushes: u64,
    /// Reads that brought something else than what had been written.
    pub false_reads: Findings,
    /// Requests that were answered with an error.
    pub errors: Findings,
}

impl Report {
    /// Starts with a record of the disk and nothing done.
    #[must_use]
    pub fn new(record: Record) -> Self {
        let (false_reads, errors) = (Findings::default(), Findings::default());
        Self { record, timings: Vec::new(), reads: 0, flushes: 0, false_reads, errors }
    }

    /// How long requests took that were sent in a stretch of time: the 99th percentile, and the longest.
    #[must_use]
    pub fn latency(&self, from: Moment, until: Moment) -> Latency {
        let inside = self.timings.iter().filter(|timing| timing.sent >= from && timing.sent < until);
        let mut took: Vec<Duration> = inside.map(|timing| timing.took).collect();
        took.sort_unstable();
        let rank = (took.len() * 99).div_ceil(100).saturating_sub(1);
        Latency {
            requests: u64_from(took.len()),
            p99: took.get(rank).copied().unwrap_or_default(),
            longest: took.last().copied().unwrap_or_default(),
        }
    }

    /// The longest request that was under way at some moment of a stretch of time.
    #[must_use]
    pub fn longest_across(&self, from: Moment, until: Moment) -> Duration {
        let across =
            self.timings.iter().filter(|timing| timing.sent <= until && timing.sent + timing.took >= from);
        across.map(|timing| timing.took).max().unwrap_or_default()
    }
}

/// How long requests took.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Latency {
    /// How many there were.
    pub requests: u64,
    /// 99 of 100 were answered within this.
    pub p99: Duration,
    /// The slowest one.
    pub longest: Duration,
}
