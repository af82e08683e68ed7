//! [`Reply`]: the answer that a request is owed; [`Replies`]: the answers that wait to be sent.
//!
//! A `Reply` is a debt. Each of its methods pays it; dropped unpaid it answers EIO, because a client that
//! hears nothing waits for ever, and panics in debug builds, because that is our mistake. Data are not
//! copied: a queued answer is a few bytes of header and the buffer that was read into, sent together.
//! Called by the NBD front end.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::fmt;
use std::io::{self, IoSlice};
use std::rc::Rc;

use super::context::{Described, statuses};
use super::request::ExtentsWanted;
use super::wire::{
    CHUNK_LEN, EXTENDED_CHUNK_LEN, EXTENDED_REPLY_MAGIC, REPLY_FLAG_DONE, SIMPLE_REPLY_MAGIC, STRING_MAX,
    STRUCTURED_REPLY_MAGIC, chunk,
};
use super::{Cookie, Errno, ReplyStyle, Terms};
use crate::buffer::Buffer;
use crate::convert::{u64_from, usize_from};
use crate::limits::NBD_EXTENTS_MAX;
use crate::range::ByteRange;
use crate::span::Span;
use crate::tracked::Tracked;

/// The most slices handed to one send. Linux takes 1024; by 64 the cost of the call no longer shows.
const SLICES_MAX: usize = 64;

/// The answers of one connection that wait to be sent. Clones share one queue; it stays on its thread.
#[derive(Clone)]
pub struct Replies(Rc<RefCell<Queue>>);

struct Queue {
    style: ReplyStyle,
    /// Headers and other small things, in order; those before `sent` are gone.
    heads: Vec<u8>,
    sent: usize,
    pieces: VecDeque<Piece>,
    len: usize,
    /// Whether the connection can send what it has not read.
    takes_spans: bool,
    /// How many of the pieces are spans.
    spans: usize,
}

/// What comes next on the wire.
enum Piece {
    /// So many bytes of `heads`.
    Heads(usize),
    /// A buffer, from that index on.
    Data(Buffer, usize),
    /// What is sent from where it lies, of a request that is in flight until that is sent.
    Span { span: Span, _in_flight: Tracked },
}

/// The answer to one request. Must be given: see the module.
#[must_use = "a request that is not answered leaves its client waiting"]
pub struct Reply {
    to: To,
    /// `None` once it has been given.
    replies: Option<Replies>,
}

/// Whom an answer is for.
#[derive(Clone, Copy)]
struct To {
    cookie: Cookie,
    /// Where the request begins, which extended headers say again.
    offset: u64,
}

/// A part of what was read.
#[derive(Debug)]
pub enum Part {
    /// Bytes, which start there. Not empty.
    Data(u64, Buffer),
    /// Zeroes; at most 4 GiB, not empty.
    Hole(ByteRange),
}

/// Whether more chunks of a reply follow.
#[derive(Clone, Copy, PartialEq, Eq)]
enum More {
    Follow,
    No,
}

impl Replies {
    /// Makes the queue of a connection.
    #[must_use]
    pub fn new(terms: &Terms) -> Self {
        Self(Rc::new(RefCell::new(Queue {
            style: terms.replies,
            heads: Vec::new(),
            sent: 0,
            pieces: VecDeque::new(),
            len: 0,
            takes_spans: false,
            spans: 0,
        })))
    }

    /// Takes spans from now on ([`Reply::span`]). The caller sends them by [`Replies::span`] and lets none wait:
    /// see [`Replies::bring_in`].
    pub fn take_spans(&self) {
        self.0.borrow_mut().takes_spans = true;
    }

    /// The span that comes next, if one does. What was sent of it is reported by [`Replies::sent`].
    #[must_use]
    pub fn span(&self) -> Option<Span> {
        match self.0.borrow().pieces.front() {
            Some(Piece::Span { span, .. }) => Some(span.clone()),
            _ => None,
        }
    }

    /// Reads by `read` what of spans could not be sent at once, so that their requests end: no client may hold them up
    /// by not reading its answers.
    ///
    /// # Errors
    /// The first of `read`. The answer has been begun, so the connection cannot go on.
    pub fn bring_in(&self, mut read: impl FnMut(&Span) -> io::Result<Buffer>) -> io::Result<()> {
        let mut queue = self.0.borrow_mut();
        if queue.spans == 0 {
            return Ok(());
        }
        let Queue { pieces, spans, .. } = &mut *queue;
        for piece in pieces {
            if let Piece::Span { span, .. } = piece {
                *piece = Piece::Data(read(span)?, 0);
                *spans -= 1;
            }
        }
        Ok(())
    }

    /// Takes on the debt of an answer to a request that begins at `offset`.
    pub(super) fn owe(&self, cookie: Cookie, offset: u64) -> Reply {
        Reply { to: To { cookie, offset }, replies: Some(self.clone()) }
    }

    /// How many bytes wait.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.borrow().len
    }

    /// Says whether nothing waits.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Shows what comes next to `send`, up to the next span, which must not touch this queue. What it sent of that is reported by
    /// [`Replies::sent`].
    pub fn show<T>(&self, send: impl FnOnce(&[IoSlice<'_>]) -> T) -> T {
        let queue = self.0.borrow();
        let mut slices = [IoSlice::new(&[]); SLICES_MAX];
        let mut count = 0;
        let mut head = queue.sent;
        for (slice, piece) in slices.iter_mut().zip(&queue.pieces) {
            *slice = match piece {
                Piece::Span { .. } => break,
                Piece::Heads(len) => {
                    head += len;
                    IoSlice::new(&queue.heads[head - len..head])
                }
                Piece::Data(buffer, from) => IoSlice::new(&buffer[*from..]),
            };
            count += 1;
        }
        send(&slices[..count])
    }

    /// Forgets the first `count` bytes: they were sent.
    pub fn sent(&self, count: usize) {
        self.0.borrow_mut().sent(count);
    }

    #[cfg(test)]
    pub(super) fn heads_capacity(&self) -> usize {
        self.0.borrow().heads.capacity()
    }

    /// Forgets everything: the client is gone.
    pub fn clear(&self) {
        let mut queue = self.0.borrow_mut();
        let len = queue.len;
        queue.sent(len);
    }
}

impl fmt::Debug for Replies {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Replies({} bytes)", self.len())
    }
}

impl Queue {
    fn head(&mut self, bytes: &[u8]) {
        self.heads.extend_from_slice(bytes);
        self.len += bytes.len();
        match self.pieces.back_mut() {
            Some(Piece::Heads(len)) => *len += bytes.len(),
            _ => self.pieces.push_back(Piece::Heads(bytes.len())),
        }
    }

    fn data(&mut self, buffer: Buffer) {
        if !buffer.is_empty() {
            self.len += buffer.len();
            self.pieces.push_back(Piece::Data(buffer, 0));
        }
    }

    fn simple(&mut self, cookie: Cookie, error: u32) {
        let mut head = [0; super::wire::SIMPLE_REPLY_LEN];
        head[..4].copy_from_slice(&SIMPLE_REPLY_MAGIC.to_be_bytes());
        head[4..8].copy_from_slice(&error.to_be_bytes());
        head[8..].copy_from_slice(&cookie.0.to_be_bytes());
        self.head(&head);
    }

    /// The header of a chunk; `len` is that of its payload.
    fn chunk(&mut self, to: To, kind: u16, len: usize, more: More) {
        let flags = if more == More::No { REPLY_FLAG_DONE } else { 0 };
        if self.style == ReplyStyle::Extended {
            let mut head = [0; EXTENDED_CHUNK_LEN];
            head[..4].copy_from_slice(&EXTENDED_REPLY_MAGIC.to_be_bytes());
            head[4..6].copy_from_slice(&flags.to_be_bytes());
            head[6..8].copy_from_slice(&kind.to_be_bytes());
            head[8..16].copy_from_slice(&to.cookie.0.to_be_bytes());
            head[16..24].copy_from_slice(&to.offset.to_be_bytes());
            head[24..].copy_from_slice(&u64_from(len).to_be_bytes());
            return self.head(&head);
        }
        let len = u32::try_from(len).expect("payloads are bounded by limits.rs, far below 32 bits");
        let mut head = [0; CHUNK_LEN];
        head[..4].copy_from_slice(&STRUCTURED_REPLY_MAGIC.to_be_bytes());
        head[4..6].copy_from_slice(&flags.to_be_bytes());
        head[6..8].copy_from_slice(&kind.to_be_bytes());
        head[8..16].copy_from_slice(&to.cookie.0.to_be_bytes());
        head[16..].copy_from_slice(&len.to_be_bytes());
        self.head(&head);
    }

    /// One chunk of a read.
    fn part(&mut self, to: To, part: Part, more: More) {
        match part {
            Part::Data(offset, buffer) => {
                self.chunk(to, chunk::OFFSET_DATA, 8 + buffer.len(), more);
                self.head(&offset.to_be_bytes());
                self.data(buffer);
            }
            Part::Hole(range) => {
                self.chunk(to, chunk::OFFSET_HOLE, 12, more);
                self.head(&range.offset().to_be_bytes());
                // Reads are bounded by limits.rs, far below 32 bits.
                self.head(&u32::try_from(range.len()).unwrap_or(u32::MAX).to_be_bytes());
            }
        }
    }

    /// What one context says.
    fn status(&mut self, to: To, id: u32, statuses: &[(u64, u32)], more: More) {
        if self.style == ReplyStyle::Extended {
            self.chunk(to, chunk::BLOCK_STATUS_EXT, 8 + 16 * statuses.len(), more);
            self.head(&id.to_be_bytes());
            self.head(&u32::try_from(statuses.len()).unwrap_or(u32::MAX).to_be_bytes());
            for (len, flags) in statuses {
                self.head(&len.to_be_bytes());
                self.head(&u64::from(*flags).to_be_bytes());
            }
            return;
        }
        self.chunk(to, chunk::BLOCK_STATUS, 4 + 8 * statuses.len(), more);
        self.head(&id.to_be_bytes());
        for (len, flags) in statuses {
            // A request of 32 bits has no longer extents: they were cut to it.
            self.head(&u32::try_from(*len).unwrap_or(u32::MAX).to_be_bytes());
            self.head(&flags.to_be_bytes());
        }
    }

    /// The last chunk, or the only message: that it failed, and where if that is known.
    fn error(&mut self, to: To, errno: Errno, message: &str, at: Option<u64>) {
        if self.style == ReplyStyle::Simple {
            return self.simple(to.cookie, errno.code());
        }
        let message = &message[..message.floor_char_boundary(STRING_MAX)];
        let len = u16::try_from(message.len()).expect("cut to 4096 bytes just above");
        let (kind, more) = if at.is_some() { (chunk::ERROR_OFFSET, 8) } else { (chunk::ERROR, 0) };
        self.chunk(to, kind, 6 + message.len() + more, More::No);
        self.head(&errno.code().to_be_bytes());
        self.head(&len.to_be_bytes());
        self.head(message.as_bytes());
        if let Some(at) = at {
            self.head(&at.to_be_bytes());
        }
    }

    fn sent(&mut self, count: usize) {
        debug_assert!(count <= self.len, "more was sent than waited");
        let mut left = count.min(self.len);
        self.len -= left;
        while left > 0 {
            let Some(piece) = self.pieces.front_mut() else { break };
            let (now, is_whole) = match piece {
                Piece::Heads(len) => {
                    let now = left.min(*len);
                    *len -= now;
                    self.sent += now;
                    (now, *len == 0)
                }
                Piece::Data(buffer, from) => {
                    let now = left.min(buffer.len() - *from);
                    *from += now;
                    (now, *from == buffer.len())
                }
                Piece::Span { span, .. } => {
                    let now = left.min(span.len());
                    span.advance(now);
                    self.spans -= usize::from(span.is_empty());
                    (now, span.is_empty())
                }
            };
            left -= now;
            if is_whole {
                self.pieces.pop_front();
            }
        }
        // Sent headers are thrown away when they are the larger part, so that a queue that never runs empty
        // does not grow; usually it does run empty, and this moves nothing.
        if self.sent * 2 >= self.heads.len() {
            self.heads.drain(..self.sent);
            self.sent = 0;
        }
    }
}

impl Reply {
    /// The id of the request.
    #[must_use]
    pub const fn cookie(&self) -> Cookie {
        self.to.cookie
    }

    /// Says whether a read may be answered with [`Reply::parts`].
    #[must_use]
    pub fn takes_parts(&self) -> bool {
        self.replies.as_ref().is_some_and(|replies| replies.0.borrow().style.has_chunks())
    }

    /// Whether [`Reply::span`] may be the answer: the connection can send it, and nothing waits before it.
    #[must_use]
    pub fn takes_span(&self) -> bool {
        let takes = |replies: &Replies| {
            let queue = replies.0.borrow();
            queue.takes_spans && queue.len == 0
        };
        self.replies.as_ref().is_some_and(takes)
    }

    /// Answers a read at `offset` with what lies there, not empty. `tracked` is in flight until that is sent. Only where
    /// [`Reply::takes_span`].
    pub fn span(mut self, offset: u64, span: Span, tracked: Tracked) {
        self.pay(|queue, to| {
            if queue.style == ReplyStyle::Simple {
                queue.simple(to.cookie, 0);
            } else {
                queue.chunk(to, chunk::OFFSET_DATA, 8 + span.len(), More::No);
                queue.head(&offset.to_be_bytes());
            }
            queue.len += span.len();
            queue.spans += 1;
            queue.pieces.push_back(Piece::Span { span, _in_flight: tracked });
        });
    }

    /// Answers that it is done. Not for reads and block status.
    pub fn done(mut self) {
        self.pay(|queue, to| match queue.style {
            ReplyStyle::Extended => queue.chunk(to, chunk::NONE, 0, More::No),
            ReplyStyle::Simple | ReplyStyle::Structured => queue.simple(to.cookie, 0),
        });
    }

    /// Answers a read at `offset` with what was read.
    pub fn data(mut self, offset: u64, buffer: Buffer) {
        self.pay(|queue, to| match queue.style {
            ReplyStyle::Simple => {
                queue.simple(to.cookie, 0);
                queue.data(buffer);
            }
            // A chunk of data may not be empty.
            _ if buffer.is_empty() => queue.chunk(to, chunk::NONE, 0, More::No),
            _ => queue.part(to, Part::Data(offset, buffer), More::No),
        });
    }

    /// Answers a read with its parts, which cover all of it and do not overlap. Only where
    /// [`Reply::takes_parts`].
    pub fn parts(mut self, parts: Vec<Part>) {
        self.pay(|queue, to| {
            let mut parts = parts.into_iter().peekable();
            if parts.peek().is_none() {
                queue.chunk(to, chunk::NONE, 0, More::No);
            }
            while let Some(part) = parts.next() {
                let more = if parts.peek().is_some() { More::Follow } else { More::No };
                queue.part(to, part, more);
            }
        });
    }

    /// Answers a read of `range` (at most 4 GiB) by saying that it is all zeroes: as a few bytes where the
    /// client takes that, else as a buffer of zeroes.
    pub fn zeroes(self, range: ByteRange) {
        if self.takes_parts() && !range.is_empty() {
            self.parts(vec![Part::Hole(range)]);
        } else {
            self.data(range.offset(), Buffer::zeroed(usize_from(range.len())));
        }
    }

    /// Answers a block status of `range` with what each context says, by its id: ranges that start where it
    /// starts and follow on each other. What lies outside the range is left out. What is not said has no flags.
    pub fn status(mut self, range: ByteRange, wanted: ExtentsWanted, said: &[(u32, Vec<Described>)]) {
        debug_assert!(!said.is_empty(), "a block status of no context");
        let max = NBD_EXTENTS_MAX / said.len().max(1);
        self.pay(|queue, to| {
            for (index, (id, described)) in said.iter().enumerate() {
                let more = if index + 1 < said.len() { More::Follow } else { More::No };
                queue.status(to, *id, &statuses(range, described, wanted, max), more);
            }
        });
    }

    /// Answers that it failed. The message, for people, reaches clients that take structured replies.
    pub fn failed(mut self, errno: Errno, message: &str) {
        self.pay(|queue, to| queue.error(to, errno, message, None));
    }

    /// Answers that a request of several bytes failed at `offset`, which lies within it. What was read of
    /// other places may be sent before, where [`Reply::takes_parts`]; the client may use that.
    pub fn failed_at(mut self, parts: Vec<Part>, errno: Errno, message: &str, offset: u64) {
        self.pay(|queue, to| {
            if queue.style.has_chunks() {
                parts.into_iter().for_each(|part| queue.part(to, part, More::Follow));
            }
            queue.error(to, errno, message, Some(offset));
        });
    }

    fn pay(&mut self, write: impl FnOnce(&mut Queue, To)) {
        if let Some(replies) = self.replies.take() {
            write(&mut replies.0.borrow_mut(), self.to);
        }
    }
}

impl Drop for Reply {
    fn drop(&mut self) {
        if self.replies.is_some() {
            self.pay(|queue, to| queue.error(to, Errno::Io, "the server lost the request", None));
            debug_assert!(std::thread::panicking(), "request {:#x} was dropped unanswered", self.to.cookie.0);
        }
    }
}

impl fmt::Debug for Reply {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Reply({:#x})", self.to.cookie.0)
    }
}
