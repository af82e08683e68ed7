//! What a job can be, what can be asked of it, and what it says: closed sets, and the two tables that say which
//! goes with which (QMP.md 1.2). Pure.

use std::time::Duration;

use crate::range::ByteRange;

/// What has become of a job (QMP.md 1.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum JobStatus {
    /// Made, not running.
    Created,
    /// Working towards READY.
    Running,
    /// Paused while running.
    Paused,
    /// In step with the source; takes `complete`.
    Ready,
    /// Paused while ready.
    Standby,
    /// Its work is done; waits for its turn to end.
    Waiting,
    /// Waits for `finalize`.
    Pending,
    /// On its way to a failed or cancelled end.
    Aborting,
    /// Ended; waits for `dismiss`.
    Concluded,
    /// Gone.
    Null,
}

impl JobStatus {
    /// What it is called everywhere: in QMP, on the command line, in JSON (QMP.md 1.2).
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Created => "created",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Ready => "ready",
            Self::Standby => "standby",
            Self::Waiting => "waiting",
            Self::Pending => "pending",
            Self::Aborting => "aborting",
            Self::Concluded => "concluded",
            Self::Null => "null",
        }
    }
}

/// What an operator asks of a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verb {
    /// Stop copying for a while.
    Pause,
    /// Go on.
    Resume,
    /// Change the limit, in bytes a second; 0 is none.
    SetSpeed(u64),
    /// Let the target take the source's place.
    Complete,
    /// End without that; before READY or with force, at once.
    Cancel(Force),
    /// End now, where the job was told to wait.
    Finalize,
    /// Forget a job that has ended.
    Dismiss,
    /// Change the copy mode.
    Change(CopyMode),
    /// Change how long guests wait for the target's half of their writes.
    SetDeadline(Duration),
}

/// Whether a cancel in READY brings the copy to a consistent end first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Force {
    /// The target becomes a consistent copy, and the job ends successfully.
    Soft,
    /// The job is cancelled; the target promises nothing.
    Hard,
}

/// What happens to a write while it is mirrored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CopyMode {
    /// It goes to the source and is copied later.
    Background,
    /// It goes to both sides before the guest is answered.
    WriteBlocking,
}

/// What to do about an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnError {
    /// The job fails.
    Report,
    /// The range is tried again, after a while.
    Ignore,
    /// The job pauses until it is resumed.
    Stop,
    /// `Stop` for no space, else `Report`.
    Enospc,
    /// As `Enospc`.
    Auto,
}

/// What was done about an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorAction {
    /// The job fails.
    Report,
    /// The range will be tried again.
    Ignore,
    /// The job pauses.
    Stop,
}

impl OnError {
    /// What to do, given whether space has run out.
    #[must_use]
    pub const fn action(self, no_space: bool) -> ErrorAction {
        match (self, no_space) {
            (Self::Report, _) | (Self::Enospc | Self::Auto, false) => ErrorAction::Report,
            (Self::Stop, _) | (Self::Enospc | Self::Auto, true) => ErrorAction::Stop,
            (Self::Ignore, _) => ErrorAction::Ignore,
        }
    }
}

/// Which side of a copy failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// Reading the source.
    Read,
    /// Writing the target, or flushing it.
    Write,
}

/// Whether a job is held up by an error (QMP.md 1.8). Keeps the first error until resumed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IoStatus {
    /// It is not.
    Ok,
    /// By any error but the next.
    Failed,
    /// By lack of space.
    NoSpace,
}

/// What a job says, in the order in which it happens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum JobEvent {
    /// Its status has changed.
    Status(JobStatus),
    /// The target is in step.
    Ready,
    /// It waits for `finalize`.
    Pending,
    /// It has ended, with the reason where it failed.
    Completed(Option<String>),
    /// It was cancelled.
    Cancelled,
    /// The target does not answer, for the reason; or does so again.
    Degraded(Option<String>),
    /// A copy or a flush failed.
    Error {
        /// On which side.
        operation: Operation,
        /// What is done about it.
        action: ErrorAction,
        /// The node that failed.
        node: String,
        /// Where; `None` for a flush.
        range: Option<ByteRange>,
        /// The host's error number, where one is known.
        errno: Option<i32>,
    },
}

/// Why a verb is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum VerbError {
    /// The status does not allow it.
    #[error("status {0:?} does not allow it")]
    Status(JobStatus),
    /// It is paused already.
    #[error("Job is already paused")]
    AlreadyPaused,
    /// It is not paused.
    #[error("Can't resume a job that was not paused")]
    NotPaused,
    /// A soft cancel of a paused job could not end.
    #[error("the job is currently paused")]
    CurrentlyPaused,
    /// It is being cancelled softly.
    #[error("the active job cannot be completed")]
    CannotComplete,
    /// Another of its group refuses.
    #[error("job '{job}' of the same group: {error}")]
    Other {
        /// The other's id.
        job: String,
        /// Why.
        error: Box<VerbError>,
    },
}

/// How a mirror is to end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// The target takes the source's place.
    Complete,
    /// The target is left as a consistent copy.
    Copy,
}

/// Which verbs a status takes (QMP.md 1.2).
#[must_use]
pub const fn allows(status: JobStatus, verb: Verb) -> bool {
    use JobStatus::{Concluded, Created, Paused, Pending, Ready, Running, Standby, Waiting};
    match verb {
        Verb::Cancel(_) => {
            matches!(status, Created | Running | Paused | Ready | Standby | Waiting | Pending)
        }
        Verb::Pause | Verb::Resume | Verb::SetSpeed(_) | Verb::Change(_) | Verb::SetDeadline(_) => {
            matches!(status, Created | Running | Paused | Ready | Standby)
        }
        Verb::Complete => matches!(status, Ready | Standby),
        Verb::Finalize => matches!(status, Pending),
        Verb::Dismiss => matches!(status, Concluded),
    }
}

/// Which status may follow which (QMP.md 1.2).
#[must_use]
pub const fn may_become(from: JobStatus, to: JobStatus) -> bool {
    use JobStatus::{Aborting, Concluded, Created, Null, Paused, Pending, Ready, Running, Standby, Waiting};
    match from {
        Created => matches!(to, Running | Aborting | Null),
        Running => matches!(to, Paused | Ready | Waiting | Aborting),
        Paused => matches!(to, Running),
        Ready => matches!(to, Standby | Waiting | Aborting),
        Standby => matches!(to, Ready),
        Waiting => matches!(to, Pending | Aborting),
        Pending => matches!(to, Aborting | Concluded),
        Aborting => matches!(to, Concluded),
        Concluded => matches!(to, Null),
        Null => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: [JobStatus; 10] = [
        JobStatus::Created,
        JobStatus::Running,
        JobStatus::Paused,
        JobStatus::Ready,
        JobStatus::Standby,
        JobStatus::Waiting,
        JobStatus::Pending,
        JobStatus::Aborting,
        JobStatus::Concluded,
        JobStatus::Null,
    ];

    /// One row a verb, one column a status, as the table in QMP.md 1.2 has it.
    #[test]
    fn verbs_are_taken_as_the_table_says() {
        let row =
            |verb| ALL.map(|status| if allows(status, verb) { 'y' } else { '-' }).iter().collect::<String>();
        assert_eq!(row(Verb::Cancel(Force::Soft)), "yyyyyyy---");
        assert_eq!(row(Verb::Cancel(Force::Hard)), "yyyyyyy---");
        for verb in [Verb::Pause, Verb::Resume, Verb::SetSpeed(0), Verb::Change(CopyMode::Background)] {
            assert_eq!(row(verb), "yyyyy-----", "{verb:?}");
        }
        assert_eq!(row(Verb::Complete), "---yy-----");
        assert_eq!(row(Verb::Finalize), "------y---");
        assert_eq!(row(Verb::Dismiss), "--------y-");
    }

    #[test]
    fn no_status_follows_itself_and_none_follows_null() {
        for from in ALL {
            assert!(!may_become(from, from));
            assert!(!may_become(JobStatus::Null, from));
        }
    }

    #[test]
    fn policies_tell_no_space_apart() {
        use ErrorAction::{Ignore, Report, Stop};
        let table = [
            (OnError::Report, Report, Report),
            (OnError::Ignore, Ignore, Ignore),
            (OnError::Stop, Stop, Stop),
            (OnError::Enospc, Report, Stop),
            (OnError::Auto, Report, Stop),
        ];
        for (policy, other, no_space) in table {
            assert_eq!((policy.action(false), policy.action(true)), (other, no_space), "{policy:?}");
        }
    }
}
