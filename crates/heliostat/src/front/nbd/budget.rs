//! [`Budget`]: the memory that all connections of a server may hold together; [`Share`]: what one of them holds.
//!
//! What is held: data of requests in flight, payloads on their way, answers that wait for their client to read. A
//! connection may have as much as would be left for the others: so however many clients read slowly or not at all,
//! something remains. Who needs more than that waits in a queue, and is served in its turn. Stays on the server's
//! thread; never blocks. Called by the connections' loops.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::rc::Rc;
use std::task::Waker;

use heliostat_block::limits::NBD_PAYLOAD_MAX;

/// What those get who are not the next in the queue and hold nothing: a guest's usual request, so that guests go on
/// one request at a time while somebody waits for much.
const SMALL: u64 = 1 << 20;

/// What a request counts for beside its data: the memory of what carries it out, and of its answer.
pub(super) const REQUEST_COST: u64 = 4 << 10;

/// The memory that the connections of a server may hold together.
#[derive(Debug)]
pub(super) struct Budget {
    max: u64,
    held: Cell<u64>,
    /// Who waits, by number, in the order in which they came.
    queue: RefCell<VecDeque<(u64, Waker)>>,
    /// The number of the next connection.
    next: Cell<u64>,
}

/// What one connection holds.
#[derive(Debug)]
pub(super) struct Share {
    budget: Rc<Budget>,
    number: u64,
    held: u64,
}

/// Where a connection stands in the queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Turn {
    /// Nobody waits.
    Free,
    /// It is the next.
    Next,
    /// Another is.
    Later,
}

/// How many bytes more a connection may take that holds `own` of `held`, which all hold together.
fn room(max: u64, held: u64, own: u64, turn: Turn) -> u64 {
    let free = max.saturating_sub(held);
    match turn {
        Turn::Free => free.saturating_sub(own),
        Turn::Next => free,
        Turn::Later if own == 0 => free.min(SMALL),
        Turn::Later => 0,
    }
}

impl Budget {
    /// Makes a budget of `max` bytes, or of two of the largest requests where that is more.
    pub(super) fn new(max: u64) -> Rc<Self> {
        let max = max.max(2 * u64::from(NBD_PAYLOAD_MAX) + 2 * REQUEST_COST);
        Rc::new(Self { max, held: Cell::new(0), queue: RefCell::default(), next: Cell::new(0) })
    }

    /// A share for one more connection, which holds nothing yet.
    pub(super) fn share(self: &Rc<Self>) -> Share {
        let number = self.next.get();
        self.next.set(number + 1);
        Share { budget: Rc::clone(self), number, held: 0 }
    }

    fn wake_next(&self) {
        if let Some((_, waker)) = self.queue.borrow().front() {
            waker.wake_by_ref();
        }
    }
}

impl Share {
    /// How many bytes more the connection may hold.
    pub(super) fn room(&self) -> u64 {
        let Budget { max, held, queue, .. } = &*self.budget;
        let turn = match queue.borrow().front() {
            None => Turn::Free,
            Some((number, _)) if *number == self.number => Turn::Next,
            Some(_) => Turn::Later,
        };
        room(*max, held.get(), self.held, turn)
    }

    /// Takes note of what the connection holds now.
    pub(super) fn hold(&mut self, bytes: u64) {
        let Budget { held, .. } = &*self.budget;
        held.set(held.get() - self.held + bytes);
        let is_less = bytes < self.held;
        self.held = bytes;
        if is_less {
            self.budget.wake_next();
        }
    }

    /// Queues up, unless it has done so. `waker` is woken when there may be room.
    pub(super) fn wait(&self, waker: &Waker) {
        let mut queue = self.budget.queue.borrow_mut();
        match queue.iter_mut().find(|(number, _)| *number == self.number) {
            Some((_, before)) => before.clone_from(waker),
            None => queue.push_back((self.number, waker.clone())),
        }
    }

    /// Leaves the queue, if it is in it.
    pub(super) fn stop_waiting(&self) {
        let mut queue = self.budget.queue.borrow_mut();
        let before = queue.len();
        queue.retain(|(number, _)| *number != self.number);
        let has_left = queue.len() < before;
        drop(queue);
        if has_left {
            self.budget.wake_next();
        }
    }

    /// Says whether it is the first in the queue.
    pub(super) fn is_next(&self) -> bool {
        self.budget.queue.borrow().front().is_some_and(|(number, _)| *number == self.number)
    }

    /// Says whether another connection waits.
    pub(super) fn others_wait(&self) -> bool {
        self.budget.queue.borrow().iter().any(|(number, _)| *number != self.number)
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.hold(0);
        self.stop_waiting();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn a_connection_may_have_as_much_as_would_be_left() {
        let table = [
            (512, 0, 0, Turn::Free, 512),
            (512, 100, 100, Turn::Free, 312),
            (512, 256, 256, Turn::Free, 0),
            (512, 400, 0, Turn::Free, 112),
            (512, 600, 0, Turn::Free, 0),
            (512, 400, 300, Turn::Next, 112),
            (512, 400, 300, Turn::Later, 0),
            (512, 400, 0, Turn::Later, 1),
            (512, 512, 0, Turn::Later, 0),
        ];
        for (max, held, own, turn, expected) in table {
            assert_eq!(room(max * MIB, held * MIB, own * MIB, turn), expected * MIB, "{held} {own} {turn:?}");
        }
    }

    #[test]
    fn however_many_take_all_that_they_may_something_is_left() {
        let budget = Budget::new(512 * MIB);
        let mut hogs: Vec<_> = (0..100).map(|_| budget.share()).collect();
        // Each takes what it may, a little at a time, until none may take more.
        loop {
            let mut has_taken = false;
            for hog in &mut hogs {
                if hog.room() >= 64 << 10 {
                    let held = hog.held + (64 << 10);
                    hog.hold(held);
                    has_taken = true;
                }
            }
            if !has_taken {
                break;
            }
        }
        assert!(budget.share().room() >= 4 * MIB, "{}", budget.share().room());
    }

    #[test]
    fn who_waits_is_served_in_turn_and_small_requests_go_on_beside() {
        let budget = Budget::new(0);
        let waker = Waker::noop();
        let [mut first, mut second, guest] = [budget.share(), budget.share(), budget.share()];
        first.hold(40 * MIB);
        second.wait(waker);
        first.wait(waker);
        assert!(first.others_wait() && second.others_wait() && guest.others_wait());
        assert_eq!(first.room(), 0, "not its turn");
        assert_eq!(guest.room(), MIB);
        assert!(second.room() > 20 * MIB);
        second.hold(20 * MIB);
        second.stop_waiting();
        assert!(first.room() > 3 * MIB && !first.others_wait(), "its turn now");
        drop(first);
        assert!(guest.room() > 40 * MIB, "gone with all that it held, and its place in the queue");
    }
}
