//! [`Handshake`]: a server's side of the NBD handshake, fixed newstyle, with a place in it for TLS.
//!
//! Looks at one option at a time, so that the caller can send the answer (and learn that the client does not
//! read it) before the next is looked at. Never takes more than one option's length of memory for itself.
//! Called by the NBD front end's socket loop.

use bytes::{Buf, BufMut, Bytes, BytesMut};

use super::context::Context;
use super::option::{self, ContextQuery, ExportQuery, put_error, put_reply};
use super::wire::{EXPORT_NAME_ZEROES, INIT_PASSWD, OPTION_LEN, OPTION_MAGIC, handshake_flag, opt, rep};
use super::{Offer, ReplyStyle, Terms, Violation};
use crate::convert::usize_from;
use crate::limits::{NBD_HANDSHAKE_BYTES_MAX, NBD_OPTION_LEN_MAX, NBD_OPTIONS_MAX};

/// What came of one step of the handshake. Whatever it is, the output must be sent first.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// More bytes are needed.
    Incomplete,
    /// One message was dealt with; there may be another in the input.
    Answered,
    /// The output is the last in plain text. Once it was sent, TLS is to be set up with this client, and the
    /// handshake goes on inside.
    StartTls,
    /// The transmission phase begins. What is left of the input belongs to it.
    Agreed(Agreed),
    /// The client has taken its leave; the connection is to be closed.
    Aborted,
}

/// What was agreed on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Agreed {
    /// Which of the offers the client chose.
    pub offer: usize,
    /// The rules of this connection.
    pub terms: Terms,
    /// The ids of the contexts that the client selected; see [`Context::index_of`].
    pub contexts: Vec<u32>,
}

/// What the server offers at the moment.
#[derive(Clone, Copy, Debug)]
pub struct Offers<'a> {
    /// The exports, in the order in which they are listed.
    pub exports: &'a [Offer],
    /// Whether the server is going away: every option but `ABORT` is then refused.
    pub shutting_down: bool,
}

impl Offers<'_> {
    /// The export that a client means by `name`. The empty name is the export that is marked as default, or
    /// the only one there is.
    fn find(self, name: &str) -> Option<usize> {
        let exact = self.exports.iter().position(|offer| offer.name == name);
        exact.or_else(|| match self.exports {
            _ if !name.is_empty() => None,
            [_] => Some(0),
            several => several.iter().position(|offer| offer.is_default),
        })
    }
}

/// What a server makes of TLS.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TlsPolicy {
    /// There is none.
    None,
    /// A client may ask for it.
    Optional,
    /// Without it a client gets nothing and is told nothing.
    Required,
}

/// Whether a connection is inside TLS.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Tls {
    Plain(TlsPolicy),
    Inside,
}

/// A server's side of the handshake.
#[derive(Debug)]
pub struct Handshake {
    stage: Stage,
    tls: Tls,
    /// Whether the answer to `EXPORT_NAME` is followed by zeroes.
    zeroes: bool,
    replies: ReplyStyle,
    /// What was selected last.
    selected: Selected,
    options: usize,
    bytes: usize,
}

/// The contexts that a client has selected, and of which export.
#[derive(Debug, Default)]
struct Selected {
    export: String,
    contexts: Vec<(u32, Context)>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    ClientFlags,
    Option,
    /// Passing over the data of an option that is too long, before that is said.
    Skip {
        option: u32,
        left: usize,
    },
    Over,
}

impl Handshake {
    /// Starts a handshake by writing the greeting.
    #[must_use]
    pub fn new(output: &mut BytesMut) -> Self {
        output.put_u64(INIT_PASSWD);
        output.put_u64(OPTION_MAGIC);
        output.put_u16(handshake_flag::FIXED_NEWSTYLE | handshake_flag::NO_ZEROES);
        Self {
            stage: Stage::ClientFlags,
            tls: Tls::Plain(TlsPolicy::None),
            zeroes: true,
            replies: ReplyStyle::Simple,
            selected: Selected::default(),
            options: 0,
            bytes: 0,
        }
    }

    /// The same, for a server that makes this of TLS.
    #[must_use]
    pub const fn with_tls(mut self, policy: TlsPolicy) -> Self {
        self.tls = Tls::Plain(policy);
        self
    }

    /// Deals with at most one message at the front of `input`, removes it, and appends the answer to
    /// `output`. The input never needs to hold more than [`NBD_OPTION_LEN_MAX`] and a header.
    ///
    /// # Errors
    /// [`Violation`] when the connection must be closed. Nothing may be sent any more.
    pub fn step(
        &mut self,
        input: &mut Bytes,
        offers: Offers<'_>,
        output: &mut BytesMut,
    ) -> Result<Step, Violation> {
        match self.stage {
            Stage::ClientFlags => self.client_flags(input),
            Stage::Option => self.option(input, offers, output),
            Stage::Skip { option, left } => Ok(self.skip(input, output, option, left)),
            Stage::Over => Err(Violation::AfterEnd),
        }
    }

    fn client_flags(&mut self, input: &mut Bytes) -> Result<Step, Violation> {
        let Ok(flags) = input.try_get_u32() else { return Ok(Step::Incomplete) };
        let no_zeroes = u32::from(handshake_flag::NO_ZEROES);
        // A client that does not say that it knows fixed newstyle is served alike: what it must not send, it
        // will not send.
        if flags & !(no_zeroes | u32::from(handshake_flag::FIXED_NEWSTYLE)) != 0 {
            self.stage = Stage::Over;
            return Err(Violation::ClientFlags(flags));
        }
        self.zeroes = flags & no_zeroes == 0;
        self.stage = Stage::Option;
        Ok(Step::Answered)
    }

    fn option(
        &mut self,
        input: &mut Bytes,
        offers: Offers<'_>,
        output: &mut BytesMut,
    ) -> Result<Step, Violation> {
        let Some((option, len)) = self.peek_option(input)? else { return Ok(Step::Incomplete) };
        if len > NBD_OPTION_LEN_MAX {
            self.count(len)?;
            input.advance(OPTION_LEN);
            if option == opt::EXPORT_NAME {
                return self.give_up(Violation::UnknownExport);
            }
            self.stage = Stage::Skip { option, left: len };
            return Ok(Step::Answered);
        }
        if input.len() < OPTION_LEN + len {
            return Ok(Step::Incomplete);
        }
        self.count(len)?;
        input.advance(OPTION_LEN);
        let data = input.split_to(len);
        if option == opt::STARTTLS {
            return self.start_tls(&data, input, output);
        }
        self.answer(option, &data, offers, output)
    }

    /// The option and its length at the front of the input, once all of its header is there.
    fn peek_option(&mut self, input: &Bytes) -> Result<Option<(u32, usize)>, Violation> {
        let Some(mut header) = input.get(..OPTION_LEN) else { return Ok(None) };
        let found = header.get_u64();
        if found != OPTION_MAGIC {
            return self.give_up(Violation::Magic { expected: OPTION_MAGIC, found });
        }
        Ok(Some((header.get_u32(), usize_from(u64::from(header.get_u32())))))
    }

    fn count(&mut self, len: usize) -> Result<(), Violation> {
        self.options += 1;
        self.bytes += OPTION_LEN + len;
        if self.options > NBD_OPTIONS_MAX {
            return self.give_up(Violation::HandshakeBound(NBD_OPTIONS_MAX, "options"));
        }
        if self.bytes > NBD_HANDSHAKE_BYTES_MAX {
            return self.give_up(Violation::HandshakeBound(NBD_HANDSHAKE_BYTES_MAX, "bytes"));
        }
        Ok(())
    }

    fn give_up<T>(&mut self, violation: Violation) -> Result<T, Violation> {
        self.stage = Stage::Over;
        Err(violation)
    }

    fn skip(&mut self, input: &mut Bytes, output: &mut BytesMut, option: u32, left: usize) -> Step {
        let now = left.min(input.len());
        input.advance(now);
        if now < left {
            self.stage = Stage::Skip { option, left: left - now };
            return Step::Incomplete;
        }
        self.stage = Stage::Option;
        if self.lacks_tls() {
            put_tls_required(output, option);
        } else {
            put_error(output, option, rep::ERR_TOO_BIG, "the option is too long");
        }
        Step::Answered
    }

    /// Whether nothing may be said to this client yet.
    fn lacks_tls(&self) -> bool {
        self.tls == Tls::Plain(TlsPolicy::Required)
    }

    fn start_tls(&mut self, data: &[u8], rest: &Bytes, output: &mut BytesMut) -> Result<Step, Violation> {
        let option = opt::STARTTLS;
        let (reply, message) = match self.tls {
            Tls::Inside => (rep::ERR_INVALID, "TLS was set up already"),
            Tls::Plain(TlsPolicy::None) => (rep::ERR_POLICY, "this server was given no TLS credentials"),
            Tls::Plain(_) if !data.is_empty() => (rep::ERR_INVALID, "the option takes no data"),
            // A client waits for the answer. What is here already would be taken for said inside TLS.
            Tls::Plain(_) if !rest.is_empty() => return self.give_up(Violation::PlainAfterStartTls),
            Tls::Plain(_) => {
                put_reply(output, option, rep::ACK, &[]);
                self.tls = Tls::Inside;
                self.forget();
                return Ok(Step::StartTls);
            }
        };
        put_error(output, option, reply, message);
        Ok(Step::Answered)
    }

    /// Forgets what was agreed on in plain text, as the document says: it may have been somebody else.
    fn forget(&mut self) {
        self.replies = ReplyStyle::Simple;
        self.selected = Selected::default();
    }

    fn answer(
        &mut self,
        option: u32,
        data: &[u8],
        offers: Offers<'_>,
        output: &mut BytesMut,
    ) -> Result<Step, Violation> {
        if option == opt::ABORT {
            put_reply(output, option, rep::ACK, &[]);
            self.stage = Stage::Over;
            return Ok(Step::Aborted);
        }
        if self.lacks_tls() {
            if option == opt::EXPORT_NAME {
                return self.give_up(Violation::TlsRequired);
            }
            put_tls_required(output, option);
            return Ok(Step::Answered);
        }
        if option == opt::EXPORT_NAME {
            return self.export_name(data, offers, output);
        }
        if offers.shutting_down {
            put_error(output, option, rep::ERR_SHUTDOWN, "the server is going away");
            return Ok(Step::Answered);
        }
        match option {
            opt::GO => return Ok(self.info_or_go(option, data, offers, output)),
            opt::INFO => {
                self.info_or_go(option, data, offers, output);
            }
            opt::LIST if data.is_empty() => {
                for offer in offers.exports {
                    option::put_server(output, option, offer);
                }
                put_reply(output, option, rep::ACK, &[]);
            }
            opt::STRUCTURED_REPLY if data.is_empty() && self.replies == ReplyStyle::Extended => {
                let message = "extended headers were negotiated, which take precedence";
                put_error(output, option, rep::ERR_EXT_HEADER_REQD, message);
            }
            opt::STRUCTURED_REPLY if data.is_empty() => {
                self.replies = ReplyStyle::Structured;
                put_reply(output, option, rep::ACK, &[]);
            }
            opt::EXTENDED_HEADERS if data.is_empty() => {
                self.replies = ReplyStyle::Extended;
                put_reply(output, option, rep::ACK, &[]);
            }
            opt::LIST | opt::STRUCTURED_REPLY | opt::EXTENDED_HEADERS => {
                put_error(output, option, rep::ERR_INVALID, "the option takes no data");
            }
            opt::LIST_META_CONTEXT | opt::SET_META_CONTEXT => self.context(option, data, offers, output),
            _ => put_error(output, option, rep::ERR_UNSUP, "the option is not supported"),
        }
        Ok(Step::Answered)
    }

    /// `EXPORT_NAME`: has no way to answer an error, so the connection ends instead.
    fn export_name(
        &mut self,
        data: &[u8],
        offers: Offers<'_>,
        output: &mut BytesMut,
    ) -> Result<Step, Violation> {
        if self.replies == ReplyStyle::Extended {
            return self.give_up(Violation::OldExportName);
        }
        let found = option::string(data).ok().and_then(|name| offers.find(&name));
        let Some(index) = found.filter(|_| !offers.shutting_down) else {
            return self.give_up(Violation::UnknownExport);
        };
        let offer = &offers.exports[index];
        output.put_u64(offer.size);
        output.put_u16(option::transmission_flags(offer.access, self.replies, &[]));
        if self.zeroes {
            output.put_bytes(0, EXPORT_NAME_ZEROES);
        }
        // What was selected of it may have been another export of that name.
        let contexts = self.selected_of(offer).unwrap_or_default();
        Ok(self.agree(index, offer, contexts))
    }

    fn info_or_go(&mut self, option: u32, data: &[u8], offers: Offers<'_>, output: &mut BytesMut) -> Step {
        let Ok(query) = ExportQuery::parse(data) else {
            put_error(output, option, rep::ERR_INVALID, "the option's data are malformed");
            return Step::Answered;
        };
        let Some(index) = offers.find(&query.name) else {
            put_error(output, option, rep::ERR_UNKNOWN, "there is no such export");
            return Step::Answered;
        };
        let offer = &offers.exports[index];
        let Some(contexts) = self.selected_of(offer) else {
            let message = "the export has no longer the contexts that were selected";
            put_error(output, option, rep::ERR_UNKNOWN, message);
            return Step::Answered;
        };
        let flags = option::transmission_flags(offer.access, self.replies, &contexts);
        option::put_export(output, option, offer, flags, &query);
        put_reply(output, option, rep::ACK, &[]);
        if option == opt::GO { self.agree(index, offer, contexts) } else { Step::Answered }
    }

    /// The ids of the contexts that were selected of this export. `None` when it is another one by now.
    fn selected_of(&self, offer: &Offer) -> Option<Vec<u32>> {
        if self.selected.export != offer.name {
            return Some(Vec::new());
        }
        let is_there = |(id, context): &(u32, Context)| {
            Context::index_of(*id).and_then(|index| offer.contexts.get(index)) == Some(context)
        };
        let contexts = &self.selected.contexts;
        contexts.iter().all(is_there).then(|| contexts.iter().map(|(id, _)| *id).collect())
    }

    fn agree(&mut self, index: usize, offer: &Offer, contexts: Vec<u32>) -> Step {
        self.stage = Stage::Over;
        let is_allocation = |id: &u32| {
            Context::index_of(*id).and_then(|index| offer.contexts.get(index)) == Some(&Context::Allocation)
        };
        let terms = Terms {
            size: offer.size,
            access: offer.access,
            block_sizes: offer.block_sizes,
            replies: self.replies,
            allocation: contexts.iter().copied().find(is_allocation),
        };
        Step::Agreed(Agreed { offer: index, terms, contexts })
    }

    fn context(&mut self, option: u32, data: &[u8], offers: Offers<'_>, output: &mut BytesMut) {
        let setting = option == opt::SET_META_CONTEXT;
        if setting {
            // What was selected before is forgotten even when this one fails.
            self.selected = Selected::default();
            if !self.replies.has_chunks() {
                let message = "structured replies must be negotiated first";
                return put_error(output, option, rep::ERR_INVALID, message);
            }
        }
        let Ok(query) = ContextQuery::parse(data) else {
            return put_error(output, option, rep::ERR_INVALID, "the option's data are malformed");
        };
        let Some(index) = offers.find(&query.name) else {
            return put_error(output, option, rep::ERR_UNKNOWN, "there is no such export");
        };
        let offer = &offers.exports[index];
        for (index, context) in offer.contexts.iter().enumerate() {
            let id = Context::id_at(index);
            if setting && context.is_selected(&query.queries) {
                option::put_context(output, option, id, context);
                self.selected.contexts.push((id, context.clone()));
            } else if !setting && context.is_listed(&query.queries) {
                // The id in a listing is reserved and zero.
                option::put_context(output, option, 0, context);
            }
        }
        if setting {
            self.selected.export.clone_from(&offer.name);
        }
        put_reply(output, option, rep::ACK, &[]);
    }
}

fn put_tls_required(output: &mut BytesMut, option: u32) {
    put_error(output, option, rep::ERR_TLS_REQD, "this server wants TLS first");
}
