//! [`Conversation`]: a client's side of the NBD transmission phase: requests out, answers in.
//!
//! Believes nothing that the server says: every answer must belong to a request, lie within it, and cover it
//! before it counts as success. Data read land in the buffer that came with the request; the socket loop may
//! receive into it directly. Called by the demo's guest, by tests, and by the NBD storage.

use std::collections::BTreeMap;

use bytes::{Buf, BytesMut};

use super::client::Found;
use super::client_request::{Ask, AskError, Line};
use super::wire::{
    CHUNK_LEN, EXTENDED_CHUNK_LEN, EXTENDED_REPLY_MAGIC, REPLY_FLAG_DONE, SIMPLE_REPLY_LEN,
    SIMPLE_REPLY_MAGIC, STATE_DIRTY, STRUCTURED_REPLY_MAGIC, chunk, state,
};
use super::{Cookie, Errno, ReplyStyle, Terms, Violation};
use crate::buffer::Buffer;
use crate::convert::{u64_from, usize_from};
use crate::limits::{
    NBD_CHUNKS_MAX, NBD_EXTENTS_LEN_MAX, NBD_EXTENTS_MAX, NBD_FAILURES_MAX, NBD_OPTION_LEN_MAX,
};
use crate::range::ByteRange;
use crate::storage::{Extent, ExtentStatus};

/// A server's answer to one request.
#[derive(Debug)]
pub struct Answer {
    /// Which request.
    pub cookie: Cookie,
    /// What came of it.
    pub outcome: Result<Answered, Failure>,
}

/// What a successful answer brings.
#[derive(Debug)]
pub enum Answered {
    /// It is done.
    Done,
    /// The buffer of the read, filled.
    Data(Buffer),
    /// Contiguous extents from the start of the range on; at least one, perhaps not up to its end.
    Extents(Vec<Extent>),
}

/// What a server says of a failure.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// What kind it is.
    pub errno: Errno,
    /// For people; often empty.
    pub message: String,
}

/// A client's side of the transmission phase.
#[derive(Debug)]
pub struct Conversation {
    terms: Terms,
    flags: u16,
    next_cookie: u64,
    waiting: BTreeMap<Cookie, Waiting>,
    stage: Stage,
    /// The context selected is one that says by its lowest bit what is dirty.
    reads_bitmap: bool,
}

#[derive(Debug)]
struct Waiting {
    expects: Expects,
    failure: Option<Failure>,
    /// How often it was said to have failed.
    failures: usize,
}

#[derive(Debug)]
enum Expects {
    Done,
    Data { offset: u64, buffer: Buffer, filled: Vec<ByteRange> },
    Extents { range: ByteRange, extents: Vec<Extent> },
}

/// Where in the server's stream we are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// Before a header.
    Header,
    /// Inside data: `from..to` of the read's buffer is still to come.
    Data { cookie: Cookie, from: usize, to: usize, is_last: bool },
    /// Inside a list of extents, with so many bytes to come, the next for `at`.
    Extents { cookie: Cookie, at: u64, left: usize, is_last: bool },
}

/// What one step through the server's stream brought.
enum Eaten {
    /// Nothing more without more bytes.
    Nothing,
    /// A part of an answer.
    Part,
    /// The last part of the answer to a request.
    Last(Cookie),
}

impl Conversation {
    /// Starts the transmission phase.
    #[must_use]
    pub const fn new(found: &Found) -> Self {
        Self {
            terms: found.terms,
            flags: found.flags,
            next_cookie: 1,
            waiting: BTreeMap::new(),
            stage: Stage::Header,
            reads_bitmap: false,
        }
    }

    /// The same, where the context selected is a dirty bitmap: what is dirty counts as
    /// [`ExtentStatus::Absent`], the rest as data.
    #[must_use]
    pub const fn with_bitmap(mut self) -> Self {
        self.reads_bitmap = true;
        self
    }

    /// The rules of this connection.
    #[must_use]
    pub const fn terms(&self) -> &Terms {
        &self.terms
    }

    /// Gives back the buffers of reads that were not answered; the connection is lost.
    pub fn abandon(self) -> impl Iterator<Item = (Cookie, Buffer)> {
        self.waiting.into_iter().filter_map(|(cookie, waiting)| match waiting.expects {
            Expects::Data { buffer, .. } => Some((cookie, buffer)),
            _ => None,
        })
    }

    /// How many requests wait for their answer.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.waiting.len()
    }

    /// Appends a request to `output`.
    ///
    /// # Errors
    /// When the server could only refuse it; nothing is appended then.
    pub fn ask(&mut self, ask: Ask, output: &mut BytesMut) -> Result<Cookie, AskError> {
        let line = ask.line(&self.terms, self.flags)?;
        let cookie = Cookie(self.next_cookie);
        self.next_cookie = self.next_cookie.wrapping_add(1);
        line.put(cookie, output);
        let expects = match ask {
            Ask::Read { offset, buffer } => Expects::Data { offset, buffer, filled: Vec::new() },
            Ask::BlockStatus { range, .. } => Expects::Extents { range, extents: Vec::new() },
            _ => Expects::Done,
        };
        self.waiting.insert(cookie, Waiting { expects, failure: None, failures: 0 });
        Ok(cookie)
    }

    /// Appends the goodbye. The server answers what is in flight and closes.
    pub fn disconnect(&mut self, output: &mut BytesMut) {
        Line::disconnect(&self.terms).put(Cookie(self.next_cookie), output);
    }

    /// Takes the next answer off the front of `input`; `None` when more bytes are needed.
    ///
    /// # Errors
    /// [`Violation`] when the server broke the protocol. The connection is to be closed; requests in flight
    /// have no known outcome.
    pub fn next(&mut self, input: &mut BytesMut) -> Result<Option<Answer>, Violation> {
        let mut rest = &input[..];
        let answer = self.next_of(&mut rest);
        let eaten = input.len() - rest.len();
        input.advance(eaten);
        answer
    }

    /// As [`Conversation::next`], of bytes that stay where they are.
    ///
    /// # Errors
    /// As [`Conversation::next`].
    pub fn next_of(&mut self, input: &mut &[u8]) -> Result<Option<Answer>, Violation> {
        loop {
            let eaten = match self.stage {
                Stage::Header => self.header(input)?,
                Stage::Data { cookie, from, to, is_last } => {
                    let now = input.len().min(to - from);
                    if let Some(room) = self.payload_room() {
                        room[..now].copy_from_slice(&input[..now]);
                    }
                    input.advance(now);
                    if from + now < to {
                        self.stage = Stage::Data { cookie, from: from + now, to, is_last };
                        return Ok(None);
                    }
                    self.stage = Stage::Header;
                    Eaten::of(cookie, is_last)
                }
                Stage::Extents { cookie, at, left, is_last } => {
                    self.extents(input, cookie, at, left, is_last)?
                }
            };
            match eaten {
                Eaten::Nothing => return Ok(None),
                Eaten::Part => {}
                Eaten::Last(cookie) => return self.finish(cookie).map(Some),
            }
        }
    }

    /// Where the next bytes from the socket should go, when they are a read's data. Not empty.
    pub fn payload_room(&mut self) -> Option<&mut [u8]> {
        let Stage::Data { cookie, from, to, .. } = self.stage else { return None };
        match &mut self.waiting.get_mut(&cookie)?.expects {
            Expects::Data { buffer, .. } => buffer.get_mut(from..to).filter(|room| !room.is_empty()),
            _ => None,
        }
    }

    /// Takes note that `count` bytes were received into [`Conversation::payload_room`].
    pub fn payload_received(&mut self, count: usize) {
        if let Stage::Data { from, to, .. } = &mut self.stage {
            *from = (*from + count).min(*to);
        }
    }

    fn header(&mut self, input: &mut &[u8]) -> Result<Eaten, Violation> {
        let Some(mut magic) = input.get(..4) else { return Ok(Eaten::Nothing) };
        match magic.get_u32() {
            SIMPLE_REPLY_MAGIC if self.terms.replies != ReplyStyle::Extended => self.simple(input),
            STRUCTURED_REPLY_MAGIC if self.terms.replies == ReplyStyle::Structured => self.chunk(input),
            EXTENDED_REPLY_MAGIC if self.terms.replies == ReplyStyle::Extended => self.chunk(input),
            found => {
                let expected = match self.terms.replies {
                    ReplyStyle::Extended => EXTENDED_REPLY_MAGIC,
                    _ => SIMPLE_REPLY_MAGIC,
                };
                Err(Violation::Magic { expected: u64::from(expected), found: u64::from(found) })
            }
        }
    }

    fn waiting(&mut self, cookie: Cookie) -> Result<&mut Waiting, Violation> {
        self.waiting.get_mut(&cookie).ok_or(Violation::Server("an answer to no request"))
    }

    fn simple(&mut self, input: &mut &[u8]) -> Result<Eaten, Violation> {
        if input.len() < SIMPLE_REPLY_LEN {
            return Ok(Eaten::Nothing);
        }
        input.advance(4);
        let error = input.get_u32();
        let cookie = Cookie(input.get_u64());
        let structured = self.terms.replies.has_chunks();
        let waiting = self.waiting(cookie)?;
        if error != 0 {
            waiting.fail(error, String::new())?;
        }
        match &mut waiting.expects {
            Expects::Data { .. } if structured => Err(Violation::Server("a simple reply to a read")),
            Expects::Data { offset, buffer, filled } if error == 0 => {
                let to = buffer.len();
                fill(filled, ByteRange::from_bounds(*offset, *offset + u64_from(to)))?;
                self.stage = Stage::Data { cookie, from: 0, to, is_last: true };
                Ok(Eaten::Part)
            }
            _ => Ok(Eaten::Last(cookie)),
        }
    }

    fn chunk(&mut self, input: &mut &[u8]) -> Result<Eaten, Violation> {
        let is_extended = self.terms.replies == ReplyStyle::Extended;
        let header_len = if is_extended { EXTENDED_CHUNK_LEN } else { CHUNK_LEN };
        let Some(mut header) = input.get(4..header_len) else { return Ok(Eaten::Nothing) };
        let is_last = header.get_u16() & REPLY_FLAG_DONE != 0;
        let kind = header.get_u16();
        let cookie = Cookie(header.get_u64());
        let len = if is_extended {
            // Where the request begins, which the cookie says already.
            header.advance(8);
            usize_from(header.get_u64())
        } else {
            usize_from(u64::from(header.get_u32()))
        };
        let whole = match kind {
            chunk::NONE if len == 0 && is_last => 0,
            chunk::OFFSET_DATA if len > 8 => 8,
            chunk::OFFSET_HOLE if len == 12 => 12,
            chunk::BLOCK_STATUS | chunk::BLOCK_STATUS_EXT if len > NBD_EXTENTS_LEN_MAX => {
                return Err(Violation::Server("extents without end"));
            }
            chunk::BLOCK_STATUS if !is_extended && len >= 12 && len % 8 == 4 => 4,
            chunk::BLOCK_STATUS_EXT if is_extended && len >= 24 && len % 16 == 8 => 8,
            chunk::ERROR_BIT.. if (6..=NBD_OPTION_LEN_MAX).contains(&len) => len,
            _ => return Err(Violation::Server("a malformed chunk")),
        };
        if input.len() < header_len + whole {
            return Ok(Eaten::Nothing);
        }
        input.advance(header_len);
        let (mut head, rest) = input.split_at(whole);
        *input = rest;
        match kind {
            chunk::NONE => {
                self.waiting(cookie)?;
            }
            chunk::OFFSET_DATA => {
                let range = self.fill(cookie, head.get_u64(), u64_from(len - 8))?;
                let (from, to) = (usize_from(range.offset()), usize_from(range.end()));
                self.stage = Stage::Data { cookie, from, to, is_last };
                return Ok(Eaten::Part);
            }
            chunk::OFFSET_HOLE => {
                let range = self.fill(cookie, head.get_u64(), u64::from(head.get_u32()))?;
                self.zero(cookie, range)?;
            }
            chunk::BLOCK_STATUS | chunk::BLOCK_STATUS_EXT => {
                let at = self.start_extents(cookie, head.get_u32())?;
                if is_extended && usize_from(u64::from(head.get_u32())) != (len - 8) / 16 {
                    return Err(Violation::Server("another number of extents than it says"));
                }
                self.stage = Stage::Extents { cookie, at, left: len - whole, is_last };
                return Ok(Eaten::Part);
            }
            _ => self.error(cookie, &mut head)?,
        }
        Ok(Eaten::of(cookie, is_last))
    }

    /// Marks a part of a read as filled. Answers which part of its buffer that is.
    fn fill(&mut self, cookie: Cookie, start: u64, len: u64) -> Result<ByteRange, Violation> {
        let Expects::Data { offset, buffer, filled } = &mut self.waiting(cookie)?.expects else {
            return Err(Violation::Server("data that were not asked for"));
        };
        let whole = ByteRange::from_bounds(*offset, *offset + u64_from(buffer.len()));
        let range =
            ByteRange::new(start, len).ok().filter(|range| !range.is_empty() && whole.contains(*range));
        let Some(range) = range else { return Err(Violation::Server("data from outside the read")) };
        fill(filled, range)?;
        Ok(ByteRange::from_bounds(range.offset() - *offset, range.end() - *offset))
    }

    fn zero(&mut self, cookie: Cookie, range: ByteRange) -> Result<(), Violation> {
        if let Expects::Data { buffer, .. } = &mut self.waiting(cookie)?.expects {
            buffer[usize_from(range.offset())..usize_from(range.end())].fill(0);
        }
        Ok(())
    }

    /// Answers for which offset the first extent will be.
    fn start_extents(&mut self, cookie: Cookie, context: u32) -> Result<u64, Violation> {
        if self.terms.allocation != Some(context) {
            return Err(Violation::Server("extents of another context"));
        }
        match &self.waiting(cookie)?.expects {
            Expects::Extents { range, extents } if extents.is_empty() => Ok(range.offset()),
            _ => Err(Violation::Server("extents that were not asked for")),
        }
    }

    /// Eats extents one by one, so that a list of any length takes bounded memory: those beyond the range or
    /// beyond [`NBD_EXTENTS_MAX`] are dropped.
    fn extents(
        &mut self,
        input: &mut &[u8],
        cookie: Cookie,
        mut at: u64,
        mut left: usize,
        is_last: bool,
    ) -> Result<Eaten, Violation> {
        let reads_bitmap = self.reads_bitmap;
        let unit = if self.terms.replies == ReplyStyle::Extended { 16 } else { 8 };
        let Expects::Extents { range, extents } = &mut self.waiting(cookie)?.expects else {
            return Err(Violation::Server("extents that were not asked for"));
        };
        while left >= unit && input.len() >= unit {
            let (len, flags) = match unit {
                16 => (input.get_u64(), input.get_u64()),
                _ => (u64::from(input.get_u32()), u64::from(input.get_u32())),
            };
            left -= unit;
            if len == 0 {
                return Err(Violation::Server("an empty extent"));
            }
            let end = at.saturating_add(len);
            let part = ByteRange::from_bounds(at, end.min(range.end()));
            if !part.is_empty() && extents.len() < NBD_EXTENTS_MAX {
                let status = if reads_bitmap { dirt(flags) } else { status(flags) };
                extents.push(Extent { range: part, status });
            }
            at = end;
        }
        if left > 0 {
            self.stage = Stage::Extents { cookie, at, left, is_last };
            return Ok(Eaten::Nothing);
        }
        self.stage = Stage::Header;
        Ok(Eaten::of(cookie, is_last))
    }

    fn error(&mut self, cookie: Cookie, head: &mut &[u8]) -> Result<(), Violation> {
        let error = head.get_u32();
        let len = usize::from(head.get_u16());
        let text = head.get(..len).ok_or(Violation::Server("a malformed error"))?;
        let message = String::from_utf8_lossy(text).into_owned();
        self.waiting(cookie)?.fail(error, message)
    }

    /// The answer to a request of which nothing more will come.
    fn finish(&mut self, cookie: Cookie) -> Result<Answer, Violation> {
        let waiting = self.waiting.remove(&cookie).ok_or(Violation::Server("an answer to no request"))?;
        let outcome = match (waiting.failure, waiting.expects) {
            (Some(failure), _) => Err(failure),
            (None, Expects::Done) => Ok(Answered::Done),
            (None, Expects::Data { offset, buffer, filled }) => {
                let whole = ByteRange::from_bounds(offset, offset + u64_from(buffer.len()));
                if !whole.is_empty() && filled != [whole] {
                    return Err(Violation::Server("less data than were asked for"));
                }
                Ok(Answered::Data(buffer))
            }
            (None, Expects::Extents { extents, .. }) if extents.is_empty() => {
                return Err(Violation::Server("no extents"));
            }
            (None, Expects::Extents { extents, .. }) => Ok(Answered::Extents(extents)),
        };
        Ok(Answer { cookie, outcome })
    }
}

impl Eaten {
    const fn of(cookie: Cookie, is_last: bool) -> Self {
        if is_last { Self::Last(cookie) } else { Self::Part }
    }
}

impl Waiting {
    /// Takes note of a failure; the first one counts.
    fn fail(&mut self, error: u32, message: String) -> Result<(), Violation> {
        self.failures += 1;
        if self.failures > NBD_FAILURES_MAX {
            return Err(Violation::Server("an answer with errors without end"));
        }
        self.failure.get_or_insert(Failure { errno: Errno::from_code(error), message });
        Ok(())
    }
}

/// Adds `range` to a sorted list of ranges that do not touch.
fn fill(filled: &mut Vec<ByteRange>, range: ByteRange) -> Result<(), Violation> {
    let at = filled.partition_point(|other| other.end() < range.offset());
    let mut merged = range;
    while let Some(next) = filled.get(at).copied().filter(|next| next.offset() <= range.end()) {
        if next.overlaps(range) {
            return Err(Violation::Server("the same data twice"));
        }
        merged = ByteRange::from_bounds(merged.offset().min(next.offset()), merged.end().max(next.end()));
        filled.remove(at);
    }
    if filled.len() >= NBD_CHUNKS_MAX {
        return Err(Violation::Server("data in too many pieces"));
    }
    filled.insert(at, merged);
    Ok(())
}

/// What a dirty bitmap says, as QEMU shows it: its bit where `base:allocation` has the one of a hole, and nothing of
/// zeroes.
fn dirt(flags: u64) -> ExtentStatus {
    if flags & u64::from(STATE_DIRTY) != 0 { ExtentStatus::Absent } else { ExtentStatus::Data }
}

/// What `base:allocation` says. A hole that is not known to read as zeroes counts as data.
fn status(flags: u64) -> ExtentStatus {
    let has = |flag: u32| flags & u64::from(flag) != 0;
    match (has(state::HOLE), has(state::ZERO)) {
        (true, true) => ExtentStatus::Hole,
        (false, true) => ExtentStatus::Zero,
        (_, false) => ExtentStatus::Data,
    }
}
