//! [`Lanes`]: threads beside the mirrors' own that carry out copies.
//!
//! Copying page-cached bytes is work for a core, not for a disk. While no guest wants the other cores, a mirror
//! sends some of its copies here. A lane decides nothing: what it copies stands in the range table before it
//! comes and until it is back. Shared by all mirrors of a daemon; the program starts the threads.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use event_listener::{Event, EventListener};

use super::copy::{Copied, CopyError, Route};
use super::doubling::Copying;
use super::unflushed::Begun;

/// A copy that has ended, on its way back to its mirror.
pub(crate) type Ended = (Begun, Copying, Result<Copied, CopyError>);

/// A copy for a lane.
pub(crate) struct Errand {
    pub(crate) route: Arc<Route>,
    pub(crate) begun: Begun,
    pub(crate) copying: Copying,
    pub(crate) returns: Arc<Returns>,
}

/// Where a mirror's copies come back to.
#[derive(Default)]
pub(crate) struct Returns {
    /// At most as many as the mirror has sent.
    ended: Mutex<Vec<Ended>>,
    came: Event,
}

/// What waits for a lane.
#[derive(Default)]
pub struct Lanes {
    state: Mutex<State>,
    changed: Event,
}

#[derive(Default)]
struct State {
    /// At most one for each lane, so that none idles while a mirror is busy with a copy of its own. Who has
    /// nothing else to do takes his back: nobody waits here behind another mirror's copy, which may hang.
    waiting: VecDeque<Errand>,
    lanes: usize,
    closed: bool,
}

impl Lanes {
    /// Carries out errands until [`Lanes::close`]; the body of a lane's thread.
    ///
    /// # Cancel safety
    /// Must not be dropped: the copy that it carries would never come back.
    pub async fn run(self: Arc<Self>) {
        self.state().lanes += 1;
        while let Some(errand) = self.next_errand().await {
            errand.carry_out().await;
        }
        self.state().lanes -= 1;
    }

    /// Idles until there is an errand; `None` when there will be none any more.
    async fn next_errand(&self) -> Option<Errand> {
        loop {
            let changed = self.changed.listen();
            {
                let mut state = self.state();
                let errand = state.waiting.pop_front();
                if errand.is_some() || state.closed {
                    return errand;
                }
            }
            changed.await;
        }
    }

    /// Lets the lanes end when nothing waits any more.
    pub fn close(&self) {
        self.state().closed = true;
        self.changed.notify(usize::MAX);
    }

    /// How many there are.
    pub(crate) fn count(&self) -> usize {
        self.state().lanes
    }

    /// Sends an errand, or gives it back when enough wait.
    pub(crate) fn send(&self, errand: Errand) -> Result<(), Errand> {
        let mut state = self.state();
        if state.closed || state.waiting.len() >= state.lanes {
            return Err(errand);
        }
        state.waiting.push_back(errand);
        drop(state);
        self.changed.notify_additional(1);
        Ok(())
    }

    /// Takes back an errand that no lane has begun, of whoever waits for `returns`.
    pub(crate) fn take_back(&self, returns: &Arc<Returns>) -> Option<Errand> {
        let mut state = self.state();
        let mine = state.waiting.iter().position(|errand| Arc::ptr_eq(&errand.returns, returns))?;
        state.waiting.remove(mine)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Errand {
    async fn carry_out(self) {
        let Self { route, begun, copying, returns } = self;
        let copied = route.copy(copying.range()).await;
        // Before it is said: who hears that the mirror has ended may want the files for himself.
        drop(route);
        returns.ended().push((begun, copying, copied));
        returns.came.notify(usize::MAX);
    }
}

impl Returns {
    /// Takes one that has come back.
    pub(crate) fn take_one(&self) -> Option<Ended> {
        self.ended().pop()
    }

    /// Hears of the next that comes back.
    pub(crate) fn listen(&self) -> EventListener {
        self.came.listen()
    }

    fn ended(&self) -> MutexGuard<'_, Vec<Ended>> {
        self.ended.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
