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
    left: Mutex<Vec<(Thread<()>, Arc<Shared>)>>,
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
        left.retain(|(thread, _)| !thread.is_finished());
        // The others are about to end.
        let hang = left.iter().filter(|(_, shared)| !shared.lock().unended.is_empty()).count();
        if hang >= LEFT_MAX {
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
        left.into_iter().for_each(|(thread, _)| thread.join());
    }

    fn left(&self) -> MutexGuard<'_, Vec<(Thread<()>, Arc<Shared>)>> {
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
        self.home.left().extend(self.thread.take().map(|thread| (thread, Arc::clone(&self.shared))));
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

#[cfg(test)]
mod tests {
    use std::pin::pin;

    use futures_util::FutureExt;
    use heliostat_block::debug_event::DebugEvent;
    use heliostat_block::graph::Claims;
    use heliostat_host::runtime::block_on;

    use super::*;
    use crate::daemon::{Child, Daemon, DriverSpec, FaultLimits, FaultSpec, NodeSpec};

    /// A daemon with a node `n` whose flushes can be held up.
    fn with_faults() -> Arc<Daemon> {
        let daemon = Daemon::new();
        let null = NodeSpec::new(None, DriverSpec::NullCo { size: 1 << 20, read_zeroes: true });
        let faults = FaultSpec {
            image: Child::New(Box::new(null)),
            config: None,
            limits: FaultLimits::default(),
            errors: Vec::new(),
            states: Vec::new(),
            claims: Claims::default(),
        };
        let file = Child::New(Box::new(NodeSpec::new(None, DriverSpec::Faults(Box::new(faults)))));
        let raw = DriverSpec::Raw { file, offset: None, size: None, is_guess: false };
        daemon.add_node(&NodeSpec::new(Some("n".to_owned()), raw)).unwrap();
        daemon
    }

    #[test]
    fn threads_that_hang_are_bounded_and_those_that_have_ended_do_not_count() {
        let daemon = with_faults();
        let (node, injector) = (daemon.node("n").unwrap(), daemon.fault_injector("n").unwrap().unwrap());
        let beside = || vec![Wanted::Beside(Arc::clone(&node))];
        for _ in 0..3 * LEFT_MAX {
            let flusher = daemon.flushers.start().unwrap();
            block_on(flusher.flush(beside())).unwrap().unwrap();
        }
        for number in 0..LEFT_MAX {
            let tag = number.to_string();
            injector.add_break(DebugEvent::FlushToDisk, &tag).unwrap();
            let flusher = daemon.flushers.start().unwrap();
            block_on(async {
                let mut flushing = pin!(flusher.flush(beside()));
                assert!(flushing.as_mut().now_or_never().is_none());
                injector.wait_break(&tag).await;
            })
            .unwrap();
            assert_eq!(flusher.unended(), "'n'");
        }
        let refused = daemon.flushers.start().err().unwrap();
        assert!(matches!(refused, DaemonError::TooMany { limit: LEFT_MAX, .. }), "{refused}");
        injector.end();
        daemon.flushers.end();
        assert_eq!(node.in_flight(), 0, "all have ended, and none was dropped");
        daemon.flushers.start().unwrap();
        daemon.shutdown().unwrap();
    }
}
