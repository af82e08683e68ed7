//! [`Flusher`]: a thread that flushes nodes, and ends what it has begun whoever waits for it.
//!
//! A request that entered a node is never cancelled, and where a disk hangs a flush may take for ever. So who waits for
//! one no longer than a bound is not who carries it out. Each is in flight at its node until it has ended: whoever drains
//! that node waits for it. It closes no gates. Called by `snapshot`.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use event_listener::Event;
use futures_util::future::join_all;
use heliostat_block::error::BlockError;
use heliostat_block::node::Node;
use heliostat_block::tracked::Tracked;
use heliostat_host::open::sync_directory_of;
use heliostat_host::runtime::Thread;

use super::DaemonError;

/// The most threads whose flushes nobody waits for any more. Each is of a snapshot that was refused for a disk that
/// hangs: whoever has tried that so often should look at the disk.
const LEFT_MAX: usize = 16;

/// The threads of a daemon that flush.
#[derive(Default)]
pub(super) struct Flushers {
    /// Those that nobody waits for any more, ended or not. Held for an instant, and while they are counted.
    left: Mutex<Vec<Thread<()>>>,
}

/// A thread that flushes. Dropped, it lets the thread end what that has begun.
pub(super) struct Flusher<'a> {
    home: &'a Flushers,
    shared: Arc<Shared>,
    thread: Option<Thread<()>>,
}

/// A flush that is to be.
pub(super) enum Wanted {
    /// Of what is written until the gate of the node lets it in.
    Beside(Arc<Node>),
    /// Of what was written before the gate closed.
    Behind(Tracked),
    /// Of the directory in which the file at this path has its name.
    Name(PathBuf),
}

#[derive(Default)]
struct Shared {
    /// Held to hand over, and to look.
    state: Mutex<State>,
    changed: Event,
}

#[derive(Default)]
struct State {
    handed: Option<Vec<Wanted>>,
    /// That of which a flush has not ended.
    unended: Vec<String>,
    outcome: Option<Result<(), BlockError>>,
    is_over: bool,
}

impl Flushers {
    /// Starts a thread.
    ///
    /// # Errors
    /// `TooMany`, `Engine`.
    pub(super) fn start(&self) -> Result<Flusher<'_>, DaemonError> {
        let mut left = self.left();
        left.retain(|thread| !thread.is_finished());
        if left.len() >= LEFT_MAX {
            return Err(DaemonError::TooMany { what: "flushes that do not end", limit: LEFT_MAX });
        }
        drop(left);
        let shared = Arc::<Shared>::default();
        let body = Arc::clone(&shared);
        let thread = Thread::spawn("flush", move || async move { body.run().await });
        Ok(Flusher { home: self, shared, thread: Some(thread.map_err(DaemonError::Engine)?) })
    }

    /// Waits until all has ended. Nothing new may be started.
    pub(super) fn end(&self) {
        let left = std::mem::take(&mut *self.left());
        left.into_iter().for_each(Thread::join);
    }

    fn left(&self) -> MutexGuard<'_, Vec<Thread<()>>> {
        self.left.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Flusher<'_> {
    /// Carries out all `wanted`, side by side. Each runs to its end, whatever becomes of the others.
    ///
    /// # Errors
    /// Of one that has failed.
    ///
    /// # Cancel safety
    /// Dropped, it leaves the flushes to end when they do; [`Flusher::unended`] says which. No more can be asked of this
    /// one then.
    pub(super) async fn flush(&self, wanted: Vec<Wanted>) -> Result<(), BlockError> {
        {
            let mut state = self.shared.lock();
            state.unended = wanted.iter().map(Wanted::what).collect();
            state.handed = Some(wanted);
            state.outcome = None;
        }
        self.shared.changed.notify(usize::MAX);
        self.shared.wait(|state| state.outcome.take()).await
    }

    /// That of which a flush has not ended.
    pub(super) fn unended(&self) -> String {
        self.shared.lock().unended.join(", ")
    }
}

impl Drop for Flusher<'_> {
    fn drop(&mut self) {
        self.shared.lock().is_over = true;
        self.shared.changed.notify(usize::MAX);
        self.home.left().extend(self.thread.take());
    }
}

impl Wanted {
    /// What is flushed, for people.
    fn what(&self) -> String {
        match self {
            Self::Beside(node) => format!("'{}'", node.name()),
            Self::Behind(tracked) => format!("'{}'", tracked.node().name()),
            Self::Name(path) => format!("the directory of '{}'", path.display()),
        }
    }

    async fn carry_out(self) -> Result<(), BlockError> {
        match self {
            Self::Beside(node) => node.enter().await.flush().await,
            Self::Behind(tracked) => tracked.flush().await,
            Self::Name(path) => {
                sync_directory_of(&path);
                Ok(())
            }
        }
    }
}

impl Shared {
    async fn run(&self) {
        while let Some(wanted) = self.wait(State::next).await {
            let flushed = join_all(wanted.into_iter().map(async |wanted| {
                let what = wanted.what();
                // It has left the node before anybody hears that it has ended.
                let flushed = wanted.carry_out().await;
                let mut state = self.lock();
                if let Some(at) = state.unended.iter().position(|unended| *unended == what) {
                    state.unended.remove(at);
                }
                flushed
            }));
            let outcome = flushed.await.into_iter().collect();
            self.lock().outcome = Some(outcome);
            self.changed.notify(usize::MAX);
        }
    }

    async fn wait<T>(&self, look: impl Fn(&mut State) -> Option<T>) -> T {
        loop {
            let changed = self.changed.listen();
            if let Some(seen) = look(&mut self.lock()) {
                return seen;
            }
            changed.await;
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// What there is to do next; nothing at the end.
    fn next(&mut self) -> Option<Option<Vec<Wanted>>> {
        match self.handed.take() {
            Some(wanted) => Some(Some(wanted)),
            None => self.is_over.then_some(None),
        }
    }
}
