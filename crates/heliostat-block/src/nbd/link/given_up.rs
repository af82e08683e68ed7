//! Requests whose answers nobody needs any more: a server has a moment still, then they fail and its connections are cut.
//! A single read is let go at once: what becomes of it makes no difference to anybody.
//!
//! Called by whoever carries a [`Link`] out, and by the link when a request ends.

use super::{Line, Link, LinkError, Phase, Ticket};
use crate::clock::Moment;
use crate::limits::GIVE_UP_GRACE;

impl Link {
    /// Nobody needs the requests that are there: those that get no answer within [`GIVE_UP_GRACE`] fail. Until there is
    /// a new connection, none waits for one.
    ///
    /// May be said again and again: what was given up before ends when it would have. What came since then ends within
    /// twice that time, so that a server that answers what it is asked has all of the time for it.
    pub fn give_up(&mut self, now: Moment) {
        let is_down = !matches!(self.phase, Phase::Up | Phase::Opening);
        self.is_impatient = is_down || !self.requests.is_empty();
        let before = Ticket(self.next_ticket);
        let is_new = self.given_up.back().is_none_or(|(last, _)| *last < before);
        if self.requests.is_empty() || !is_new {
            return;
        }
        // Of those that wait for their time the first keeps it; the others count as one.
        self.given_up.truncate(1);
        self.given_up.push_back((before, now + GIVE_UP_GRACE));
    }

    /// Nobody needs that request any more, which must be a read or a look at the layout: it ends now. Its answer is passed
    /// over should it come, and it is not sent again. Others are not touched.
    pub fn let_go(&mut self, ticket: Ticket) {
        self.queue.remove(&ticket);
        self.end(ticket, Err(LinkError::Lost("nobody needs the answer any more".to_owned())));
    }

    /// What was given up and has no time left: all that is before that ticket.
    fn out_of_time(&self, now: Moment) -> Option<Ticket> {
        self.given_up.iter().rfind(|(_, until)| *until <= now).map(|(before, _)| *before)
    }

    /// The connections of a server that owes answers that nobody needs, and has owed them for long enough: they are to be
    /// closed, and said to be cut. All of them: a server that hangs on one is not asked on another.
    #[must_use]
    pub fn overdue(&self, now: Moment) -> Vec<usize> {
        let Some(before) = self.out_of_time(now) else { return Vec::new() };
        let is_owed = self.up().any(|talk| talk.tickets.values().any(|ticket| *ticket < before));
        let up = self.lines.iter().enumerate().filter(|(_, line)| is_owed && matches!(line, Line::Up(_)));
        up.map(|(number, _)| number).collect()
    }

    /// Lets those fail that nobody needs and that nobody has answered.
    pub(super) fn end_given_up(&mut self, now: Moment) {
        let Some(before) = self.out_of_time(now) else { return };
        let unneeded: Vec<_> = self.queue.range(..before).copied().collect();
        for ticket in unneeded {
            self.queue.remove(&ticket);
            self.end(ticket, Err(LinkError::Lost("it did not answer, and was given up".to_owned())));
        }
        self.look_at_given_up();
    }

    /// Forgets what was given up when none of it is there any more. A server that has answered all of it is well.
    pub(super) fn look_at_given_up(&mut self) {
        let Some((before, _)) = self.given_up.front() else { return };
        let first = self.requests.first_key_value().map(|(ticket, _)| *ticket);
        if first.is_some_and(|first| first < *before) {
            return;
        }
        self.given_up.retain(|(before, _)| first.is_some_and(|first| first < *before));
        if self.given_up.is_empty() {
            self.is_impatient &= !matches!(self.phase, Phase::Up);
        }
    }
}
