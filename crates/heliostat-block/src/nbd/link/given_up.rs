//! Requests whose answers nobody needs any more: a server has a moment still, then they fail and its connections are cut.
//!
//! Called by whoever carries a [`Link`] out, and by the link when a request ends.

use super::{Line, Link, LinkError, Phase, Ticket};
use crate::clock::Moment;
use crate::limits::GIVE_UP_GRACE;

impl Link {
    /// Nobody needs the requests that are there: those that get no answer within [`GIVE_UP_GRACE`] fail. Until there is
    /// a new connection, none waits for one.
    pub fn give_up(&mut self, now: Moment) {
        self.is_impatient = !matches!(self.phase, Phase::Up | Phase::Opening) || !self.requests.is_empty();
        self.given_up = (!self.requests.is_empty()).then(|| (Ticket(self.next_ticket), now + GIVE_UP_GRACE));
    }

    /// The connections of a server that owes answers that nobody needs, and has owed them for long enough: they are to be
    /// closed, and said to be cut. All of them: a server that hangs on one is not asked on another.
    #[must_use]
    pub fn overdue(&self, now: Moment) -> Vec<usize> {
        let Some((before, _)) = self.given_up.filter(|(_, until)| *until <= now) else { return Vec::new() };
        let is_owed = self.up().any(|talk| talk.tickets.values().any(|ticket| *ticket < before));
        let up = self.lines.iter().enumerate().filter(|(_, line)| is_owed && matches!(line, Line::Up(_)));
        up.map(|(number, _)| number).collect()
    }

    /// Lets those fail that nobody needs and that nobody has answered.
    pub(super) fn end_given_up(&mut self, now: Moment) {
        let Some((before, _)) = self.given_up.filter(|(_, until)| *until <= now) else { return };
        let unneeded: Vec<_> = self.queue.range(..before).copied().collect();
        for ticket in unneeded {
            self.queue.remove(&ticket);
            self.end(ticket, Err(LinkError::Lost("it did not answer, and was given up".to_owned())));
        }
        self.look_at_given_up();
    }

    /// Forgets what was given up when none of it is there any more. A server that has answered all of it is well.
    pub(super) fn look_at_given_up(&mut self) {
        if self.given_up.is_some_and(|(before, _)| self.requests.range(..before).next().is_none()) {
            self.given_up = None;
            self.is_impatient &= !matches!(self.phase, Phase::Up);
        }
    }
}
