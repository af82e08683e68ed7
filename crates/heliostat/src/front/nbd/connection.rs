//! One NBD connection: the loop between a socket and the requests.
//!
//! A connection is one task. In each turn it receives as much as is there, starts every request in it, and
//! sends all answers that are ready in one call; requests that do not end at once go on beside each other. It
//! never drops a request that it started: when the client is gone or the server stops, it takes no more and
//! waits for those in flight; a client that sends more is told that the server is going away. Called by the
//! server's thread.

use std::future::{Future, poll_fn};
use std::io;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use bytes::Bytes;
use event_listener::EventListener;
use futures_util::future::{Either, select};
use heliostat_block::buffer::Buffer;
use heliostat_block::clock::LocalFuture;
use heliostat_block::convert::u64_from;
use heliostat_block::nbd::handshake::Agreed;
use heliostat_block::nbd::reply::Replies;
use heliostat_block::nbd::request::{Command, Parsed, Request, Requests};
use heliostat_block::span::Span;
use heliostat_host::span::read_span;
use heliostat_host::stream::Stream;

use super::budget::{REQUEST_COST, Share};
use super::exports::Client;
use super::flights::{Awake, Flights};
use super::greeting::handshake;
use super::input::{RECEIVE_LEN, receive_now};
use super::pace::Pace;
use super::patience::Patience;
use super::stint::Stint;
use super::{Shared, until_stopped};
use crate::serve::{Permit, Permits, bytes_held, carry_out, detached};

/// How long answers are kept for a client that does not read them when its connection is to end.
const LAST_ANSWERS_TIME: Duration = Duration::from_secs(3);

/// What one receive takes at most after a long payload: the next one is likely long too, and what is received
/// before its length is known must be copied into its buffer.
const RECEIVE_LEN_AFTER_LONG: usize = 8 << 10;

/// Requests of one connection in flight at once; the Linux client sends at most 128.
const REQUESTS_MAX: usize = 128;

/// Bytes of requests in flight, and of answers to be sent, of one connection: two of the largest requests.
const BYTES_MAX: u64 = 64 << 20;

/// Answers that may wait for the client to read before no more requests are taken.
const ANSWERS_MAX: usize = 512 << 10;

/// An answer of so many bytes is sent before the next request is started, while it is in the processor's cache; and
/// has gone when that begins, so that its memory, and room in the socket, are there for the next.
const ANSWERS_LONG: usize = 64 << 10;

/// From so many waiting requests on, short payloads are copied out of the receive buffer, so that one of them
/// does not keep all of it.
const PINNING_MAX: usize = 16;

/// A payload that fills less than this of its receive buffer counts as short.
const PINNING_LEN: usize = RECEIVE_LEN / 4;

/// Serves a client from its first byte to its last answer.
pub(super) async fn serve(stream: Stream, shared: &Shared) {
    let mut input = Bytes::new();
    let agreed = {
        let handshake = until_stopped(&shared.exports, handshake(stream, shared, &mut input));
        match select(pin!(handshake), shared.clock.sleep(shared.handshake_time)).await {
            Either::Left((agreed, _)) => agreed.flatten(),
            Either::Right(_) => None,
        }
    };
    let Some((stream, client, agreed)) = agreed else { return };
    let start =
        |request, permit| carry_out(Arc::clone(client.seat()), shared.buffers.clone(), request, permit);
    let mut connection = Connection::new(stream, (&client, &agreed), shared, input, start);
    poll_fn(|cx| connection.turn(cx)).await;
}

/// Whether a connection takes requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// It does.
    Serving,
    /// It refuses them, because the server is going away, until those in flight have ended; then it is closed.
    Refusing,
    /// No more: those in flight end, their answers are sent, then it is closed.
    Ending,
    /// No more, and there is nobody to send answers to.
    Gone,
}

impl Stage {
    /// Whether what the client says is read.
    fn listens(self) -> bool {
        matches!(self, Self::Serving | Self::Refusing)
    }
}

/// A connection in the transmission phase. `M` starts a request, `F` is a request that was started.
struct Connection<'a, F, M> {
    stream: Stream,
    client: &'a Client,
    shared: &'a Shared,
    awake: Awake,
    stage: Stage,
    requests: Requests,
    replies: Replies,
    /// What was received and not understood yet.
    input: Bytes,
    /// Memory for the next receive.
    spare: Option<Buffer>,
    /// Whether the last receive went straight into a long payload.
    was_long: bool,
    permits: Permits,
    share: Share,
    start: M,
    flights: Flights<F>,
    /// Whether the next request must wait for others to end.
    is_full: bool,
    /// Whether there may be more requests in the input: they were broken off for others' sake.
    has_more: bool,
    /// Whether others must end for that, or read their answers.
    is_starved: bool,
    patience: Patience,
    stint: Stint,
    last_answer: Instant,
    /// How the client reads its answers.
    reading: Pace,
    /// How it sends the payload that memory is kept for.
    sending: Pace,
    changed: EventListener,
    last_answers: Option<LocalFuture<'static, ()>>,
    /// When to look whether the client gets on.
    slow: Option<LocalFuture<'static, ()>>,
}

impl<'a, F: Future<Output = ()>, M: Fn(Request, Permit) -> F> Connection<'a, F, M> {
    fn new(
        stream: Stream,
        (client, agreed): (&'a Client, &Agreed),
        shared: &'a Shared,
        input: Bytes,
        start: M,
    ) -> Self {
        let replies = Replies::new(&agreed.terms);
        if !stream.is_tls() {
            replies.take_spans();
        }
        let pool = shared.buffers.for_payloads();
        Self {
            stream,
            client,
            shared,
            awake: Awake::new(&shared.awake, &shared.all_awake),
            stage: Stage::Serving,
            requests: Requests::new(agreed.terms, &agreed.contexts, pool, replies.clone()),
            replies,
            input,
            spare: None,
            was_long: false,
            permits: Permits::new(REQUESTS_MAX, BYTES_MAX),
            share: shared.budget.share(),
            start,
            flights: Flights::new(),
            is_full: false,
            has_more: false,
            is_starved: false,
            patience: Patience::new(),
            stint: Stint::new(Instant::now()),
            last_answer: Instant::now(),
            reading: Pace::default(),
            sending: Pace::default(),
            changed: shared.exports.listen(),
            last_answers: None,
            slow: None,
        }
    }

    /// Does what can be done now. Ready when the connection is over.
    fn turn(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        self.awake.wake();
        let mut now = Instant::now();
        self.stint = Stint::new(now);
        loop {
            let has_moved = self.step(cx);
            let before = std::mem::replace(&mut now, Instant::now());
            self.patience.took(before, now);
            if self.stage != Stage::Serving && self.flights.are_over() && self.is_through(cx) {
                return Poll::Ready(());
            }
            if !has_moved && !self.looks_on(now) {
                break;
            }
            // Giving way costs a look at the ring, so it is done for others' sake, and for the ring's now and
            // then.
            if !self.awake.is_alone() || self.stint.is_over(now) {
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
            if !has_moved {
                std::hint::spin_loop();
            }
        }
        if self.has_news(cx) {
            cx.waker().wake_by_ref();
        } else {
            // Asleep, a connection keeps no more memory than it must.
            self.spare = None;
            if self.flights.are_over() {
                self.awake.sleep();
            }
        }
        Poll::Pending
    }

    /// Gets on with what is in flight, takes requests, sends answers. Says whether anything has changed.
    fn step(&mut self, cx: &mut Context<'_>) -> bool {
        if self.stage == Stage::Serving && (self.shared.exports.is_stopping() || self.client.is_closing()) {
            self.stage = Stage::Refusing;
            self.requests.shut_down();
        }
        let mut has_moved = self.flights.poll_ended(cx);
        if self.stage.listens() {
            if self.is_full || self.has_more {
                self.take_requests(cx);
            }
            has_moved |= self.receive(cx) || self.has_more;
        }
        has_moved |= self.send();
        if !self.stage.listens() {
            self.is_starved = false;
        }
        if !self.is_starved {
            self.share.stop_waiting();
        }
        self.count_held();
        has_moved
    }

    /// Tells the server's budget what is held.
    fn count_held(&mut self) {
        let (requests, bytes) = self.permits.held();
        let kept = u64_from(self.replies.len() + self.requests.receiving());
        self.share.hold(bytes + kept + u64_from(requests) * REQUEST_COST);
    }

    /// Receives what is there and starts what is in it. Says whether anything came.
    fn receive(&mut self, cx: &mut Context<'_>) -> bool {
        if self.is_full || self.has_more {
            return false;
        }
        let mut is_long = false;
        let received = match self.requests.payload_room() {
            Some(room) => {
                is_long = true;
                let received = self.stream.recv_now(room);
                let count = received.as_ref().copied().unwrap_or(0);
                self.requests.payload_received(count);
                self.sending.moved(count);
                if self.requests.payload_room().is_none() {
                    self.sending.rest();
                }
                received
            }
            None => {
                let len = if self.was_long { RECEIVE_LEN_AFTER_LONG } else { RECEIVE_LEN };
                receive_now(&self.stream, &self.shared.buffers, &mut self.spare, len, &mut self.input)
            }
        };
        match received {
            Ok(0) => self.stage = Stage::Ending,
            // Many clients leave TLS without a word. What was cut off is no whole request, and is not carried out.
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => self.stage = Stage::Ending,
            Ok(_) => {
                self.was_long = is_long;
                self.patience.learn(self.last_answer.elapsed());
                self.take_requests(cx);
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return false,
            Err(_) => self.stage = Stage::Gone,
        }
        true
    }

    /// Starts the requests in the input, as far as there is room for them.
    fn take_requests(&mut self, cx: &mut Context<'_>) {
        self.is_full = false;
        self.has_more = false;
        self.is_starved = false;
        while self.stage.listens() {
            let Some(own_room) = self.room() else {
                self.is_full = true;
                return;
            };
            self.count_held();
            let shared_room = self.share.room().saturating_sub(REQUEST_COST);
            // What is being received is counted already: it must come to its end, or its memory waits for others
            // who wait for that memory.
            let is_receiving = self.requests.receiving() > 0;
            if shared_room == 0 && !is_receiving && self.stage == Stage::Serving {
                (self.is_full, self.is_starved) = (true, true);
                return;
            }
            match self.requests.next(&mut self.input, own_room.min(shared_room)) {
                Ok(Parsed::Request(request)) => {
                    let request = self.unpinned(request);
                    let permit = self.permits.take(bytes_held(&request.command));
                    self.flights.start((self.start)(request, permit), cx);
                    if self.replies.len() >= ANSWERS_LONG {
                        self.send();
                        if !self.replies.is_empty() {
                            self.is_full = true;
                            return;
                        }
                    }
                }
                Ok(Parsed::Refused(_)) => {}
                Ok(Parsed::NoRoom) => {
                    self.is_full = true;
                    self.is_starved = shared_room < own_room;
                    return;
                }
                Ok(Parsed::Incomplete) => return,
                // After a violation nothing more can be understood; what came before it is answered.
                Ok(Parsed::Disconnect) | Err(_) => self.stage = Stage::Ending,
            }
            // Those that end at once are bounded by nothing else. Who is to end soon goes through them all.
            if self.stage == Stage::Serving && self.stint.is_over_after_one_more(Instant::now) {
                self.has_more = true;
                return;
            }
        }
    }

    /// How many bytes the next request may hold; `None` when there may be none.
    fn room(&self) -> Option<u64> {
        let waiting = self.replies.len();
        // What is refused needs no permit, but its answer must be kept.
        let room = if self.stage == Stage::Refusing { Some(0) } else { self.permits.room() };
        let room = room.filter(|_| waiting < ANSWERS_MAX)?;
        Some(room.saturating_sub(u64_from(waiting)))
    }

    /// The same request, which does not keep a whole receive buffer for a short payload.
    fn unpinned(&self, mut request: Request) -> Request {
        if let Command::Write { data, .. } = &mut request.command
            && self.flights.len() >= PINNING_MAX
            && data.len() < PINNING_LEN
        {
            *data = detached(data);
        }
        request
    }

    /// Sends the answers that are ready. Says whether any could be sent.
    fn send(&mut self) -> bool {
        if self.stage == Stage::Gone {
            self.replies.clear();
        }
        let mut has_sent = false;
        while !self.replies.is_empty() {
            let sent = match self.replies.span() {
                Some(span) => self.stream.send_span_now(&span),
                None => self.replies.show(|slices| self.stream.send_now(slices)),
            };
            match sent {
                Ok(sent) => {
                    self.replies.sent(sent);
                    self.reading.moved(sent);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(_) => {
                    self.stage = Stage::Gone;
                    self.replies.clear();
                }
            }
            has_sent = true;
        }
        // What a client does not take at once is read now: no request is in flight for its sake.
        let bring_in = |span: &Span| read_span(span, self.shared.buffers.take(span.len()));
        if self.replies.bring_in(bring_in).is_err() {
            self.stage = Stage::Gone;
            self.replies.clear();
        }
        if self.replies.is_empty() {
            self.reading.rest();
        }
        if has_sent {
            self.last_answer = Instant::now();
        }
        has_sent
    }

    /// Says whether the last answers were sent, or have waited for long enough.
    fn is_through(&mut self, cx: &mut Context<'_>) -> bool {
        if self.replies.is_empty() {
            return true;
        }
        let clock = self.shared.clock;
        let patience = self.last_answers.get_or_insert_with(|| clock.sleep(LAST_ANSWERS_TIME));
        patience.as_mut().poll(cx).is_ready()
    }

    /// Says whether to look at the socket once more before sleeping.
    fn looks_on(&self, now: Instant) -> bool {
        self.stage == Stage::Serving
            && self.flights.are_over()
            && self.replies.is_empty()
            // Another one needs the core more.
            && self.awake.is_only_thread()
            && self.patience.looks_on(self.last_answer, now)
    }

    /// Asks to be woken by whatever can go on. Says whether something can already.
    fn has_news(&mut self, cx: &mut Context<'_>) -> bool {
        let mut has_news = false;
        if self.stage.listens() {
            if !self.is_full {
                has_news |= pin!(self.stream.readable()).poll(cx).is_ready();
            }
            if Pin::new(&mut self.changed).poll(cx).is_ready() {
                self.changed = self.shared.exports.listen();
                has_news = true;
            }
        }
        if self.is_starved {
            let was_next = self.share.is_next();
            self.share.wait(cx.waker());
            // Nobody wakes who has become the next only now.
            has_news |= !was_next && self.share.is_next();
        }
        if !self.replies.is_empty() {
            has_news |= pin!(self.stream.writable()).poll(cx).is_ready();
        }
        has_news | self.is_given_up(cx)
    }

    /// For how long the client has not got on with what only it can end; `None` where there is nothing like that.
    fn lag(&mut self) -> Option<Duration> {
        let is_reading = !self.replies.is_empty();
        // While the server does not read, it is not the client's fault.
        let is_sending = self.requests.receiving() > 0 && !self.is_full && self.stage.listens();
        if !is_reading {
            self.reading.rest();
        }
        if !is_sending {
            self.sending.rest();
        }
        let now = (is_reading || is_sending).then(Instant::now)?;
        let reading = is_reading.then(|| self.reading.lag(now));
        reading.max(is_sending.then(|| self.sending.lag(now)))
    }

    /// Gives a client up that has long not got on, if others wait for the memory that is kept for it. Says whether it
    /// did.
    fn is_given_up(&mut self, cx: &mut Context<'_>) -> bool {
        let (clock, patience) = (self.shared.clock, self.shared.slow_reader_time);
        loop {
            let Some(lag) = self.lag() else {
                self.slow = None;
                return false;
            };
            let slow = self.slow.get_or_insert_with(|| clock.sleep(patience));
            if slow.as_mut().poll(cx).is_pending() {
                return false;
            }
            self.slow = None;
            if lag >= patience && self.share.others_wait() {
                self.stage = Stage::Gone;
                return true;
            }
        }
    }
}
