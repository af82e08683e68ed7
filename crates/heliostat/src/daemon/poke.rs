//! Requests that an operator makes by hand, one at a time: what `qemu-io` does to a node.
//!
//! A request is a user of its node like an export's client: it is refused where an export would be, and it keeps the
//! node while it is in flight. Knows no command's words.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use heliostat_block::buffer::Buffer;
use heliostat_block::driver::fault::FaultInjector;
use heliostat_block::error::BlockError;
use heliostat_block::graph::{GraphError, Place, Role};
use heliostat_block::range::ByteRange;
use heliostat_block::storage::{Durability, ZeroEffort, ZeroSpace};
use heliostat_host::runtime::{self, Thread};

use super::conflict::conflict;
use super::{Daemon, DaemonError};

/// The most requests at once. Each has a thread of its own; a test that wants more wants a client.
const POKES_MAX: usize = 64;

/// The most bytes of all of them, as of one client's connection: two of the longest that an operator can ask for.
const BYTES_MAX: usize = 64 << 20;

/// The most texts of ended requests that wait to be asked for; the oldest is lost.
const TEXTS_MAX: usize = 1024;

/// The most bytes of all those texts: three requests whose data are printed, or any number of others.
const TEXTS_LEN_MAX: usize = 16 << 20;

/// A request.
#[derive(Debug)]
pub enum Poke {
    /// Reads so many bytes from an offset on.
    Read {
        /// Where.
        offset: u64,
        /// How many.
        len: usize,
    },
    /// Writes one byte again and again.
    Write {
        /// Where.
        offset: u64,
        /// Which.
        byte: u8,
        /// How often.
        len: usize,
        /// Whether it is durable on return.
        durability: Durability,
    },
    /// Makes zeroes.
    WriteZeroes {
        /// Where.
        range: ByteRange,
        /// What becomes of the space.
        space: ZeroSpace,
        /// Whether zeroes may be written as data.
        effort: ZeroEffort,
        /// Whether it is durable on return.
        durability: Durability,
    },
    /// Discards.
    Discard {
        /// Where.
        range: ByteRange,
    },
    /// Makes durable.
    Flush,
}

impl Poke {
    /// How much memory its data takes while it is in flight.
    const fn bytes(&self) -> usize {
        match self {
            Self::Read { len, .. } | Self::Write { len, .. } => *len,
            Self::WriteZeroes { .. } | Self::Discard { .. } | Self::Flush => 0,
        }
    }
}

/// How a request ended.
#[derive(Debug)]
pub struct Poked {
    /// What was read, where it read.
    pub result: Result<Option<Buffer>, BlockError>,
    /// How long it took.
    pub took: Duration,
}

/// Requests in flight, and what there is to say of those that have ended.
#[derive(Default)]
pub(super) struct Pokes {
    state: Mutex<State>,
    fewer: Condvar,
}

#[derive(Default)]
struct State {
    /// The node of each.
    running: Vec<String>,
    /// What their data take. Counted before there is memory for them.
    bytes: usize,
    texts: Vec<(String, String)>,
}

/// A request in flight.
struct Running {
    pokes: Arc<Pokes>,
    node: String,
    bytes: usize,
}

impl Daemon {
    /// Carries out a request on the node `name`, and waits for it.
    ///
    /// # Errors
    /// `NodeNotFound`, `TooMany`, `Engine`, or why an export of the node would be refused.
    pub fn poke(&self, name: &str, poke: Poke) -> Result<Poked, DaemonError> {
        let (place, _running) = self.begin_poke(name, &poke)?;
        runtime::block_on(carry_out(&place, poke)).map_err(DaemonError::Engine)
    }

    /// Starts a request; what `say` says of its end is kept for [`Daemon::poked`].
    ///
    /// # Errors
    /// As [`Daemon::poke`].
    pub fn poke_later(
        &self,
        name: &str,
        poke: Poke,
        say: impl FnOnce(Poked) -> String + Send + 'static,
    ) -> Result<(), DaemonError> {
        let (place, running) = self.begin_poke(name, &poke)?;
        let body = move || async move {
            let poked = carry_out(&place, poke).await;
            // Before anybody hears that it is over, it is.
            drop(place);
            running.end(say(poked));
        };
        Thread::spawn("qemu-io", body).map_err(DaemonError::Engine)?;
        Ok(())
    }

    /// Waits until nothing that [`Daemon::poke_later`] has started on the node `name` is in flight. Answers what there
    /// is to say of it, in the order in which it ended.
    #[must_use]
    pub fn poked(&self, name: &str) -> Vec<String> {
        let mut state = self.pokes.wait(|state| state.running.iter().any(|node| node == name));
        state.texts.extract_if(.., |(node, _)| node == name).map(|(_, text)| text).collect()
    }

    /// The fault injector that the node `name` is, or stands on.
    ///
    /// # Errors
    /// `NodeNotFound`.
    pub fn fault_injector(&self, name: &str) -> Result<Option<Arc<FaultInjector>>, DaemonError> {
        let nodes = self.nodes();
        let find = |name: &str| nodes.iter().find(|entry| entry.node.name().as_str() == name);
        let first = find(name).ok_or_else(|| DaemonError::NodeNotFound(name.to_owned()))?;
        let mut down = std::iter::successors(Some(first), |entry| find(entry.child.as_ref()?.as_str()));
        Ok(down.find_map(|entry| entry.node.fault_injector().cloned()))
    }

    /// Waits until no request is in flight.
    pub(super) fn end_pokes(&self) {
        drop(self.pokes.wait(|state| !state.running.is_empty()));
    }

    fn begin_poke(&self, name: &str, poke: &Poke) -> Result<(Arc<Place>, Running), DaemonError> {
        let _change = self.begin_change()?;
        let node = self.node(name)?;
        let writable = !matches!(poke, Poke::Read { .. } | Poke::Flush);
        if writable && node.options().read_only {
            return Err(DaemonError::TargetReadOnly);
        }
        let running = self.pokes.begin(name, poke.bytes())?;
        let attached = self.graph.attach(&node, Role::Export { id: "qemu-io".to_owned(), writable });
        let place = attached.map_err(|error| match error {
            GraphError::InUse { node, role } => conflict(node, &role, writable),
            GraphError::NotFound(name) | GraphError::Duplicate(name) => DaemonError::NodeNotFound(name),
        })?;
        Ok((place, running))
    }
}

async fn carry_out(place: &Place, poke: Poke) -> Poked {
    let node = place.node();
    let begun = node.clock().now();
    let result = {
        let tracked = place.enter().await;
        match poke {
            Poke::Read { offset, len } => tracked.read(offset, Buffer::zeroed(len)).await.map(Some),
            Poke::Write { offset, byte, len, durability } => {
                let data = Bytes::from(vec![byte; len]);
                tracked.write(offset, data, durability).await.map(|()| None)
            }
            Poke::WriteZeroes { range, space, effort, durability } => {
                tracked.write_zeroes(range, space, effort, durability).await.map(|()| None)
            }
            Poke::Discard { range } => tracked.discard(range).await.map(|()| None),
            Poke::Flush => tracked.flush().await.map(|()| None),
        }
    };
    Poked { result, took: node.clock().now().since(begun) }
}

impl Pokes {
    fn begin(self: &Arc<Self>, node: &str, bytes: usize) -> Result<Running, DaemonError> {
        let mut state = self.lock();
        if state.running.len() >= POKES_MAX {
            return Err(DaemonError::TooMany { what: "requests", limit: POKES_MAX });
        }
        if bytes > BYTES_MAX - state.bytes {
            return Err(DaemonError::TooMany { what: "bytes of requests", limit: BYTES_MAX });
        }
        state.bytes += bytes;
        state.running.push(node.to_owned());
        Ok(Running { pokes: Arc::clone(self), node: node.to_owned(), bytes })
    }

    fn wait(&self, go_on: impl Fn(&State) -> bool) -> MutexGuard<'_, State> {
        let state = self.fewer.wait_while(self.lock(), |state| go_on(state));
        state.unwrap_or_else(PoisonError::into_inner)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Running {
    /// It has ended, with this to say.
    fn end(self, text: String) {
        let mut state = self.pokes.lock();
        state.texts.push((self.node.clone(), text));
        // Those that may stay, from the newest on.
        let mut room = TEXTS_LEN_MAX;
        let fitting = state.texts.iter().rev().take(TEXTS_MAX).take_while(|(_, text)| {
            let left = room.checked_sub(text.len());
            room = left.unwrap_or(0);
            left.is_some()
        });
        let kept = fitting.count();
        let lost = state.texts.len() - kept;
        state.texts.drain(..lost);
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let mut state = self.pokes.lock();
        if let Some(at) = state.running.iter().position(|node| *node == self.node) {
            state.running.remove(at);
        }
        state.bytes -= self.bytes;
        drop(state);
        self.pokes.fewer.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kept_texts_are_bounded_in_all_and_the_oldest_are_lost() {
        let pokes = Arc::new(Pokes::default());
        for byte in ["a", "b", "c", "d"] {
            pokes.begin("n", 0).unwrap().end(byte.repeat(TEXTS_LEN_MAX / 3));
        }
        let kept: Vec<_> = pokes.lock().texts.iter().map(|(_, text)| text[..1].to_owned()).collect();
        assert_eq!(kept, ["b", "c", "d"]);
        for _ in 0..=TEXTS_MAX {
            pokes.begin("n", 0).unwrap().end(String::new());
        }
        assert_eq!(pokes.lock().texts.len(), TEXTS_MAX);
    }

    #[test]
    fn the_data_of_requests_in_flight_are_bounded_in_all() {
        let pokes = Arc::new(Pokes::default());
        let first = pokes.begin("n", BYTES_MAX / 2).unwrap();
        let second = pokes.begin("m", BYTES_MAX / 2).unwrap();
        let refused = pokes.begin("n", 1).map(drop);
        assert!(matches!(refused, Err(DaemonError::TooMany { limit: BYTES_MAX, .. })), "{refused:?}");
        drop(pokes.begin("n", 0).unwrap());
        first.end(String::new());
        drop(pokes.begin("n", BYTES_MAX / 2).unwrap());
        drop(second);
        assert_eq!(pokes.lock().bytes, 0);
    }
}
