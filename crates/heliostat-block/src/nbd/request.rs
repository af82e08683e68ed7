//! [`Requests`]: finds requests in the bytes that a client sent, refuses the wrong ones, and hands out the
//! others together with the [`Reply`] that each is owed.
//!
//! Written data are cut out of the receive buffer without a copy; a long payload that has not arrived whole
//! gets an aligned buffer of its own, into which the socket loop receives directly. Never executes anything,
//! never waits. Called by the NBD front end's socket loop.

use std::rc::Rc;

use bytes::{Buf, Bytes};

use super::header::Header;
use super::reply::{Replies, Reply};
use super::wire::{EXTENDED_REQUEST_LEN, cmd, cmd_flag};
use super::{Access, Cookie, Errno, ReplyStyle, Terms, Violation};
use crate::buffer::{Buffer, BufferPool};
use crate::convert::{u64_from, usize_from};
use crate::limits::{NBD_OWN_BUFFER_MIN, NBD_SKIP_MAX};
use crate::range::ByteRange;
use crate::storage::{Durability, ZeroEffort, ZeroSpace};

/// What must fit into the input at once: a header and a payload that gets no buffer of its own.
pub const INPUT_MAX: usize = EXTENDED_REQUEST_LEN + NBD_OWN_BUFFER_MIN;

/// What a client wants done. Ranges lie within the export and are aligned to its block size.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Command {
    /// Read a range, which may be empty.
    Read {
        /// What to read.
        range: ByteRange,
        /// Whether the answer may come in several chunks.
        fragments: Fragments,
    },
    /// Write data, which may be empty.
    Write {
        /// Where.
        offset: u64,
        /// What.
        data: Bytes,
        /// Whether it must be durable when answered.
        durability: Durability,
    },
    /// Make everything durable that was answered before.
    Flush,
    /// The contents are no longer needed.
    Trim {
        /// Where.
        range: ByteRange,
        /// Whether it must be durable when answered.
        durability: Durability,
    },
    /// Make a range read as zeroes.
    WriteZeroes {
        /// Where.
        range: ByteRange,
        /// Whether space must stay allocated.
        space: ZeroSpace,
        /// Whether to fail rather than be slow.
        effort: ZeroEffort,
        /// Whether it must be durable when answered.
        durability: Durability,
    },
    /// The client will access a range soon.
    Cache {
        /// Where.
        range: ByteRange,
    },
    /// Say how a range, which is not empty, is laid out.
    BlockStatus {
        /// Where.
        range: ByteRange,
        /// How much of it the client wants to hear of.
        extents: ExtentsWanted,
        /// The ids of the contexts that it wants to hear from; never none, each once.
        contexts: Rc<[u32]>,
    },
}

/// Whether a read may be answered in several chunks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fragments {
    /// It may.
    Allowed,
    /// One chunk of data (the flag `DF`).
    Forbidden,
}

/// How many extents a client wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExtentsWanted {
    /// The first only (the flag `REQ_ONE`).
    One,
    /// As many as there are, within reason.
    Many,
}

/// A request and the answer that it is owed.
#[derive(Debug)]
pub struct Request {
    /// What to do.
    pub command: Command,
    /// Where the outcome goes.
    pub reply: Reply,
}

/// What was found at the front of the input.
#[derive(Debug)]
pub enum Parsed {
    /// No whole request. Receive more: into [`Requests::payload_room`] where there is one, else behind what
    /// is left of the input, which is never more than [`INPUT_MAX`] bytes.
    Incomplete,
    /// The next request would hold more memory than the caller has left. Nothing was consumed.
    NoRoom,
    /// A request.
    Request(Request),
    /// A wrong request; the error is in the replies already.
    Refused(Errno),
    /// The client is done. Requests in flight are to be ended and answered, then the connection is closed.
    Disconnect,
}

/// Finds the requests in what a client sends.
pub struct Requests {
    terms: Terms,
    /// The ids of the contexts that were selected.
    contexts: Rc<[u32]>,
    state: State,
    pool: BufferPool,
    replies: Replies,
    /// The server is going away: nothing is handed out any more.
    shutting_down: bool,
}

#[derive(Debug)]
enum State {
    Header,
    /// Receiving the payload of a write into a buffer of its own.
    Payload(Payload),
    /// Passing over the payload of a refused write.
    Skip(u64),
    Over,
}

#[derive(Debug)]
struct Payload {
    cookie: Cookie,
    offset: u64,
    durability: Durability,
    buffer: Buffer,
    filled: usize,
}

/// What a request is about.
struct Subject {
    range: ByteRange,
    contexts: Rc<[u32]>,
}

/// Why a request is refused, and in which words.
type Refusal = (Errno, &'static str);

const GOING_AWAY: Refusal = (Errno::Shutdown, "the server is going away");

impl Requests {
    /// Makes the parser of one connection, on which the contexts with these ids were selected. Long payloads take
    /// their buffers from `pool`; refusals go to `replies`.
    #[must_use]
    pub fn new(terms: Terms, contexts: &[u32], pool: BufferPool, replies: Replies) -> Self {
        Self { terms, contexts: contexts.into(), state: State::Header, pool, replies, shutting_down: false }
    }

    /// Refuses every request from now on, as the server is going away; one whose payload is on its way too.
    /// A client that reads that is to end the connection (the document, "Terminating the transmission phase").
    pub fn shut_down(&mut self) {
        self.shutting_down = true;
        if let State::Payload(Payload { cookie, offset, buffer, filled, .. }) = &self.state {
            let (errno, message) = GOING_AWAY;
            self.replies.owe(*cookie, *offset).failed(errno, message);
            self.state = State::Skip(u64_from(buffer.len() - filled));
        }
    }

    /// Takes the next request off the front of `input`. A read or write of more than `room` bytes is left
    /// there; `room` must at some time be as large as the export's largest payload.
    ///
    /// # Errors
    /// [`Violation`] when it can no longer be known where a request starts. The connection is to be closed.
    pub fn next(&mut self, input: &mut Bytes, room: u64) -> Result<Parsed, Violation> {
        match &mut self.state {
            State::Over if input.is_empty() => return Ok(Parsed::Incomplete),
            State::Over => return Err(Violation::AfterEnd),
            State::Skip(left) => {
                let now = u64_from(input.len()).min(*left);
                input.advance(usize_from(now));
                *left -= now;
                if *left > 0 {
                    return Ok(Parsed::Incomplete);
                }
                self.state = State::Header;
            }
            State::Payload(payload) => {
                payload.take_from(input);
                return Ok(self.finish_payload());
            }
            State::Header => {}
        }
        let header = match Header::peek(input, self.terms.replies) {
            Ok(Some(header)) => header,
            Ok(None) => return Ok(Parsed::Incomplete),
            Err(violation) => {
                self.state = State::Over;
                return Err(violation);
            }
        };
        if header.kind == cmd::DISC {
            self.state = State::Over;
            input.advance(header.header_len);
            return Ok(Parsed::Disconnect);
        }
        match self.subject(header, input) {
            None => Ok(Parsed::Incomplete),
            Some(Ok(subject)) => Ok(self.take(header, subject, input, room)),
            Some(Err(refusal)) => self.refuse(header, refusal, input),
        }
    }

    /// Where the next bytes from the socket should go, when they belong to a long payload. Not empty.
    pub fn payload_room(&mut self) -> Option<&mut [u8]> {
        match &mut self.state {
            State::Payload(payload) => {
                payload.buffer.get_mut(payload.filled..).filter(|room| !room.is_empty())
            }
            _ => None,
        }
    }

    /// How long the payload is that is being received into a buffer of its own; 0 when there is none.
    #[must_use]
    pub fn receiving(&self) -> usize {
        match &self.state {
            State::Payload(payload) => payload.buffer.len(),
            State::Header | State::Skip(_) | State::Over => 0,
        }
    }

    /// Takes note that `count` bytes were received into [`Requests::payload_room`].
    pub fn payload_received(&mut self, count: usize) {
        if let State::Payload(payload) = &mut self.state {
            payload.filled = payload.buffer.len().min(payload.filled + count);
        }
    }

    /// Says whether the client stopped in the middle of a request.
    #[must_use]
    pub fn is_inside_request(&self, input: &Bytes) -> bool {
        !input.is_empty() || matches!(self.state, State::Payload(_) | State::Skip(_))
    }

    /// Decides whether a request may be carried out, and on what. Changes nothing. `None` when its payload must
    /// be there to tell.
    fn subject(&self, header: Header, input: &Bytes) -> Option<Result<Subject, Refusal>> {
        if let Err(refusal) = self.check_kind(header) {
            return Some(Err(refusal));
        }
        let all = || Rc::clone(&self.contexts);
        if header.kind != cmd::BLOCK_STATUS || header.payload == 0 {
            return Some(self.check_range(header).map(|range| Subject { range, contexts: all() }));
        }
        if !self.may_be_filter(header.payload) {
            return Some(Err((Errno::Invalid, "the payload has no length that a list of contexts has")));
        }
        let payload = header.payload_in(input)?;
        Some(self.filtered(header, payload))
    }

    /// Decides whether the client may ask for this at all.
    fn check_kind(&self, header: Header) -> Result<(), Refusal> {
        if self.shutting_down {
            return Err(GOING_AWAY);
        }
        let Terms { access, replies, .. } = self.terms;
        // With extended headers a write is to say that it has a payload; see `Header::peek` for those that do not.
        let payload = if replies == ReplyStyle::Extended { cmd_flag::PAYLOAD_LEN } else { 0 };
        let (allowed, writes) = match header.kind {
            cmd::READ => (if replies.has_chunks() { cmd_flag::DF } else { 0 }, false),
            cmd::WRITE => (payload, true),
            cmd::TRIM => (0, true),
            cmd::WRITE_ZEROES => (cmd_flag::NO_HOLE | cmd_flag::FAST_ZERO, true),
            cmd::FLUSH | cmd::CACHE => (0, false),
            cmd::BLOCK_STATUS if !self.contexts.is_empty() => (cmd_flag::REQ_ONE | payload, false),
            cmd::BLOCK_STATUS => return Err((Errno::Invalid, "no metadata context was selected")),
            _ => return Err((Errno::Invalid, "the command is unknown")),
        };
        // FUA is valid on every command once it is offered, and it always is.
        if header.flags & !(allowed | cmd_flag::FUA) != 0 {
            return Err((Errno::Invalid, "the command does not take these flags"));
        }
        if writes && access == Access::ReadOnly {
            return Err((Errno::Permission, "the export is read-only"));
        }
        Ok(())
    }

    /// Decides whether the client may ask for it there.
    fn check_range(&self, header: Header) -> Result<ByteRange, Refusal> {
        let Terms { size, block_sizes, replies, .. } = self.terms;
        if header.kind == cmd::FLUSH {
            let empty = header.offset == 0 && header.len == 0;
            let refusal = (Errno::Invalid, "a flush has neither offset nor length");
            return if empty { Ok(ByteRange::from_bounds(0, 0)) } else { Err(refusal) };
        }
        let payload_max = u64::from(block_sizes.payload_max());
        if header.len > payload_max && header.kind == cmd::WRITE {
            return Err((Errno::Invalid, "the payload is too long"));
        }
        if header.len > payload_max && header.kind == cmd::READ {
            let errno = if replies.has_chunks() { Errno::Overflow } else { Errno::Invalid };
            return Err((errno, "the read is too long"));
        }
        let inside = ByteRange::new(header.offset, header.len).ok();
        let Some(range) = inside.filter(|range| range.end() <= size) else {
            let takes_space = matches!(header.kind, cmd::WRITE | cmd::WRITE_ZEROES);
            let errno = if takes_space { Errno::NoSpace } else { Errno::Invalid };
            return Err((errno, "the request ends beyond the export"));
        };
        let unit = u64::from(block_sizes.minimum());
        let aligned = range.offset().is_multiple_of(unit);
        if !aligned || !(range.len().is_multiple_of(unit) || range.end() == size) {
            return Err((Errno::Invalid, "the request is not aligned to the block size"));
        }
        if header.kind == cmd::BLOCK_STATUS && range.is_empty() {
            return Err((Errno::Invalid, "an empty range has no status"));
        }
        Ok(range)
    }

    /// Says whether a block status may have a payload of that length: a length, and a list that is not empty and
    /// not longer than that of the contexts that were selected.
    fn may_be_filter(&self, payload: u64) -> bool {
        let ids = payload.checked_sub(8).filter(|list| list.is_multiple_of(4)).map(|list| list / 4);
        ids.is_some_and(|ids| (1..=u64_from(self.contexts.len())).contains(&ids))
    }

    /// What a block status is about whose payload says it.
    fn filtered(&self, header: Header, mut payload: Bytes) -> Result<Subject, Refusal> {
        let len = payload.try_get_u64().unwrap_or(0);
        let mut ids = Vec::new();
        while let Ok(id) = payload.try_get_u32() {
            if !self.contexts.contains(&id) || ids.contains(&id) {
                return Err((Errno::Invalid, "a context was not selected, or is named twice"));
            }
            ids.push(id);
        }
        let range = self.check_range(Header { len, ..header })?;
        Ok(Subject { range, contexts: ids.into() })
    }

    /// Takes a request that passed the check off the input, if all of it is there.
    fn take(&mut self, header: Header, subject: Subject, input: &mut Bytes, room: u64) -> Parsed {
        let Subject { range, contexts } = subject;
        if matches!(header.kind, cmd::READ | cmd::WRITE) && range.len() > room {
            return Parsed::NoRoom;
        }
        if header.kind == cmd::WRITE {
            return self.take_write(header, range, input);
        }
        // The payload of a block status is there, see `subject`.
        input.advance(header.header_len + usize_from(header.payload));
        let durability = header.durability();
        let command = match header.kind {
            cmd::READ if header.has(cmd_flag::DF) => Command::Read { range, fragments: Fragments::Forbidden },
            cmd::READ => Command::Read { range, fragments: Fragments::Allowed },
            cmd::TRIM => Command::Trim { range, durability },
            cmd::WRITE_ZEROES => Command::WriteZeroes {
                range,
                space: if header.has(cmd_flag::NO_HOLE) { ZeroSpace::Keep } else { ZeroSpace::MayUnmap },
                effort: if header.has(cmd_flag::FAST_ZERO) { ZeroEffort::FastOnly } else { ZeroEffort::Any },
                durability,
            },
            cmd::CACHE => Command::Cache { range },
            cmd::BLOCK_STATUS if header.has(cmd_flag::REQ_ONE) => {
                Command::BlockStatus { range, extents: ExtentsWanted::One, contexts }
            }
            cmd::BLOCK_STATUS => Command::BlockStatus { range, extents: ExtentsWanted::Many, contexts },
            _ => Command::Flush,
        };
        Parsed::Request(Request { command, reply: self.replies.owe(header.cookie, header.offset) })
    }

    fn take_write(&mut self, header: Header, range: ByteRange, input: &mut Bytes) -> Parsed {
        let len = usize_from(range.len());
        let (cookie, durability) = (header.cookie, header.durability());
        if input.len() >= header.header_len + len {
            input.advance(header.header_len);
            let command = Command::Write { offset: range.offset(), data: input.split_to(len), durability };
            return Parsed::Request(Request { command, reply: self.replies.owe(cookie, range.offset()) });
        }
        if len >= NBD_OWN_BUFFER_MIN {
            input.advance(header.header_len);
            let buffer = self.pool.take(len);
            let mut payload = Payload { cookie, offset: range.offset(), durability, buffer, filled: 0 };
            payload.take_from(input);
            self.state = State::Payload(payload);
        }
        Parsed::Incomplete
    }

    /// Hands out a write whose payload is there to the last byte.
    fn finish_payload(&mut self) -> Parsed {
        match std::mem::replace(&mut self.state, State::Header) {
            State::Payload(payload) if payload.filled == payload.buffer.len() => {
                let Payload { cookie, offset, durability, buffer, .. } = payload;
                let command = Command::Write { offset, data: buffer.freeze(), durability };
                Parsed::Request(Request { command, reply: self.replies.owe(cookie, offset) })
            }
            unfinished => {
                self.state = unfinished;
                Parsed::Incomplete
            }
        }
    }

    fn refuse(&mut self, header: Header, refusal: Refusal, input: &mut Bytes) -> Result<Parsed, Violation> {
        let (errno, message) = refusal;
        let skipped_max = match self.terms.replies {
            ReplyStyle::Extended => self.terms.block_sizes.payload_max(),
            ReplyStyle::Simple | ReplyStyle::Structured => NBD_SKIP_MAX,
        };
        if header.payload > u64::from(skipped_max) {
            self.state = State::Over;
            return Err(Violation::PayloadTooLong(header.payload));
        }
        if header.payload > 0 {
            self.state = State::Skip(header.payload);
        }
        input.advance(header.header_len);
        self.replies.owe(header.cookie, header.offset).failed(errno, message);
        Ok(Parsed::Refused(errno))
    }
}

impl Payload {
    /// Moves what is there from `input` into the buffer.
    fn take_from(&mut self, input: &mut Bytes) {
        let now = input.len().min(self.buffer.len() - self.filled);
        self.buffer[self.filled..self.filled + now].copy_from_slice(&input[..now]);
        input.advance(now);
        self.filled += now;
    }
}
