//! [`Reply`]: the answer that a request is owed; [`Replies`]: the answers that wait to be sent.
//!
//! A `Reply` is a debt. Each of its methods pays it; dropped unpaid it answers EIO, because a client that
//! hears nothing waits for ever, and panics in debug builds, because that is our mistake. Data are not
//! copied: a queued answer is a few bytes of header and the buffer that was read into, sent together.
//! Called by the NBD front end.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::fmt;
use std::io::IoSlice;
use std::rc::Rc;

use super::request::ExtentsWanted;
use super::wire::{
    CHUNK_LEN, REPLY_FLAG_DONE, SIMPLE_REPLY_MAGIC, STRING_MAX, STRUCTURED_REPLY_MAGIC, chunk, state,
};
use super::{Cookie, Errno, ReplyStyle, Terms};
use crate::buffer::Buffer;
use crate::convert::usize_from;
use crate::limits::NBD_EXTENTS_MAX;
use crate::range::ByteRange;
use crate::storage::{Extent, ExtentStatus};

/// The most slices handed to one send. Linux takes 1024; by 64 the cost of the call no longer shows.
const SLICES_MAX: usize = 64;

/// The answers of one connection that wait to be sent. Clones share one queue; it stays on its thread.
#[derive(Clone)]
pub struct Replies(Rc<RefCell<Queue>>);

struct Queue {
    style: ReplyStyle,
    allocation: u32,
    /// Headers and other small things, in order; those before `sent` are gone.
    heads: Vec<u8>,
    sent: usize,
    pieces: VecDeque<Piece>,
    len: usize,
}

/// What comes next on the wire.
enum Piece {
    /// So many bytes of `heads`.
    Heads(usize),
    /// A buffer, from that index on.
    Data(Buffer, usize),
}

/// The answer to one request. Must be given: see the module.
#[must_use = "a request that is not answered leaves its client waiting"]
pub struct Reply {
    cookie: Cookie,
    /// `None` once it has been given.
    replies: Option<Replies>,
}

impl Replies {
    /// Makes the queue of a connection.
    #[must_use]
    pub fn new(terms: &Terms) -> Self {
        Self(Rc::new(RefCell::new(Queue {
            style: terms.replies,
            allocation: terms.allocation.unwrap_or(0),
            heads: Vec::new(),
            sent: 0,
            pieces: VecDeque::new(),
            len: 0,
        })))
    }

    /// Takes on the debt of an answer.
    pub(super) fn owe(&self, cookie: Cookie) -> Reply {
        Reply { cookie, replies: Some(self.clone()) }
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

    /// Shows what comes next to `send`, which must not touch this queue. What it sent of that is reported by
    /// [`Replies::sent`].
    pub fn show<T>(&self, send: impl FnOnce(&[IoSlice<'_>]) -> T) -> T {
        let queue = self.0.borrow();
        let mut slices = [IoSlice::new(&[]); SLICES_MAX];
        let mut count = 0;
        let mut head = queue.sent;
        for (slice, piece) in slices.iter_mut().zip(&queue.pieces) {
            *slice = match piece {
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

    /// The header of a chunk after which none follows; `len` is that of its payload.
    fn chunk(&mut self, cookie: Cookie, kind: u16, len: usize) {
        let len = u32::try_from(len).expect("payloads are bounded by limits.rs, far below 32 bits");
        let mut head = [0; CHUNK_LEN];
        head[..4].copy_from_slice(&STRUCTURED_REPLY_MAGIC.to_be_bytes());
        head[4..6].copy_from_slice(&REPLY_FLAG_DONE.to_be_bytes());
        head[6..8].copy_from_slice(&kind.to_be_bytes());
        head[8..16].copy_from_slice(&cookie.0.to_be_bytes());
        head[16..].copy_from_slice(&len.to_be_bytes());
        self.head(&head);
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
        self.cookie
    }

    /// Answers that it is done. Not for reads and block status.
    pub fn done(mut self) {
        self.pay(|queue, cookie| queue.simple(cookie, 0));
    }

    /// Answers a read at `offset` with what was read.
    pub fn data(mut self, offset: u64, buffer: Buffer) {
        self.pay(|queue, cookie| {
            match queue.style {
                ReplyStyle::Simple => queue.simple(cookie, 0),
                // A chunk of data may not be empty.
                _ if buffer.is_empty() => queue.chunk(cookie, chunk::NONE, 0),
                _ => {
                    queue.chunk(cookie, chunk::OFFSET_DATA, 8 + buffer.len());
                    queue.head(&offset.to_be_bytes());
                }
            }
            queue.data(buffer);
        });
    }

    /// Answers a read of `range` (at most 4 GiB) by saying that it is all zeroes: as a few bytes where the
    /// client takes that, else as a buffer of zeroes.
    pub fn zeroes(mut self, range: ByteRange) {
        let structured =
            self.replies.as_ref().is_some_and(|replies| replies.0.borrow().style == ReplyStyle::Structured);
        match u32::try_from(range.len()) {
            Ok(len) if structured && len > 0 => self.pay(|queue, cookie| {
                queue.chunk(cookie, chunk::OFFSET_HOLE, 12);
                queue.head(&range.offset().to_be_bytes());
                queue.head(&len.to_be_bytes());
            }),
            _ => self.data(range.offset(), Buffer::zeroed(usize_from(range.len()))),
        }
    }

    /// Answers a block status of `range` with `extents`, which start where it starts and follow on each
    /// other. What lies outside the range is left out. None at all counts as data.
    pub fn extents(mut self, range: ByteRange, extents: &[Extent], wanted: ExtentsWanted) {
        let statuses = statuses(range, extents, wanted);
        self.pay(|queue, cookie| {
            queue.chunk(cookie, chunk::BLOCK_STATUS, 4 + 8 * statuses.len());
            queue.head(&queue.allocation.to_be_bytes());
            for (len, status) in statuses {
                queue.head(&len.to_be_bytes());
                queue.head(&status.to_be_bytes());
            }
        });
    }

    /// Answers that it failed. The message, for people, reaches clients that take structured replies.
    pub fn failed(mut self, errno: Errno, message: &str) {
        self.pay(|queue, cookie| queue.error(cookie, errno, message));
    }

    fn pay(&mut self, write: impl FnOnce(&mut Queue, Cookie)) {
        if let Some(replies) = self.replies.take() {
            write(&mut replies.0.borrow_mut(), self.cookie);
        }
    }
}

impl Queue {
    fn error(&mut self, cookie: Cookie, errno: Errno, message: &str) {
        if self.style == ReplyStyle::Simple {
            return self.simple(cookie, errno.code());
        }
        let message = &message[..message.floor_char_boundary(STRING_MAX)];
        let len = u16::try_from(message.len()).expect("cut to 4096 bytes just above");
        self.chunk(cookie, chunk::ERROR, 6 + message.len());
        self.head(&errno.code().to_be_bytes());
        self.head(&len.to_be_bytes());
        self.head(message.as_bytes());
    }
}

impl Drop for Reply {
    fn drop(&mut self) {
        if self.replies.is_some() {
            self.pay(|queue, cookie| queue.error(cookie, Errno::Io, "the server lost the request"));
            debug_assert!(std::thread::panicking(), "request {:#x} was dropped unanswered", self.cookie.0);
        }
    }
}

impl fmt::Debug for Reply {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Reply({:#x})", self.cookie.0)
    }
}

/// What the wire says of `extents` within `range`: lengths and status flags; neighbours of one status are
/// one. Never empty unless the range is.
fn statuses(range: ByteRange, extents: &[Extent], wanted: ExtentsWanted) -> Vec<(u32, u32)> {
    let max = if wanted == ExtentsWanted::One { 1 } else { NBD_EXTENTS_MAX };
    let mut statuses: Vec<(u32, u32)> = Vec::new();
    let mut at = range.offset();
    for extent in extents {
        let end = extent.range.end().min(range.end());
        if extent.range.offset() > at || end <= at {
            break;
        }
        let len = u32::try_from(end - at).expect("a request's length has 32 bits");
        let status = match extent.status {
            ExtentStatus::Data => 0,
            ExtentStatus::Zero => state::ZERO,
            ExtentStatus::Hole => state::HOLE | state::ZERO,
        };
        let is_full = statuses.len() == max;
        match statuses.last_mut() {
            Some((last, same)) if *same == status => *last += len,
            _ if is_full => break,
            _ => statuses.push((len, status)),
        }
        at = end;
    }
    if statuses.is_empty() && !range.is_empty() {
        statuses.push((u32::try_from(range.len()).unwrap_or(u32::MAX), 0));
    }
    statuses
}
