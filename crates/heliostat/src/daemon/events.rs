//! [`Event`]s: what happens in a daemon, in one order for everybody who listens.
//!
//! Who says something never waits for who listens: a [`Watch`] must not block, a [`Subscription`] loses its
//! oldest events when nobody takes them.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant, SystemTime};

use heliostat_block::job::JobEvent;
use heliostat_block::range::ByteRange;

/// Events that a subscription keeps. A job says a few dozen in its life; more wait only where errors are ignored.
const KEPT_MAX: usize = 1024;

/// Something that happened, and when.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    /// When.
    pub at: SystemTime,
    /// What.
    pub what: Happening,
}

/// What happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Happening {
    /// A job said something.
    Job {
        /// The job's id.
        id: String,
        /// What it said.
        event: JobEvent,
        /// Bytes done at that moment.
        offset: u64,
        /// Bytes done and left at that moment.
        len: u64,
        /// How long guests were held at the last attempt to end, if there was one.
        pause: Option<Duration>,
        /// Its limit in bytes a second; 0 is none.
        speed: u64,
    },
    /// A request met what an image contradicts itself in. Said once of each node.
    ImageCorrupt {
        /// The node.
        node: String,
        /// What was found.
        text: String,
        /// Where a write was kept from destroying a table, in the file, where it was that.
        range: Option<ByteRange>,
        /// Nothing is written to it any more; else it was only read anyway.
        is_fatal: bool,
    },
    /// A dirty bitmap that was kept in an image has followed to a node that cannot keep it.
    BitmapNotStored {
        /// The node that it is on now.
        node: String,
        /// Its name.
        name: String,
    },
    /// An export is gone: its last client has left.
    ExportDeleted {
        /// The export's id.
        id: String,
    },
}

type Watcher = Arc<dyn Fn(&Arc<Event>) + Send + Sync>;

/// Where events are said and heard.
#[derive(Default)]
pub(super) struct Events {
    /// Held while watchers are called, which is what makes one order for all. Nothing else is locked inside
    /// but what watchers lock.
    watchers: Mutex<Watchers>,
}

#[derive(Default)]
struct Watchers {
    list: Vec<(u64, Watcher)>,
    next: u64,
}

impl Events {
    /// Tells everybody.
    pub(super) fn say(&self, what: Happening) {
        let watchers = self.lock();
        // Taken under the lock, so that timestamps have the order of the events.
        let event = Arc::new(Event { at: SystemTime::now(), what });
        for (_, watcher) in &watchers.list {
            watcher(&event);
        }
    }

    pub(super) fn watch(self: &Arc<Self>, watcher: Watcher) -> Watch {
        let mut watchers = self.lock();
        let number = watchers.next;
        watchers.next += 1;
        watchers.list.push((number, watcher));
        Watch { events: Arc::downgrade(self), number }
    }

    pub(super) fn subscribe(self: &Arc<Self>) -> Subscription {
        let kept = Arc::new(Kept::default());
        let keeper = Arc::clone(&kept);
        let watch = self.watch(Arc::new(move |event| keeper.keep(Arc::clone(event))));
        Subscription { kept, _watch: watch }
    }

    fn lock(&self) -> MutexGuard<'_, Watchers> {
        self.watchers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Somebody who is called with every event. Dropped, it is called no more.
#[must_use]
pub struct Watch {
    events: Weak<Events>,
    number: u64,
}

impl Drop for Watch {
    fn drop(&mut self) {
        if let Some(events) = self.events.upgrade() {
            events.lock().list.retain(|(number, _)| *number != self.number);
        }
    }
}

/// Events that wait to be taken.
#[derive(Default)]
struct Kept {
    queue: Mutex<Queue>,
    came: Condvar,
}

#[derive(Default)]
struct Queue {
    events: VecDeque<Arc<Event>>,
    lost: u64,
}

impl Kept {
    fn keep(&self, event: Arc<Event>) {
        let mut queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
        if queue.events.len() == KEPT_MAX {
            queue.events.pop_front();
            queue.lost += 1;
        }
        queue.events.push_back(event);
        self.came.notify_all();
    }
}

/// Events from the moment of subscribing on, each once, in order.
#[must_use]
pub struct Subscription {
    kept: Arc<Kept>,
    _watch: Watch,
}

impl Subscription {
    /// Takes the oldest event; waits for one for at most `limit`.
    #[must_use]
    pub fn next(&self, limit: Duration) -> Option<Arc<Event>> {
        let deadline = Instant::now().checked_add(limit);
        let mut queue = self.kept.queue.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            if let Some(event) = queue.events.pop_front() {
                return Some(event);
            }
            let left = deadline.map_or(limit, |deadline| deadline.saturating_duration_since(Instant::now()));
            if left.is_zero() {
                return None;
            }
            queue = self.kept.came.wait_timeout(queue, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// How many were lost because nobody took them.
    #[must_use]
    pub fn lost(&self) -> u64 {
        self.kept.queue.lock().unwrap_or_else(PoisonError::into_inner).lost
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn deleted(id: usize) -> Happening {
        Happening::ExportDeleted { id: id.to_string() }
    }

    #[test]
    fn a_subscription_that_nobody_reads_loses_its_oldest_events_and_counts_them() {
        let events = Arc::new(Events::default());
        let subscription = events.subscribe();
        for id in 0..KEPT_MAX + 3 {
            events.say(deleted(id));
        }
        assert_eq!(subscription.lost(), 3);
        assert_eq!(subscription.next(Duration::ZERO).unwrap().what, deleted(3));
    }

    #[test]
    fn a_dropped_watch_hears_nothing_more() {
        let events = Arc::new(Events::default());
        let heard = Arc::new(Mutex::new(0));
        let counter = Arc::clone(&heard);
        let watch = events.watch(Arc::new(move |_| *counter.lock().unwrap() += 1));
        events.say(deleted(0));
        drop(watch);
        events.say(deleted(1));
        assert_eq!(*heard.lock().unwrap(), 1);
    }
}
