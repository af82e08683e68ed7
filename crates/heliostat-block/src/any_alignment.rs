//! [`AnyAlignment`]: a storage that takes whole blocks only, as one that takes requests of any alignment.
//!
//! Decides nothing and makes no errors of its own; what is not aligned is read, changed and written as
//! [`crate::blocks`] says. Called where the unit of a storage has changed under users that were told another.

use std::sync::Arc;

use bytes::Bytes;

use crate::blocks::Blocks;
use crate::buffer::Buffer;
use crate::clock::LocalFuture;
use crate::debug_event::DebugEvent;
use crate::range::ByteRange;
use crate::storage::{Durability, Extent, IoFuture, Storage, Traits, ZeroEffort, ZeroSpace};
use crate::throttle::Hurry;

/// A storage that takes requests of any alignment. All writes to what is below must come this way.
pub struct AnyAlignment(Blocks<Arc<dyn Storage>>);

impl AnyAlignment {
    /// Makes one over `below`.
    #[must_use]
    pub fn new(below: Arc<dyn Storage>) -> Self {
        Self(Blocks::new(below))
    }

    fn below(&self) -> &dyn Storage {
        &**self.0.below()
    }
}

impl Storage for AnyAlignment {
    fn traits(&self) -> Traits {
        Traits { block_size: 1, ..self.below().traits() }
    }

    fn size(&self) -> u64 {
        self.below().size()
    }

    fn set_size(&self, size: u64) -> IoFuture<'_, ()> {
        IoFuture::pending(self.0.set_size(size))
    }

    fn allocated_size(&self) -> Option<u64> {
        self.below().allocated_size()
    }

    fn read(&self, offset: u64, buffer: Buffer) -> IoFuture<'_, Buffer> {
        IoFuture::pending(self.0.read(offset, buffer))
    }

    fn write(&self, offset: u64, data: Bytes, durability: Durability) -> IoFuture<'_, ()> {
        IoFuture::pending(self.0.write(offset, data, durability))
    }

    fn write_zeroes(
        &self,
        range: ByteRange,
        space: ZeroSpace,
        effort: ZeroEffort,
        durability: Durability,
    ) -> IoFuture<'_, ()> {
        IoFuture::pending(self.0.write_zeroes(range, space, effort, durability))
    }

    fn discard(&self, range: ByteRange) -> IoFuture<'_, ()> {
        IoFuture::pending(self.0.discard(range))
    }

    fn flush(&self) -> IoFuture<'_, ()> {
        self.below().flush()
    }

    fn extents(&self, range: ByteRange) -> IoFuture<'_, Vec<Extent>> {
        self.below().extents(range)
    }

    fn losses(&self) -> u64 {
        self.below().losses()
    }

    fn give_up(&self) {
        self.below().give_up();
    }

    fn out_of_reach(&self) -> Option<String> {
        self.below().out_of_reach()
    }

    fn expect_writes(&self, end: u64) -> IoFuture<'_, ()> {
        self.below().expect_writes(end)
    }

    fn start_writeback(&self, range: ByteRange) {
        self.below().start_writeback(range);
    }

    fn raise(&self, event: DebugEvent) -> Option<LocalFuture<'static, ()>> {
        self.below().raise(event)
    }

    fn hurry(&self, hurry: &mut Hurry) {
        self.below().hurry(hurry);
    }
}
