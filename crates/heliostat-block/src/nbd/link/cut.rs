//! What a lost connection does: all are lost with it, what was in flight is sent again, what may be lost is counted.
//!
//! Called by whoever carries a [`Link`] out.

use std::collections::BTreeMap;

use super::again::pause;
use super::{Line, Link, LinkError, Phase, Talk};
use crate::clock::Moment;
use crate::limits::{NBD_REPLAYS_MAX, NBD_UNWELCOME_TIME};
use crate::nbd::Cookie;

impl Link {
    /// A connection was lost, and all others with it (see the module): all of them are to be closed, also those that are
    /// being made. What was in flight is sent again. `jitter` as for [`Link::connected`].
    pub fn cut(&mut self, line: usize, reason: &str, now: Moment, jitter: u32) {
        let Some(talk) = self.lines[line].talk() else { return };
        let is_early = !talk.has_answered && now < talk.since + NBD_UNWELCOME_TIME;
        let has_others = self.up().count() > 1;
        if has_others && is_early {
            self.unwelcome = self.unwelcome.saturating_add(1);
        }
        self.cut_all(reason, now, jitter);
        self.rest(line, now, jitter);
        self.go_down(reason, has_others, now);
    }

    /// There is no connection any more. `was_there` when the server was still there on others.
    pub(super) fn go_down(&mut self, reason: &str, was_there: bool, now: Moment) {
        if matches!(self.phase, Phase::Up) {
            self.was_there = was_there;
            self.enter(Phase::Down(reason.to_owned()), now);
        }
    }

    /// Takes back what is in flight, and puts all connections off.
    pub(super) fn cut_all(&mut self, reason: &str, now: Moment, jitter: u32) {
        let mut may_be_lost = self.changes > self.settled;
        for line in 0..self.lines.len() {
            if matches!(self.lines[line], Line::Resting(_)) {
                continue;
            }
            // It is not the fault of this one: the attempt does not count.
            let resting = Line::Resting(now + pause(self.attempts[line], jitter));
            if let Line::Up(talk) = std::mem::replace(&mut self.lines[line], resting) {
                may_be_lost |= self.take_back(*talk, reason);
            }
        }
        if may_be_lost {
            self.losses += 1;
            self.settled = self.changes;
        }
    }

    /// Takes back what is in flight on a connection that is lost. Says whether something of that changes what is stored.
    fn take_back(&mut self, talk: Talk, reason: &str) -> bool {
        let mut buffers: BTreeMap<Cookie, _> = talk.conversation.abandon().collect();
        let mut changes_something = false;
        for (cookie, ticket) in talk.tickets {
            let Some(request) = self.requests.get_mut(&ticket) else { continue };
            changes_something |= request.changes_something();
            if request.take_back(buffers.remove(&cookie)) > NBD_REPLAYS_MAX {
                self.end(ticket, Err(LinkError::Lost(reason.to_owned())));
            } else {
                self.queue.insert(ticket);
            }
        }
        changes_something
    }
}
