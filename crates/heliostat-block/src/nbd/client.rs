//! [`Negotiation`]: a client's side of the NBD handshake.
//!
//! Asks for extended headers or structured replies, and `base:allocation`, puts up with their refusal, then for the export with
//! `GO`, and by `EXPORT_NAME` from a server that knows no `GO`. Where TLS is wanted that comes first, and without it
//! nothing is said. Called by the demo's guest, by tests, and by the NBD storage; what follows is [`super::client_reply::Conversation`].

use bytes::{Buf, BufMut, BytesMut};

use super::option::string;
use super::wire::{
    BASE_ALLOCATION, EXPORT_NAME_ZEROES, INIT_PASSWD, OPTION_MAGIC, OPTION_REPLY_LEN, OPTION_REPLY_MAGIC,
    handshake_flag, info, opt, rep, transmission_flag,
};
use super::{Access, BlockSizes, ReplyStyle, Terms, Violation};
use crate::convert::usize_from;
use crate::limits::NBD_OPTION_LEN_MAX;

/// What a client asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wish {
    /// The export's name; empty for the default one.
    pub export: String,
    /// The best style of reply that it can use.
    pub replies: ReplyStyle,
    /// Whether it wants to know how the export is laid out. Needs structured replies.
    pub allocation: Allocation,
}

/// Which metadata context a client asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Allocation {
    /// `base:allocation`.
    Wanted,
    /// None.
    Unwanted,
    /// The one of this name instead, such as `qemu:dirty-bitmap:NAME`.
    Context(String),
}

impl Allocation {
    /// The context's name; `None` where none is wanted.
    #[must_use]
    pub fn context(&self) -> Option<&str> {
        match self {
            Self::Wanted => Some(BASE_ALLOCATION),
            Self::Unwanted => None,
            Self::Context(name) => Some(name),
        }
    }
}

/// Whether a client goes on in plain text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Privacy {
    /// It does.
    Plain,
    /// It says nothing but the wish for TLS until that is there.
    Wanted,
    /// TLS is there.
    Reached,
}

/// What a client got.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    /// The rules of this connection.
    pub terms: Terms,
    /// The transmission flags as the server sent them: what it can do.
    pub flags: u16,
    /// The server's description of the export; empty where it gave none.
    pub description: String,
}

/// Why a client got nothing.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NegotiationError {
    /// The server does not speak this protocol.
    #[error(transparent)]
    Violation(#[from] Violation),
    /// The server would not give the export.
    #[error("the server refused the export: {message} (reply {reply:#x})")]
    Refused {
        /// The type of its reply.
        reply: u32,
        /// What it said; may be empty.
        message: String,
    },
    /// The server would not set up TLS, which was asked for.
    #[error("the server offers no TLS, and plain text was not asked for: {message}")]
    TlsRefused {
        /// What it said, or what it lacks.
        message: String,
    },
    /// The server wants TLS, which was not asked for.
    #[error("the server wants TLS: give TLS credentials for it")]
    TlsRequired,
}

/// A client's side of the handshake.
#[derive(Debug)]
pub struct Negotiation {
    wish: Wish,
    stage: Stage,
    no_zeroes: bool,
    replies: ReplyStyle,
    allocation: Option<u32>,
    export: Option<(u64, u16)>,
    block_sizes: BlockSizes,
    description: String,
    privacy: Privacy,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Greeting,
    /// The server is ready for TLS; nothing is said until it is there.
    Tls,
    /// The option was sent; its last reply has not come.
    Option(u32),
    ExportName,
    Over,
}

/// A reply to an option.
struct OptionReply {
    kind: u32,
    data: BytesMut,
}

impl Negotiation {
    /// Starts to wait for the server's greeting.
    #[must_use]
    pub const fn new(wish: Wish) -> Self {
        Self {
            wish,
            stage: Stage::Greeting,
            no_zeroes: false,
            replies: ReplyStyle::Simple,
            allocation: None,
            export: None,
            block_sizes: BlockSizes::DEFAULT,
            description: String::new(),
            privacy: Privacy::Plain,
        }
    }

    /// The same, but nothing of the wish is said before the connection is private: see
    /// [`Negotiation::awaits_tls`].
    #[must_use]
    pub const fn with_tls(mut self) -> Self {
        self.privacy = Privacy::Wanted;
        self
    }

    /// Says whether TLS must begin now. What came in plain text until then has been eaten; more of it is a
    /// violation.
    #[must_use]
    pub fn awaits_tls(&self) -> bool {
        self.stage == Stage::Tls
    }

    /// Goes on behind TLS.
    pub fn tls_reached(&mut self, output: &mut BytesMut) {
        if self.stage == Stage::Tls {
            self.privacy = Privacy::Reached;
            self.ask_first(output);
        }
    }

    /// Eats what it can of `input` and appends what is to be sent to `output`. `None` as long as the server
    /// has to say more. Once it is there, the rest of the input belongs to the transmission phase.
    ///
    /// # Errors
    /// [`NegotiationError::Refused`]: the output then holds a goodbye. [`NegotiationError::Violation`]: close.
    pub fn step(
        &mut self,
        input: &mut BytesMut,
        output: &mut BytesMut,
    ) -> Result<Option<Found>, NegotiationError> {
        loop {
            let is_done = match self.stage {
                Stage::Greeting => {
                    if !self.greeting(input, output)? {
                        return Ok(None);
                    }
                    false
                }
                Stage::Option(option) => {
                    let Some(reply) = take_reply(option, input)? else { return Ok(None) };
                    self.reply(option, reply, output)?
                }
                // Whoever sits in between could have said it, and it would count as said in private.
                Stage::Tls if !input.is_empty() => {
                    return Err(Violation::PlainAfterStartTls.into());
                }
                Stage::Tls => return Ok(None),
                Stage::ExportName => {
                    if !self.export_name_reply(input) {
                        return Ok(None);
                    }
                    true
                }
                Stage::Over => return Err(Violation::AfterEnd.into()),
            };
            if is_done {
                return self.found().map(Some);
            }
        }
    }

    /// Answers whether the greeting was there.
    fn greeting(&mut self, input: &mut BytesMut, output: &mut BytesMut) -> Result<bool, NegotiationError> {
        let Some(mut greeting) = input.get(..18) else { return Ok(false) };
        for expected in [INIT_PASSWD, OPTION_MAGIC] {
            let found = greeting.get_u64();
            if found != expected {
                return Err(Violation::Magic { expected, found }.into());
            }
        }
        let flags = greeting.get_u16();
        input.advance(18);
        let ours = flags & (handshake_flag::FIXED_NEWSTYLE | handshake_flag::NO_ZEROES);
        self.no_zeroes = ours & handshake_flag::NO_ZEROES != 0;
        let can_answer = ours & handshake_flag::FIXED_NEWSTYLE != 0;
        if can_answer || self.privacy != Privacy::Wanted {
            output.put_u32(u32::from(ours));
        }
        match self.privacy {
            Privacy::Wanted if can_answer => self.ask(opt::STARTTLS, &[], output),
            Privacy::Wanted => {
                self.stage = Stage::Over;
                let message = "its protocol is too old for it".to_owned();
                return Err(NegotiationError::TlsRefused { message });
            }
            _ if can_answer => self.ask_first(output),
            _ => self.ask_export_name(output),
        }
        Ok(true)
    }

    fn ask_first(&mut self, output: &mut BytesMut) {
        match self.wish.replies {
            ReplyStyle::Extended => self.ask(opt::EXTENDED_HEADERS, &[], output),
            ReplyStyle::Structured => self.ask(opt::STRUCTURED_REPLY, &[], output),
            ReplyStyle::Simple => self.ask_go(output),
        }
    }

    fn ask(&mut self, option: u32, parts: &[&[u8]], output: &mut BytesMut) {
        let len: usize = parts.iter().map(|part| part.len()).sum();
        output.put_u64(OPTION_MAGIC);
        output.put_u32(option);
        output.put_u32(u32::try_from(len).expect("a name that somebody typed is shorter than 4 GiB"));
        for part in parts {
            output.put_slice(part);
        }
        self.stage = Stage::Option(option);
    }

    fn name(&self) -> (Vec<u8>, [u8; 4]) {
        let name = self.wish.export.clone().into_bytes();
        let len = u32::try_from(name.len()).expect("a name that somebody typed is shorter than 4 GiB");
        (name, len.to_be_bytes())
    }

    fn ask_go(&mut self, output: &mut BytesMut) {
        let (name, len) = self.name();
        let wanted = [2, info::BLOCK_SIZE, info::DESCRIPTION].map(u16::to_be_bytes);
        self.ask(opt::GO, &[&len, &name, wanted.as_flattened()], output);
    }

    fn ask_context(&mut self, output: &mut BytesMut) {
        let Some(query) = self.wish.allocation.context().map(str::to_owned) else {
            return self.ask_go(output);
        };
        let (name, len) = self.name();
        let query_len = u32::try_from(query.len()).expect("a name that somebody typed is shorter than 4 GiB");
        let counts = [1, query_len].map(u32::to_be_bytes);
        self.ask(opt::SET_META_CONTEXT, &[&len, &name, counts.as_flattened(), query.as_bytes()], output);
    }

    fn ask_export_name(&mut self, output: &mut BytesMut) {
        let (name, _) = self.name();
        self.ask(opt::EXPORT_NAME, &[&name], output);
        self.stage = Stage::ExportName;
    }

    /// Takes one reply in. Answers whether it was the last of the handshake.
    fn reply(
        &mut self,
        option: u32,
        reply: OptionReply,
        output: &mut BytesMut,
    ) -> Result<bool, NegotiationError> {
        let OptionReply { kind, mut data } = reply;
        match (option, kind) {
            (opt::GO, rep::ACK) => return Ok(true),
            (opt::GO, rep::INFO) => self.info(&mut data)?,
            (opt::GO, rep::ERR_UNSUP) => self.ask_export_name(output),
            (_, rep::ERR_SHUTDOWN | rep::ERR_TLS_REQD) | (opt::GO | opt::STARTTLS, rep::ERROR_BIT..) => {
                self.ask(opt::ABORT, &[], output);
                self.stage = Stage::Over;
                let message = string(&data).unwrap_or_default();
                return Err(match (option, kind) {
                    (_, rep::ERR_SHUTDOWN) => NegotiationError::Refused { reply: kind, message },
                    (opt::STARTTLS, _) => NegotiationError::TlsRefused { message },
                    (_, rep::ERR_TLS_REQD) => NegotiationError::TlsRequired,
                    _ => NegotiationError::Refused { reply: kind, message },
                });
            }
            (opt::EXTENDED_HEADERS | opt::STRUCTURED_REPLY, rep::ACK) => {
                self.replies = match option {
                    opt::EXTENDED_HEADERS => ReplyStyle::Extended,
                    _ => ReplyStyle::Structured,
                };
                self.ask_context(output);
            }
            (opt::STARTTLS, rep::ACK) => self.stage = Stage::Tls,
            (opt::SET_META_CONTEXT, rep::META_CONTEXT) => {
                let id = data.try_get_u32().map_err(|_| Violation::Server("a short context"))?;
                if self.wish.allocation.context().is_some_and(|name| data == name.as_bytes()) {
                    self.allocation = Some(id);
                }
            }
            (opt::SET_META_CONTEXT, rep::ACK) => self.ask_go(output),
            (opt::EXTENDED_HEADERS, rep::ERROR_BIT..) => self.ask(opt::STRUCTURED_REPLY, &[], output),
            (_, rep::ERROR_BIT..) => {
                self.allocation = None;
                self.ask_go(output);
            }
            _ => return Err(Violation::Server("an unexpected reply to an option").into()),
        }
        Ok(false)
    }

    fn info(&mut self, data: &mut BytesMut) -> Result<(), Violation> {
        let malformed = |_| Violation::Server("malformed information about the export");
        match data.try_get_u16().map_err(malformed)? {
            info::EXPORT => {
                let size = data.try_get_u64().map_err(malformed)?;
                self.export = Some((size, data.try_get_u16().map_err(malformed)?));
            }
            info::BLOCK_SIZE => {
                let minimum = data.try_get_u32().map_err(malformed)?;
                let preferred = data.try_get_u32().map_err(malformed)?;
                let payload_max = data.try_get_u32().map_err(malformed)?;
                if !minimum.is_power_of_two() || minimum > 1 << 16 {
                    return Err(Violation::Server("an impossible block size"));
                }
                self.block_sizes = BlockSizes::new(minimum, preferred, payload_max);
            }
            info::DESCRIPTION => self.description = string(data).unwrap_or_default(),
            _ => {}
        }
        Ok(())
    }

    /// Answers whether the reply to `EXPORT_NAME` was there.
    fn export_name_reply(&mut self, input: &mut BytesMut) -> bool {
        let zeroes = if self.no_zeroes { 0 } else { EXPORT_NAME_ZEROES };
        if input.len() < 10 + zeroes {
            return false;
        }
        self.export = Some((input.get_u64(), input.get_u16()));
        input.advance(zeroes);
        true
    }

    fn found(&mut self) -> Result<Found, NegotiationError> {
        self.stage = Stage::Over;
        let (size, flags) = self.export.ok_or(Violation::Server("no size of the export"))?;
        let is_read_only = flags & transmission_flag::READ_ONLY != 0;
        let terms = Terms {
            size,
            access: if is_read_only { Access::ReadOnly } else { Access::Writable },
            block_sizes: self.block_sizes,
            replies: self.replies,
            allocation: self.allocation,
        };
        Ok(Found { terms, flags, description: std::mem::take(&mut self.description) })
    }
}

fn take_reply(option: u32, input: &mut BytesMut) -> Result<Option<OptionReply>, Violation> {
    let Some(mut header) = input.get(..OPTION_REPLY_LEN) else { return Ok(None) };
    let found = header.get_u64();
    if found != OPTION_REPLY_MAGIC {
        return Err(Violation::Magic { expected: OPTION_REPLY_MAGIC, found });
    }
    if header.get_u32() != option {
        return Err(Violation::Server("a reply to an option that was not sent"));
    }
    let kind = header.get_u32();
    let len = usize_from(u64::from(header.get_u32()));
    if len > NBD_OPTION_LEN_MAX {
        return Err(Violation::Server("an overlong reply to an option"));
    }
    if input.len() < OPTION_REPLY_LEN + len {
        return Ok(None);
    }
    input.advance(OPTION_REPLY_LEN);
    Ok(Some(OptionReply { kind, data: input.split_to(len) }))
}
