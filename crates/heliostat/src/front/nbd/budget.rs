//! [`Budget`]: the memory that all connections of a server may hold together; [`Share`]: what one of them holds.
//!
//! What is held: data of requests in flight, payloads on their way, answers that wait for their client to read. A
//! connection may have as much as would then be left for the others: one alone half of all, the next half of the rest. So
//! however many clients read slowly or not at all, something remains. Who needs more than that waits in a queue, and
//! may have all that is free when it is the first there. Beside it others go on with one small request each, in the order
//! in which they came, and with so much only that the first gets what the largest request needs when those who had more
//! before have ended. Stays on the server's thread; never blocks. Called by the connections' loops.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::rc::Rc;
use std::task::Waker;

use heliostat_block::limits::NBD_PAYLOAD_MAX;

/// What a request counts for beside its data: the memory of what carries it out, and of its answer.
pub(super) const REQUEST_COST: u64 = 4 << 10;

/// What those get who are not the next in the queue and hold nothing: a guest's usual request of 1 MiB at most, so
/// that guests go on one request at a time while somebody waits for much.
const SMALL: u64 = (1 << 20) + REQUEST_COST;

/// What the largest request counts for.
fn largest() -> u64 {
    u64::from(NBD_PAYLOAD_MAX) + REQUEST_COST
}

/// The memory that the connections of a server may hold together.
#[derive(Debug)]
pub(super) struct Budget {
    max: u64,
    held: Cell<u64>,
    /// What of that was taken beside the first in the queue.
    beside: Cell<u64>,
    /// Who waits, by number, in the order in which they came.
    queue: RefCell<VecDeque<Waiter>>,
    /// The number of the next connection.
    next: Cell<u64>,
}

/// A connection that waits.
#[derive(Debug)]
struct Waiter {
    number: u64,
    waker: Waker,
    /// It wants less than a small request may have, and goes on with that though it is not the next.
    is_small: bool,
    /// What there was of that. It is woken when there is more, and once.
    found: Option<u64>,
}

/// What one connection holds.
#[derive(Debug)]
pub(super) struct Share {
    budget: Rc<Budget>,
    number: u64,
    held: u64,
    /// It took that beside the first in the queue.
    is_beside: bool,
}

/// Where a connection stands in the queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Turn {
    /// Nobody waits.
    Free,
    /// It is the next.
    Next,
    /// Another is; so many bytes are there for small requests beside it.
    Later(u64),
}

/// How many bytes more a connection may take that holds `own` of `held`, which all hold together.
fn room(max: u64, held: u64, own: u64, turn: Turn) -> u64 {
    let free = max.saturating_sub(held);
    match turn {
        // Of what it would hold then, and of what would be left, the first is not more.
        Turn::Free => free.saturating_sub(own) / 2,
        Turn::Next => free,
        Turn::Later(left) if own == 0 => left.min(SMALL),
        Turn::Later(_) => 0,
    }
}

impl Waiter {
    /// Takes from what is `left` for small requests what this one may need, if there is something new for it. Says
    /// whether there is.
    fn leaves(&self, left: &mut u64) -> bool {
        let is_due = self.is_small && self.found.is_none_or(|found| *left > found);
        *left = if is_due { left.saturating_sub(SMALL) } else { *left };
        is_due
    }
}

impl Budget {
    /// Makes a budget of `max` bytes, or of two of the largest requests where that is more.
    pub(super) fn new(max: u64) -> Rc<Self> {
        let max = max.max(2 * u64::from(NBD_PAYLOAD_MAX) + 2 * REQUEST_COST);
        Rc::new(Self {
            max,
            held: Cell::new(0),
            beside: Cell::new(0),
            queue: RefCell::default(),
            next: Cell::new(0),
        })
    }

    /// A share for one more connection, which holds nothing yet.
    pub(super) fn share(self: &Rc<Self>) -> Share {
        let number = self.next.get();
        self.next.set(number + 1);
        Share { budget: Rc::clone(self), number, held: 0, is_beside: false }
    }

    /// Wakes those that may go on: the next, and those that need little and found less. Once each, until they queue
    /// up again.
    fn wake_waiters(&self) {
        let mut left = self.small_room();
        for (place, waiter) in self.queue.borrow_mut().iter_mut().enumerate() {
            if place == 0 || (waiter.leaves(&mut left) && waiter.found.take().is_some()) {
                waiter.waker.wake_by_ref();
            }
        }
    }

    /// How many bytes there are for small requests beside the first in the queue: never so many that the largest request
    /// had no room.
    fn small_room(&self) -> u64 {
        self.free().min(self.max.saturating_sub(largest() + self.beside.get()))
    }

    fn free(&self) -> u64 {
        self.max.saturating_sub(self.held.get())
    }

    fn is_next(&self, number: u64) -> bool {
        self.queue.borrow().front().is_some_and(|waiter| waiter.number == number)
    }
}

impl Share {
    /// How many bytes more the connection may hold.
    pub(super) fn room(&self) -> u64 {
        room(self.budget.max, self.budget.held.get(), self.held, self.turn())
    }

    fn turn(&self) -> Turn {
        let queue = self.budget.queue.borrow();
        match queue.front() {
            None => Turn::Free,
            Some(waiter) if waiter.number == self.number => Turn::Next,
            Some(_) => {
                let before = queue.iter().skip(1).take_while(|waiter| waiter.number != self.number);
                let mut left = self.budget.small_room();
                before.for_each(|waiter| _ = waiter.leaves(&mut left));
                Turn::Later(left)
            }
        }
    }

    /// Takes note of what the connection holds now.
    pub(super) fn hold(&mut self, bytes: u64) {
        let is_less = bytes < self.held;
        if bytes > self.held {
            let is_beside = matches!(self.turn(), Turn::Later(_)) && (self.is_beside || self.held == 0);
            self.count(self.held, is_beside);
        }
        self.count(bytes, self.is_beside && bytes > 0);
        if is_less {
            self.budget.wake_waiters();
        }
    }

    /// Counts it as one that holds so much, beside the first in the queue or not.
    fn count(&mut self, bytes: u64, is_beside: bool) {
        let Budget { held, beside, .. } = &*self.budget;
        held.set(held.get() - self.held + bytes);
        let of = |share: bool, bytes: u64| if share { bytes } else { 0 };
        beside.set(beside.get() - of(self.is_beside, self.held) + of(is_beside, bytes));
        (self.held, self.is_beside) = (bytes, is_beside);
    }

    /// Queues up, unless it has done so. `waker` is woken when there may be room.
    pub(super) fn wait(&self, waker: &Waker) {
        let room = self.room();
        // Where all of a small request's was there and was not enough, more is no use.
        let is_small = self.held == 0 && room < SMALL;
        let found = is_small.then_some(room);
        let mut queue = self.budget.queue.borrow_mut();
        match queue.iter_mut().find(|waiter| waiter.number == self.number) {
            Some(before) => {
                before.waker.clone_from(waker);
                (before.is_small, before.found) = (is_small, found);
            }
            None => queue.push_back(Waiter { number: self.number, waker: waker.clone(), is_small, found }),
        }
    }

    /// Leaves the queue, if it is in it.
    pub(super) fn stop_waiting(&self) {
        let mut queue = self.budget.queue.borrow_mut();
        let before = queue.len();
        queue.retain(|waiter| waiter.number != self.number);
        let has_left = queue.len() < before;
        drop(queue);
        if has_left {
            self.budget.wake_waiters();
        }
    }

    /// Says whether it is the first in the queue.
    pub(super) fn is_next(&self) -> bool {
        self.budget.is_next(self.number)
    }

    /// Says whether another connection waits.
    pub(super) fn others_wait(&self) -> bool {
        self.budget.queue.borrow().iter().any(|waiter| waiter.number != self.number)
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
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::task::Wake;

    use super::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn a_connection_may_have_as_much_as_would_then_be_left() {
        let table = [
            (512, 0, 0, Turn::Free, 256 * MIB),
            (512, 100, 100, Turn::Free, 156 * MIB),
            (512, 256, 256, Turn::Free, 0),
            (512, 400, 0, Turn::Free, 56 * MIB),
            (512, 600, 0, Turn::Free, 0),
            (512, 400, 300, Turn::Next, 112 * MIB),
            (512, 400, 300, Turn::Later(100 * MIB), 0),
            (512, 400, 0, Turn::Later(100 * MIB), MIB + REQUEST_COST),
            (512, 511, 0, Turn::Later(MIB), MIB),
            (512, 512, 0, Turn::Later(0), 0),
        ];
        for (max, held, own, turn, expected) in table {
            let room = room(max * MIB, held * MIB, own * MIB, turn);
            assert_eq!(room, expected, "{held} {own} {turn:?}");
            let (own, left) = (own * MIB + room, (max * MIB).saturating_sub(held * MIB + room));
            assert!(turn != Turn::Free || room == 0 || own <= left, "{held} {own}: not as much is left");
        }
    }

    #[test]
    fn the_smallest_budget_has_room_for_the_largest_request() {
        let budget = Budget::new(0);
        let [mut hog, next] = [budget.share(), budget.share()];
        assert!(next.room() >= largest(), "alone");
        // One takes all that it may, a little at a time.
        while hog.room() > REQUEST_COST {
            let held = hog.held + hog.room().min(64 << 10);
            hog.hold(held);
        }
        assert!(next.room() < largest(), "half of what is left");
        next.wait(Waker::noop());
        assert!(next.room() >= largest(), "all that is left");
    }

    /// Counts how often it is woken.
    #[derive(Default)]
    struct Bell(AtomicUsize);

    impl Wake for Bell {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::SeqCst);
        }
    }

    #[test]
    fn freed_memory_wakes_the_next_and_those_that_need_little() {
        let budget = Budget::new(0);
        let [mut hog, first, small, mut busy, large] = std::array::from_fn(|_| budget.share());
        let bells: [Arc<Bell>; 4] = Default::default();
        let rung = || bells.each_ref().map(|bell| bell.0.swap(0, Ordering::SeqCst));
        let wait = |share: &Share, bell: usize| share.wait(&Waker::from(Arc::clone(&bells[bell])));
        busy.hold(MIB);
        // It has been there before anybody waited.
        hog.hold(REQUEST_COST);
        // It found room for a small request, and needs more.
        wait(&first, 0);
        wait(&large, 1);
        hog.hold(budget.max - MIB);
        wait(&small, 2);
        wait(&busy, 3);
        hog.hold(budget.max - 2 * MIB);
        assert_eq!(rung(), [1, 0, 1, 0]);
        hog.hold(budget.max - 3 * MIB);
        assert_eq!(rung(), [1, 0, 0, 0], "it was woken and has not been here since");
        assert!(small.room() > MIB);
        small.stop_waiting();
        assert_eq!(rung(), [1, 0, 0, 0]);
        first.stop_waiting();
        assert_eq!(rung(), [0, 1, 0, 0], "the next now");
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
        assert!(budget.share().room() >= 2 * MIB, "{}", budget.share().room());
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
        assert_eq!(guest.room(), MIB + REQUEST_COST);
        assert!(second.room() > 20 * MIB);
        second.hold(20 * MIB);
        second.stop_waiting();
        assert!(first.room() > 3 * MIB && !first.others_wait(), "its turn now");
        drop(first);
        assert!(guest.room() > 20 * MIB, "gone with all that it held, and its place in the queue");
    }

    /// Small clients, each with one request at a time and always another, beside a first that needs much.
    #[test]
    fn many_small_clients_do_not_starve_the_first_and_take_turns() {
        let budget = Budget::new(0);
        let mut small: Vec<_> = (0..200).map(|_| budget.share()).collect();
        let mut first = budget.share();
        let served = |share: &mut Share| {
            let has_room = share.room() >= SMALL;
            if has_room {
                share.hold(SMALL);
                share.stop_waiting();
            } else {
                share.wait(Waker::noop());
            }
            u32::from(has_room)
        };
        first.hold(MIB);
        let mut counts = vec![0; small.len()];
        let mut waited = 0;
        for round in 0..40_000 {
            let at = round * 7 % small.len();
            // Whoever is done asks again at once; those who wait are asked in no order.
            small[at].hold(0);
            counts[at] += served(&mut small[at]);
            if round == 100 {
                first.hold(0);
                first.wait(Waker::noop());
                // It was there before those who wait for little.
                assert!(small.iter().any(|share| share.held > 0));
            }
            if round > 100 && (!first.is_next() || first.room() < largest()) {
                waited = round;
            }
        }
        assert!(waited < 10_000, "the first waits still after {waited}");
        let (least, most) = (counts.iter().min().unwrap(), counts.iter().max().unwrap());
        assert!(*least > 0 && *most <= 10 * least, "{least} to {most}");
    }
}
