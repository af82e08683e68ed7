//! [`Session`]: a mirror that has been started, followed to its end: progress, signals, and what to do when it is
//! ready.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::FutureExt;
use heliostat_block::job::{End, ErrorAction, Force, Job, JobEvent, JobStatus, Operation, Verb};
use heliostat_host::signal::Signals;

use super::ending;
use super::progress::{Look, Meter, Wanted};
use crate::daemon::{Daemon, Happening, Subscription};

/// How the job ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ended {
    /// The target has taken the source's place.
    Completed,
    /// The target is a consistent copy.
    Copied,
    /// It failed.
    Failed(String),
    /// It was cancelled.
    Cancelled,
}

/// What to do when the mirror is ready.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AtReady {
    /// The target takes the source's place.
    Complete,
    /// The target is left as a consistent copy.
    Copy,
    /// Nothing, until an operator or a signal says so.
    Wait,
}

/// A mirror that has been started.
pub struct Session {
    /// What it runs in.
    pub daemon: Arc<Daemon>,
    /// What has been said since before it was started.
    pub events: Subscription,
    /// Requests to end.
    pub signals: Signals,
    /// The job.
    pub job: Arc<Job>,
    /// When it was started.
    pub started: Instant,
    /// What to do when it is ready.
    pub at_ready: AtReady,
    /// Whether progress is wanted.
    pub wanted: Wanted,
    /// Where an operator can resume it.
    pub control: Option<PathBuf>,
    /// The last signal that came.
    pub signal: Option<u8>,
    /// An operator has told the program to end.
    pub quit: bool,
}

impl Session {
    /// Shows progress, says what must be said, and does what was asked for when the job is ready. Answers how it
    /// ended, and how long it took.
    pub fn follow(&mut self) -> (Ended, Duration) {
        let mut meter = Meter::start(self.job.id(), self.wanted);
        let ended = loop {
            while let Some(signal) = self.signals.take() {
                self.interrupted(ending::number(signal), &meter);
            }
            if !self.quit && self.daemon.quit_asked().now_or_never().is_some() {
                self.quit = true;
                let _ = self.job.ask(Verb::Cancel(Force::Hard));
            }
            let event = self.events.next(ending::LOOK_EVERY);
            meter.show(&Look::at(&self.job));
            let event = match event.as_ref().map(|event| &event.what) {
                Some(Happening::Job { id, event, .. }) if id == self.job.id() => event,
                _ => continue,
            };
            match event {
                JobEvent::Ready => self.ready(&meter),
                JobEvent::Error { .. } => meter.say(format_args!("mirror: {}", words_of_error(event))),
                JobEvent::Status(JobStatus::Paused | JobStatus::Standby) => meter.say(self.words_of_pause()),
                JobEvent::Completed(error) => {
                    break match (error, self.job.orders().end) {
                        (Some(error), _) => Ended::Failed(error.clone()),
                        (None, Some(End::Complete)) => Ended::Completed,
                        (None, _) => Ended::Copied,
                    };
                }
                JobEvent::Cancelled => break Ended::Cancelled,
                JobEvent::Degraded(Some(reason)) => {
                    meter.say(format!("mirror: degraded: {reason}; writes are remembered and copied later"));
                }
                JobEvent::Degraded(None) => meter.say("mirror: the target answers again"),
                JobEvent::Status(_) | JobEvent::Pending => {}
            }
        };
        (ended, self.started.elapsed())
    }

    fn ready(&self, meter: &Meter) {
        let verb = match self.at_ready {
            AtReady::Complete => Verb::Complete,
            AtReady::Copy => Verb::Cancel(Force::Soft),
            AtReady::Wait => {
                if self.wanted == Wanted::Yes {
                    meter.say("mirror: in step with the source; Ctrl-C ends it and leaves a consistent copy");
                }
                return;
            }
        };
        // Refused only when an operator or a signal was faster; then theirs holds.
        let _ = self.job.ask(verb);
    }

    /// Before READY the first signal cancels. In READY it ends with a consistent copy; where an end is under way
    /// already, the second one cancels.
    fn interrupted(&mut self, signal: u8, meter: &Meter) {
        let is_second = self.signal.replace(signal).is_some();
        let is_ready = matches!(self.job.status(), JobStatus::Ready | JobStatus::Standby);
        let is_ending = self.job.orders().end.is_some();
        let verb = match (is_ready && !is_second, is_ending) {
            (true, true) => {
                meter.say("heliostat: the mirror is ending; once more cancels it");
                return;
            }
            (true, false) => Verb::Cancel(Force::Soft),
            (false, _) => Verb::Cancel(Force::Hard),
        };
        // Refused only by a job that is ending already, or that is paused and cannot end in order.
        if self.job.ask(verb).is_err() {
            let _ = self.job.ask(Verb::Cancel(Force::Hard));
        }
    }

    fn words_of_pause(&self) -> String {
        let id = self.job.id();
        match &self.control {
            Some(control) => {
                format!(
                    "mirror: paused; `heliostat job resume {id} --control {}` lets it go on",
                    control.display()
                )
            }
            None => "mirror: paused, and nobody can resume it without --control; Ctrl-C ends it".to_owned(),
        }
    }
}

fn words_of_error(event: &JobEvent) -> String {
    let JobEvent::Error { operation, action, node, range, errno } = event else { return String::new() };
    let side = match operation {
        Operation::Read => "reading the source",
        Operation::Write => "writing the target",
    };
    let place = range.map_or_else(String::new, |range| format!(" at {range}"));
    let why =
        errno.map_or_else(String::new, |errno| format!(": {}", std::io::Error::from_raw_os_error(errno)));
    let next = match action {
        ErrorAction::Report => "",
        ErrorAction::Ignore => "; it will be tried again",
        ErrorAction::Stop => "; the mirror pauses",
    };
    format!("{side} (node {node}) failed{place}{why}{next}")
}
