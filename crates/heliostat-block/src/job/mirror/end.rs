//! How a mirror ends: the pivot, the copy that is left behind, the abort. Called by the loop, when everything that it
//! needs is so.

use std::sync::Arc;

use super::Mirror;
use crate::job::{End, JobEvent, JobStatus};
use crate::node::Node;
use crate::tracked::Drained;

/// Puts the target in the source's place. Called once, when the source is drained, everything is copied and flushed,
/// and nothing is on its way to the target. Must not block. An error fails the job, with the source in its place: so
/// nothing may have changed then.
pub type Succession = Box<dyn FnOnce(&Drained, &Arc<Node>) -> Result<(), String> + Send>;

impl Mirror {
    /// Whether no verb stands in the way of the end, nor can any more.
    pub(super) fn may_end(&self, end: End) -> bool {
        (self.job.status() == JobStatus::Pending || self.job.leave_ready(end)) && self.job.commit()
    }

    pub(super) fn pivot(&mut self) -> Result<(), String> {
        // From here on nobody may write the target but whoever gets it.
        self.doubling.close();
        let Some(drained) = self.gate.drained() else { return Ok(()) };
        match self.succession.take() {
            Some(succession) => succession(drained, &self.route.target),
            None => {
                self.graph.pivot(drained, &self.route.target);
                Ok(())
            }
        }
    }

    pub(super) fn end(mut self) -> JobEvent {
        self.route.source.detach_doubling();
        self.doubling.close();
        self.open_gate();
        self.tell_figures(true);
        JobEvent::Completed(None)
    }

    pub(super) fn end_aborted(mut self) -> JobEvent {
        self.tell_figures(true);
        self.failure.take().map_or(JobEvent::Cancelled, |failure| JobEvent::Completed(Some(failure)))
    }
}
