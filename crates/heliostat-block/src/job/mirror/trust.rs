//! What a mirror believes of its target: what the looks ahead of the first pass find there, and what it does when the
//! target may have lost something. That is when a flush failed, or when a storage was cut off from its server and says
//! so by its count. Called by the loop.

use std::sync::atomic::Ordering;

use super::Mirror;
use crate::error::BlockError;
use crate::job::Operation;
use crate::job::mirror_step::Scan;
use crate::job::scan::Scanned;
use crate::planted::{Bug, is_planted};

impl Mirror {
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

    pub(super) fn take_in_failed_flush(&mut self, error: &BlockError) {
        self.unflushed.flush_failed(self.doubling.bitmap());
        self.attempt.flush_ended(false);
        self.distrust_target();
        self.meet_error(Operation::Write, error);
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
