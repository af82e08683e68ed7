//! [`Figures`]: what a job tells of itself. [`Tally`]: how a mirror comes to them.
//!
//! Counting and arithmetic; decides nothing and does no I/O.

use std::time::Duration;

use super::copy::Copied;
use super::progress::{Counted, Progress, Rates, TimeLeft};
use crate::clock::Moment;
use crate::latency::{Latencies, LatencySnapshot};
use crate::limits::{FLUSH_SAMPLE_MIN, PAUSE_BUDGET_FIRST, PAUSE_BUDGET_LAST, RATE_ASSUMED, TICK};

/// A job's figures at one moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Figures {
    /// Bytes done; QMP's `offset`.
    pub offset: u64,
    /// Bytes done and left; QMP's `len`.
    pub len: u64,
    /// Bytes dirty or on their way.
    pub dirty: u64,
    /// Bytes of the source that the first pass has not looked at yet.
    pub unscanned: u64,
    /// How fast.
    pub rates: Rates,
    /// How long still, or why that cannot be said.
    pub time_left: TimeLeft,
    /// Whether source and target have been equal since the last look, but for what is in flight on both.
    pub actively_synced: bool,
    /// Whether it sleeps for the limit or has nothing to do.
    pub busy: bool,
    /// The 99th percentile of guests' latency before the job began.
    pub guest_p99_before: Option<Duration>,
    /// The same over the last second.
    pub guest_p99_now: Option<Duration>,
    /// How long the gate was closed at the last attempt to end.
    pub pause: Option<Duration>,
    /// How many bytes were copied as data.
    pub data_copied: u64,
    /// How many bytes became or stayed zero without being written.
    pub zeroes_skipped: u64,
    /// How many errors were ignored.
    pub errors_ignored: u64,
    /// That the target does not answer.
    pub degraded: Option<Degradation>,
}

/// That a target does not answer, or cannot be reached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Degradation {
    /// Why it is thought so.
    pub reason: String,
    /// For how long, when it was told.
    pub lasted: Duration,
}

impl Default for Figures {
    fn default() -> Self {
        Self {
            offset: 0,
            len: 0,
            dirty: 0,
            unscanned: 0,
            rates: Rates::default(),
            time_left: TimeLeft::NoRateYet,
            actively_synced: false,
            busy: true,
            guest_p99_before: None,
            guest_p99_now: None,
            pause: None,
            data_copied: 0,
            zeroes_skipped: 0,
            errors_ignored: 0,
            degraded: None,
        }
    }
}

/// What a mirror has counted and measured.
pub(crate) struct Tally {
    copied: u64,
    data: u64,
    zeroes_skipped: u64,
    errors_ignored: u64,
    capacity: Capacity,
    /// The flush on its way: since when, and what it covers.
    flush: Option<(Moment, u64)>,
    /// What the medium took at the last flush, in bytes a second.
    flush_rate: u64,
    progress: Progress,
    pause: Option<Duration>,
    guest_p99_before: Option<Duration>,
    guest_p99_now: Option<Duration>,
    /// When the window of guests' latencies began, and what had been recorded then.
    window: (Moment, LatencySnapshot),
    told_at: Option<Moment>,
}

/// What a mirror knows of itself when it tells its figures.
pub(crate) struct Standing {
    /// Bytes that doubled writes have brought over.
    pub(crate) doubled: u64,
    /// Bytes dirty or on their way.
    pub(crate) left: u64,
    /// Bytes that the first pass has not looked at.
    pub(crate) unscanned: u64,
    pub(crate) paused: bool,
    pub(crate) write_blocking: bool,
    pub(crate) waits_for_pace: bool,
    pub(crate) degraded: Option<Degradation>,
}

/// What the target takes while it is given all that it can take: bytes over the time in which copies were in
/// flight.
#[derive(Default)]
struct Capacity {
    busy_since: Option<(Moment, u64)>,
    bytes_per_second: Option<u64>,
}

impl Tally {
    pub(crate) fn new(now: Moment, guests: &Latencies) -> Self {
        let before = guests.snapshot();
        Self {
            copied: 0,
            data: 0,
            zeroes_skipped: 0,
            errors_ignored: 0,
            capacity: Capacity::default(),
            flush: None,
            flush_rate: RATE_ASSUMED,
            progress: Progress::default(),
            pause: None,
            guest_p99_before: before.quantile(990),
            guest_p99_now: None,
            window: (now, before),
            told_at: None,
        }
    }

    pub(crate) fn copy_begins(&mut self, now: Moment) {
        self.capacity.busy_since.get_or_insert((now, self.data));
    }

    pub(crate) fn copy_succeeded(&mut self, len: u64, copied: Copied) {
        self.copied += len;
        self.data += copied.data;
        self.zeroes_skipped += copied.zeroed + copied.skipped;
    }

    /// No copy is in flight any more.
    pub(crate) fn copies_end(&mut self, now: Moment) {
        self.capacity.rest(now, self.data);
    }

    pub(crate) const fn error_ignored(&mut self) {
        self.errors_ignored += 1;
    }

    pub(crate) const fn paused_guests_for(&mut self, pause: Duration) {
        self.pause = Some(pause);
    }

    /// Forgets past rates: what comes is another phase.
    pub(crate) fn phase_begins(&mut self) {
        self.progress.restart();
    }

    /// What may be left when the gate closes: what the target takes in a few milliseconds; in more of them the
    /// longer it has been `tried`, so that a steady writer cannot put the end off for ever.
    pub(crate) fn pause_budget(&self, tried: Duration) -> u64 {
        share(self.capacity.bytes_per_second.unwrap_or(RATE_ASSUMED), pause_at(tried))
    }

    pub(crate) const fn flush_begins(&mut self, now: Moment, bytes: u64) {
        self.flush = Some((now, bytes));
    }

    /// The flush has ended: a slow one says what the medium takes.
    pub(crate) fn flush_ends(&mut self, now: Moment) {
        // A flush of little takes its fixed cost, which says nothing of more.
        if let Some((since, bytes)) = self.flush.take().filter(|(_, bytes)| *bytes >= FLUSH_SAMPLE_MIN) {
            self.flush_rate = rate(bytes, now.since(since));
        }
    }

    /// What may be unflushed when the gate closes; see [`Tally::pause_budget`].
    pub(crate) fn flush_budget(&self, tried: Duration) -> u64 {
        share(self.flush_rate, pause_at(tried))
    }

    /// Says whether the figures told last are old enough to be told again.
    pub(crate) fn is_due(&self, now: Moment) -> bool {
        self.told_at.is_none_or(|told| now.since(told) >= TICK)
    }

    /// The figures now.
    pub(crate) fn tell(&mut self, now: Moment, standing: &Standing, guests: &Latencies) -> Figures {
        self.told_at = Some(now);
        self.capacity.look(now, self.data);
        let done = self.copied + standing.doubled;
        let counted = Counted { copied: self.copied, left: standing.left };
        self.progress.sample(now, counted);
        let rates = self.progress.rates(now, counted);
        self.look_at_guests(now, guests);
        Figures {
            offset: done,
            len: done + standing.left,
            dirty: standing.left,
            unscanned: standing.unscanned,
            rates,
            time_left: if standing.paused { TimeLeft::Paused } else { rates.time_left(standing.left) },
            actively_synced: standing.unscanned == 0 && standing.left == 0 && standing.write_blocking,
            busy: !standing.paused && !standing.waits_for_pace,
            guest_p99_before: self.guest_p99_before,
            guest_p99_now: self.guest_p99_now,
            pause: self.pause,
            data_copied: self.data,
            zeroes_skipped: self.zeroes_skipped,
            errors_ignored: self.errors_ignored,
            degraded: standing.degraded.clone(),
        }
    }

    /// Once a second, takes what guests' requests took in that second.
    fn look_at_guests(&mut self, now: Moment, guests: &Latencies) {
        if now.since(self.window.0) >= Duration::from_secs(1) {
            let snapshot = guests.snapshot();
            self.guest_p99_now = snapshot.since(&self.window.1).quantile(990);
            self.window = (now, snapshot);
        }
    }
}

impl Capacity {
    /// Takes in how fast data went until now, the past counting for seven eighths. Zeroes say nothing.
    fn rest(&mut self, now: Moment, data: u64) {
        let Some((since, data_then)) = self.busy_since.take() else { return };
        if data > data_then {
            let rate = rate(data - data_then, now.since(since));
            self.bytes_per_second = Some(self.bytes_per_second.map_or(rate, |old| old - old / 8 + rate / 8));
        }
    }

    /// The same where copies never rest.
    fn look(&mut self, now: Moment, data: u64) {
        if self.busy_since.is_some_and(|(_, then)| data > then) {
            self.rest(now, data);
            self.busy_since = Some((now, data));
        }
    }
}

/// How long guests may be held after so much trying: the longer it took, the longer.
fn pause_at(tried: Duration) -> Duration {
    (PAUSE_BUDGET_FIRST + tried / 16).min(PAUSE_BUDGET_LAST)
}

fn rate(bytes: u64, took: Duration) -> u64 {
    u64::try_from(u128::from(bytes) * 1_000_000_000 / took.as_nanos().max(1)).unwrap_or(u64::MAX)
}

/// What goes at `rate` in `time`.
fn share(rate: u64, time: Duration) -> u64 {
    u64::try_from(u128::from(rate) * time.as_micros() / 1_000_000).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(millis: u64) -> Moment {
        Moment::from_start(Duration::from_millis(millis))
    }

    #[test]
    fn the_pause_budget_follows_what_the_target_takes_and_grows_with_time() {
        let mut tally = Tally::new(at(0), &Latencies::default());
        tally.copy_begins(at(0));
        tally.copy_succeeded(1_000_000, Copied { data: 1_000_000, ..Copied::default() });
        tally.copies_end(at(1000));
        assert_eq!(tally.pause_budget(Duration::ZERO), 4_000);
        assert_eq!(tally.pause_budget(Duration::from_millis(160)), 14_000);
        assert_eq!(tally.pause_budget(Duration::from_secs(1000)), 100_000);
    }

    #[test]
    fn len_is_what_is_done_and_what_is_left() {
        let mut tally = Tally::new(at(0), &Latencies::default());
        tally.copy_succeeded(10, Copied { data: 10, zeroed: 0, skipped: 0 });
        let standing = Standing {
            doubled: 5,
            left: 7,
            unscanned: 0,
            paused: false,
            write_blocking: true,
            waits_for_pace: false,
            degraded: None,
        };
        let figures = tally.tell(at(0), &standing, &Latencies::default());
        assert_eq!((figures.offset, figures.len, figures.dirty), (15, 22, 7));
        assert!(!figures.actively_synced);
    }
}
