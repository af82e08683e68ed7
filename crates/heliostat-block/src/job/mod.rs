//! [`Job`]: long-running work on nodes, as an operator sees and steers it.
//!
//! Statuses, verbs and which goes with which stand here, as tables (QMP.md 1.2). A job's work is elsewhere
//! (`mirror`); it reads its [`Orders`] here and says here what it has become. Nothing here does I/O.

pub(crate) mod copy;
pub mod doubling;
pub mod mirror;
pub(crate) mod mirror_step;
pub mod progress;
pub(crate) mod range_table;
pub(crate) mod rate;
pub mod scan;
pub(crate) mod unflushed;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use event_listener::{Event, EventListener};

use crate::range::ByteRange;
use progress::{Rates, TimeLeft};

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
}

/// How a mirror is to end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// The target takes the source's place.
    Complete,
    /// The target is left as a consistent copy.
    Copy,
}

/// What the operator wants at this moment. The job looks at it before each step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Orders {
    /// Hold.
    pub paused: bool,
    /// Stop at once.
    pub cancelled: bool,
    /// End, and how.
    pub end: Option<End>,
    /// `finalize` was said, or need not be.
    pub finalize: bool,
    /// Bytes a second; 0 is no limit.
    pub speed: u64,
    /// The copy mode.
    pub copy_mode: CopyMode,
}

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
        }
    }
}

/// Settings that do not change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct JobOptions {
    /// Whether it ends by itself when it may.
    pub auto_finalize: bool,
    /// Whether it is forgotten by itself when it has ended.
    pub auto_dismiss: bool,
    /// The first limit, in bytes a second; 0 is none.
    pub speed: u64,
    /// The first copy mode.
    pub copy_mode: CopyMode,
}

impl Default for JobOptions {
    fn default() -> Self {
        Self { auto_finalize: true, auto_dismiss: true, speed: 0, copy_mode: CopyMode::Background }
    }
}

/// Hears what jobs say. Called on the job's thread, in order, without a lock; must not block.
pub type Observer = Arc<dyn Fn(&Job, &JobEvent) + Send + Sync>;

/// An operator's handle on a job, and the job's own notice board.
pub struct Job {
    id: String,
    options: JobOptions,
    observer: Observer,
    /// Held for a look or a change, never while the observer is called.
    state: Mutex<State>,
    changed: Event,
}

struct State {
    status: JobStatus,
    orders: Orders,
    io_status: IoStatus,
    error: Option<String>,
    figures: Figures,
    /// `BLOCK_JOB_COMPLETED` or `_CANCELLED` has been said.
    ended: bool,
}

impl Job {
    /// Makes a job, and says that it is created and running.
    #[must_use]
    pub fn start(id: String, options: JobOptions, observer: Observer) -> Arc<Self> {
        let orders = Orders {
            paused: false,
            cancelled: false,
            end: None,
            finalize: options.auto_finalize,
            speed: options.speed,
            copy_mode: options.copy_mode,
        };
        let state = State {
            status: JobStatus::Created,
            orders,
            io_status: IoStatus::Ok,
            error: None,
            figures: Figures::default(),
            ended: false,
        };
        let job = Arc::new(Self { id, options, observer, state: Mutex::new(state), changed: Event::new() });
        job.say(&JobEvent::Status(JobStatus::Created));
        job.become_status(JobStatus::Running);
        job
    }

    /// Its id.
    #[must_use]
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Its settings.
    #[must_use]
    pub const fn options(&self) -> JobOptions {
        self.options
    }

    /// Its status.
    #[must_use]
    pub fn status(&self) -> JobStatus {
        self.state().status
    }

    /// What is wanted of it.
    #[must_use]
    pub fn orders(&self) -> Orders {
        self.state().orders
    }

    /// Its figures as it last told them.
    #[must_use]
    pub fn figures(&self) -> Figures {
        self.state().figures.clone()
    }

    /// Whether an error holds it up.
    #[must_use]
    pub fn io_status(&self) -> IoStatus {
        self.state().io_status
    }

    /// Why it failed.
    #[must_use]
    pub fn error(&self) -> Option<String> {
        self.state().error.clone()
    }

    /// Says whether queries still list it: not once its end has been said, unless it waits for `dismiss`.
    #[must_use]
    pub fn is_listed(&self) -> bool {
        let state = self.state();
        state.status != JobStatus::Null && !(state.ended && self.options.auto_dismiss)
    }

    /// Waits until orders or status change.
    #[must_use]
    pub fn listen(&self) -> EventListener {
        self.changed.listen()
    }

    /// Asks something of the job. Returns when it is accepted, not when it is done.
    ///
    /// # Errors
    /// [`VerbError`] when the status or an earlier verb does not allow it; nothing has changed then.
    pub fn ask(&self, verb: Verb) -> Result<(), VerbError> {
        let dismissed = {
            let mut state = self.state();
            state.accept(verb)?;
            verb == Verb::Dismiss
        };
        if dismissed {
            self.become_status(JobStatus::Null);
        }
        self.changed.notify(usize::MAX);
        Ok(())
    }

    // ------------------------------------------------------------------ the job's own side

    /// Takes on a status and says so; nothing when it has it already.
    pub(crate) fn become_status(&self, status: JobStatus) {
        {
            let mut state = self.state();
            if state.status == status {
                return;
            }
            assert!(may_become(state.status, status), "no way from {:?} to {status:?}", state.status);
            state.status = status;
        }
        self.changed.notify(usize::MAX);
        self.say(&JobEvent::Status(status));
    }

    pub(crate) fn say(&self, event: &JobEvent) {
        (self.observer)(self, event);
    }

    pub(crate) fn tell_figures(&self, figures: Figures) {
        self.state().figures = figures;
    }

    /// Holds the job because of an error; the first error's status stays.
    pub(crate) fn stop_for_error(&self, no_space: bool) {
        let mut state = self.state();
        state.orders.paused = true;
        if state.io_status == IoStatus::Ok {
            state.io_status = if no_space { IoStatus::NoSpace } else { IoStatus::Failed };
        }
    }

    /// Takes back a `finalize` that failed.
    pub(crate) fn withdraw_finalize(&self) {
        let mut state = self.state();
        state.orders.finalize = self.options.auto_finalize;
    }

    /// Says the end, with the last figures, and concludes.
    pub(crate) fn conclude(&self, event: JobEvent) {
        {
            let mut state = self.state();
            state.ended = true;
            state.error = match &event {
                JobEvent::Completed(error) => error.clone(),
                _ => Some("Operation canceled".to_owned()),
            };
        }
        self.say(&event);
        self.become_status(JobStatus::Concluded);
        if self.options.auto_dismiss {
            self.become_status(JobStatus::Null);
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn accept(&mut self, verb: Verb) -> Result<(), VerbError> {
        // "Not paused" is said before "not now" (QMP.md 1.3).
        if verb == Verb::Resume && !self.orders.paused {
            return Err(VerbError::NotPaused);
        }
        if !allows(self.status, verb) {
            return Err(VerbError::Status(self.status));
        }
        let ready = matches!(self.status, JobStatus::Ready | JobStatus::Standby);
        match verb {
            Verb::Pause if self.orders.paused => return Err(VerbError::AlreadyPaused),
            Verb::Pause => self.orders.paused = true,
            Verb::Resume => {
                self.orders.paused = false;
                self.io_status = IoStatus::Ok;
            }
            Verb::SetSpeed(speed) => self.orders.speed = speed,
            Verb::Complete if self.orders.end == Some(End::Copy) => return Err(VerbError::CannotComplete),
            Verb::Complete => self.orders.end = Some(End::Complete),
            Verb::Cancel(Force::Soft) if self.orders.paused => return Err(VerbError::CurrentlyPaused),
            Verb::Cancel(Force::Soft) if ready => self.orders.end = Some(End::Copy),
            Verb::Cancel(_) => {
                self.orders.cancelled = true;
                self.orders.paused = false;
            }
            Verb::Finalize => self.orders.finalize = true,
            Verb::Dismiss => {}
            Verb::Change(copy_mode) => self.orders.copy_mode = copy_mode,
        }
        Ok(())
    }
}

/// Which verbs a status takes (QMP.md 1.2).
#[must_use]
pub const fn allows(status: JobStatus, verb: Verb) -> bool {
    use JobStatus::{Concluded, Created, Paused, Pending, Ready, Running, Standby, Waiting};
    match verb {
        Verb::Cancel(_) => {
            matches!(status, Created | Running | Paused | Ready | Standby | Waiting | Pending)
        }
        Verb::Pause | Verb::Resume | Verb::SetSpeed(_) | Verb::Change(_) => {
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
