//! [`Crew`]: the threads that serve a server's connections.
//!
//! The first is the one that takes connections; another is started when each has one to serve already, up to a bound. A
//! connection stays with the thread that it was given to. Threads share nothing that changes but counts: each has its
//! part of the memory. Called by the server's thread.

use std::collections::VecDeque;
use std::io;
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::available_parallelism;

use event_listener::Event;
use heliostat_host::runtime::{Thread, spawn_local};
use heliostat_host::socket::{DetachedSocket, Socket};

use super::exports::Exports;
use super::{ServerSettings, Shared, connection};

/// The most threads of one server: by then the memory of the host is what its clients wait for, not its cores.
const THREADS_MAX: usize = 4;

/// The least that a thread's connections may hold together: two of the largest requests of two connections.
const MEMORY_MIN: u64 = 128 << 20;

/// Connections that have not ended.
#[derive(Default)]
pub(super) struct Tally {
    count: AtomicUsize,
    fewer: Event,
}

/// One connection, in the tally of the server and in that of its thread.
struct Counted([Arc<Tally>; 2]);

/// The threads of a server.
pub(super) struct Crew {
    exports: Arc<Exports>,
    settings: ServerSettings,
    /// How many there may be.
    size: usize,
    all: Arc<Tally>,
    /// What the connections of the first thread share.
    shared: Rc<Shared>,
    own: Arc<Tally>,
    others: Vec<Member>,
}

/// A thread beside the first.
struct Member {
    thread: Thread<()>,
    inbox: Arc<Inbox>,
    tally: Arc<Tally>,
}

/// Connections on their way to a thread.
#[derive(Default)]
struct Inbox {
    /// Held for a push or a pop.
    waiting: Mutex<VecDeque<(DetachedSocket, Counted)>>,
    is_closed: AtomicBool,
    changed: Event,
}

impl Tally {
    /// Waits until there are fewer than `bound`.
    pub(super) async fn fewer_than(&self, bound: usize) {
        loop {
            let fewer = self.fewer.listen();
            if self.count.load(Ordering::SeqCst) < bound {
                return;
            }
            fewer.await;
        }
    }
}

impl Counted {
    fn of(tallies: [&Arc<Tally>; 2]) -> Self {
        for tally in tallies {
            tally.count.fetch_add(1, Ordering::SeqCst);
        }
        Self(tallies.map(Arc::clone))
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        for tally in &self.0 {
            tally.count.fetch_sub(1, Ordering::SeqCst);
            tally.fewer.notify(usize::MAX);
        }
    }
}

impl Crew {
    /// One whose first thread is this one.
    pub(super) fn new(exports: Arc<Exports>, settings: ServerSettings) -> Self {
        let cores = available_parallelism().map_or(1, usize::from);
        let parts = usize::try_from(settings.memory_max / MEMORY_MIN).unwrap_or(THREADS_MAX);
        let size = cores.min(parts).clamp(1, THREADS_MAX);
        let settings =
            ServerSettings { memory_max: settings.memory_max / u64::try_from(size).unwrap_or(1), ..settings };
        let shared = Rc::new(Shared::new(Arc::clone(&exports), &settings, Arc::default()));
        let (all, own) = <(Arc<Tally>, Arc<Tally>)>::default();
        Self { exports, settings, size, all, shared, own, others: Vec::new() }
    }

    /// How many connections there are, on all threads.
    pub(super) const fn tally(&self) -> &Arc<Tally> {
        &self.all
    }

    /// Gives a connection to the thread with the fewest; to a new one, where all have some.
    pub(super) fn serve(&mut self, socket: Socket) {
        let (least, _) = self.least_busy();
        if least > 0 && self.others.len() + 1 < self.size {
            // A host that gives no more threads is served by those that there are.
            let _ = self.grow();
        }
        match self.least_busy() {
            (_, Some(member)) => {
                let counted = Counted::of([&self.all, &member.tally]);
                member.inbox.put((socket.detach(), counted));
            }
            (_, None) => start(socket, Rc::clone(&self.shared), Counted::of([&self.all, &self.own])),
        }
    }

    /// The thread with the fewest connections, and how many these are; `None` is the first.
    fn least_busy(&self) -> (usize, Option<&Member>) {
        let working = self.others.iter().filter(|member| !member.inbox.is_closed.load(Ordering::SeqCst));
        let others = working.map(|member| (member.tally.count.load(Ordering::SeqCst), Some(member)));
        let own = (self.own.count.load(Ordering::SeqCst), None);
        others.fold(own, |least, next| if next.0 < least.0 { next } else { least })
    }

    fn grow(&mut self) -> io::Result<()> {
        let (inbox, tally) = <(Arc<Inbox>, Arc<Tally>)>::default();
        let (theirs, counted) = (Arc::clone(&inbox), Arc::clone(&tally));
        let (exports, settings) = (Arc::clone(&self.exports), self.settings.clone());
        let awake = Arc::clone(&self.shared.all_awake);
        let body = move || async move {
            let _leaving = Leaving(Arc::clone(&theirs));
            let shared = Rc::new(Shared::new(exports, &settings, awake));
            while let Some((socket, counted)) = theirs.next().await {
                start(socket.attach(), Rc::clone(&shared), counted);
            }
            counted.fewer_than(1).await;
        };
        self.others.push(Member { thread: Thread::spawn("nbd", body)?, inbox, tally });
        Ok(())
    }

    /// Waits until all connections have ended, and the threads with them.
    pub(super) async fn end(self) {
        for member in &self.others {
            member.inbox.close();
        }
        self.all.fewer_than(1).await;
        for member in self.others {
            member.thread.join();
        }
    }
}

/// A thread that ends takes no more connections, also where it ends in a panic; those on their way to it are closed.
struct Leaving(Arc<Inbox>);

impl Drop for Leaving {
    fn drop(&mut self) {
        self.0.close();
        self.0.waiting().clear();
    }
}

fn start(socket: Socket, shared: Rc<Shared>, counted: Counted) {
    spawn_local(async move {
        connection::serve(socket.into(), &shared).await;
        drop(counted);
    });
}

impl Inbox {
    fn waiting(&self) -> MutexGuard<'_, VecDeque<(DetachedSocket, Counted)>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn put(&self, connection: (DetachedSocket, Counted)) {
        self.waiting().push_back(connection);
        self.changed.notify(usize::MAX);
    }

    fn close(&self) {
        self.is_closed.store(true, Ordering::SeqCst);
        self.changed.notify(usize::MAX);
    }

    /// The next connection; `None` when there will be none any more.
    async fn next(&self) -> Option<(DetachedSocket, Counted)> {
        loop {
            let changed = self.changed.listen();
            // Before the look: nothing is put in once it is closed.
            let is_closed = self.is_closed.load(Ordering::SeqCst);
            let next = self.waiting().pop_front();
            if next.is_some() || is_closed {
                return next;
            }
            changed.await;
        }
    }
}
