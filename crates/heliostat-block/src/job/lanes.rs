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

/// A copy that has ended, on its way back to its mirror; with the stint in which it was begun.
pub(crate) type Ended = (u64, Begun, Copying, Result<Copied, CopyError>);

/// A copy for a lane.
pub(crate) struct Errand {
    pub(crate) route: Arc<Route>,
    pub(crate) stint: u64,
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
        let Self { route, stint, begun, copying, returns } = self;
        let copied = route.copy(copying.range()).await;
        // Before it is said: who hears that the mirror has ended may want the files for himself.
        drop(route);
        returns.ended().push((stint, begun, copying, copied));
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

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicBool;
    use std::time::Duration;

    use futures_util::FutureExt;

    use super::super::doubling::Doubling;
    use super::super::scan::SyncMode;
    use super::super::test_disk::{Bench, Disk, SECTOR, Ticking};
    use super::super::unflushed::Unflushed;
    use super::*;
    use crate::buffer::BufferPool;
    use crate::dirty_bitmap::DirtyBitmap;
    use crate::job::at_target::AtTarget;
    use crate::storage::ZeroSpace;

    /// A mirror's side of lanes, for copies of one sector.
    struct Sender {
        route: Arc<Route>,
        doubling: Arc<Doubling>,
        unflushed: Unflushed,
        returns: Arc<Returns>,
    }

    impl Sender {
        fn new(target: &Arc<Disk>) -> Self {
            let bench = Bench::new(Disk::of(vec![7; 8 * SECTOR]), Arc::clone(target));
            let size = bench.source.size();
            let fresh = || DirtyBitmap::new(size, 512).unwrap();
            let doubling = Doubling::new(fresh(), Duration::ZERO, Arc::<Ticking>::clone(&bench.clock));
            doubling.bitmap().mark_all();
            let route = Route {
                source: bench.source,
                target: bench.target,
                buffers: BufferPool::new(SECTOR, 1),
                detect_zeroes: false,
                zero_space: ZeroSpace::Keep,
                trust_target: AtomicBool::new(true),
                sync: SyncMode::Full,
                stands_on_source: false,
                patience: Arc::default(),
                at_target: AtTarget::default(),
            };
            let unflushed = Unflushed::new([fresh(), fresh()]);
            Self { route: Arc::new(route), doubling, unflushed, returns: Arc::default() }
        }

        fn errand(&self) -> Errand {
            Errand {
                route: Arc::clone(&self.route),
                stint: 0,
                begun: self.unflushed.write_begins(),
                copying: self.doubling.begin_copy(0, 512).expect("something is dirty"),
                returns: Arc::clone(&self.returns),
            }
        }

        fn take_one(&self) -> bool {
            let Some((_, _, copying, copied)) = self.returns.take_one() else { return false };
            self.doubling.end_copy(copying, copied.is_ok());
            true
        }
    }

    fn target() -> Arc<Disk> {
        Disk::of(vec![0; 8 * SECTOR])
    }

    #[test]
    fn a_copy_comes_back_when_it_has_ended_and_its_mirror_hears_of_it() {
        let target = target();
        let sender = Sender::new(&target);
        let lanes = Arc::<Lanes>::default();
        let mut lane = Box::pin(Arc::clone(&lanes).run());
        assert!(lane.as_mut().now_or_never().is_none(), "it idles");
        assert_eq!(lanes.count(), 1);
        target.hold_writes();
        assert!(lanes.send(sender.errand()).is_ok());
        let mut heard = sender.returns.listen();
        assert!(lane.as_mut().now_or_never().is_none(), "the target holds it up");
        assert!(!sender.take_one() && (&mut heard).now_or_never().is_none());
        target.release();
        assert!(lane.as_mut().now_or_never().is_none(), "it idles again");
        assert!(heard.now_or_never().is_some());
        assert!(sender.take_one() && !sender.take_one());
        assert_eq!(target.shown()[..SECTOR], [7; SECTOR]);
        lanes.close();
        assert!(lane.now_or_never().is_some(), "it ends");
        assert_eq!(lanes.count(), 0);
    }

    #[test]
    fn no_more_waits_than_there_are_lanes() {
        let sender = Sender::new(&target());
        let lanes = Arc::<Lanes>::default();
        let give_back = |sent: Result<(), Errand>| match sent {
            Ok(()) => true,
            Err(errand) => {
                sender.doubling.end_copy(errand.copying, false);
                false
            }
        };
        assert!(!give_back(lanes.send(sender.errand())), "there is no lane");
        let mut lane = Box::pin(Arc::clone(&lanes).run());
        assert!(lane.as_mut().now_or_never().is_none());
        assert!(give_back(lanes.send(sender.errand())));
        assert!(!give_back(lanes.send(sender.errand())), "the lane has not come to the first yet");
        assert!(lane.as_mut().now_or_never().is_none());
        assert!(give_back(lanes.send(sender.errand())));
    }

    #[test]
    fn what_waits_is_taken_back_by_nobody_but_its_own_mirror() {
        let (one, other) = (Sender::new(&target()), Sender::new(&target()));
        let lanes = Arc::<Lanes>::default();
        let mut lane = Box::pin(Arc::clone(&lanes).run());
        assert!(lane.as_mut().now_or_never().is_none());
        assert!(lanes.send(one.errand()).is_ok());
        assert!(lanes.take_back(&other.returns).is_none());
        let errand = lanes.take_back(&one.returns).expect("no lane has begun it");
        one.doubling.end_copy(errand.copying, false);
        assert!(lane.as_mut().now_or_never().is_none());
        assert!(!one.take_one(), "nothing is left for the lane");
    }

    #[test]
    fn closed_lanes_carry_out_what_waits_and_take_no_more() {
        let sender = Sender::new(&target());
        let lanes = Arc::<Lanes>::default();
        let mut lane = Box::pin(Arc::clone(&lanes).run());
        assert!(lane.as_mut().now_or_never().is_none());
        assert!(lanes.send(sender.errand()).is_ok());
        lanes.close();
        let refused = lanes.send(sender.errand()).expect_err("they are closed");
        sender.doubling.end_copy(refused.copying, false);
        assert!(lane.now_or_never().is_some(), "it ends");
        assert!(sender.take_one(), "and not before what waited was carried out");
    }
}
