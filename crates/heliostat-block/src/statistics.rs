//! [`Statistics`]: how many requests of each kind there were, how much they moved and how long they took.
//!
//! Any thread adds to it, for the price of a few relaxed additions a request; who reads it while requests end may see
//! one that is half counted. Kept for each node and for each place in the graph.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::error::{BlockError, ErrorKind};
use crate::range::ByteRange;

/// What is told apart. Zeroes that are written are writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Reads.
    Read,
    /// Writes.
    Write,
    /// Discards.
    Discard,
    /// Flushes.
    Flush,
}

const KINDS: usize = 4;

/// What became of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It succeeded.
    Done,
    /// The storage failed it.
    Failed,
    /// It could not be carried out as it was.
    Invalid,
}

impl Outcome {
    /// What a result means.
    #[must_use]
    pub fn of<T>(result: &Result<T, BlockError>) -> Self {
        match result {
            Ok(_) => Self::Done,
            Err(error) if matches!(error.kind(), ErrorKind::InvalidRequest | ErrorKind::ReadOnly) => {
                Self::Invalid
            }
            Err(_) => Self::Failed,
        }
    }
}

/// A request that has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ended {
    /// What it was.
    pub kind: Kind,
    /// What it was about; nothing for a flush, and for what lies outside of any disk.
    pub range: Option<ByteRange>,
    /// How long it took, from its arrival on.
    pub took: Duration,
    /// What became of it.
    pub outcome: Outcome,
}

/// What was counted of one kind of request.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Requests that succeeded.
    pub operations: u64,
    /// Bytes that those were about.
    pub bytes: u64,
    /// How long those took in all, in nanoseconds, waits at the gate included.
    pub nanoseconds: u64,
    /// Requests that the storage failed.
    pub failed: u64,
    /// Requests that could not be carried out as they were: outside the disk, or writing to what is read only.
    pub invalid: u64,
}

/// The counters of requests.
#[derive(Debug, Default)]
pub struct Statistics {
    kinds: [Counters; KINDS],
    /// The end of the highest write so far.
    written_end: AtomicU64,
}

#[derive(Debug, Default)]
struct Counters {
    operations: AtomicU64,
    bytes: AtomicU64,
    nanoseconds: AtomicU64,
    failed: AtomicU64,
    invalid: AtomicU64,
}

impl Statistics {
    /// What was counted of one kind.
    #[must_use]
    pub fn of(&self, kind: Kind) -> Counts {
        let counters = self.counters(kind);
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Counts {
            operations: read(&counters.operations),
            bytes: read(&counters.bytes),
            nanoseconds: read(&counters.nanoseconds),
            failed: read(&counters.failed),
            invalid: read(&counters.invalid),
        }
    }

    /// Where the highest write so far ended; 0 before the first.
    #[must_use]
    pub fn written_end(&self) -> u64 {
        self.written_end.load(Ordering::Relaxed)
    }

    /// Counts a request.
    pub fn add(&self, ended: Ended) {
        let counters = self.counters(ended.kind);
        let add = |counter: &AtomicU64, number| counter.fetch_add(number, Ordering::Relaxed);
        match ended.outcome {
            Outcome::Failed => add(&counters.failed, 1),
            Outcome::Invalid => add(&counters.invalid, 1),
            Outcome::Done => {
                add(&counters.nanoseconds, u64::try_from(ended.took.as_nanos()).unwrap_or(u64::MAX));
                add(&counters.operations, 1)
            }
        };
        let Some(range) = ended.range.filter(|_| ended.outcome == Outcome::Done) else { return };
        add(&counters.bytes, range.len());
        // Looked at first: most writes are not the highest.
        if ended.kind == Kind::Write && range.end() > self.written_end() {
            self.written_end.fetch_max(range.end(), Ordering::Relaxed);
        }
    }

    fn counters(&self, kind: Kind) -> &Counters {
        match kind {
            Kind::Read => &self.kinds[0],
            Kind::Write => &self.kinds[1],
            Kind::Discard => &self.kinds[2],
            Kind::Flush => &self.kinds[3],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_failed_is_counted_apart_from_what_was_impossible() {
        let statistics = Statistics::default();
        let range = Some(ByteRange::from_bounds(4096, 8192));
        let took = Duration::from_micros(3);
        let write = Ended { kind: Kind::Write, range, took, outcome: Outcome::Done };
        statistics.add(write);
        statistics.add(Ended { range: Some(ByteRange::from_bounds(0, 512)), ..write });
        statistics.add(Ended { kind: Kind::Flush, range: None, ..write });
        for kind in [ErrorKind::Io, ErrorKind::InvalidRequest, ErrorKind::ReadOnly] {
            let outcome = Outcome::of::<()>(&Err(BlockError::new(kind, "disk0", None)));
            statistics.add(Ended { outcome, ..write });
        }
        let counts = Counts { operations: 2, bytes: 4608, nanoseconds: 6000, failed: 1, invalid: 2 };
        assert_eq!(statistics.of(Kind::Write), counts);
        assert_eq!(statistics.written_end(), 8192);
        let counts = Counts { operations: 1, nanoseconds: 3000, ..Counts::default() };
        assert_eq!(statistics.of(Kind::Flush), counts);
        assert_eq!(statistics.of(Kind::Read), Counts::default());
    }
}
