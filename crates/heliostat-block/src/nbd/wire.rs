//! The numbers of the NBD protocol, under the document's names without `NBD_`.
//!
//! Those of extended headers stand in the document as reserved; what they mean is in its branch
//! <https://github.com/NetworkBlockDevice/nbd/blob/extension-ext-header/doc/proto.md>.

/// `NBDMAGIC`, the first thing that a server says.
pub const INIT_PASSWD: u64 = 0x4e42_444d_4147_4943;
/// `IHAVEOPT`, before the handshake flags and before each option.
pub const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
/// Before each reply to an option.
pub const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
/// Before each request.
pub const REQUEST_MAGIC: u32 = 0x2560_9513;
/// Before each request where extended headers were negotiated.
pub const EXTENDED_REQUEST_MAGIC: u32 = 0x21e4_1c71;
/// Before each simple reply.
pub const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
/// Before each chunk of a structured reply.
pub const STRUCTURED_REPLY_MAGIC: u32 = 0x668e_33ef;
/// Before each chunk of a reply where extended headers were negotiated.
pub const EXTENDED_REPLY_MAGIC: u32 = 0x6e8a_278c;

/// Length of the zeroes after the answer to `EXPORT_NAME`, unless the client wants none.
pub const EXPORT_NAME_ZEROES: usize = 124;
/// Length of a request without payload.
pub const REQUEST_LEN: usize = 28;
/// Length of a request with an extended header, without payload.
pub const EXTENDED_REQUEST_LEN: usize = 32;
/// Length of a simple reply without payload.
pub const SIMPLE_REPLY_LEN: usize = 16;
/// Length of a chunk without payload.
pub const CHUNK_LEN: usize = 20;
/// Length of a chunk with an extended header, without payload.
pub const EXTENDED_CHUNK_LEN: usize = 32;
/// Length of an option without its data.
pub const OPTION_LEN: usize = 16;
/// Length of a reply to an option without its data.
pub const OPTION_REPLY_LEN: usize = 20;
/// The longest string that the document allows.
pub const STRING_MAX: usize = 4096;

/// Handshake flags (server, 16 bits) and client flags (32 bits): the same two bits.
pub mod handshake_flag {
    /// Options may be answered.
    pub const FIXED_NEWSTYLE: u16 = 1 << 0;
    /// No zeroes after the answer to `EXPORT_NAME`.
    pub const NO_ZEROES: u16 = 1 << 1;
}

/// Transmission flags.
#[expect(missing_docs, reason = "the document explains them")]
pub mod transmission_flag {
    pub const HAS_FLAGS: u16 = 1 << 0;
    pub const READ_ONLY: u16 = 1 << 1;
    pub const SEND_FLUSH: u16 = 1 << 2;
    pub const SEND_FUA: u16 = 1 << 3;
    pub const ROTATIONAL: u16 = 1 << 4;
    pub const SEND_TRIM: u16 = 1 << 5;
    pub const SEND_WRITE_ZEROES: u16 = 1 << 6;
    pub const SEND_DF: u16 = 1 << 7;
    pub const CAN_MULTI_CONN: u16 = 1 << 8;
    pub const SEND_CACHE: u16 = 1 << 10;
    pub const SEND_FAST_ZERO: u16 = 1 << 11;
    pub const BLOCK_STATUS_PAYLOAD: u16 = 1 << 12;
}

/// Options.
#[expect(missing_docs, reason = "the document explains them")]
pub mod opt {
    pub const EXPORT_NAME: u32 = 1;
    pub const ABORT: u32 = 2;
    pub const LIST: u32 = 3;
    pub const STARTTLS: u32 = 5;
    pub const INFO: u32 = 6;
    pub const GO: u32 = 7;
    pub const STRUCTURED_REPLY: u32 = 8;
    pub const LIST_META_CONTEXT: u32 = 9;
    pub const SET_META_CONTEXT: u32 = 10;
    pub const EXTENDED_HEADERS: u32 = 11;
}

/// Replies to options.
#[expect(missing_docs, reason = "the document explains them")]
pub mod rep {
    pub const ACK: u32 = 1;
    pub const SERVER: u32 = 2;
    pub const INFO: u32 = 3;
    pub const META_CONTEXT: u32 = 4;
    pub const ERROR_BIT: u32 = 1 << 31;
    pub const ERR_UNSUP: u32 = ERROR_BIT + 1;
    pub const ERR_POLICY: u32 = ERROR_BIT + 2;
    pub const ERR_INVALID: u32 = ERROR_BIT + 3;
    pub const ERR_TLS_REQD: u32 = ERROR_BIT + 5;
    pub const ERR_UNKNOWN: u32 = ERROR_BIT + 6;
    pub const ERR_SHUTDOWN: u32 = ERROR_BIT + 7;
    pub const ERR_BLOCK_SIZE_REQD: u32 = ERROR_BIT + 8;
    pub const ERR_TOO_BIG: u32 = ERROR_BIT + 9;
    pub const ERR_EXT_HEADER_REQD: u32 = ERROR_BIT + 10;
}

/// Kinds of information about an export.
#[expect(missing_docs, reason = "the document explains them")]
pub mod info {
    pub const EXPORT: u16 = 0;
    pub const NAME: u16 = 1;
    pub const DESCRIPTION: u16 = 2;
    pub const BLOCK_SIZE: u16 = 3;
}

/// Request types.
#[expect(missing_docs, reason = "the document explains them")]
pub mod cmd {
    pub const READ: u16 = 0;
    pub const WRITE: u16 = 1;
    pub const DISC: u16 = 2;
    pub const FLUSH: u16 = 3;
    pub const TRIM: u16 = 4;
    pub const CACHE: u16 = 5;
    pub const WRITE_ZEROES: u16 = 6;
    pub const BLOCK_STATUS: u16 = 7;
}

/// Flags of a request.
#[expect(missing_docs, reason = "the document explains them")]
pub mod cmd_flag {
    pub const FUA: u16 = 1 << 0;
    pub const NO_HOLE: u16 = 1 << 1;
    pub const DF: u16 = 1 << 2;
    pub const REQ_ONE: u16 = 1 << 3;
    pub const FAST_ZERO: u16 = 1 << 4;
    pub const PAYLOAD_LEN: u16 = 1 << 5;
}

/// The flag of a chunk after which no other chunk of its reply follows.
pub const REPLY_FLAG_DONE: u16 = 1 << 0;

/// Types of chunks.
#[expect(missing_docs, reason = "the document explains them")]
pub mod chunk {
    pub const NONE: u16 = 0;
    pub const OFFSET_DATA: u16 = 1;
    pub const OFFSET_HOLE: u16 = 2;
    pub const BLOCK_STATUS: u16 = 5;
    pub const BLOCK_STATUS_EXT: u16 = 6;
    pub const ERROR_BIT: u16 = 1 << 15;
    pub const ERROR: u16 = ERROR_BIT + 1;
    pub const ERROR_OFFSET: u16 = ERROR_BIT + 2;
}

/// The one metadata context of the document.
pub const BASE_ALLOCATION: &str = "base:allocation";
/// The context of QEMU's that says in which layer of a chain a range is.
pub const QEMU_ALLOCATION_DEPTH: &str = "qemu:allocation-depth";
/// What a context of QEMU's starts with that says what a dirty bitmap holds; the bitmap's name follows.
pub const QEMU_DIRTY_BITMAP: &str = "qemu:dirty-bitmap:";

/// Status flags of `base:allocation`.
#[expect(missing_docs, reason = "the document explains them")]
pub mod state {
    pub const HOLE: u32 = 1 << 0;
    pub const ZERO: u32 = 1 << 1;
}

/// The status flag of `qemu:dirty-bitmap:`: the range is dirty.
pub const STATE_DIRTY: u32 = 1 << 0;
