//! [`Outbox`]: a client's bytes that wait to be sent on one connection, payloads among them uncopied.
//!
//! Called by [`super::link::Link`], which fills it, and by the NBD storage, which sends it.

use std::collections::VecDeque;
use std::io::IoSlice;

use bytes::{Buf, Bytes, BytesMut};

use crate::span::Span;

/// The most slices handed to one send. Linux takes 1024; by 64 the cost of the call no longer shows.
const SLICES_MAX: usize = 64;

/// A payload that is shorter goes between the headers: copying it costs less than a slice of its own.
const COPY_MAX: usize = 512;

/// What a write is to put there.
#[derive(Clone, Debug)]
pub enum Payload {
    /// These bytes.
    Bytes(Bytes),
    /// What lies there when it is sent, perhaps more than once.
    Span(Span),
}

impl Payload {
    /// How many bytes it has.
    #[must_use]
    pub const fn len(&self) -> usize {
        match self {
            Self::Bytes(bytes) => bytes.len(),
            Self::Span(span) => span.len(),
        }
    }

    /// Whether it has none.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The `len` bytes of it from `from` on, which must be there.
    #[must_use]
    pub fn slice(&self, from: usize, len: usize) -> Self {
        match self {
            Self::Bytes(bytes) => Self::Bytes(bytes.slice(from..from + len)),
            Self::Span(span) => Self::Span(span.slice(from, len)),
        }
    }

    fn advance(&mut self, count: usize) {
        match self {
            Self::Bytes(bytes) => bytes.advance(count),
            Self::Span(span) => span.advance(count),
        }
    }
}

impl From<Bytes> for Payload {
    fn from(bytes: Bytes) -> Self {
        Self::Bytes(bytes)
    }
}

impl From<Span> for Payload {
    fn from(span: Span) -> Self {
        Self::Span(span)
    }
}

/// What is to be sent, in order.
#[derive(Debug, Default)]
pub struct Outbox {
    pieces: VecDeque<Payload>,
    /// Comes after all pieces.
    tail: BytesMut,
    len: usize,
}

impl Outbox {
    /// How many bytes wait.
    #[must_use]
    pub const fn len(&self) -> usize {
        self.len
    }

    /// Says whether nothing waits.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Appends what `write` appends to a buffer.
    pub(super) fn head<T>(&mut self, write: impl FnOnce(&mut BytesMut) -> T) -> T {
        let before = self.tail.len();
        let output = write(&mut self.tail);
        self.len += self.tail.len() - before;
        output
    }

    /// Appends a payload.
    pub(super) fn payload(&mut self, data: &Payload) {
        self.len += data.len();
        match data {
            Payload::Bytes(bytes) if bytes.len() < COPY_MAX => return self.tail.extend_from_slice(bytes),
            _ if data.is_empty() => return,
            _ => {}
        }
        if !self.tail.is_empty() {
            self.pieces.push_back(self.tail.split().freeze().into());
        }
        self.pieces.push_back(data.clone());
    }

    /// The span that comes next, if one does. What was sent of it is reported by [`Outbox::sent`].
    #[must_use]
    pub fn span(&self) -> Option<&Span> {
        match self.pieces.front() {
            Some(Payload::Span(span)) => Some(span),
            _ => None,
        }
    }

    /// Shows what comes next to `send`, up to the next span. What it sent of that is reported by [`Outbox::sent`].
    pub fn show<T>(&self, send: impl FnOnce(&[IoSlice<'_>]) -> T) -> T {
        let mut slices = [IoSlice::new(&[]); SLICES_MAX];
        let pieces = self.pieces.iter().map(|piece| match piece {
            Payload::Bytes(bytes) => Some(&bytes[..]),
            Payload::Span(_) => None,
        });
        let all = pieces.chain([Some(&self.tail[..])]).map_while(|piece| piece);
        let mut count = 0;
        for (slice, piece) in slices.iter_mut().zip(all.filter(|piece| !piece.is_empty())) {
            *slice = IoSlice::new(piece);
            count += 1;
        }
        send(&slices[..count])
    }

    /// Forgets the first `count` bytes: they were sent.
    pub fn sent(&mut self, count: usize) {
        debug_assert!(count <= self.len, "more was sent than waited");
        let mut left = count.min(self.len);
        self.len -= left;
        while left > 0 {
            let Some(piece) = self.pieces.front_mut() else { break };
            let now = left.min(piece.len());
            piece.advance(now);
            left -= now;
            if piece.is_empty() {
                self.pieces.pop_front();
            }
        }
        self.tail.advance(left);
    }
}

#[cfg(test)]
mod tests {
    use bytes::BufMut;

    use super::*;

    #[test]
    fn what_is_sent_in_any_pieces_is_what_was_put_in() {
        let long = Bytes::from(vec![7; 3000]);
        let build = || {
            let mut outbox = Outbox::default();
            outbox.head(|bytes| bytes.put_slice(b"first"));
            outbox.payload(&long.clone().into());
            outbox.payload(&long.slice(..10).into());
            outbox.head(|bytes| bytes.put_slice(b"second"));
            outbox.payload(&long.slice(..600).into());
            outbox
        };
        let expected = [b"first".to_vec(), vec![7; 3010], b"second".to_vec(), vec![7; 600]].concat();
        for step in [1, 3, 500, 5000] {
            let mut outbox = build();
            assert_eq!(outbox.len(), expected.len());
            let mut sent = Vec::new();
            while !outbox.is_empty() {
                let count = outbox.show(|slices| {
                    let all = slices.iter().flat_map(|slice| slice.iter().copied());
                    let before = sent.len();
                    sent.extend(all.take(step));
                    sent.len() - before
                });
                outbox.sent(count);
            }
            assert!(sent == expected, "in steps of {step}");
        }
    }
}
