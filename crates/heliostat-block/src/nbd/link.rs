//! [`Link`]: one export of an NBD server, reached over connections that come and go.
//!
//! Knows every request that was not answered, and how to send it again; which connections are to be made, and
//! when; and what of the writes a lost connection may have taken with it. Opens no socket and knows no time but
//! what it is told. Called by the NBD storage, which carries out what it asks for.
//!
//! # Unanswered writes
//! A write whose connection was lost before its answer came may be carried out, or not, or later: NBD has no way to
//! ask. It is sent again, and answered when the server has answered that; nothing keeps the first one, if the server
//! still has it, from being carried out after. So a loss is counted ([`Link::losses`]), and who must be sure, writes
//! again what was not flushed.
//!
//! # One server
//! Connections that are used at the same time are taken to end at one server: a flush on one covers what was answered
//! on the others. A connection that is lost may have been lost because another server is there now. So all are lost
//! with it, and made again.

mod again;
mod cut;
mod given_up;
mod request;
mod status;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use self::again::{compare, pause};
pub use self::request::{LinkError, Ticket, Wanted};
use self::request::{Request, Standing};
pub use self::status::{LinkState, LinkStatus};
use super::client::Found;
use super::client_reply::{Answered, Conversation};
use super::client_request::AskError;
use super::outbox::Outbox;
use super::wire::transmission_flag;
use super::{Cookie, Violation};
use crate::clock::Moment;
use crate::limits::{NBD_LINE_REQUESTS_MAX, NBD_UNWELCOME_MAX};

/// How a link is to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LinkSettings {
    /// How long after a loss requests wait for the server to come back, before they fail.
    pub reconnect_delay: Duration,
    /// How many connections there may be, where the server allows more than one. At least 1.
    pub connections: usize,
    /// The metadata context is a dirty bitmap, not an allocation map.
    pub reads_bitmap: bool,
}

/// A connection of a link, by its number.
#[derive(Debug)]
enum Line {
    /// None, and none wanted before that moment.
    Resting(Moment),
    /// Being made.
    Connecting,
    /// In use.
    Up(Box<Talk>),
}

/// What is said on a connection.
#[derive(Debug)]
struct Talk {
    conversation: Conversation,
    tickets: BTreeMap<Cookie, Ticket>,
    outbox: Outbox,
    /// Since when; and whether the server has answered a request on it.
    since: Moment,
    has_answered: bool,
}

/// How the link as a whole is.
#[derive(Clone, Debug)]
enum Phase {
    /// It never was up.
    Opening,
    /// There is a connection.
    Up,
    /// There is none; for the reason.
    Down(String),
    /// What answers there is not the export that it was; for the reason.
    Changed(String),
    /// Nobody wants it any more.
    Closed,
}

/// One export of an NBD server. See the module.
#[derive(Debug)]
pub struct Link {
    settings: LinkSettings,
    phase: Phase,
    /// Since when it is in this phase. A link that finds the export changed is down since it was lost.
    since: Moment,
    /// What was found when it first came up. Everything later is held to it.
    found: Option<Found>,
    /// Whether the server said, on the connection that was made last, that several make no difference.
    is_shared: bool,
    lines: Vec<Line>,
    requests: BTreeMap<Ticket, Request>,
    /// Those that no connection has; in their order.
    queue: BTreeSet<Ticket>,
    next_ticket: u64,
    ended: VecDeque<(Ticket, Result<Answered, LinkError>)>,
    /// For each line, the attempts since the server last answered a request on it.
    attempts: Vec<u32>,
    reconnects: u64,
    losses: u64,
    /// Changes that were answered and that only a flush makes durable.
    changes: u64,
    /// Of those, how many a flush has made durable, or a loss has been counted for.
    settled: u64,
    /// Nobody needs requests before these tickets any more; those without an answer by then end. In their order.
    given_up: VecDeque<(Ticket, Moment)>,
    /// Requests do not wait for a server that is not there, until it is there again.
    is_impatient: bool,
    /// When the last connection was lost the server was still there on others: requests wait for one attempt to reach it.
    was_there: bool,
    /// Connections beside others that the server closed at once.
    unwelcome: u32,
}

impl Link {
    /// Makes one that is not connected.
    #[must_use]
    pub fn new(settings: LinkSettings, now: Moment) -> Self {
        let lines = (0..settings.connections.max(1)).map(|_| Line::Resting(now)).collect();
        Self {
            attempts: vec![0; settings.connections.max(1)],
            settings,
            phase: Phase::Opening,
            since: now,
            found: None,
            is_shared: false,
            lines,
            requests: BTreeMap::new(),
            queue: BTreeSet::new(),
            next_ticket: 0,
            ended: VecDeque::new(),
            reconnects: 0,
            losses: 0,
            changes: 0,
            settled: 0,
            given_up: VecDeque::new(),
            is_impatient: false,
            was_there: false,
            unwelcome: 0,
        }
    }

    /// How often what was written and not flushed, or was in flight, may have been lost with a connection.
    #[must_use]
    pub const fn losses(&self) -> u64 {
        self.losses
    }

    /// What the server offered when the link first came up.
    #[must_use]
    pub const fn found(&self) -> Option<&Found> {
        self.found.as_ref()
    }

    /// How it is.
    #[must_use]
    pub fn status(&self, now: Moment) -> LinkStatus {
        let (state, reason) = match &self.phase {
            Phase::Opening => (LinkState::Opening, None),
            Phase::Up => (LinkState::Up, None),
            Phase::Down(reason) if self.waits(now) => (LinkState::Waiting, Some(reason.clone())),
            Phase::Down(reason) => (LinkState::Down, Some(reason.clone())),
            Phase::Changed(reason) => (LinkState::Changed, Some(reason.clone())),
            Phase::Closed => (LinkState::Closed, None),
        };
        LinkStatus {
            state,
            reason,
            lasted: now.since(self.since),
            connections: self.up().count(),
            reconnects: self.reconnects,
            losses: self.losses,
            found: self.found.clone(),
        }
    }

    // ------------------------------------------------------------------ requests

    /// Takes a request on. Its end is told by [`Link::next_ended`].
    pub fn submit(&mut self, wanted: Wanted) -> Ticket {
        let ticket = Ticket(self.next_ticket);
        self.next_ticket += 1;
        self.requests.insert(ticket, Request::new(wanted, self.changes));
        self.queue.insert(ticket);
        ticket
    }

    /// How many requests have not ended.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.requests.len()
    }

    /// The next request that has ended.
    pub fn next_ended(&mut self) -> Option<(Ticket, Result<Answered, LinkError>)> {
        self.ended.pop_front()
    }

    /// Hands requests that wait to the connections, and lets those fail that have waited for too long.
    pub fn hand_out(&mut self, now: Moment) {
        self.end_given_up(now);
        if let Some(error) = self.refusal(now) {
            for ticket in std::mem::take(&mut self.queue) {
                self.end(ticket, Err(error.clone()));
            }
        }
        while let Some(ticket) = self.queue.first().copied() {
            let least_busy = self
                .lines
                .iter_mut()
                .filter_map(Line::talk)
                .min_by_key(|talk| talk.tickets.len())
                .filter(|talk| talk.tickets.len() < NBD_LINE_REQUESTS_MAX);
            let Some(talk) = least_busy else { return };
            self.queue.remove(&ticket);
            let asked = match self.requests.get_mut(&ticket) {
                Some(request) => talk.ask(ticket, request),
                None => continue,
            };
            if let Err(error) = asked {
                self.end(ticket, Err(error.into()));
            }
        }
    }

    /// Why a request that no connection has cannot wait for one.
    fn refusal(&self, now: Moment) -> Option<LinkError> {
        match &self.phase {
            Phase::Opening | Phase::Up => None,
            Phase::Down(_) if self.waits(now) => None,
            Phase::Down(reason) => Some(LinkError::Lost(reason.clone())),
            Phase::Changed(reason) => Some(LinkError::Changed(reason.clone())),
            Phase::Closed => Some(LinkError::Closed),
        }
    }

    /// Whether, when down, requests wait still.
    fn waits(&self, now: Moment) -> bool {
        !self.is_impatient && (self.was_there || now < self.since + self.settings.reconnect_delay)
    }

    fn end(&mut self, ticket: Ticket, outcome: Result<Answered, LinkError>) {
        let Some(request) = self.requests.remove(&ticket) else { return };
        if outcome.is_ok() {
            match request.standing() {
                Standing::Change => self.changes += 1,
                Standing::Flush { covers } => self.settled = self.settled.max(covers),
                Standing::Neither => {}
            }
        }
        self.ended.push_back((ticket, outcome));
        self.look_at_given_up();
    }

    // ------------------------------------------------------------------ connections

    /// The next connection that is to be made now; it counts as being made then.
    pub fn next_to_connect(&mut self, now: Moment) -> Option<usize> {
        let wanted = self.wanted_lines();
        let line = self.lines[..wanted]
            .iter()
            .position(|line| matches!(line, Line::Resting(until) if *until <= now))?;
        self.lines[line] = Line::Connecting;
        Some(line)
    }

    /// When to look again, though nothing else happens.
    #[must_use]
    pub fn wakes_at(&self) -> Option<Moment> {
        let resting = self.lines[..self.wanted_lines()].iter().filter_map(|line| match line {
            Line::Resting(until) => Some(*until),
            _ => None,
        });
        let expiry = match self.phase {
            Phase::Down(_) if !self.queue.is_empty() && !self.was_there => {
                Some(self.since + self.settings.reconnect_delay)
            }
            _ => None,
        };
        resting.chain(expiry).chain(self.given_up.front().map(|(_, until)| *until)).min()
    }

    /// How many connections are wanted: one, and the others beside it.
    fn wanted_lines(&self) -> usize {
        let is_shared =
            self.is_shared && matches!(self.phase, Phase::Up) && self.unwelcome < NBD_UNWELCOME_MAX;
        match self.phase {
            Phase::Closed => 0,
            _ if is_shared => self.lines.len(),
            // Any one of them brings a link that is down up again.
            _ if self.lines.iter().any(|line| !matches!(line, Line::Resting(_))) => 0,
            _ => 1,
        }
    }

    /// A connection was made, and this is what was found there.
    ///
    /// # Errors
    /// What is not as it was; the connection is to be closed then, and counts as failed, and all that the link does not
    /// want any more ([`Link::is_wanted`]). `jitter` is any number, another one each time.
    pub fn connected(&mut self, line: usize, found: Found, now: Moment, jitter: u32) -> Result<(), String> {
        if let Some(first) = &self.found
            && let Err(change) = compare(first, &found)
        {
            if self.up().next().is_none() {
                self.phase = Phase::Changed(change.clone());
                self.was_there = false;
            }
            self.rest(line, now, jitter);
            return Err(change);
        }
        self.is_shared = found.flags & transmission_flag::CAN_MULTI_CONN != 0;
        if !self.is_shared && self.up().next().is_some() {
            let change = "the server allows one connection only now".to_owned();
            self.cut_all(&change, now, jitter);
            self.rest(line, now, jitter);
            self.go_down(&change, true, now);
            return Err(change);
        }
        let conversation = Conversation::new(&found);
        let conversation = if self.settings.reads_bitmap { conversation.with_bitmap() } else { conversation };
        self.lines[line] = Line::Up(Box::new(Talk::new(conversation, now)));
        self.was_there = false;
        // With answers still owed on another connection it is not well.
        self.is_impatient &= !self.given_up.is_empty();
        match self.phase {
            Phase::Up => {}
            Phase::Opening => self.enter(Phase::Up, now),
            _ => {
                self.reconnects += 1;
                // Who answers may be another server, or the same one without what it had, also where nothing was on
                // its way.
                self.losses += 1;
                self.enter(Phase::Up, now);
            }
        }
        self.found.get_or_insert(found);
        Ok(())
    }

    /// A connection could not be made. `jitter` as for [`Link::connected`].
    pub fn connect_failed(&mut self, line: usize, reason: String, now: Moment, jitter: u32) {
        if let Phase::Down(_) | Phase::Changed(_) = self.phase {
            self.phase = Phase::Down(reason);
            self.was_there = false;
        }
        self.rest(line, now, jitter);
    }

    /// Whether a connection is in use or being made. One that is not is to be closed.
    #[must_use]
    pub fn is_wanted(&self, line: usize) -> bool {
        !matches!(self.lines[line], Line::Resting(_))
    }

    /// Lets every request end and asks for no connection any more; those in flight go on.
    pub fn close(&mut self, now: Moment) {
        self.enter(Phase::Closed, now);
        for line in &mut self.lines {
            if let Some(talk) = line.talk() {
                let Talk { conversation, outbox, .. } = talk;
                outbox.head(|bytes| conversation.disconnect(bytes));
            }
        }
    }

    fn enter(&mut self, phase: Phase, now: Moment) {
        self.phase = phase;
        self.since = now;
    }

    /// Puts a connection off by a pause that is longer the more attempts there were.
    fn rest(&mut self, line: usize, now: Moment, jitter: u32) {
        self.lines[line] = Line::Resting(now + pause(self.attempts[line], jitter));
        self.attempts[line] = self.attempts[line].saturating_add(1);
    }

    fn up(&self) -> impl Iterator<Item = &Talk> {
        self.lines.iter().filter_map(|line| match line {
            Line::Up(talk) => Some(&**talk),
            _ => None,
        })
    }

    // ------------------------------------------------------------------ bytes

    /// What is to be sent on a connection; `None` where there is none.
    pub fn outbox(&mut self, line: usize) -> Option<&mut Outbox> {
        self.lines.get_mut(line)?.talk().map(|talk| &mut talk.outbox)
    }

    /// Takes what was received on a connection off the front of `input`, as far as it is complete.
    ///
    /// # Errors
    /// [`Violation`] when the server broke the protocol: the connection is to be closed, and said to be cut.
    pub fn receive(&mut self, line: usize, input: &mut &[u8]) -> Result<(), Violation> {
        while let Some(talk) = self.lines.get_mut(line).and_then(Line::talk) {
            let Some(answer) = talk.conversation.next_of(input)? else { return Ok(()) };
            let ticket = talk.tickets.remove(&answer.cookie);
            talk.has_answered = true;
            self.attempts[line] = 0;
            if let Some(ticket) = ticket {
                self.end(ticket, answer.outcome.map_err(LinkError::Server));
            }
        }
        Ok(())
    }

    /// Where the next bytes from a connection should go, when they are a read's data. Not empty.
    pub fn payload_room(&mut self, line: usize) -> Option<&mut [u8]> {
        self.lines.get_mut(line)?.talk()?.conversation.payload_room()
    }

    /// Takes note that `count` bytes were received into [`Link::payload_room`].
    pub fn payload_received(&mut self, line: usize, count: usize) {
        if let Some(talk) = self.lines.get_mut(line).and_then(Line::talk) {
            talk.conversation.payload_received(count);
        }
    }
}

impl Line {
    fn talk(&mut self) -> Option<&mut Talk> {
        match self {
            Self::Up(talk) => Some(talk),
            _ => None,
        }
    }
}

impl Talk {
    fn new(conversation: Conversation, since: Moment) -> Self {
        let (tickets, outbox) = (BTreeMap::new(), Outbox::default());
        Self { conversation, tickets, outbox, since, has_answered: false }
    }

    fn ask(&mut self, ticket: Ticket, request: &mut Request) -> Result<(), AskError> {
        let (ask, payload) = request.ask();
        let Self { conversation, outbox, .. } = self;
        let cookie = outbox.head(|bytes| conversation.ask(ask, bytes))?;
        if let Some(payload) = payload {
            outbox.payload(&payload);
        }
        self.tickets.insert(cookie, ticket);
        Ok(())
    }
}
