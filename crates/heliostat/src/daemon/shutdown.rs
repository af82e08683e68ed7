//! The end of a daemon: jobs are cancelled, clients' requests end, everything is flushed; and what it waits
//! for can be asked meanwhile.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use event_listener::Event;

use super::Daemon;
use super::nodes::flush;

/// Something was not made durable at the end.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not everything could be made durable at the end: {0}")]
pub struct ShutdownError(String);

/// The wish to end.
#[derive(Default)]
pub(super) struct Quit {
    asked: AtomicBool,
    changed: Event,
    stage: Mutex<Stage>,
}

/// How far the end has come.
#[derive(Clone, Copy, Default)]
enum Stage {
    #[default]
    Running,
    Jobs,
    Clients,
    Flush,
    Over,
}

impl Daemon {
    /// Asks the program to end, as the QMP command `quit` does. Whoever runs the daemon then calls
    /// [`Daemon::shutdown`].
    pub fn ask_to_quit(&self) {
        self.quit.asked.store(true, Ordering::SeqCst);
        self.quit.changed.notify(usize::MAX);
    }

    /// Waits until somebody has asked the program to end. Runs on any runtime.
    ///
    /// # Cancel safety
    /// Dropping it leaves nothing behind.
    pub async fn quit_asked(&self) {
        loop {
            let changed = self.quit.changed.listen();
            if self.quit.asked.load(Ordering::SeqCst) {
                return;
            }
            changed.await;
        }
    }

    /// Cancels the jobs, stops the server when what is in flight has ended, flushes every node, closes them.
    /// Blocks until that is done. A second call finds nothing to do.
    ///
    /// # Errors
    /// [`ShutdownError`] when a flush failed; everything else was done all the same.
    pub fn shutdown(&self) -> Result<(), ShutdownError> {
        self.closing.store(true, std::sync::atomic::Ordering::Release);
        // Whoever is in the middle of a change ends it first, and may be waiting for what is held up.
        self.release_held_up();
        drop(self.changes.lock().unwrap_or_else(PoisonError::into_inner));
        self.release_held_up();
        self.enter(Stage::Jobs);
        self.end_jobs();
        self.lanes.end();
        self.enter(Stage::Clients);
        // Nobody waits for a server that is not there, to be answered on a connection that ends.
        self.graph
            .nodes()
            .iter()
            .filter(|node| node.out_of_reach().is_some())
            .for_each(|node| node.give_up());
        self.end_serving();
        self.end_pokes();
        self.enter(Stage::Flush);
        // Images are closed when nobody is at them any more.
        self.flushers.end();
        let flushed = flush(&self.graph.nodes());
        let closed = self.close_nodes();
        self.enter(Stage::Over);
        flushed.and(closed).map_err(ShutdownError)
    }

    /// Says in one line what [`Daemon::shutdown`] is waiting for.
    #[must_use]
    pub fn waiting_for(&self) -> String {
        let stage = *self.quit.stage.lock().unwrap_or_else(PoisonError::into_inner);
        match stage {
            Stage::Running => "nothing: nobody has asked for the end".to_owned(),
            Stage::Jobs => format!("jobs to end: {}", self.running_jobs().join(", ")),
            Stage::Clients => format!("clients' requests to end: {}", self.busy_nodes()),
            Stage::Flush => "flushes to end".to_owned(),
            Stage::Over => "nothing: it is over".to_owned(),
        }
    }

    fn busy_nodes(&self) -> String {
        let nodes = self.graph.nodes();
        let busy = nodes.iter().filter(|node| node.in_flight() > 0);
        let busy: Vec<_> = busy.map(|node| format!("{} on node {}", node.in_flight(), node.name())).collect();
        if busy.is_empty() { "connections close".to_owned() } else { busy.join(", ") }
    }

    fn enter(&self, stage: Stage) {
        *self.quit.stage.lock().unwrap_or_else(PoisonError::into_inner) = stage;
    }
}
