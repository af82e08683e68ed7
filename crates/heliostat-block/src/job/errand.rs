//! A job that is one piece of work with an end of its own: what it says on the way. The work is its caller's.

use std::sync::Arc;

use super::{Figures, Job, JobEvent, JobStatus};

/// Does `work` as the job that has been started, and concludes it as that came out. Work that has begun is finished:
/// a cancel is heard when it is done.
///
/// # Cancel safety
/// Dropped, the job stays as it is for ever: run it to its end.
pub async fn run(job: &Arc<Job>, work: impl Future<Output = Result<(), String>>) {
    job.tell_figures(Figures { len: 1, ..Figures::default() });
    let done = work.await;
    job.tell_figures(Figures { offset: 1, len: 1, ..Figures::default() });
    let is_kept = job.commit();
    if is_kept && done.is_ok() {
        job.become_status(JobStatus::Waiting);
        job.become_status(JobStatus::Pending);
    } else {
        job.become_status(JobStatus::Aborting);
    }
    match (is_kept, done) {
        (false, Ok(())) => job.conclude(JobEvent::Cancelled),
        (_, done) => job.conclude(JobEvent::Completed(done.err())),
    }
}
