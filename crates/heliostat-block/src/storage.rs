//! [`Storage`]: a flat array of bytes. A host file, a block device, an NBD server, the simulator's disk.
//!
//! Called by drivers only. What a storage can do is probed by it, never assumed by its caller; a fast path
//! that is missing is replaced by a slow one without an error.

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::Bytes;

use crate::buffer::Buffer;
use crate::clock::LocalFuture;
use crate::debug_event::DebugEvent;
use crate::range::ByteRange;
use crate::span::Span;
use crate::throttle::Hurry;

/// Whether a write is durable when it returns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Durability {
    /// Durable after the next successful flush.
    Cached,
    /// Durable on return (NBD's FUA).
    Fua,
}

/// What zeroing may do with the space behind the range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ZeroSpace {
    /// Space may be given back; the range may become a hole.
    MayUnmap,
    /// Space must stay allocated (NBD's NO_HOLE), so that a later write cannot run out of it.
    Keep,
}

/// What to do where a storage cannot zero faster than by writing zeroes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ZeroEffort {
    /// Write the zeroes.
    Any,
    /// Fail with [`io::ErrorKind::Unsupported`], at once and with nothing changed (NBD's FAST_ZERO).
    FastOnly,
}

/// How a range reads and whether it is allocated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExtentStatus {
    /// Allocated; may hold anything.
    Data,
    /// Allocated or mapped in this layer, and known to read as zeroes.
    Zero,
    /// Not allocated in this layer: reads as zeroes, or as the backing node where there is one.
    Hole,
    /// Said to hold nothing of its own, and may read as anything all the same: what a dirty bitmap that is shown in
    /// the place of extents calls dirty. Stands in for no read.
    Absent,
}

impl ExtentStatus {
    /// Says whether only a read can tell what is there, all layers below included.
    #[must_use]
    pub const fn may_hold_data(self) -> bool {
        matches!(self, Self::Data | Self::Absent)
    }
}

/// A range with one status.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Where.
    pub range: ByteRange,
    /// How it reads there.
    pub status: ExtentStatus,
}

/// A storage's fixed properties. Its size is none of them, see [`Storage::set_size`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Traits {
    /// Offsets and lengths of reads and writes must be multiples of this (a power of two), but for a request
    /// that ends at the storage's end. 1 where there is no such rule.
    pub block_size: u32,
    /// The size that is best for performance; a hint.
    pub preferred_size: u32,
    /// Whether writes, zeroing and discards fail with [`io::ErrorKind::ReadOnlyFilesystem`].
    pub read_only: bool,
    /// Whether discarding gives space back.
    pub can_discard: bool,
    /// Whether `write_zeroes` is faster than writing zeroes.
    pub can_zero_fast: bool,
    /// Whether [`Storage::set_size`] works.
    pub can_resize: bool,
    /// Whether a request may take so long that the caller should not expect it done at once (a network).
    pub remote: bool,
}

/// The answer to a storage call: here already, or to be awaited on the thread that asked.
///
/// The first case is what makes a page-cached 4 KiB write cost no allocation.
pub enum IoFuture<'a, T> {
    /// The answer. `None` once it has been taken.
    Ready(Option<io::Result<T>>),
    /// The answer will come. Must not be dropped once polled, see [`Storage`].
    Pending(Pin<Box<dyn Future<Output = io::Result<T>> + 'a>>),
}

impl<'a, T> IoFuture<'a, T> {
    /// An answer that is here already.
    pub fn ready(result: io::Result<T>) -> Self {
        Self::Ready(Some(result))
    }

    /// An answer that `future` will give.
    pub fn pending(future: impl Future<Output = io::Result<T>> + 'a) -> Self {
        Self::Pending(Box::pin(future))
    }
}

impl<T: Unpin> Future for IoFuture<'_, T> {
    type Output = io::Result<T>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        match self.get_mut() {
            Self::Ready(result) => Poll::Ready(result.take().expect("an IoFuture is awaited once")),
            Self::Pending(future) => future.as_mut().poll(cx),
        }
    }
}

/// A flat array of bytes.
///
/// Shared by threads; a future that it returns stays on the thread that asked. Ranges lie within
/// [`Storage::size`] and are aligned to [`Traits::block_size`]; the node sees to it. Overlapping writes that
/// run at once leave each byte as one of them wrote it.
///
/// # Cancel safety
/// A future that is dropped after it was polled leaves open what becomes of the I/O: it may happen in whole, in
/// part or not at all, at any time until the thread has ended. A kernel cancels what it has not begun, a request in
/// several steps ends after one of them. Memory and descriptors stay until nobody uses them. Callers that must
/// know (all of the core) never drop one that was polled.
pub trait Storage: Send + Sync + 'static {
    /// What it can do, as probed when it was opened.
    fn traits(&self) -> Traits;

    /// Its length in bytes, as it is now.
    fn size(&self) -> u64;

    /// Makes it `size` bytes long. New bytes read as zeroes and take no space, also where there were bytes once;
    /// bytes beyond the new end are gone. [`Storage::size`] says the new length when this has ended; while it
    /// runs, either. Durable after the next successful flush. Calls take turns.
    ///
    /// The caller sees to it that meanwhile no request is in flight that reaches beyond the new end, nor one into
    /// the last block of the old or the new length if that block is short. Nodes keep the size that they
    /// were made with.
    ///
    /// # Errors
    /// [`io::ErrorKind::Unsupported`] unless [`Traits::can_resize`]; [`io::ErrorKind::ReadOnlyFilesystem`] where
    /// nothing may be written; else the host's. The length is unchanged then.
    fn set_size(&self, size: u64) -> IoFuture<'_, ()> {
        let _ = size;
        IoFuture::ready(Err(io::ErrorKind::Unsupported.into()))
    }

    /// The caller is about to make it at least `end` bytes long and to write there: room can be made in larger steps
    /// than it will ask for. What [`Storage::size`] says stays. A hint: never fails. Takes turns with
    /// [`Storage::set_size`].
    fn expect_writes(&self, end: u64) -> IoFuture<'_, ()> {
        let _ = end;
        IoFuture::ready(Ok(()))
    }

    /// Bytes that it occupies on the host; `None` where that cannot be known.
    fn allocated_size(&self) -> Option<u64>;

    /// Fills all of `buffer` from `offset` on.
    ///
    /// # Errors
    /// Any of the host's; [`io::ErrorKind::UnexpectedEof`] when the storage has become shorter.
    fn read(&self, offset: u64, buffer: Buffer) -> IoFuture<'_, Buffer>;

    /// Where `range` lies in a host's file, if it can be sent from there at once, in the place of a read that would not
    /// wait for a medium. Whoever takes it is to send it, or to read it, before anything else may happen to the range
    /// that a read must not run beside. `None` where it cannot be had so, or would not be worth it.
    fn span(&self, range: ByteRange) -> Option<Span> {
        let _ = range;
        None
    }

    /// Writes all of `data` at `offset`. After an error any part of it may have been written.
    ///
    /// # Errors
    /// Any of the host's; no space is `StorageFull` or `QuotaExceeded`.
    fn write(&self, offset: u64, data: Bytes, durability: Durability) -> IoFuture<'_, ()>;

    /// Whether [`Storage::write_span`] may be called.
    fn takes_spans(&self) -> bool {
        false
    }

    /// As [`Storage::write`] of what lies in `span` when it is written; whoever lends it keeps it as it should be until
    /// this has ended. Durable after the next successful flush. Only where [`Storage::takes_spans`].
    ///
    /// # Errors
    /// As [`Storage::write`]; `Unsupported` where it takes none.
    fn write_span(&self, offset: u64, span: Span) -> IoFuture<'_, ()> {
        let _ = (offset, span);
        IoFuture::ready(Err(io::ErrorKind::Unsupported.into()))
    }

    /// Makes `range` read as zeroes.
    ///
    /// # Errors
    /// As [`Storage::write`]; [`io::ErrorKind::Unsupported`] only with [`ZeroEffort::FastOnly`].
    fn write_zeroes(
        &self,
        range: ByteRange,
        space: ZeroSpace,
        effort: ZeroEffort,
        durability: Durability,
    ) -> IoFuture<'_, ()>;

    /// Says that the contents of `range` are no longer needed; it may then read as anything, until written.
    /// Success where nothing can be done.
    fn discard(&self, range: ByteRange) -> IoFuture<'_, ()>;

    /// Makes every write that has ended before this call durable.
    ///
    /// # Errors
    /// Any of the host's. After an error everything written since the last good flush may be gone, even if a
    /// later flush succeeds.
    fn flush(&self) -> IoFuture<'_, ()>;

    /// How often something that was written here may have been lost without an error that says so: a network storage
    /// was cut off from its server, and perhaps reached another one, or the same one after a crash. A write that was cut
    /// off may even be carried out late. Only grows. Whoever sees it grow between two good flushes knows that what was
    /// written since the first of them may be gone, or else than written; and that it had better look whether the rest
    /// is there.
    ///
    /// It has grown before any request ends that a loss could concern.
    fn losses(&self) -> u64 {
        0
    }

    /// Says how `range` is laid out: contiguous extents in order that start at its start. May stop early, but
    /// not before the first extent; the last may be cut at the range's end. What it says may be outdated by a
    /// write that runs beside it. A storage that cannot know says [`ExtentStatus::Data`].
    fn extents(&self, range: ByteRange) -> IoFuture<'_, Vec<Extent>>;

    /// Starts writing `range` back to the medium and, where that is done, drops it from the host's cache. A
    /// hint: never fails, never waits, does nothing where there is no such cache.
    fn start_writeback(&self, range: ByteRange) {
        let _ = range;
    }

    /// A driver on top has come to this moment. Where somebody wants to hold the request up there, what it has to
    /// wait for; nobody does but a fault injector.
    fn raise(&self, event: DebugEvent) -> Option<LocalFuture<'static, ()>> {
        let _ = event;
        None
    }

    /// Somebody waits until nothing is in flight above: what waits here only because of a limit is to go on at once,
    /// as long as `hurry` lives.
    fn hurry(&self, hurry: &mut Hurry) {
        let _ = hurry;
    }

    /// Nobody needs what is in flight any more: what waits for somebody who may never answer (a server) ends soon, with
    /// an error; and until that one is there again, so does what comes later. Where nobody is waited for, nothing
    /// changes.
    fn give_up(&self) {}

    /// Why requests cannot be carried out at this moment, where somebody has to come back for that: the server was lost.
    fn out_of_reach(&self) -> Option<String> {
        None
    }
}

/// Raises `event` on `storage` and waits where the request is held up.
pub(crate) async fn pass(storage: &dyn Storage, event: DebugEvent) {
    if let Some(held_up) = storage.raise(event) {
        held_up.await;
    }
}
