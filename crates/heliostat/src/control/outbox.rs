//! [`Outbox`]: what a client is to be sent, in order, with a bound.
//!
//! Replies and events of one client go through here. Who says an event never waits: a client that does not
//! read loses its connection once too much has gathered. Who makes replies does wait: a client that does not
//! read has no further commands taken from it.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, ThreadId};
use std::time::Duration;

/// Bytes that may wait for a client that does not read, events and replies together. A thousand events; more
/// than any client that still lives leaves unread.
const BYTES_MAX: usize = 1 << 20;

/// Below this, further commands are taken.
const BYTES_ROOM: usize = BYTES_MAX / 4;

/// What a client is to be sent.
#[derive(Default)]
pub(super) struct Outbox {
    state: Mutex<State>,
    /// Something was put in, taken out, or the end has come.
    changed: Condvar,
}

#[derive(Default)]
struct State {
    queue: VecDeque<Arc<[u8]>>,
    /// Events that came from other threads while a command was carried out; sent behind its reply.
    held: VecDeque<Arc<[u8]>>,
    /// Bytes queued, held and being sent.
    bytes: usize,
    /// Bytes being sent, by whoever took them out; nobody else takes any out meanwhile.
    sending: usize,
    /// The client has negotiated: it gets events.
    wants_events: bool,
    /// Who carries out a command of this client that makes things happen.
    carrying_out: Option<ThreadId>,
    end: End,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum End {
    #[default]
    Open,
    /// Nothing more is put in; what is there is sent.
    Finishing,
    /// Nothing more is sent.
    Broken,
}

/// Too much has gathered, or the connection is broken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Overflow;

impl Outbox {
    /// Puts in what is neither a reply to a command nor an event.
    pub(super) fn send(&self, line: Arc<[u8]>) {
        self.lock().push(line);
        self.changed.notify_all();
    }

    /// A command is about to be carried out by this thread. What happens because of it and is said by this
    /// thread goes before the reply, what others say until then behind it: a client hears that its job was
    /// created, then that its command was accepted, then what came of it.
    pub(super) fn begin_command(&self) {
        self.lock().carrying_out = Some(thread::current().id());
    }

    /// Puts in the reply, and lets go what was held back.
    pub(super) fn reply(&self, line: Arc<[u8]>) {
        let mut state = self.lock();
        state.push(line);
        state.carrying_out = None;
        state.release();
        drop(state);
        self.changed.notify_all();
    }

    /// [`Outbox::reply`], and `send` is called with all that is to be sent, if nobody is sending: a client that waits
    /// for each reply is answered without waking another thread. `send` must not block, and answers how much it sent.
    pub(super) fn reply_at_once(&self, line: Arc<[u8]>, send: impl FnOnce(&[u8]) -> usize) {
        let mut state = self.lock();
        state.push(line);
        state.carrying_out = None;
        state.release();
        if state.sending > 0 || state.end == End::Broken {
            drop(state);
            self.changed.notify_all();
            return;
        }
        let batch = state.take_batch();
        drop(state);
        let sent = send(&batch).min(batch.len());
        let mut state = self.lock();
        state.sending = 0;
        state.bytes -= sent;
        if sent < batch.len() {
            state.queue.push_front(batch[sent..].into());
        }
        // Somebody may have put something in meanwhile, or wait for the end.
        drop(state);
        self.changed.notify_all();
    }

    /// From now on the client gets events.
    pub(super) fn want_events(&self) {
        self.lock().wants_events = true;
    }

    /// Puts in an event.
    ///
    /// # Errors
    /// [`Overflow`] once, when too much has gathered; nothing more is sent then.
    pub(super) fn event(&self, line: &Arc<[u8]>) -> Result<(), Overflow> {
        let mut state = self.lock();
        if !state.wants_events || state.end != End::Open {
            return Ok(());
        }
        if state.bytes + line.len() > BYTES_MAX {
            state.end = End::Broken;
            drop(state);
            self.changed.notify_all();
            return Err(Overflow);
        }
        match state.carrying_out {
            Some(thread) if thread != thread::current().id() => state.hold(Arc::clone(line)),
            _ => {
                // Events keep their order among themselves.
                state.release();
                state.push(Arc::clone(line));
            }
        }
        drop(state);
        self.changed.notify_all();
        Ok(())
    }

    /// Waits until a further command may be taken. `false` when there is no use in it.
    pub(super) fn wait_for_room(&self) -> bool {
        let mut state = self.lock();
        while state.bytes > BYTES_ROOM && state.end == End::Open {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.end == End::Open
    }

    /// Nothing more will be put in.
    pub(super) fn finish(&self) {
        let mut state = self.lock();
        if state.end == End::Open {
            state.carrying_out = None;
            state.release();
            state.end = End::Finishing;
        }
        drop(state);
        self.changed.notify_all();
    }

    /// Waits until all has been sent, or nobody will be sent it, or `limit` has passed.
    pub(super) fn wait_until_sent(&self, limit: Duration) {
        let is_unsent = |state: &mut State| state.bytes > 0 && state.end != End::Broken;
        drop(self.changed.wait_timeout_while(self.lock(), limit, is_unsent));
    }

    /// The connection is gone.
    pub(super) fn break_off(&self) {
        self.lock().end = End::Broken;
        self.changed.notify_all();
    }

    /// What was taken out has been sent.
    pub(super) fn sent(&self) {
        let mut state = self.lock();
        state.bytes -= std::mem::take(&mut state.sending);
        drop(state);
        self.changed.notify_all();
    }

    /// Takes out what is to be sent next, and waits for it; [`Outbox::sent`] says that it has been. `None` when
    /// there will be nothing more.
    pub(super) fn take(&self) -> Option<Vec<u8>> {
        let mut state = self.lock();
        loop {
            if state.end == End::Broken {
                return None;
            }
            // What somebody else is sending may come back in part, and goes first.
            if state.sending == 0 && !state.queue.is_empty() {
                return Some(state.take_batch());
            }
            if state.sending == 0 && state.end == End::Finishing {
                return None;
            }
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn push(&mut self, line: Arc<[u8]>) {
        self.bytes += line.len();
        self.queue.push_back(line);
    }

    fn hold(&mut self, line: Arc<[u8]>) {
        self.bytes += line.len();
        self.held.push_back(line);
    }

    fn take_batch(&mut self) -> Vec<u8> {
        let batch: Vec<u8> = self.queue.drain(..).flat_map(|line| line.to_vec()).collect();
        self.sending = batch.len();
        batch
    }

    fn release(&mut self) {
        self.queue.append(&mut self.held);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(text: &str) -> Arc<[u8]> {
        Arc::from(text.as_bytes())
    }

    fn from_another_thread(outbox: &Outbox, text: &str) {
        thread::scope(|scope| {
            scope.spawn(|| outbox.event(&line(text)).unwrap());
        });
    }

    #[test]
    fn what_others_say_meanwhile_comes_behind_the_reply() {
        let outbox = Outbox::default();
        outbox.want_events();
        outbox.begin_command();
        outbox.event(&line("created ")).unwrap();
        from_another_thread(&outbox, "ready ");
        outbox.reply(line("reply "));
        from_another_thread(&outbox, "later");
        assert_eq!(outbox.take().unwrap(), b"created reply ready later");
    }

    #[test]
    fn what_does_not_go_at_once_is_sent_first_by_the_sender() {
        let outbox = Outbox::default();
        outbox.want_events();
        outbox.begin_command();
        from_another_thread(&outbox, "ready ");
        outbox.reply_at_once(line("reply "), |batch| {
            assert_eq!(batch, b"reply ready ");
            from_another_thread(&outbox, "later ");
            2
        });
        outbox.reply_at_once(line("second"), |batch| {
            assert_eq!(batch, b"ply ready later second");
            0
        });
        assert_eq!(outbox.take().unwrap(), b"ply ready later second");
        outbox.reply_at_once(line("third"), |_| unreachable!("the sender is at it"));
        outbox.sent();
        assert_eq!(outbox.take().unwrap(), b"third");
        outbox.sent();
        outbox.finish();
        assert_eq!(outbox.take(), None);
        outbox.wait_until_sent(Duration::from_secs(30));
    }

    #[test]
    fn events_keep_their_order_even_where_a_command_says_the_last() {
        let outbox = Outbox::default();
        outbox.want_events();
        outbox.begin_command();
        from_another_thread(&outbox, "concluded ");
        outbox.event(&line("null ")).unwrap();
        outbox.reply(line("reply"));
        assert_eq!(outbox.take().unwrap(), b"concluded null reply");
    }

    #[test]
    fn a_client_that_does_not_read_is_given_up_with_bounded_memory() {
        let outbox = Outbox::default();
        outbox.want_events();
        let event: Arc<[u8]> = vec![0; 1000].into();
        let sent = (0..10_000).take_while(|_| outbox.event(&event).is_ok()).count();
        assert_eq!(sent, BYTES_MAX / 1000);
        assert!(!outbox.wait_for_room());
        assert_eq!(outbox.take(), None);
    }

    #[test]
    fn what_is_being_sent_still_counts() {
        let outbox = Outbox::default();
        outbox.want_events();
        let event: Arc<[u8]> = vec![0; BYTES_MAX].into();
        outbox.event(&event).unwrap();
        assert!(outbox.take().is_some());
        assert_eq!(outbox.event(&line("x")), Err(Overflow));
    }

    #[test]
    fn before_it_has_negotiated_a_client_gets_no_events() {
        let outbox = Outbox::default();
        outbox.event(&line("event")).unwrap();
        outbox.send(line("greeting"));
        outbox.finish();
        assert_eq!(outbox.take().unwrap(), b"greeting");
        outbox.sent();
        assert_eq!(outbox.take(), None);
    }
}
