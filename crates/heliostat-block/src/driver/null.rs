//! [`NullStorage`]: bytes that are nowhere. What is written is forgotten, what is read is zero.
//!
//! For measuring everything but the disk, and for trying out commands (`null-co` in QMP).

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;

use crate::buffer::Buffer;
use crate::clock::Clock;
use crate::range::ByteRange;
use crate::storage::{Durability, Extent, ExtentStatus, IoFuture, Storage, Traits, ZeroEffort, ZeroSpace};

/// A storage that keeps nothing.
pub struct NullStorage {
    size: u64,
    reads_zero: ReadsZero,
    /// How long each request takes; `None`: no time.
    latency: Option<(Arc<dyn Clock>, Duration)>,
}

/// Whether a [`NullStorage`] promises what it does: that it reads as zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReadsZero {
    /// It says that all of it is zero, so that copies skip it.
    Promised,
    /// It says that all of it is data, so that copies carry it.
    Unsaid,
}

impl NullStorage {
    /// Makes one of `size` bytes.
    #[must_use]
    pub const fn new(size: u64, reads_zero: ReadsZero) -> Self {
        Self { size, reads_zero, latency: None }
    }

    /// The same, but reads, writes, zeroes and flushes take `latency` by `clock`.
    #[must_use]
    pub fn with_latency(self, latency: Duration, clock: Arc<dyn Clock>) -> Self {
        let latency = (!latency.is_zero()).then_some((clock, latency));
        Self { latency, ..self }
    }

    /// Answers when the time has passed.
    fn later<'a, T: 'a>(&'a self, answer: T) -> IoFuture<'a, T> {
        let Some((clock, latency)) = &self.latency else { return IoFuture::ready(Ok(answer)) };
        let over = clock.sleep_until(clock.now() + *latency);
        IoFuture::pending(async move {
            over.await;
            Ok(answer)
        })
    }
}

impl Storage for NullStorage {
    fn traits(&self) -> Traits {
        Traits {
            block_size: 1,
            preferred_size: 4096,
            read_only: false,
            can_discard: true,
            can_zero_fast: true,
            can_resize: false,
            remote: false,
        }
    }

    fn size(&self) -> u64 {
        self.size
    }

    fn allocated_size(&self) -> Option<u64> {
        Some(0)
    }

    // Zeroes in both cases: a buffer may hold what another guest has read.
    fn read(&self, _offset: u64, mut buffer: Buffer) -> IoFuture<'_, Buffer> {
        buffer.fill(0);
        self.later(buffer)
    }

    fn write(&self, _offset: u64, _data: Bytes, _durability: Durability) -> IoFuture<'_, ()> {
        self.later(())
    }

    fn write_zeroes(
        &self,
        _range: ByteRange,
        _space: ZeroSpace,
        _effort: ZeroEffort,
        _durability: Durability,
    ) -> IoFuture<'_, ()> {
        self.later(())
    }

    fn discard(&self, _range: ByteRange) -> IoFuture<'_, ()> {
        self.later(())
    }

    fn flush(&self) -> IoFuture<'_, ()> {
        self.later(())
    }

    fn extents(&self, range: ByteRange) -> IoFuture<'_, Vec<Extent>> {
        let status = match self.reads_zero {
            ReadsZero::Promised => ExtentStatus::Zero,
            ReadsZero::Unsaid => ExtentStatus::Data,
        };
        IoFuture::ready(Ok(vec![Extent { range, status }]))
    }
}
