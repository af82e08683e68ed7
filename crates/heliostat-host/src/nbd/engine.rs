//! [`Engine`]: the thread that has the connections of one storage, and the loop on it.
//!
//! Carries out what a [`Link`] decides: makes connections, sends, receives, wakes who waits. Decides nothing about
//! requests. Started by the storage; ends when that is dropped.

use std::collections::BTreeMap;
use std::future::poll_fn;
use std::hash::{BuildHasher, RandomState};
use std::io;
use std::pin::pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use heliostat_block::clock::{Clock, LocalFuture, Moment};
use heliostat_block::nbd::client::Found;
use heliostat_block::nbd::link::{Link, LinkSettings, LinkState, LinkStatus, Ticket};

use super::connect::{Destination, Reached, reach};
use super::mailbox::{Letter, Mailbox, Owed, Post};
use crate::clock::RealClock;
use crate::stream::Stream;

/// What one receive takes at most: 60 reads of 4 KiB, so that their cost is shared by many.
const RECEIVE_LEN: usize = 256 << 10;

/// What one receive takes at most after a long payload: the next one is likely long too, and what is received before
/// its length is known must be copied into its buffer.
const RECEIVE_LEN_AFTER_LONG: usize = 8 << 10;

/// From this length on a payload is received into its buffer directly.
const DIRECT_MIN: usize = 16 << 10;

/// Receives from one connection before the others and the thread's other work have their turn: a server can send without
/// end.
const RECEIVES_MAX: usize = 16;

/// How long the loop may go on before the thread looks at its ring.
const TURN_MAX: Duration = Duration::from_micros(50);

/// How long answers are waited for when the storage is gone, before the connections are closed.
const GOODBYE_TIME: Duration = Duration::from_secs(1);

/// What the storage sees of the thread.
pub(super) struct Board {
    losses: AtomicU64,
    /// How it was, and when. Held to copy.
    status: Mutex<(LinkStatus, Moment)>,
    reconnect_delay: Duration,
    clock: RealClock,
}

impl Board {
    pub(super) fn new(clock: RealClock, reconnect_delay: Duration) -> Arc<Self> {
        let status = LinkStatus {
            state: LinkState::Opening,
            reason: None,
            lasted: Duration::ZERO,
            connections: 0,
            reconnects: 0,
            losses: 0,
            found: None,
        };
        let status = Mutex::new((status, clock.now()));
        Arc::new(Self { losses: AtomicU64::new(0), status, reconnect_delay, clock })
    }

    pub(super) fn losses(&self) -> u64 {
        self.losses.load(Ordering::Acquire)
    }

    pub(super) fn status(&self) -> LinkStatus {
        let (mut status, at) = self.lock().clone();
        status.lasted += self.clock.now().since(at);
        if status.state == LinkState::Waiting && status.lasted >= self.reconnect_delay {
            status.state = LinkState::Down;
        }
        status
    }

    fn tell(&self, status: LinkStatus, now: Moment) {
        *self.lock() = (status, now);
    }

    fn lock(&self) -> MutexGuard<'_, (LinkStatus, Moment)> {
        self.status.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// How the first connection came about.
pub(super) type Opened = io::Result<Found>;

/// Says once how the first connection came about.
pub(super) type TellOpened = Box<dyn FnOnce(Opened) + Send>;

/// What becomes of one connection.
enum Place {
    Empty,
    Connecting(LocalFuture<'static, Result<Reached, String>>),
    Up(Box<Wire>),
}

/// A connection in the transmission phase.
struct Wire {
    stream: Stream,
    inbox: Inbox,
}

/// What was received and not understood yet.
struct Inbox {
    memory: Vec<u8>,
    from: usize,
    to: usize,
    was_long: bool,
}

/// The connections of one storage.
pub(super) struct Engine {
    link: Link,
    destination: Destination,
    mailbox: Arc<Mailbox>,
    board: Arc<Board>,
    clock: RealClock,
    places: Vec<Place>,
    owed: BTreeMap<Ticket, Owed>,
    tell_opened: Option<(TellOpened, Moment)>,
    timer: Option<(Moment, LocalFuture<'static, ()>)>,
    /// Until when the last answers are waited for.
    goodbye: Option<Moment>,
    chance: RandomState,
    dice: u64,
}

impl Engine {
    pub(super) fn new(
        destination: Destination,
        settings: LinkSettings,
        mailbox: Arc<Mailbox>,
        board: Arc<Board>,
        (tell_opened, open_timeout): (TellOpened, Duration),
    ) -> Self {
        let clock = board.clock;
        let now = clock.now();
        let places = (0..settings.connections.max(1)).map(|_| Place::Empty).collect();
        Self {
            link: Link::new(settings, now),
            destination,
            mailbox,
            board,
            clock,
            places,
            owed: BTreeMap::new(),
            tell_opened: Some((tell_opened, now + open_timeout)),
            timer: None,
            goodbye: None,
            chance: RandomState::new(),
            dice: 0,
        }
    }

    /// Runs until the storage is gone, or until it could not be opened.
    pub(super) async fn run(mut self) {
        poll_fn(|cx| self.turn(cx)).await;
    }

    /// Does what can be done now. Ready when it is over.
    fn turn(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let began = Instant::now();
        loop {
            let now = self.clock.now();
            let mut has_moved = self.take_mail(cx);
            has_moved |= self.connect(cx, now);
            self.cut_overdue(now);
            self.link.hand_out(now);
            has_moved |= self.send_and_receive(now);
            self.link.hand_out(now);
            has_moved |= self.deliver();
            if self.is_over(now) {
                return Poll::Ready(());
            }
            if !has_moved && !self.has_news(cx) {
                return Poll::Pending;
            }
            if began.elapsed() >= TURN_MAX {
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
        }
    }

    fn take_mail(&mut self, cx: &Context<'_>) -> bool {
        let Post { letters, given_up, has_let_go } = self.mailbox.take(cx.waker());
        let has_moved = !letters.is_empty() || given_up.is_some() || has_let_go;
        let mut letters = letters.into_iter();
        if let Some(count) = given_up {
            letters.by_ref().take(count).for_each(|letter| self.submit(letter));
            let now = self.clock.now();
            self.link.give_up(now);
            self.tell(now);
        }
        letters.for_each(|letter| self.submit(letter));
        if has_let_go {
            let let_go = self.owed.iter().filter(|(_, owed)| owed.is_let_go());
            let let_go: Vec<_> = let_go.map(|(ticket, _)| *ticket).collect();
            let_go.into_iter().for_each(|ticket| self.link.let_go(ticket));
        }
        has_moved
    }

    fn submit(&mut self, letter: Letter) {
        let ticket = self.link.submit(letter.wanted);
        self.owed.insert(ticket, letter.owed);
    }

    /// Closes connections that owe what nobody needs.
    fn cut_overdue(&mut self, now: Moment) {
        for line in self.link.overdue(now) {
            self.cut(line, "it did not answer, and was given up", now);
        }
    }

    /// Closes a connection that is lost, and those that the link wants no more for that.
    fn cut(&mut self, line: usize, reason: &str, now: Moment) {
        self.places[line] = Place::Empty;
        let jitter = self.throw();
        self.link.cut(line, reason, now, jitter);
        self.sweep();
        self.tell(now);
    }

    /// Closes the connections that the link does not want any more.
    fn sweep(&mut self) {
        for (line, place) in self.places.iter_mut().enumerate() {
            if !self.link.is_wanted(line) {
                *place = Place::Empty;
            }
        }
    }

    /// Makes the connections that the link wants, and takes in those that have come about or have failed.
    fn connect(&mut self, cx: &mut Context<'_>, now: Moment) -> bool {
        let mut has_moved = false;
        while let Some(line) = self.link.next_to_connect(now) {
            let attempt = reach(self.destination.clone(), self.clock);
            self.places[line] = Place::Connecting(Box::pin(attempt));
        }
        for line in 0..self.places.len() {
            let Place::Connecting(attempt) = &mut self.places[line] else { continue };
            let Poll::Ready(reached) = attempt.as_mut().poll(cx) else { continue };
            has_moved = true;
            self.places[line] = Place::Empty;
            let jitter = self.throw();
            let failed = match reached {
                Ok(reached) => {
                    let failed = self.take_in(line, reached, now, jitter).err();
                    self.sweep();
                    failed
                }
                Err(reason) => {
                    self.link.connect_failed(line, reason.clone(), now, jitter);
                    Some(reason)
                }
            };
            if let Some(reason) = failed {
                self.open_failed(reason, now);
            }
            self.tell(now);
        }
        has_moved
    }

    fn take_in(&mut self, line: usize, reached: Reached, now: Moment, jitter: u32) -> Result<(), String> {
        let Reached { stream, found, rest } = reached;
        self.link.connected(line, found.clone(), now, jitter)?;
        let wire = Wire { stream, inbox: Inbox::of(&rest) };
        self.places[line] = Place::Up(Box::new(wire));
        // Before anybody who waits for the opening looks.
        self.tell(now);
        if let Some((tell_opened, _)) = self.tell_opened.take() {
            tell_opened(Ok(found));
        }
        Ok(())
    }

    /// Gives up, where it has never been open and its time is over.
    fn open_failed(&mut self, reason: String, now: Moment) {
        if let Some((tell_opened, deadline)) = self.tell_opened.take() {
            if now < deadline {
                self.tell_opened = Some((tell_opened, deadline));
            } else {
                self.link.close(now);
                tell_opened(Err(io::Error::other(reason)));
            }
        }
    }

    fn send_and_receive(&mut self, now: Moment) -> bool {
        let mut has_moved = false;
        for line in 0..self.places.len() {
            let Place::Up(wire) = &mut self.places[line] else { continue };
            match wire.turn(&mut self.link, line) {
                Ok(moved) => has_moved |= moved,
                Err(reason) => {
                    has_moved = true;
                    self.cut(line, &reason, now);
                }
            }
        }
        has_moved
    }

    fn deliver(&mut self) -> bool {
        let mut has_moved = false;
        while let Some((ticket, outcome)) = self.link.next_ended() {
            has_moved = true;
            if let Some(owed) = self.owed.remove(&ticket) {
                owed.pay(outcome);
            }
        }
        has_moved
    }

    /// Lets others see how the link is. To be called before answers are given that a change is behind.
    fn tell(&self, now: Moment) {
        self.board.losses.store(self.link.losses(), Ordering::Release);
        self.board.tell(self.link.status(now), now);
    }

    fn is_over(&mut self, now: Moment) -> bool {
        if self.goodbye.is_none() && (self.mailbox.is_abandoned() || self.is_closed(now)) {
            self.goodbye = Some(now + GOODBYE_TIME);
            self.link.close(now);
            self.tell(now);
        }
        let Some(deadline) = self.goodbye else { return false };
        let is_quiet = self.owed.is_empty() && (0..self.places.len()).all(|line| self.is_sent(line));
        is_quiet || now >= deadline
    }

    fn is_closed(&self, now: Moment) -> bool {
        self.link.status(now).state == LinkState::Closed
    }

    fn is_sent(&mut self, line: usize) -> bool {
        match &self.places[line] {
            Place::Up(_) => self.link.outbox(line).is_none_or(|outbox| outbox.is_empty()),
            _ => true,
        }
    }

    /// Asks to be woken by whatever can go on. Says whether something can already.
    fn has_news(&mut self, cx: &mut Context<'_>) -> bool {
        let mut has_news = false;
        for (line, place) in self.places.iter_mut().enumerate() {
            let Place::Up(wire) = place else { continue };
            has_news |= pin!(wire.stream.readable()).poll(cx).is_ready();
            if self.link.outbox(line).is_some_and(|outbox| !outbox.is_empty()) {
                has_news |= pin!(wire.stream.writable()).poll(cx).is_ready();
            }
        }
        let wakes_at = [self.link.wakes_at(), self.goodbye].into_iter().flatten().min();
        if self.timer.as_ref().map(|(at, _)| *at) != wakes_at {
            self.timer = wakes_at.map(|at| (at, self.clock.sleep_until(at)));
        }
        if let Some((_, timer)) = &mut self.timer
            && timer.as_mut().poll(cx).is_ready()
        {
            self.timer = None;
            has_news = true;
        }
        has_news
    }

    /// Another number each time.
    fn throw(&mut self) -> u32 {
        self.dice += 1;
        let [a, b, c, d, ..] = self.chance.hash_one(self.dice).to_le_bytes();
        u32::from_le_bytes([a, b, c, d])
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        // Whatever ended it: nobody may wait for an answer that does not come.
        self.mailbox.shut();
    }
}

impl Wire {
    /// Sends what there is room for, and takes in what is there, up to a bound. Says whether anything moved; or why the
    /// connection is lost.
    fn turn(&mut self, link: &mut Link, line: usize) -> Result<bool, String> {
        let has_moved = self.send(link, line).map_err(|error| error.to_string())?;
        Ok(self.inbox.fill(link, line, |room| self.stream.recv_now(room))? || has_moved)
    }

    fn send(&mut self, link: &mut Link, line: usize) -> io::Result<bool> {
        let mut has_moved = false;
        if let Some(outbox) = link.outbox(line) {
            while !outbox.is_empty() {
                let sent = match outbox.span() {
                    Some(span) => self.stream.send_span_now(span),
                    None => outbox.show(|slices| self.stream.send_now(slices)),
                };
                match sent {
                    Ok(count) => outbox.sent(count),
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                    Err(error) => return Err(error),
                }
                has_moved = true;
            }
        }
        Ok(has_moved)
    }
}

impl Inbox {
    fn of(rest: &[u8]) -> Self {
        let mut memory = vec![0; RECEIVE_LEN];
        memory[..rest.len()].copy_from_slice(rest);
        Self { memory, from: 0, to: rest.len(), was_long: false }
    }

    /// Takes in what there is on a connection, up to [`RECEIVES_MAX`] times. Says whether there was something, in which
    /// case there may be more; or why the connection is lost.
    fn fill(
        &mut self,
        link: &mut Link,
        line: usize,
        mut receive: impl FnMut(&mut [u8]) -> io::Result<usize>,
    ) -> Result<bool, String> {
        for round in 0..RECEIVES_MAX {
            let received = match link.payload_room(line) {
                Some(room) if room.len() >= DIRECT_MIN && self.is_empty() => {
                    self.was_long = true;
                    receive(room).inspect(|count| link.payload_received(line, *count))
                }
                _ => receive(self.room()).inspect(|count| self.to += count),
            };
            match received {
                Ok(0) => return Err("the server closed the connection".to_owned()),
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(round > 0),
                Err(error) => return Err(error.to_string()),
            }
            let mut input = self.bytes();
            let before = input.len();
            let understood = link.receive(line, &mut input);
            let eaten = before - input.len();
            self.from += eaten;
            understood.map_err(|violation| violation.to_string())?;
        }
        Ok(true)
    }

    const fn is_empty(&self) -> bool {
        self.from == self.to
    }

    fn bytes(&self) -> &[u8] {
        &self.memory[self.from..self.to]
    }

    /// Where the next bytes go. Not empty: what is not understood yet is much shorter than the whole.
    fn room(&mut self) -> &mut [u8] {
        self.memory.copy_within(self.from..self.to, 0);
        self.to -= self.from;
        self.from = 0;
        let end = if std::mem::take(&mut self.was_long) {
            (self.to + RECEIVE_LEN_AFTER_LONG).min(self.memory.len())
        } else {
            self.memory.len()
        };
        &mut self.memory[self.to..end]
    }
}

#[cfg(test)]
mod tests {
    use heliostat_block::buffer::Buffer;
    use heliostat_block::nbd::link::Wanted;
    use heliostat_block::nbd::wire::SIMPLE_REPLY_MAGIC;
    use heliostat_block::nbd::{Access, BlockSizes, ReplyStyle, Terms};

    use super::*;

    #[test]
    fn a_server_that_sends_without_end_does_not_keep_the_thread_for_ever() {
        let settings = LinkSettings { reconnect_delay: Duration::ZERO, connections: 1, reads_bitmap: false };
        let mut link = Link::new(settings, Moment::START);
        let line = link.next_to_connect(Moment::START).unwrap();
        let terms = Terms {
            size: 1 << 20,
            access: Access::Writable,
            block_sizes: BlockSizes::DEFAULT,
            replies: ReplyStyle::Simple,
            allocation: None,
        };
        let found = Found { terms, flags: 1, description: String::new() };
        link.connected(line, found, Moment::START, 0).unwrap();
        link.submit(Wanted::Read { offset: 0, buffer: Buffer::zeroed(1 << 20) });
        link.hand_out(Moment::START);
        let header = [&SIMPLE_REPLY_MAGIC.to_be_bytes()[..], &[0; 4], &1_u64.to_be_bytes()].concat();
        let mut inbox = Inbox::of(&[]);
        let mut receives = 0;
        let has_moved = inbox.fill(&mut link, line, |room| {
            receives += 1;
            let bytes = if receives == 1 { &header[..] } else { &[7][..] };
            room[..bytes.len()].copy_from_slice(bytes);
            Ok(bytes.len())
        });
        assert_eq!((has_moved, receives), (Ok(true), RECEIVES_MAX));
    }
}
