//! [`Driver`]: how a node keeps its bytes. A closed set, so an enum.
//!
//! A driver maps a node's bytes onto a storage. It knows nothing of clients, bitmaps or jobs; the node calls
//! it with ranges that lie inside and are aligned to its block size.

pub mod null;
pub mod qcow2;
pub mod raw;

use std::io;
use std::sync::Arc;

use bytes::Bytes;

use crate::blocks::Below;
use crate::buffer::Buffer;
use crate::named_bitmap::NamedBitmap;
use crate::node::Node;
use crate::range::ByteRange;
use crate::storage::{Durability, Extent, IoFuture, Traits, ZeroEffort, ZeroSpace};

pub use qcow2::{Preallocation, Qcow2};
pub use raw::Raw;

/// How a node keeps its bytes.
pub enum Driver {
    /// One to one, in a window of a storage.
    Raw(Raw),
    /// In clusters that are allocated as they are written, on top of another node.
    Qcow2(Arc<Qcow2>),
}

impl Driver {
    /// The fixed properties.
    pub(crate) fn traits(&self) -> Traits {
        match self {
            Self::Raw(raw) => raw.traits(),
            Self::Qcow2(qcow2) => qcow2.traits(),
        }
    }

    /// The virtual size in bytes.
    pub(crate) fn size(&self) -> u64 {
        match self {
            Self::Raw(raw) => raw.size(),
            Self::Qcow2(qcow2) => qcow2.size(),
        }
    }

    /// Bytes spent on the host, where that can be known.
    pub(crate) fn allocated_size(&self) -> Option<u64> {
        match self {
            Self::Raw(raw) => raw.allocated_size(),
            Self::Qcow2(qcow2) => qcow2.allocated_size(),
        }
    }

    /// The node below, which holds what this one does not.
    pub(crate) fn backing(&self) -> Option<Arc<Node>> {
        match self {
            Self::Raw(_) => None,
            Self::Qcow2(qcow2) => qcow2.backing(),
        }
    }

    /// Changes the virtual size. Nobody may use it meanwhile.
    pub(crate) async fn resize(&self, size: u64, preallocation: Preallocation) -> io::Result<()> {
        match self {
            Self::Raw(raw) => {
                let old = raw.size();
                raw.resize(size).await?;
                match ByteRange::from_bounds(old, size) {
                    gained if preallocation == Preallocation::Off || gained.is_empty() => Ok(()),
                    gained => {
                        raw.write_zeroes(gained, ZeroSpace::Keep, ZeroEffort::Any, Durability::Cached).await
                    }
                }
            }
            Self::Qcow2(qcow2) => Ok(qcow2.resize(size, preallocation).await?),
        }
    }

    /// Bitmaps that it keeps.
    pub(crate) fn bitmaps(&self) -> Vec<NamedBitmap> {
        match self {
            Self::Raw(_) => Vec::new(),
            Self::Qcow2(qcow2) => qcow2.named_bitmaps(),
        }
    }

    /// Leaves everything in order. Nobody may use it any more.
    pub(crate) async fn close(&self) -> io::Result<()> {
        match self {
            Self::Raw(raw) => raw.flush().await,
            Self::Qcow2(qcow2) => qcow2.close().await,
        }
    }

    /// See [`crate::storage::Storage::flush`].
    pub(crate) fn flush(&self) -> IoFuture<'_, ()> {
        match self {
            Self::Raw(raw) => raw.flush(),
            Self::Qcow2(qcow2) => IoFuture::pending(qcow2.flush()),
        }
    }

    /// See [`crate::storage::Storage::extents`].
    pub(crate) fn extents(&self, range: ByteRange) -> IoFuture<'_, Vec<Extent>> {
        match self {
            Self::Raw(raw) => raw.extents(range),
            Self::Qcow2(qcow2) => qcow2.extents(range),
        }
    }

    /// See [`crate::storage::Storage::start_writeback`].
    pub(crate) fn start_writeback(&self, range: ByteRange) {
        match self {
            Self::Raw(raw) => raw.start_writeback(range),
            Self::Qcow2(qcow2) => qcow2.start_writeback(range),
        }
    }
}

impl Below for Driver {
    fn block_size(&self) -> u32 {
        self.traits().block_size
    }

    fn end(&self) -> u64 {
        match self {
            Self::Raw(raw) => raw.end(),
            Self::Qcow2(qcow2) => qcow2.size(),
        }
    }

    fn read(&self, offset: u64, buffer: Buffer) -> IoFuture<'_, Buffer> {
        match self {
            Self::Raw(raw) => raw.read(offset, buffer),
            Self::Qcow2(qcow2) => qcow2.read(offset, buffer),
        }
    }

    fn write(&self, offset: u64, data: Bytes, durability: Durability) -> IoFuture<'_, ()> {
        match self {
            Self::Raw(raw) => raw.write(offset, data, durability),
            Self::Qcow2(qcow2) => qcow2.write(offset, data, durability),
        }
    }

    fn write_zeroes(
        &self,
        range: ByteRange,
        space: ZeroSpace,
        effort: ZeroEffort,
        durability: Durability,
    ) -> IoFuture<'_, ()> {
        match self {
            Self::Raw(raw) => raw.write_zeroes(range, space, effort, durability),
            Self::Qcow2(qcow2) => qcow2.write_zeroes(range, space, durability),
        }
    }

    fn discard(&self, range: ByteRange) -> IoFuture<'_, ()> {
        match self {
            Self::Raw(raw) => raw.discard(range),
            Self::Qcow2(qcow2) => qcow2.discard(range),
        }
    }
}
