//! [`NullStorage`]: bytes that are nowhere. What is written is forgotten, what is read is zero.
//!
//! For measuring everything but the disk, and for trying out commands (`null-co` in QMP).

use std::io;

use bytes::Bytes;

use crate::buffer::Buffer;
use crate::range::ByteRange;
use crate::storage::{Durability, Extent, ExtentStatus, IoFuture, Storage, Traits, ZeroEffort, ZeroSpace};

/// A storage that keeps nothing.
#[derive(Clone, Copy, Debug)]
pub struct NullStorage {
    size: u64,
    reads_zero: ReadsZero,
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
        Self { size, reads_zero }
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
        IoFuture::ready(Ok(buffer))
    }

    fn write(&self, _offset: u64, _data: Bytes, _durability: Durability) -> IoFuture<'_, ()> {
        done()
    }

    fn write_zeroes(
        &self,
        _range: ByteRange,
        _space: ZeroSpace,
        _effort: ZeroEffort,
        _durability: Durability,
    ) -> IoFuture<'_, ()> {
        done()
    }

    fn discard(&self, _range: ByteRange) -> IoFuture<'_, ()> {
        done()
    }

    fn flush(&self) -> IoFuture<'_, ()> {
        done()
    }

    fn extents(&self, range: ByteRange) -> IoFuture<'_, Vec<Extent>> {
        let status = match self.reads_zero {
            ReadsZero::Promised => ExtentStatus::Zero,
            ReadsZero::Unsaid => ExtentStatus::Data,
        };
        IoFuture::ready(Ok(vec![Extent { range, status }]))
    }
}

fn done() -> IoFuture<'static, ()> {
    IoFuture::ready(io::Result::Ok(()))
}
