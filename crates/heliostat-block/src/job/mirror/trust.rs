//! What a mirror believes of its target: what the looks ahead of the first pass find there, and what it does when the
//! target may have lost something. That is when a flush failed, or when a storage was cut off from its server and says
//! so by its count. Called by the loop.

use std::sync::atomic::Ordering;

use super::Mirror;
use crate::clock::Moment;
use crate::error::BlockError;
use crate::job::copy::CopyError;
use crate::job::mirror_step::Scan;
use crate::job::sample::{Comparable, Known};
use crate::job::scan::{Scanned, SyncMode};
use crate::job::{JobStatus, Operation};
use crate::limits::REST_FIRST;
use crate::planted::{Bug, is_planted};
use crate::range::ByteRange;

/// Whether the target still holds what was copied and flushed.
#[derive(Default)]
pub(super) struct Doubt {
    stage: Stage,
    look: Option<Look>,
}

/// What is to be compared.
#[derive(Default)]
enum Stage {
    /// Nothing: it is trusted.
    #[default]
    Settled,
    /// A sample, not before that moment.
    Due(Moment),
    /// What differed, once more, not before that moment: a guest's write may have been on its way.
    Again(Vec<ByteRange>, Moment),
}

/// A comparison that is on its way.
struct Look {
    is_second: bool,
    places: Vec<ByteRange>,
}

impl Doubt {
    /// Whether the target is not trusted.
    pub(super) const fn is_open(&self) -> bool {
        !matches!(self.stage, Stage::Settled) || self.look.is_some()
    }

    /// Whether a comparison is on its way.
    pub(super) const fn is_looking(&self) -> bool {
        self.look.is_some()
    }
}

impl Mirror {
    /// Compares what is in doubt, when it can.
    pub(super) async fn settle_doubt(&mut self) {
        let now = self.clock.now();
        // One that was resumed says so before it touches the target again.
        let is_paused =
            self.job.orders().paused || matches!(self.job.status(), JobStatus::Paused | JobStatus::Standby);
        let is_held = self.failure.is_some() || is_paused || self.rest.until(now).is_some();
        let is_over = self.job.status() == JobStatus::Aborting || self.job.orders().cancelled;
        if self.doubt.is_looking() || is_held || is_over {
            return;
        }
        let (places, is_second) = match std::mem::take(&mut self.doubt.stage) {
            Stage::Settled => return,
            Stage::Due(at) if at <= now => match self.comparable() {
                Comparable::Nothing => return,
                Comparable::NotNow => return self.doubt.stage = Stage::Due(now + REST_FIRST),
                Comparable::Places(places) => (places, false),
            },
            Stage::Again(places, at) if at <= now => (places, true),
            later => return self.doubt.stage = later,
        };
        self.doubt.look = Some(Look { is_second, places: places.clone() });
        let done = self.underway.sample(places).await;
        self.take_in(done);
    }

    fn comparable(&self) -> Comparable {
        let is_all = self.options.sync == SyncMode::Full && !self.route.lacks_backing();
        let known = if is_all { Known::Clean } else { Known::Copied };
        let dirty = self.doubling.bitmap();
        self.copied.comparable(dirty, self.unscanned_from(), known, |place| self.doubling.is_still(place))
    }

    pub(super) fn take_in_sample(&mut self, stint: u64, sampled: Result<Vec<ByteRange>, CopyError>) {
        let Some(Look { is_second, places }) = self.doubt.look.take() else { return };
        let now = self.clock.now();
        let mut differing = match sampled {
            Ok(differing) => differing,
            Err((operation, error)) => {
                self.doubt.stage = Stage::Due(now);
                return self.meet_error(stint, operation, &error);
            }
        };
        // A loss that came meanwhile asks for another sample, whatever this one says.
        if matches!(self.doubt.stage, Stage::Due(_)) {
            return;
        }
        differing.retain(|place| self.doubling.is_still(*place));
        if differing.is_empty() {
            // Places that were written meanwhile have told nothing: if all were, all is as open as before.
            if !places.iter().any(|place| self.doubling.is_still(*place)) {
                self.doubt.stage = Stage::Due(now + REST_FIRST);
            }
            return;
        }
        if !is_second {
            self.doubt.stage = Stage::Again(differing, now + REST_FIRST);
            return;
        }
        // It is another one, or an older one. Everything is copied, whatever the first pass was to copy: what it left out
        // and what it had copied once cannot be told apart any more.
        self.doubling.bitmap().mark_all();
        self.first_pass_over = false;
        self.cursor = 0;
        self.attempt.restart(now);
        self.tally.phase_begins();
    }

    pub(super) fn take_in_scan(&mut self, scanned: &Scanned) {
        self.scan = Scan::Ahead;
        if std::mem::take(&mut self.scans_in_vain) {
            return;
        }
        for range in &scanned.dirty {
            self.doubling.bitmap().mark(*range);
        }
        self.scanned_to = scanned.range.end();
        if self.scanned_to >= self.route.source.size() {
            self.scan = Scan::Over;
            self.cursor = 0;
            self.attempt.restart(self.clock.now());
            self.tally.phase_begins();
        }
    }

    pub(super) fn take_in_failed_flush(&mut self, stint: u64, error: &BlockError) {
        self.unflushed.flush_failed(self.doubling.bitmap());
        self.attempt.flush_ended(false);
        self.distrust_target();
        self.meet_error(stint, Operation::Write, error);
    }

    /// Looks whether the target may have lost what was not flushed, as [`crate::storage::Storage::losses`] says; all of
    /// that is dirty again then. It is no error of the job: requests that fail say so themselves.
    pub(super) fn heed_losses(&mut self) {
        let losses = self.route.target.losses();
        if losses == self.losses || is_planted(Bug::LossNotHeeded) {
            return;
        }
        self.losses = losses;
        self.unflushed.lose(self.doubling.bitmap());
        self.blocked = false;
        self.attempt.retry();
        self.distrust_target();
        self.doubt.stage = Stage::Due(self.clock.now());
    }

    /// Believes nothing any more that the target says of itself.
    fn distrust_target(&mut self) {
        self.route.trust_target.store(false, Ordering::Relaxed);
        if !self.unflushed.has_succeeded() && self.options.sync.scans() {
            // What the target showed as zero was perhaps never durable: looks again.
            if self.scan == Scan::Running {
                self.scans_in_vain = true;
            } else {
                self.scan = Scan::Ahead;
            }
            self.scanned_to = 0;
            self.first_pass_over = false;
        }
    }
}
