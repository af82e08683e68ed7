//! [`ThrottleGroup`]: limits that several nodes share, and whose turn it is.
//!
//! Each direction has a queue for each member; the members take turns, so that one with many requests does not
//! starve one with few. Only the request whose turn it is looks at the clock. Knows no nodes and does no I/O. Called
//! by [`crate::driver::throttle`]; limits are changed by the control plane.

mod meter;
mod patience;

use std::collections::{BTreeMap, VecDeque};
use std::pin::pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use event_listener::{Event, EventListener};
use futures_util::future::{pending, select};

use self::meter::Meter;
use crate::clock::{Clock, Moment};

pub(crate) use self::patience::Patience;
pub use self::patience::while_wanted;

pub use self::meter::{Counted, Direction, InvalidLimits, Limit, Limits, RATE_MAX};

/// Limits that several nodes share.
pub struct ThrottleGroup {
    clock: Arc<dyn Clock>,
    /// Held to look and to change, never across I/O.
    state: Mutex<State>,
}

struct State {
    meter: Meter,
    members: BTreeMap<u64, Member>,
    next_id: u64,
    /// The requests that look at the clock, by direction: the member and the ticket.
    heads: [Option<(u64, u64)>; 2],
}

/// A node of the group.
#[derive(Default)]
struct Member {
    /// In the order of arrival, by direction. As long as requests are in flight, which permits bound.
    waiting: [VecDeque<Ticket>; 2],
    /// How many wait for it to be quiet.
    hurries: u32,
}

/// A request that waits.
#[derive(Clone)]
struct Ticket {
    id: u64,
    called: Arc<Event>,
}

/// What a request that waits is to do.
enum Next {
    Go,
    Sleep(Moment),
    Wait,
}

/// Members that are not held up by their limits, as long as this lives.
#[derive(Default)]
pub struct Hurry(Vec<(Arc<ThrottleGroup>, u64)>);

impl Hurry {
    pub(crate) fn add(&mut self, group: &Arc<ThrottleGroup>, member: u64) {
        group.begin_hurry(member);
        self.0.push((Arc::clone(group), member));
    }
}

impl Drop for Hurry {
    fn drop(&mut self) {
        self.0.iter().for_each(|(group, member)| group.end_hurry(*member));
    }
}

/// A place in the queue; given up when dropped.
struct Waiting<'a> {
    group: &'a ThrottleGroup,
    member: u64,
    direction: Direction,
    ticket: Ticket,
}

impl ThrottleGroup {
    /// Makes a group without members.
    ///
    /// # Errors
    /// [`InvalidLimits`].
    pub fn new(limits: Limits, clock: Arc<dyn Clock>) -> Result<Arc<Self>, InvalidLimits> {
        limits.check()?;
        let state =
            State { meter: Meter::new(limits), members: BTreeMap::new(), next_id: 1, heads: [None; 2] };
        Ok(Arc::new(Self { clock, state: Mutex::new(state) }))
    }

    /// Its limits.
    #[must_use]
    pub fn limits(&self) -> Limits {
        self.lock().meter.limits()
    }

    /// Changes its limits. What waits goes by the new ones.
    ///
    /// # Errors
    /// [`InvalidLimits`]; nothing has changed then.
    pub fn set_limits(&self, limits: Limits) -> Result<(), InvalidLimits> {
        limits.check()?;
        let mut state = self.lock();
        if state.meter.limits() != limits {
            state.meter = Meter::new(limits);
            // What was done before is forgotten; nothing before now is to be made up for.
            let _ = state.meter.wait(Direction::Read, self.clock.now());
        }
        for ticket in state.members.values().flat_map(|member| member.waiting.iter().flatten()) {
            ticket.called.notify(usize::MAX);
        }
        Ok(())
    }

    /// Says whether a node belongs to it.
    #[must_use]
    pub fn has_members(&self) -> bool {
        !self.lock().members.is_empty()
    }

    pub(crate) fn join(&self) -> u64 {
        let mut state = self.lock();
        let id = state.new_id();
        state.members.insert(id, Member::default());
        id
    }

    pub(crate) fn leave(&self, member: u64) {
        self.lock().members.remove(&member);
    }

    /// Lets all that waits for `member` go on, until [`ThrottleGroup::end_hurry`]; it counts all the same.
    fn begin_hurry(&self, member: u64) {
        if let Some(member) = self.lock().members.get_mut(&member) {
            member.hurries += 1;
            for ticket in member.waiting.iter().flatten() {
                ticket.called.notify(usize::MAX);
            }
        }
    }

    fn end_hurry(&self, member: u64) {
        if let Some(member) = self.lock().members.get_mut(&member) {
            member.hurries = member.hurries.saturating_sub(1);
        }
    }

    /// Waits until a request of `member` may go on, and counts it.
    ///
    /// # Cancel safety
    /// Dropped before it returns, the request has not been counted and has given up its place.
    pub(crate) async fn admit(&self, member: u64, direction: Direction, bytes: u64) {
        let patience = Patience::of_owner();
        let is_over = || patience.as_ref().is_some_and(|patience| patience.is_over());
        let Some(waiting) = self.arrive(member, direction, bytes, is_over()) else { return };
        loop {
            let called = waiting.ticket.called.listen();
            let ended = pin!(ended(patience.as_ref().map(|patience| patience.listen())));
            let called = select(called, ended);
            match self.next(&waiting, bytes, is_over()) {
                Next::Go => return,
                Next::Sleep(until) => {
                    let _ = select(pin!(self.clock.sleep_until(until)), called).await;
                }
                Next::Wait => {
                    let _ = called.await;
                }
            }
        }
    }

    /// Lets it pass at once, or queues it.
    fn arrive(&self, member: u64, direction: Direction, bytes: u64, may_hurry: bool) -> Option<Waiting<'_>> {
        let now = self.clock.now();
        let mut state = self.lock();
        let way = index(direction);
        let may_pass = may_hurry
            || state.is_free(member, direction)
            || (state.heads[way].is_none() && state.meter.wait(direction, now).is_zero());
        if may_pass {
            state.meter.charge(direction, bytes, now);
            return None;
        }
        let ticket = Ticket { id: state.new_id(), called: Arc::new(Event::new()) };
        state.heads[way].get_or_insert((member, ticket.id));
        if let Some(member) = state.members.get_mut(&member) {
            member.waiting[way].push_back(ticket.clone());
        }
        Some(Waiting { group: self, member, direction, ticket })
    }

    fn next(&self, waiting: &Waiting<'_>, bytes: u64, may_hurry: bool) -> Next {
        let (member, direction) = (waiting.member, waiting.direction);
        let now = self.clock.now();
        let mut state = self.lock();
        let is_head = state.heads[index(direction)] == Some((member, waiting.ticket.id));
        if !may_hurry && !state.is_free(member, direction) {
            if !is_head {
                return Next::Wait;
            }
            let wait = state.meter.wait(direction, now);
            if !wait.is_zero() {
                return Next::Sleep(now + wait);
            }
        }
        state.meter.charge(direction, bytes, now);
        Next::Go
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    const fn new_id(&mut self) -> u64 {
        self.next_id += 1;
        self.next_id
    }

    /// Says whether requests of `member` pass without a limit.
    fn is_free(&self, member: u64, direction: Direction) -> bool {
        !self.meter.is_limited(direction) || self.members.get(&member).is_none_or(|member| member.hurries > 0)
    }

    /// The first request of the member whose turn comes after that of `last`.
    fn elect(&self, way: usize, last: u64) -> Option<(u64, &Ticket)> {
        let after = self.members.range(last + 1..).chain(self.members.range(..=last));
        after.filter_map(|(id, member)| Some((*id, member.waiting[way].front()?))).next()
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        let mut state = self.group.lock();
        let way = index(self.direction);
        if let Some(member) = state.members.get_mut(&self.member) {
            member.waiting[way].retain(|ticket| ticket.id != self.ticket.id);
        }
        if state.heads[way] != Some((self.member, self.ticket.id)) {
            return;
        }
        let next = state.elect(way, self.member).map(|(member, ticket)| (member, ticket.clone()));
        state.heads[way] = next.as_ref().map(|(member, ticket)| (*member, ticket.id));
        if let Some((_, ticket)) = next {
            ticket.called.notify(usize::MAX);
        }
    }
}

/// Ends when its owner is told so; never without one.
async fn ended(told: Option<EventListener>) {
    match told {
        Some(told) => told.await,
        None => pending().await,
    }
}

const fn index(direction: Direction) -> usize {
    match direction {
        Direction::Read => 0,
        Direction::Write => 1,
    }
}

#[cfg(all(test, not(loom)))]
mod tests;
