//! The jobs of a daemon: which there are, newest first, and the threads that they run on.

use std::sync::{Arc, MutexGuard, PoisonError, Weak};

use event_listener::Listener;
use heliostat_block::job::{End, Force, Job, JobStatus, Observer, Verb, VerbError, allows};
use heliostat_block::limits::JOBS_MAX;
use heliostat_block::node::Node;
use heliostat_host::runtime::Thread;

use super::events::Happening;
use super::nodes::NODES_MAX;
use super::{Daemon, DaemonError};

/// What a job does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum JobKind {
    /// Mirrors a node.
    Mirror,
    /// Makes an image. No block job: it has no node, no speed, and only statuses to tell of.
    Create,
}

impl JobKind {
    /// QEMU's name of it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Mirror => "mirror",
            Self::Create => "create",
        }
    }
}

/// A job, and what it works on.
#[derive(Clone)]
pub struct JobEntry {
    /// The operator's handle.
    pub job: Arc<Job>,
    /// What it does.
    pub kind: JobKind,
    /// The name of the node that is mirrored.
    pub source: String,
    /// The name of the node that it is mirrored to.
    pub target: String,
    /// A node's name that is kept free as long as the job lives.
    pub filter_node_name: Option<String>,
    /// A target that is to stand on what its image names: opened when the job is asked to complete.
    /// It is not held: its file is somebody else's as soon as the job has said its end.
    pub(super) opens_at_end: Option<Weak<Node>>,
}

impl JobEntry {
    /// Asks something of the job, as [`Daemon::ask_job`], which opens what has to be open before. Of a job that is dismissed the last word has been said when
    /// this returns, by this thread: clients hear it before they are answered.
    ///
    /// # Errors
    /// As [`Job::ask`].
    fn ask(&self, verb: Verb) -> Result<(), VerbError> {
        if verb == Verb::Dismiss {
            // Whoever is in the middle of saying that it has concluded would say the rest too.
            wait_until_silent(&self.job);
        }
        self.job.ask(verb)
    }
}

/// Waits until a job has said all that there is to say, which takes as long as telling those who listen.
fn wait_until_silent(job: &Job) {
    loop {
        let changed = job.listen();
        if job.has_said_all() {
            return;
        }
        changed.wait();
    }
}

/// The jobs, oldest first.
#[derive(Default)]
pub(super) struct Jobs {
    list: Vec<Running>,
}

struct Running {
    entry: JobEntry,
    /// `None` once it has been joined.
    thread: Option<Thread<()>>,
}

impl Jobs {
    /// Lets go of what has ended and been dismissed.
    fn prune(&mut self) {
        let has_ended = |thread: &Option<Thread<()>>| thread.as_ref().is_none_or(Thread::is_finished);
        self.list
            .retain(|running| running.entry.job.status() != JobStatus::Null || !has_ended(&running.thread));
    }
}

impl Daemon {
    /// The jobs that are listed, newest first.
    #[must_use]
    pub fn jobs(&self) -> Vec<JobEntry> {
        let mut jobs = self.lock_jobs();
        jobs.prune();
        let entries = jobs.list.iter().rev().map(|running| &running.entry);
        entries.filter(|entry| entry.job.is_listed()).cloned().collect()
    }

    /// The job of that id.
    #[must_use]
    pub fn job(&self, id: &str) -> Option<JobEntry> {
        self.jobs().into_iter().find(|entry| entry.job.id() == id)
    }

    /// Asks something of a job. What a target is to stand on is opened before it is told to complete: where that
    /// cannot be had, the job goes on as it was.
    ///
    /// # Errors
    /// `Verb`, as [`Job::ask`] says it; `Backing`.
    pub fn ask_job(&self, entry: &JobEntry, verb: Verb) -> Result<(), DaemonError> {
        let target = entry.opens_at_end.as_ref().and_then(Weak::upgrade);
        if let Some(target) = target.filter(|_| verb == Verb::Complete) {
            // Looked at once: a job that becomes ready between two looks must not be told without its chain.
            let status = entry.job.status();
            if !allows(status, verb) {
                return Err(VerbError::Status(status).into());
            }
            if entry.job.orders().end != Some(End::Copy) {
                let _change = self.begin_change()?;
                self.open_beneath(&target)?;
            }
        }
        Ok(entry.ask(verb)?)
    }

    pub(super) fn check_new_job(&self, id: &str) -> Result<(), DaemonError> {
        if self.job(id).is_some() {
            return Err(DaemonError::JobExists(id.to_owned()));
        }
        self.wait_for_last_words(id);
        self.check_room_for_jobs(0)
    }

    /// Refuses one job more beside those that are there and `coming`.
    pub(super) fn check_room_for_jobs(&self, coming: usize) -> Result<(), DaemonError> {
        if self.lock_jobs().list.len() + coming >= JOBS_MAX {
            return Err(DaemonError::TooMany { what: "jobs", limit: JOBS_MAX });
        }
        Ok(())
    }

    /// Waits until a job of that id that has ended has said so to the last: what it says must not come between
    /// the words of a new one. It is about to, and waits for nobody.
    fn wait_for_last_words(&self, id: &str) {
        let is_over = |entry: &&JobEntry| entry.job.id() == id && !entry.job.is_listed();
        let over: Vec<_> = {
            let jobs = self.lock_jobs();
            jobs.list.iter().map(|running| &running.entry).filter(is_over).cloned().collect()
        };
        over.iter().for_each(|entry| wait_until_silent(&entry.job));
    }

    /// Says whether no new node may be called that.
    pub(super) fn is_taken(&self, name: &str) -> bool {
        self.graph.node(name).is_ok() || self.is_filter_name(name)
    }

    /// Refuses `coming` nodes more beside those that are there.
    pub(super) fn check_room_for_nodes(&self, coming: usize) -> Result<(), DaemonError> {
        if self.nodes().len() + coming > NODES_MAX {
            return Err(DaemonError::TooMany { what: "nodes", limit: NODES_MAX });
        }
        Ok(())
    }

    pub(super) fn is_filter_name(&self, name: &str) -> bool {
        self.jobs().iter().any(|entry| entry.filter_node_name.as_deref() == Some(name))
    }

    pub(super) fn keep_job(&self, entry: JobEntry, thread: Thread<()>) {
        self.lock_jobs().list.push(Running { entry, thread: Some(thread) });
    }

    /// Says what jobs say to everybody who listens.
    pub(super) fn job_observer(&self) -> Observer {
        let events = Arc::clone(&self.events);
        Arc::new(move |job, event| {
            let figures = job.figures();
            events.say(Happening::Job {
                id: job.id().to_owned(),
                event: event.clone(),
                offset: figures.offset,
                len: figures.len,
                pause: figures.pause,
                speed: job.orders().speed,
            });
        })
    }

    /// Cancels every job, waits until all have ended, and dismisses those that wait for that: their last word is said.
    pub(super) fn end_jobs(&self) {
        for running in &self.lock_jobs().list {
            // Refused only by a job that is ending already.
            let _ = running.entry.job.ask(Verb::Cancel(Force::Hard));
        }
        loop {
            // Joined without the lock: what waits is asked about meanwhile.
            let next = self.lock_jobs().list.iter_mut().find_map(|running| running.thread.take());
            match next {
                Some(thread) => thread.join(),
                None => break,
            }
        }
        let ended: Vec<_> = self.lock_jobs().list.iter().map(|running| running.entry.clone()).collect();
        for entry in ended {
            // Refused where it has been dismissed.
            let _ = entry.ask(Verb::Dismiss);
        }
    }

    /// The ids of jobs that have not ended.
    pub(super) fn running_jobs(&self) -> Vec<String> {
        let jobs = self.lock_jobs();
        let running = jobs
            .list
            .iter()
            .map(|running| &running.entry.job)
            .filter(|job| !matches!(job.status(), JobStatus::Concluded | JobStatus::Null));
        running.map(|job| job.id().to_owned()).collect()
    }

    pub(super) fn lock_jobs(&self) -> MutexGuard<'_, Jobs> {
        self.jobs.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
