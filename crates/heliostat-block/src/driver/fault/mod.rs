//! [`FaultInjector`]: lets requests fail, and holds them up, where its rules say so (`blkdebug` in QMP).
//!
//! For tests, and for an operator who wants to see what a fault does. Drivers above tell it what they are at
//! ([`Storage::raise`]); requests that the rules do not concern go below as they are. It never changes what is read
//! or written.
//!
//! It also takes limits on requests (their alignment, their length) as a device would have them: what is above cuts
//! and widens its requests accordingly.

mod rules;

use std::io;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use event_listener::Event;

use self::rules::{Resumed, Rules};
use crate::buffer::Buffer;
use crate::clock::{LocalFuture, yield_once};
use crate::convert::{u64_from, usize_from};
use crate::debug_event::DebugEvent;
use crate::graph::Spot;
use crate::node_storage::NodeStorage;
use crate::range::ByteRange;
use crate::storage::{Durability, Extent, IoFuture, Storage, Traits, ZeroEffort, ZeroSpace, pass};
use crate::throttle::Hurry;

pub use self::rules::{InjectError, IoType, SetState, Times};

/// The most breakpoints and requests held up by them at once. A test has a handful; each is a request in memory.
const BREAKS_MAX: usize = 1024;

/// How requests are to be cut, as if a device wanted it. Zero says nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RequestLimits {
    /// What all must be multiples of.
    pub align: u32,
    /// The most that is read or written at once.
    pub transfer_max: u64,
    /// What zeroing is best a multiple of; what is shorter is written as data.
    pub zero_unit: u64,
    /// The most that is made zero at once.
    pub zero_max: u64,
    /// What discards are best a multiple of; what is shorter is not discarded.
    pub discard_unit: u64,
    /// The most that is discarded at once.
    pub discard_max: u64,
}

/// Why a breakpoint cannot be set.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("there are {BREAKS_MAX} breakpoints already, which is the most")]
pub struct TooManyBreaks;

/// There is no such breakpoint, or nobody is held up by it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("No such file or directory")]
pub struct NoSuchBreak;

/// Lets requests fail and holds them up.
pub struct FaultInjector {
    below: NodeStorage,
    limits: RequestLimits,
    rules: Arc<Shared>,
}

struct Shared {
    /// Held to look and to change, never across I/O.
    rules: Mutex<Rules>,
    /// A request has come to a breakpoint.
    suspended: Event,
}

impl FaultInjector {
    /// Makes one over whatever node is at `child`, and raises [`DebugEvent::None`].
    #[must_use]
    pub fn new(
        child: Arc<Spot>,
        limits: RequestLimits,
        errors: Vec<InjectError>,
        states: Vec<SetState>,
    ) -> Arc<Self> {
        let rules = Rules::new(errors, states);
        let rules = Arc::new(Shared { rules: Mutex::new(rules), suspended: Event::new() });
        // Nobody can have set a breakpoint yet.
        let _ = rules.lock().happens(DebugEvent::None);
        Arc::new(Self { below: NodeStorage::of_layer(child), limits, rules })
    }

    pub(super) const fn below(&self) -> &NodeStorage {
        &self.below
    }

    /// Lets the next request that comes to `event` be held up there, under the name `tag`.
    ///
    /// # Errors
    /// [`TooManyBreaks`].
    pub fn add_break(&self, event: DebugEvent, tag: &str) -> Result<(), TooManyBreaks> {
        let mut rules = self.rules.lock();
        if rules.breaks() >= BREAKS_MAX {
            return Err(TooManyBreaks);
        }
        rules.add_break(event, tag);
        Ok(())
    }

    /// Waits until a request is held up by `tag`; not beyond [`FaultInjector::end`].
    ///
    /// # Cancel safety
    /// Dropping it leaves nothing behind.
    pub async fn wait_break(&self, tag: &str) {
        loop {
            let suspended = self.rules.suspended.listen();
            if self.rules.lock().ends_wait(tag) {
                return;
            }
            suspended.await;
        }
    }

    /// Says whether a request is held up by `tag`.
    #[must_use]
    pub fn is_suspended(&self, tag: &str) -> bool {
        self.rules.lock().is_suspended(tag)
    }

    /// Lets one request that is held up by `tag` go on.
    ///
    /// # Errors
    /// [`NoSuchBreak`] when there is none.
    pub fn resume(&self, tag: &str) -> Result<(), NoSuchBreak> {
        let taken = self.rules.lock().take_suspended(Some(tag), false);
        release(&taken);
        if taken.is_empty() { Err(NoSuchBreak) } else { Ok(()) }
    }

    /// Takes breakpoints of that name back, and lets every request go on that is held up by one.
    ///
    /// # Errors
    /// [`NoSuchBreak`] when there is no breakpoint; one that holds a request up is none any more, as in QEMU. What
    /// was held up goes on all the same.
    pub fn remove_break(&self, tag: &str) -> Result<(), NoSuchBreak> {
        let (was_there, taken) = {
            let mut rules = self.rules.lock();
            (rules.remove_break(tag), rules.take_suspended(Some(tag), true))
        };
        release(&taken);
        if was_there { Ok(()) } else { Err(NoSuchBreak) }
    }

    /// Lets everything go on that is held up, and holds nothing up any more: for an end that waits for it.
    pub fn end(&self) {
        let taken = {
            let mut rules = self.rules.lock();
            rules.end_breaks();
            rules.take_suspended(None, true)
        };
        release(&taken);
        self.rules.suspended.notify(usize::MAX);
    }

    /// Fails as the rules have it.
    async fn check(&self, io: IoType, range: ByteRange) -> io::Result<()> {
        let failure = self.rules.lock().check(io, range);
        let Some(failure) = failure else { return Ok(()) };
        if !failure.immediately {
            yield_once().await;
        }
        Err(io::Error::from_raw_os_error(failure.errno))
    }

    async fn read_pieces(&self, offset: u64, mut buffer: Buffer) -> io::Result<Buffer> {
        let range = ByteRange::from_bounds(offset, offset + u64_from(buffer.len()));
        if range.len() <= longest(self.limits.transfer_max) {
            self.check(IoType::Read, range).await?;
            return self.below.read(offset, buffer).await;
        }
        for piece in range.pieces(self.limits.transfer_max) {
            self.check(IoType::Read, piece).await?;
            let read = self.below.read(piece.offset(), Buffer::zeroed(usize_from(piece.len()))).await?;
            let start = usize_from(piece.offset() - offset);
            buffer[start..start + read.len()].copy_from_slice(&read);
        }
        Ok(buffer)
    }

    async fn write_pieces(&self, offset: u64, data: Bytes, durability: Durability) -> io::Result<()> {
        let range = ByteRange::from_bounds(offset, offset + u64_from(data.len()));
        for piece in range.pieces(longest(self.limits.transfer_max)) {
            self.check(IoType::Write, piece).await?;
            let start = usize_from(piece.offset() - offset);
            let data = data.slice(start..start + usize_from(piece.len()));
            self.below.write(piece.offset(), data, durability).await?;
        }
        Ok(())
    }

    async fn zero_pieces(
        &self,
        range: ByteRange,
        space: ZeroSpace,
        effort: ZeroEffort,
        durability: Durability,
    ) -> io::Result<()> {
        let unit = self.limits.zero_unit.max(1);
        if effort == ZeroEffort::FastOnly && !range.is_aligned(unit) {
            return Err(io::ErrorKind::Unsupported.into());
        }
        for part in split(range, unit) {
            let is_whole = part.is_aligned(unit);
            let longest = longest(if is_whole { self.limits.zero_max } else { self.limits.transfer_max });
            for piece in part.pieces(longest) {
                if is_whole {
                    self.check(IoType::WriteZeroes, piece).await?;
                    self.below.write_zeroes(piece, space, effort, durability).await?;
                } else {
                    let zeroes = Buffer::zeroed(usize_from(piece.len())).freeze();
                    self.write_pieces(piece.offset(), zeroes, durability).await?;
                }
            }
        }
        Ok(())
    }
}

impl Storage for FaultInjector {
    fn traits(&self) -> Traits {
        let below = self.below.traits();
        let block_size = below.block_size.max(self.limits.align.max(1));
        Traits { block_size, preferred_size: below.preferred_size.max(block_size), ..below }
    }

    fn size(&self) -> u64 {
        self.below.size()
    }

    fn set_size(&self, size: u64) -> IoFuture<'_, ()> {
        self.below.set_size(size)
    }

    fn expect_writes(&self, end: u64) -> IoFuture<'_, ()> {
        self.below.expect_writes(end)
    }

    /// QEMU does not know it either.
    fn allocated_size(&self) -> Option<u64> {
        None
    }

    fn read(&self, offset: u64, buffer: Buffer) -> IoFuture<'_, Buffer> {
        IoFuture::pending(self.read_pieces(offset, buffer))
    }

    fn write(&self, offset: u64, data: Bytes, durability: Durability) -> IoFuture<'_, ()> {
        IoFuture::pending(async move {
            pass(self, DebugEvent::Pwritev).await;
            let written = self.write_pieces(offset, data, durability).await;
            pass(self, DebugEvent::PwritevDone).await;
            written
        })
    }

    fn write_zeroes(
        &self,
        range: ByteRange,
        space: ZeroSpace,
        effort: ZeroEffort,
        durability: Durability,
    ) -> IoFuture<'_, ()> {
        IoFuture::pending(async move {
            pass(self, DebugEvent::PwritevZero).await;
            let zeroed = self.zero_pieces(range, space, effort, durability).await;
            pass(self, DebugEvent::PwritevDone).await;
            zeroed
        })
    }

    fn discard(&self, range: ByteRange) -> IoFuture<'_, ()> {
        IoFuture::pending(async move {
            let unit = self.limits.discard_unit.max(1);
            for part in split(range, unit) {
                for piece in part.pieces(longest(self.limits.discard_max)) {
                    // What is not discarded can fail all the same, as in QEMU.
                    self.check(IoType::Discard, piece).await?;
                    if part.is_aligned(unit) {
                        self.below.discard(piece).await?;
                    }
                }
            }
            Ok(())
        })
    }

    fn flush(&self) -> IoFuture<'_, ()> {
        IoFuture::pending(async move {
            self.check(IoType::Flush, ByteRange::from_bounds(0, 0)).await?;
            self.below.flush().await
        })
    }

    fn extents(&self, range: ByteRange) -> IoFuture<'_, Vec<Extent>> {
        IoFuture::pending(async move {
            self.check(IoType::BlockStatus, range).await?;
            self.below.extents(range).await
        })
    }

    fn losses(&self) -> u64 {
        self.below.losses()
    }

    fn start_writeback(&self, range: ByteRange) {
        self.below.start_writeback(range);
    }

    fn raise(&self, event: DebugEvent) -> Option<LocalFuture<'static, ()>> {
        let held_up = self.rules.lock().happens(event);
        if held_up.is_empty() {
            return None;
        }
        self.rules.suspended.notify(usize::MAX);
        let rules = Arc::clone(&self.rules);
        Some(Box::pin(async move {
            let held_up = HeldUp { rules, by: held_up };
            for resumed in &held_up.by {
                while !resumed.is_over.load(Ordering::Acquire) {
                    let listener = resumed.event.listen();
                    if !resumed.is_over.load(Ordering::Acquire) {
                        listener.await;
                    }
                }
            }
        }))
    }

    fn hurry(&self, hurry: &mut Hurry) {
        self.below.hurry(hurry);
    }

    fn give_up(&self) {
        self.below.give_up();
    }

    fn out_of_reach(&self) -> Option<String> {
        self.below.out_of_reach()
    }
}

/// A request that is held up. Dropped, it is no longer there to be resumed.
struct HeldUp {
    rules: Arc<Shared>,
    by: Vec<Arc<Resumed>>,
}

impl Drop for HeldUp {
    fn drop(&mut self) {
        let mut rules = self.rules.lock();
        self.by.iter().for_each(|resumed| rules.forget(resumed));
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Rules> {
        self.rules.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn release(taken: &[Arc<Resumed>]) {
    for resumed in taken {
        resumed.is_over.store(true, Ordering::Release);
        resumed.event.notify(usize::MAX);
    }
}

const fn longest(limit: u64) -> u64 {
    if limit == 0 { u64::MAX } else { limit }
}

/// `range` as the part before the first multiple of `unit` in it, the multiples, and the rest; none of them empty.
fn split(range: ByteRange, unit: u64) -> Vec<ByteRange> {
    let first = range.offset().next_multiple_of(unit).min(range.end());
    let last = (range.end() - range.end() % unit).max(first);
    let cuts = [(range.offset(), first), (first, last), (last, range.end())];
    let parts = cuts.map(|(start, end)| ByteRange::from_bounds(start, end));
    parts.into_iter().filter(|part| !part.is_empty()).collect()
}

#[cfg(all(test, not(loom)))]
mod tests;
