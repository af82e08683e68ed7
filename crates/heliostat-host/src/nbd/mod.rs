//! [`NbdStorage`]: an export of an NBD server as a storage.
//!
//! Requests of any thread go to the one thread that has the connections (see `engine`), in pieces that the server takes;
//! what the server does not offer is replaced here. Which connections there are, what is sent again and when a request
//! fails is decided by [`heliostat_block::nbd::link`].

mod connect;
mod durable;
mod engine;
mod errors;
mod mailbox;

use std::fmt;
use std::io;
use std::sync::{Arc, mpsc};
use std::time::Duration;

use bytes::Bytes;
use futures_util::stream::{StreamExt, iter};
use heliostat_block::buffer::Buffer;
use heliostat_block::convert::{u64_from, usize_from};
use heliostat_block::limits::NBD_PAYLOAD_MAX;
use heliostat_block::nbd::client::Found;
use heliostat_block::nbd::client_reply::Answered;
use heliostat_block::nbd::link::{LinkError, LinkSettings, LinkState, LinkStatus, Wanted};
use heliostat_block::nbd::outbox::Payload;
use heliostat_block::nbd::wire::transmission_flag;
use heliostat_block::nbd::{Access, ReplyStyle};
use heliostat_block::range::ByteRange;
use heliostat_block::span::Span;
use heliostat_block::storage::{
    Durability, Extent, ExtentStatus, IoFuture, Storage, Traits, ZeroEffort, ZeroSpace,
};
use heliostat_block::throttle::while_wanted;

use self::connect::Destination;
pub use self::connect::{OpenConnection, ServerAddress, Tls};
use self::durable::durably;
use self::engine::{Board, Engine, TellOpened};
use self::errors::{io_error, unexpected};
use self::mailbox::Mailbox;
use crate::clock::RealClock;
use crate::runtime::{Driver, Thread};

/// Connections to a server that allows several, when nothing is said: what saturates a fast link, and what servers
/// with a thread for each connection can carry.
pub const CONNECTIONS_DEFAULT: usize = 4;

/// The most connections of one storage.
pub const CONNECTIONS_MAX: usize = 16;

/// Pieces of one request in flight at once: enough to keep the server busy, few enough that they leave room for other
/// requests.
const PIECES_IN_FLIGHT: usize = 8;

/// The longest piece of a request without payload. Its length has 32 bits on the wire; a server that is at it for long
/// delays all others.
const PLAIN_LEN_MAX: u64 = 1 << 30;

/// The longest range that is asked about at once, where lengths have 64 bits: the answer has a bound of its own.
const STATUS_LEN_MAX: u64 = 1 << 50;

/// Zeroes that are written where the server has no request for that.
const ZEROES: usize = 1 << 20;

/// How to reach an export.
#[derive(Clone, Debug)]
pub struct NbdOptions {
    /// Where the server is.
    pub address: ServerAddress,
    /// The export's name; empty for the server's default.
    pub export: String,
    /// With what connections are encrypted; plain text without.
    pub tls: Option<Tls>,
    /// How long requests wait for a server that was lost, before they fail. Attempts go on after that.
    pub reconnect_delay: Duration,
    /// How long to try for the first connection. Zero means one attempt.
    pub open_timeout: Duration,
    /// A metadata context to be asked for instead of `base:allocation`, such as `qemu:dirty-bitmap:NAME`: extents then
    /// say what is dirty (as data) and what is not (as holes), whatever it reads as.
    pub bitmap: Option<String>,
    /// Whether nothing may be written.
    pub read_only: bool,
    /// Connections at most; more than one only where the server says that it makes no difference. 1 to
    /// [`CONNECTIONS_MAX`]; others are moved to the nearest.
    pub connections: usize,
}

impl NbdOptions {
    /// The options that matter little, as they are when nothing is said.
    #[must_use]
    pub const fn new(address: ServerAddress, export: String) -> Self {
        Self {
            address,
            export,
            tls: None,
            reconnect_delay: Duration::ZERO,
            open_timeout: Duration::ZERO,
            bitmap: None,
            read_only: false,
            connections: CONNECTIONS_DEFAULT,
        }
    }
}

/// An export of an NBD server.
///
/// Shared by threads. A call may be awaited on any thread, whatever runs there. Dropped, it says goodbye to the server
/// and does not wait for that.
pub struct NbdStorage {
    mailbox: Arc<Mailbox>,
    board: Arc<Board>,
    found: Found,
    traits: Traits,
    zeroes: Bytes,
    /// Its connections are inside TLS.
    is_private: bool,
}

impl NbdStorage {
    /// Connects, and blocks until that is done or has failed.
    ///
    /// # Errors
    /// Why the last attempt failed; `ReadOnlyFilesystem` when the export may not be written and that was not asked
    /// for; the host's, when there is no thread.
    pub fn open(options: NbdOptions) -> io::Result<Self> {
        Self::open_with(Driver::from_environment()?, options)
    }

    /// As [`NbdStorage::open`], with a driver.
    ///
    /// # Errors
    /// As [`NbdStorage::open`].
    pub fn open_with(driver: Driver, options: NbdOptions) -> io::Result<Self> {
        let (opened, is_opened) = mpsc::sync_channel(1);
        let (mailbox, board) = (Mailbox::new(), Board::new(RealClock::new(), options.reconnect_delay));
        let settings = LinkSettings {
            reconnect_delay: options.reconnect_delay,
            connections: options.connections.clamp(1, CONNECTIONS_MAX),
            reads_bitmap: options.bitmap.is_some(),
        };
        let is_private = options.tls.is_some();
        let destination = Destination {
            address: options.address,
            export: options.export,
            context: options.bitmap,
            tls: options.tls,
        };
        let (its_mailbox, its_board) = (Arc::clone(&mailbox), Arc::clone(&board));
        // The thread runs on until the storage is dropped, and ends by itself.
        Thread::spawn_with(driver, "nbd client", move || async move {
            let tell_opened: TellOpened = Box::new(move |result| {
                // Who opens waits for it.
                let _ = opened.send(result);
            });
            let opening = (tell_opened, options.open_timeout);
            Engine::new(destination, settings, its_mailbox, its_board, opening).run().await;
        })?;
        let found = is_opened.recv().map_err(|_| io::Error::other("the connection's thread ended"))??;
        let mut storage = Self::new(mailbox, board, found, options.read_only);
        storage.is_private = is_private;
        if storage.found.terms.access == Access::ReadOnly && !options.read_only {
            return Err(io::Error::new(io::ErrorKind::ReadOnlyFilesystem, "the export is read-only"));
        }
        Ok(storage)
    }

    fn new(mailbox: Arc<Mailbox>, board: Arc<Board>, found: Found, read_only: bool) -> Self {
        let offers = |flag: u16| found.flags & flag != 0;
        let traits = Traits {
            block_size: found.terms.block_sizes.minimum(),
            preferred_size: found.terms.block_sizes.preferred(),
            read_only,
            can_discard: offers(transmission_flag::SEND_TRIM),
            can_zero_fast: offers(transmission_flag::SEND_WRITE_ZEROES),
            can_resize: false,
            remote: true,
        };
        Self { mailbox, board, found, traits, zeroes: Bytes::from(vec![0; ZEROES]), is_private: false }
    }

    /// How the connection is.
    #[must_use]
    pub fn status(&self) -> LinkStatus {
        self.board.status()
    }

    /// What was negotiated when it was opened.
    #[must_use]
    pub const fn found(&self) -> &Found {
        &self.found
    }

    fn offers(&self, flag: u16) -> bool {
        self.found.flags & flag != 0
    }

    /// Whether lengths have 64 bits. A connection that comes later may have shorter ones; what is too long then is
    /// refused.
    fn is_extended(&self) -> bool {
        self.found.terms.replies == ReplyStyle::Extended
    }

    /// Refuses what the server could only refuse, or what may not be changed.
    fn check(&self, range: ByteRange, is_change: bool) -> io::Result<()> {
        if is_change && self.traits.read_only {
            return Err(io::ErrorKind::ReadOnlyFilesystem.into());
        }
        if range.end() > self.found.terms.size {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "the request is outside of the export"));
        }
        Ok(())
    }

    /// The longest piece of a request, given the most that it may be.
    fn piece_max(&self, most: u64) -> u64 {
        let unit = u64::from(self.traits.block_size);
        (most & !(unit - 1)).max(unit)
    }

    fn payload_max(&self) -> u64 {
        self.piece_max(u64::from(self.found.terms.block_sizes.payload_max().min(NBD_PAYLOAD_MAX)))
    }

    async fn ask(&self, wanted: Wanted) -> Result<Answered, LinkError> {
        self.mailbox.ask(wanted).await
    }

    /// A request that changes nothing: whoever asks may lose interest before the server answers.
    async fn look(&self, wanted: Wanted) -> Result<Answered, LinkError> {
        let looked = while_wanted(self.ask(wanted)).await;
        looked.unwrap_or_else(|| Err(LinkError::Lost("nobody needs the answer any more".to_owned())))
    }

    async fn done(&self, wanted: Wanted) -> Result<(), LinkError> {
        self.ask(wanted).await.map(|_| ())
    }

    /// Asks for each piece of `range`. Goes on until all have ended, also when one has failed: a part that came later
    /// than the answer could destroy what is written next.
    async fn each(
        &self,
        range: ByteRange,
        longest: u64,
        wanted: impl Fn(ByteRange) -> Wanted,
    ) -> Result<(), LinkError> {
        if range.len() <= longest {
            return self.done(wanted(range)).await;
        }
        let mut ended = iter(range.pieces(longest))
            .map(|piece| self.done(wanted(piece)))
            .buffer_unordered(PIECES_IN_FLIGHT);
        let mut result = Ok(());
        while let Some(piece) = ended.next().await {
            result = result.and(piece);
        }
        result
    }

    async fn read_pieces(&self, offset: u64, mut buffer: Buffer, longest: u64) -> io::Result<Buffer> {
        let whole = ByteRange::from_bounds(offset, offset + u64_from(buffer.len()));
        let read = async |piece: ByteRange| {
            let room = Buffer::zeroed(usize_from(piece.len()));
            (piece, self.look(Wanted::Read { offset: piece.offset(), buffer: room }).await)
        };
        let mut ended = iter(whole.pieces(longest)).map(read).buffer_unordered(PIECES_IN_FLIGHT);
        let mut result = Ok(());
        while let Some((piece, answered)) = ended.next().await {
            match answered {
                Ok(Answered::Data(data)) => {
                    let start = usize_from(piece.offset() - offset);
                    buffer[start..start + data.len()].copy_from_slice(&data);
                }
                Ok(_) => result = Err(unexpected()),
                Err(error) => result = Err(io_error(error)),
            }
        }
        drop(ended);
        result.map(|()| buffer)
    }

    /// Carries out a change that may have to be durable, in the best way that the server offers.
    async fn change<F: AsyncFn(Durability) -> Result<(), LinkError>>(
        &self,
        durability: Durability,
        change: F,
    ) -> io::Result<()> {
        let is_offered = self.offers(transmission_flag::SEND_FUA);
        if !durably(durability, is_offered, change).await.map_err(io_error)? {
            return self.flush_all().await;
        }
        Ok(())
    }

    async fn flush_all(&self) -> io::Result<()> {
        match self.done(Wanted::Flush).await {
            // The server says by that that nothing it has answered can be lost, as far as it knows.
            Err(LinkError::NotOffered) => Ok(()),
            result => result.map_err(io_error),
        }
    }

    fn write_payload(&self, offset: u64, data: Payload, durability: Durability) -> IoFuture<'_, ()> {
        let range = ByteRange::from_bounds(offset, offset.saturating_add(u64_from(data.len())));
        if let Err(error) = self.check(range, true) {
            return IoFuture::ready(Err(error));
        }
        if range.is_empty() {
            return IoFuture::ready(Ok(()));
        }
        IoFuture::pending(async move {
            self.change(durability, async |durability| self.write_all(offset, &data, durability).await).await
        })
    }

    async fn write_all(&self, offset: u64, data: &Payload, durability: Durability) -> Result<(), LinkError> {
        let range = ByteRange::from_bounds(offset, offset + u64_from(data.len()));
        self.each(range, self.payload_max(), |piece| {
            let from = usize_from(piece.offset() - offset);
            let data = data.slice(from, usize_from(piece.len()));
            Wanted::Write { offset: piece.offset(), data, durability }
        })
        .await
    }

    async fn zero_all(
        &self,
        range: ByteRange,
        space: ZeroSpace,
        effort: ZeroEffort,
        durability: Durability,
    ) -> Result<(), LinkError> {
        // Servers that know no long requests may bound these as if they had a payload.
        let longest = if self.is_extended() { self.piece_max(PLAIN_LEN_MAX) } else { self.payload_max() };
        let zeroed =
            self.each(range, longest, |range| Wanted::WriteZeroes { range, space, effort, durability }).await;
        if zeroed != Err(LinkError::NotOffered) || effort == ZeroEffort::FastOnly {
            return zeroed;
        }
        let longest = self.piece_max(u64_from(ZEROES)).min(self.payload_max());
        self.each(range, longest, |piece| {
            let data = self.zeroes.slice(..usize_from(piece.len()));
            Wanted::Write { offset: piece.offset(), data: data.into(), durability }
        })
        .await
    }
}

impl Drop for NbdStorage {
    fn drop(&mut self) {
        self.mailbox.abandon();
    }
}

impl fmt::Debug for NbdStorage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("NbdStorage").field("found", &self.found).field("traits", &self.traits).finish()
    }
}

impl Storage for NbdStorage {
    fn traits(&self) -> Traits {
        self.traits
    }

    fn size(&self) -> u64 {
        self.found.terms.size
    }

    fn allocated_size(&self) -> Option<u64> {
        None
    }

    fn read(&self, offset: u64, buffer: Buffer) -> IoFuture<'_, Buffer> {
        let range = ByteRange::from_bounds(offset, offset.saturating_add(u64_from(buffer.len())));
        if let Err(error) = self.check(range, false) {
            return IoFuture::ready(Err(error));
        }
        if range.is_empty() {
            return IoFuture::ready(Ok(buffer));
        }
        let longest = self.payload_max();
        if range.len() > longest {
            return IoFuture::pending(self.read_pieces(offset, buffer, longest));
        }
        IoFuture::pending(async move {
            match self.look(Wanted::Read { offset, buffer }).await {
                Ok(Answered::Data(buffer)) => Ok(buffer),
                Ok(_) => Err(unexpected()),
                Err(error) => Err(io_error(error)),
            }
        })
    }

    fn write(&self, offset: u64, data: Bytes, durability: Durability) -> IoFuture<'_, ()> {
        self.write_payload(offset, data.into(), durability)
    }

    fn takes_spans(&self) -> bool {
        !self.is_private
    }

    fn write_span(&self, offset: u64, span: Span) -> IoFuture<'_, ()> {
        if self.is_private {
            return IoFuture::ready(Err(io::ErrorKind::Unsupported.into()));
        }
        self.write_payload(offset, span.into(), Durability::Cached)
    }

    fn write_zeroes(
        &self,
        range: ByteRange,
        space: ZeroSpace,
        effort: ZeroEffort,
        durability: Durability,
    ) -> IoFuture<'_, ()> {
        if let Err(error) = self.check(range, true) {
            return IoFuture::ready(Err(error));
        }
        let can_be_fast = self.traits.can_zero_fast && self.offers(transmission_flag::SEND_FAST_ZERO);
        if effort == ZeroEffort::FastOnly && !can_be_fast {
            return IoFuture::ready(Err(io::ErrorKind::Unsupported.into()));
        }
        if range.is_empty() {
            return IoFuture::ready(Ok(()));
        }
        IoFuture::pending(async move {
            let zero = async |durability| self.zero_all(range, space, effort, durability).await;
            self.change(durability, zero).await
        })
    }

    fn discard(&self, range: ByteRange) -> IoFuture<'_, ()> {
        if let Err(error) = self.check(range, true) {
            return IoFuture::ready(Err(error));
        }
        if range.is_empty() || !self.traits.can_discard {
            return IoFuture::ready(Ok(()));
        }
        let longest = self.piece_max(PLAIN_LEN_MAX);
        IoFuture::pending(async move {
            match self.each(range, longest, |range| Wanted::Trim { range }).await {
                Err(LinkError::NotOffered) => Ok(()),
                result => result.map_err(io_error),
            }
        })
    }

    fn flush(&self) -> IoFuture<'_, ()> {
        if self.traits.read_only {
            return IoFuture::ready(Ok(()));
        }
        IoFuture::pending(self.flush_all())
    }

    fn losses(&self) -> u64 {
        self.board.losses()
    }

    fn give_up(&self) {
        self.mailbox.give_up();
    }

    fn out_of_reach(&self) -> Option<String> {
        let status = self.status();
        let is_there = matches!(status.state, LinkState::Up | LinkState::Opening);
        (!is_there).then(|| status.reason.unwrap_or_else(|| "the connection was closed".to_owned()))
    }

    fn extents(&self, range: ByteRange) -> IoFuture<'_, Vec<Extent>> {
        let all_data = move || Ok(vec![Extent { range, status: ExtentStatus::Data }]);
        if let Err(error) = self.check(range, false) {
            return IoFuture::ready(Err(error));
        }
        if range.is_empty() || self.found.terms.allocation.is_none() {
            return IoFuture::ready(all_data());
        }
        let longest = if self.is_extended() { STATUS_LEN_MAX } else { PLAIN_LEN_MAX };
        let end = range.end().min(range.offset().saturating_add(self.piece_max(longest)));
        let asked = ByteRange::from_bounds(range.offset(), end);
        IoFuture::pending(async move {
            match self.look(Wanted::BlockStatus { range: asked }).await {
                Ok(Answered::Extents(extents)) => Ok(extents),
                Ok(_) => Err(unexpected()),
                // Another connection than the first may not have the context, or only shorter lengths.
                Err(LinkError::NotOffered | LinkError::OutsideTerms) => all_data(),
                Err(error) => Err(io_error(error)),
            }
        })
    }
}
