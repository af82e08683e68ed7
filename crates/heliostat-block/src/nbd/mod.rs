//! The NBD protocol as bytes in, bytes out: what a server and a client say to each other, and nothing of how
//! the bytes travel.
//!
//! A server's connection is first a [`handshake::Handshake`], then [`request::Requests`], which hands out
//! each request together with the [`reply::Reply`] that it is owed. A client's is first a
//! [`client::Negotiation`], then [`client_reply::Conversation`]. All of them eat from the front of the bytes
//! that were received, leave what is incomplete for the next time, and answer any bytes whatever with a value
//! or a [`Violation`], never with a panic.
//!
//! Nothing here opens a socket, waits, or takes more memory than [`crate::limits`] says. Called by the NBD
//! front end, by the demo's guest, and by the NBD storage.
//!
//! The specification is <https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md>; comments below
//! call it "the document".

pub mod client;
pub mod client_reply;
pub mod client_request;
pub mod context;
pub mod handshake;
mod header;
pub mod link;
mod option;
pub mod outbox;
pub mod reply;
pub mod request;
#[cfg(test)]
mod tests;
pub mod wire;

use crate::error::ErrorKind;
use crate::limits::NBD_PAYLOAD_MAX;
use crate::storage::Traits;

/// The id that a client gave to a request; every reply carries it back.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Cookie(pub u64);

/// A breach of the protocol after which the two sides no longer agree where a message starts, or after which
/// the document wants the connection closed. Nothing can be answered any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Violation {
    /// A message did not start with its magic number.
    #[error("expected magic {expected:#x}, found {found:#x}")]
    Magic {
        /// What the document wants.
        expected: u64,
        /// What came.
        found: u64,
    },
    /// The client set flags that the server did not offer.
    #[error("unknown client flags {0:#x}")]
    ClientFlags(u32),
    /// The handshake went on for longer than any client needs.
    #[error("the handshake exceeded its bound of {0} {1}")]
    HandshakeBound(usize, &'static str),
    /// The client asked for an export by a message that cannot be answered with an error.
    #[error("the client chose an export that does not exist")]
    UnknownExport,
    /// The client asked for an export in plain text by a message that cannot be answered with an error.
    #[error("the client chose an export without the TLS that is required")]
    TlsRequired,
    /// Something came in plain text after TLS was agreed on. The peer waits before it says anything there, so
    /// this is somebody else's.
    #[error("plain text after TLS was agreed on")]
    PlainAfterStartTls,
    /// The client asked for extended headers, and then for an export by the message that cannot have them.
    #[error("the client chose its export by EXPORT_NAME after EXTENDED_HEADERS")]
    OldExportName,
    /// A payload is too long to be skipped.
    #[error("a payload of {0} bytes is too long")]
    PayloadTooLong(u64),
    /// The peer spoke after its goodbye.
    #[error("a message after the last one")]
    AfterEnd,
    /// The server (seen from a client) sent something that makes no sense.
    #[error("the server sent {0}")]
    Server(&'static str),
}

/// The error numbers that may be sent in a reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Errno {
    /// `NBD_EPERM`: the export is read-only.
    Permission,
    /// `NBD_EIO`.
    Io,
    /// `NBD_ENOMEM`.
    Memory,
    /// `NBD_EINVAL`.
    Invalid,
    /// `NBD_ENOSPC`, also for a write beyond the end.
    NoSpace,
    /// `NBD_EOVERFLOW`: too long for one reply.
    Overflow,
    /// `NBD_ENOTSUP`: zeroing would not be fast.
    NotSupported,
    /// `NBD_ESHUTDOWN`: the server is going away.
    Shutdown,
}

impl Errno {
    const ALL: [Self; 8] = [
        Self::Permission,
        Self::Io,
        Self::Memory,
        Self::Invalid,
        Self::NoSpace,
        Self::Overflow,
        Self::NotSupported,
        Self::Shutdown,
    ];

    /// The number on the wire.
    #[must_use]
    pub const fn code(self) -> u32 {
        match self {
            Self::Permission => 1,
            Self::Io => 5,
            Self::Memory => 12,
            Self::Invalid => 22,
            Self::NoSpace => 28,
            Self::Overflow => 75,
            Self::NotSupported => 95,
            Self::Shutdown => 108,
        }
    }

    /// The meaning of a number from the wire; one that is not in the document's list counts as
    /// [`Errno::Invalid`], as the document says.
    #[must_use]
    pub fn from_code(code: u32) -> Self {
        Self::ALL.into_iter().find(|errno| errno.code() == code).unwrap_or(Self::Invalid)
    }
}

impl From<ErrorKind> for Errno {
    fn from(kind: ErrorKind) -> Self {
        match kind {
            ErrorKind::InvalidRequest => Self::Invalid,
            ErrorKind::ReadOnly => Self::Permission,
            ErrorKind::NoSpace => Self::NoSpace,
            // Nodes say so only when asked to zero fast or not at all, and there NBD wants this number.
            ErrorKind::Unsupported => Self::NotSupported,
            ErrorKind::Closed => Self::Shutdown,
            ErrorKind::Io => Self::Io,
        }
    }
}

/// The document's size constraints of an export.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockSizes {
    minimum: u32,
    preferred: u32,
    payload_max: u32,
}

impl BlockSizes {
    /// What a peer may assume when nothing was said.
    pub const DEFAULT: Self = Self { minimum: 1, preferred: 4096, payload_max: NBD_PAYLOAD_MAX };

    /// Makes constraints that obey the document: powers of two, the minimum at most 64 KiB, the preferred
    /// size at least the minimum and 512, the payload at least the preferred size. Values outside are moved
    /// to the nearest that is allowed; the minimum is never made smaller than asked unless it exceeds 64 KiB.
    #[must_use]
    pub fn new(minimum: u32, preferred: u32, payload_max: u32) -> Self {
        let minimum = minimum.clamp(1, 1 << 16).next_power_of_two();
        let preferred = preferred.clamp(minimum.max(512), 1 << 24).next_power_of_two();
        Self { minimum, preferred, payload_max: payload_max.max(preferred) }
    }

    /// What a server should say of a storage with these traits.
    #[must_use]
    pub fn of(traits: Traits) -> Self {
        Self::new(traits.block_size, traits.preferred_size, NBD_PAYLOAD_MAX)
    }

    /// Offsets and lengths must be multiples of this.
    #[must_use]
    pub const fn minimum(self) -> u32 {
        self.minimum
    }

    /// Offsets and lengths had better be multiples of this.
    #[must_use]
    pub const fn preferred(self) -> u32 {
        self.preferred
    }

    /// The most bytes in one read or write.
    #[must_use]
    pub const fn payload_max(self) -> u32 {
        self.payload_max
    }

    /// Whether a client that was told nothing would break them.
    #[must_use]
    pub const fn is_stricter_than_default(self) -> bool {
        self.minimum > 1 || self.payload_max < NBD_PAYLOAD_MAX
    }
}

/// Whether an export takes writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Writes answer EPERM.
    ReadOnly,
    /// Writes are taken.
    Writable,
}

/// What the handshake may say of one export.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Offer {
    /// The name that clients ask for: at most 4096 bytes, no NUL.
    pub name: String,
    /// For people; may be empty.
    pub description: String,
    /// Bytes.
    pub size: u64,
    /// Whether it takes writes.
    pub access: Access,
    /// Its size constraints.
    pub block_sizes: BlockSizes,
    /// Whether it is what a client gets that asks for the empty name. A single export is that anyway.
    pub is_default: bool,
    /// What clients may ask of its ranges. At most [`crate::limits::NBD_CONTEXTS_MAX`]; the place of one in
    /// this list is its id, see [`context::Context::id_at`].
    pub contexts: Vec<context::Context>,
}

/// What both sides know of an export once they are through with the handshake.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Terms {
    /// The export's length in bytes.
    pub size: u64,
    /// Whether it takes writes.
    pub access: Access,
    /// Its size constraints.
    pub block_sizes: BlockSizes,
    /// How requests are answered.
    pub replies: ReplyStyle,
    /// The id of `base:allocation`, where the client selected it.
    pub allocation: Option<u32>,
}

/// How requests are answered on a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReplyStyle {
    /// One message each; a read's data follow it.
    Simple,
    /// In chunks that say what they are.
    Structured,
    /// In chunks, too; and requests and replies have extended headers, with lengths of 64 bits.
    Extended,
}

impl ReplyStyle {
    /// Whether answers come in chunks.
    #[must_use]
    pub const fn has_chunks(self) -> bool {
        matches!(self, Self::Structured | Self::Extended)
    }
}
