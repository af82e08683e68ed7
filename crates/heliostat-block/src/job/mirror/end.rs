//! What a mirror has to do with a named bitmap, and how it ends: the pivot, the copy that is left behind, the abort. Called by the loop, when everything that it
//! needs is so.

use std::sync::Arc;

use super::Mirror;
use crate::clock::Clock;
use crate::job::by_bitmap::ByBitmap;
use crate::job::group::Member;
use crate::job::mirror_step::Scan;
use crate::job::scan::SyncMode;
use crate::job::{End, JobEvent, JobStatus};
use crate::limits::PAUSE_LAST;
use crate::node::Node;
use crate::planted::{Bug, is_planted};
use crate::range::ByteRange;
use crate::tracked::Drained;

/// Puts the target in the place of the node that is to be replaced: of the source, or of one to which the source passes
/// its requests on. Called once, when that is drained and all above it, everything is copied and flushed, and nothing is
/// on its way to the target. Must not block. An error fails the job, with the node in its place: so nothing may have
/// changed then.
pub type Succession = Box<dyn FnOnce(&Drained, &Arc<Node>) -> Result<(), String> + Send>;

impl Mirror {
    /// Lets it copy by a named bitmap of the source, or keep that up to date, or both: see [`crate::job::by_bitmap`].
    #[must_use]
    pub fn with_bitmap(mut self, by_bitmap: ByBitmap) -> Self {
        if self.options.sync == SyncMode::Bitmap {
            by_bitmap.add_to(&self.route.source, self.doubling.bitmap());
        }
        self.by_bitmap = Some(by_bitmap);
        self
    }

    /// Lets it end together with the others of its group.
    #[must_use]
    pub fn with_group(mut self, member: Member) -> Self {
        self.member = Some(member);
        self
    }

    /// What lies behind has not been looked at.
    pub(super) fn unscanned_from(&self) -> u64 {
        if self.scan == Scan::Over { self.route.source.size() } else { self.scanned_to }
    }

    /// Whether no verb stands in the way of the end, nor can any more.
    pub(super) fn may_end(&self, end: End) -> bool {
        (self.job.status() == JobStatus::Pending || self.job.leave_ready(end)) && self.job.commit()
    }

    /// Lets the target take the place of the last of `below` instead of the source's. These are the nodes through which
    /// the source's requests go, from the top down; each passes them on as they are, and its bytes are the source's.
    #[must_use]
    pub fn with_replaced(mut self, below: Vec<Arc<Node>>) -> Self {
        self.gate.replace(below);
        self
    }

    pub(super) async fn close_below(&mut self) {
        if !self.gate.close_below(&*self.clock).await {
            self.open_gate();
            self.member.iter().for_each(Member::open);
        }
    }

    pub(super) fn pivot(&mut self) -> Result<(), String> {
        // From here on nobody may write the target but whoever gets it.
        self.doubling.close();
        let Some((source, drained)) = self.gate.drained() else { return Ok(()) };
        // First: a bitmap that is on the target hears of what guests write there.
        let named = self.by_bitmap.take().map(|mut named| (named.succeed(source.node()), named));
        let pivoted = match self.succession.take() {
            Some(succession) => succession(drained, &self.route.target),
            None => {
                self.graph.pivot(drained, &self.route.target);
                Ok(())
            }
        };
        let named = named.filter(|_| !is_planted(Bug::BitmapNotTakenBack));
        if let (Err(_), Some((Some(old), named))) = (&pivoted, named) {
            named.take_back(source.node(), &old);
        }
        if pivoted.is_err() && is_planted(Bug::GateLeftClosed) {
            self.gate.lose();
        }
        pivoted
    }

    pub(super) fn end(mut self) -> JobEvent {
        self.route.source.detach_doubling();
        self.doubling.close();
        if let Some(mut named) = self.by_bitmap.take() {
            named.succeed(&self.route.source);
        }
        self.open_gate();
        self.tell_figures(true);
        JobEvent::Completed(None)
    }

    /// Gives up: nothing more is launched, and what is on its way must end.
    pub(super) fn abort(&mut self) {
        self.job.become_status(JobStatus::Aborting);
        self.member.iter().for_each(Member::fail);
        self.by_bitmap.iter_mut().for_each(|by_bitmap| by_bitmap.abort(&self.route.source));
        self.route.source.detach_doubling();
        self.doubling.close();
        self.hurry = self.route.give_up();
    }

    /// What came to the target after it was given up, as a request that was on its way there, is not waited for either.
    pub(super) fn give_up_again(&self) {
        if self.job.status() == JobStatus::Aborting && !self.underway.is_idle() {
            self.route.target.give_up();
        }
    }

    pub(super) fn open_gate(&mut self) {
        self.attempt.retry();
        let pause = self.gate.reopen(self.clock.now());
        self.tally.paused_guests_for(pause);
    }

    pub(super) fn end_aborted(mut self) -> JobEvent {
        self.tell_figures(true);
        if let Some(mut named) = self.by_bitmap.take() {
            let dirty = self.doubling.bitmap();
            dirty.mark(ByteRange::from_bounds(self.unscanned_from(), dirty.size()));
            self.unflushed.flush_failed(dirty);
            named.fail(&self.route.source, dirty, self.options.sync == SyncMode::Bitmap);
        }
        match self.failure.take() {
            // Cancelled while it was held: it says so, and its error is what it had met.
            Some(failure) if self.job.orders().cancelled => {
                self.job.keep_failure(failure);
                JobEvent::Cancelled
            }
            Some(failure) => JobEvent::Completed(Some(failure)),
            None => JobEvent::Cancelled,
        }
    }
}

/// Does nothing, but where a test breaks the rule that a bitmap is cleared behind the closed gate.
pub(super) struct Late(Option<(Arc<Node>, String, Arc<dyn Clock>)>);

impl Late {
    pub(super) fn of(mirror: &Mirror) -> Self {
        let is_due = is_planted(Bug::BitmapClearedLate);
        let named = mirror.by_bitmap.as_ref().filter(|_| is_due);
        Self(named.map(|named| {
            (Arc::clone(&mirror.route.source), named.name().to_owned(), Arc::clone(&mirror.clock))
        }))
    }

    pub(super) async fn clear(self) {
        let Some((source, name, clock)) = self.0 else { return };
        clock.sleep_until(clock.now() + PAUSE_LAST).await;
        if let Some(bits) = source.named_bitmap(&name).and_then(|bitmap| bitmap.bits) {
            bits.clear(source.range());
        }
    }
}
