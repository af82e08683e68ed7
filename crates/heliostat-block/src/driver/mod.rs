//! [`Driver`]: how a node keeps its bytes. A closed set, so an enum.
//!
//! A driver maps a node's bytes onto a storage. It knows nothing of clients, bitmaps or jobs; the node calls
//! it with ranges that lie inside and are aligned to its block size.

pub mod copy_on_read;
pub mod fault;
pub mod filter;
pub mod null;
pub mod preallocate;
pub mod qcow2;
pub mod raw;
pub mod throttle;

use std::io;
use std::sync::Arc;

use bytes::Bytes;

use crate::blocks::Below;
use crate::buffer::Buffer;
use crate::clock::LocalFuture;
use crate::debug_event::DebugEvent;
use crate::named_bitmap::NamedBitmap;
use crate::node::Node;
use crate::range::ByteRange;
use crate::span::Span;
use crate::storage::{Durability, Extent, IoFuture, Traits, ZeroEffort, ZeroSpace, pass};
use crate::throttle::Hurry;

pub use filter::Filter;
pub use qcow2::{Preallocation, Qcow2};
pub use raw::Raw;

/// How a node keeps its bytes.
pub enum Driver {
    /// One to one, in a window of a storage.
    Raw(Raw),
    /// In clusters that are allocated as they are written, on top of another node.
    Qcow2(Arc<Qcow2>),
    /// In another node, to which requests are passed on.
    Filter(Filter),
}

impl Driver {
    /// The fixed properties.
    pub(crate) fn traits(&self) -> Traits {
        match self {
            Self::Raw(raw) => raw.traits(),
            Self::Qcow2(qcow2) => qcow2.traits(),
            Self::Filter(filter) => filter.storage().traits(),
        }
    }

    /// The virtual size in bytes.
    pub(crate) fn size(&self) -> u64 {
        match self {
            Self::Raw(raw) => raw.size(),
            Self::Qcow2(qcow2) => qcow2.size(),
            Self::Filter(filter) => filter.storage().size(),
        }
    }

    /// Bytes spent on the host, where that can be known.
    pub(crate) fn allocated_size(&self) -> Option<u64> {
        match self {
            Self::Raw(raw) => raw.allocated_size(),
            Self::Qcow2(qcow2) => qcow2.allocated_size(),
            Self::Filter(filter) => filter.storage().allocated_size(),
        }
    }

    /// The node below, which holds what this one does not.
    pub(crate) fn backing(&self) -> Option<Arc<Node>> {
        match self {
            Self::Raw(_) => None,
            Self::Qcow2(qcow2) => qcow2.backing(),
            Self::Filter(filter) => filter.child().backing(),
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
            Self::Filter(filter) => {
                let old = self.size();
                filter.storage().set_size(size).await?;
                match ByteRange::from_bounds(old.min(size), size) {
                    gained if preallocation == Preallocation::Off || gained.is_empty() => Ok(()),
                    gained => {
                        let (effort, durability) = (ZeroEffort::Any, Durability::Cached);
                        filter.storage().write_zeroes(gained, ZeroSpace::Keep, effort, durability).await
                    }
                }
            }
        }
    }

    /// See [`crate::storage::Storage::expect_writes`].
    pub(crate) fn expect_writes(&self, end: u64) -> IoFuture<'_, ()> {
        match self {
            Self::Raw(raw) => raw.expect_writes(end),
            Self::Qcow2(_) => IoFuture::ready(Ok(())),
            Self::Filter(filter) => filter.storage().expect_writes(end),
        }
    }

    /// Bitmaps that it keeps.
    pub(crate) fn bitmaps(&self) -> Vec<NamedBitmap> {
        match self {
            Self::Raw(_) | Self::Filter(_) => Vec::new(),
            Self::Qcow2(qcow2) => qcow2.named_bitmaps(),
        }
    }

    /// Leaves everything in order. Nobody may use it any more.
    pub(crate) async fn close(&self) -> io::Result<()> {
        match self {
            Self::Filter(Filter::Preallocate(preallocate)) => preallocate.close().await,
            Self::Raw(_) | Self::Filter(_) => self.flush().await,
            Self::Qcow2(qcow2) => qcow2.close().await,
        }
    }

    /// See [`crate::storage::Storage::flush`].
    pub(crate) fn flush(&self) -> IoFuture<'_, ()> {
        match self {
            Self::Raw(raw) => raw.flush(),
            Self::Qcow2(qcow2) => IoFuture::pending(async move {
                pass(&**qcow2.storage(), DebugEvent::FlushToOs).await;
                qcow2.flush().await
            }),
            Self::Filter(filter) => filter.flush(),
        }
    }

    /// See [`crate::storage::Storage::extents`].
    pub(crate) fn extents(&self, range: ByteRange) -> IoFuture<'_, Vec<Extent>> {
        match self {
            Self::Raw(raw) => raw.extents(range),
            Self::Qcow2(qcow2) => qcow2.extents(range),
            Self::Filter(filter) => filter.storage().extents(range),
        }
    }

    /// See [`crate::storage::Storage::span`]. Filters want to see what is read.
    pub(crate) fn span(&self, range: ByteRange) -> Option<Span> {
        match self {
            Self::Raw(raw) => raw.span(range),
            Self::Qcow2(_) | Self::Filter(_) => None,
        }
    }

    /// See [`crate::storage::Storage::takes_spans`].
    pub(crate) fn takes_span(&self, range: ByteRange) -> bool {
        match self {
            Self::Raw(raw) => raw.takes_span(range),
            Self::Qcow2(_) | Self::Filter(_) => false,
        }
    }

    /// See [`crate::storage::Storage::write_span`].
    pub(crate) fn write_span(&self, offset: u64, span: Span) -> IoFuture<'_, ()> {
        match self {
            Self::Raw(raw) => raw.write_span(offset, span),
            Self::Qcow2(_) | Self::Filter(_) => IoFuture::ready(Err(io::ErrorKind::Unsupported.into())),
        }
    }

    /// See [`crate::storage::Storage::losses`]; of everything that it writes to.
    pub(crate) fn losses(&self) -> u64 {
        match self {
            Self::Raw(raw) => raw.storage().losses(),
            Self::Qcow2(qcow2) => qcow2.storages().map(|below| below.losses()).sum(),
            Self::Filter(filter) => filter.storage().losses(),
        }
    }

    /// See [`crate::storage::Storage::start_writeback`].
    pub(crate) fn start_writeback(&self, range: ByteRange) {
        match self {
            Self::Raw(raw) => raw.start_writeback(range),
            Self::Qcow2(qcow2) => qcow2.start_writeback(range),
            Self::Filter(filter) => filter.storage().start_writeback(range),
        }
    }
}

impl Driver {
    /// See [`Storage::raise`]: what a driver on top does concerns this one alone.
    pub(crate) fn raise(&self, event: DebugEvent) -> Option<LocalFuture<'static, ()>> {
        match self {
            Self::Filter(filter) => filter.storage().raise(event),
            Self::Raw(_) | Self::Qcow2(_) => None,
        }
    }

    /// See [`Storage::hurry`]; for everything that it stands on.
    pub(crate) fn hurry(&self, hurry: &mut Hurry) {
        match self {
            Self::Raw(raw) => raw.storage().hurry(hurry),
            Self::Qcow2(qcow2) => {
                qcow2.storages().for_each(|below| below.hurry(hurry));
                if let Some(backing) = qcow2.backing() {
                    backing.driver().hurry(hurry);
                }
            }
            Self::Filter(filter) => filter.storage().hurry(hurry),
        }
    }
}

impl Driver {
    /// See [`Storage::give_up`]; for everything that it writes to.
    pub(crate) fn give_up(&self) {
        match self {
            Self::Raw(raw) => raw.storage().give_up(),
            Self::Qcow2(qcow2) => qcow2.storages().for_each(|below| below.give_up()),
            Self::Filter(filter) => filter.storage().give_up(),
        }
    }

    /// See [`Storage::out_of_reach`]; of everything that it writes to.
    pub(crate) fn out_of_reach(&self) -> Option<String> {
        match self {
            Self::Raw(raw) => raw.storage().out_of_reach(),
            Self::Qcow2(qcow2) => qcow2.storages().find_map(|below| below.out_of_reach()),
            Self::Filter(filter) => filter.storage().out_of_reach(),
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
            Self::Filter(filter) => filter.storage().size(),
        }
    }

    fn read(&self, offset: u64, buffer: Buffer) -> IoFuture<'_, Buffer> {
        match self {
            Self::Raw(raw) => raw.read(offset, buffer),
            Self::Qcow2(qcow2) => qcow2.read(offset, buffer),
            Self::Filter(filter) => filter.storage().read(offset, buffer),
        }
    }

    fn write(&self, offset: u64, data: Bytes, durability: Durability) -> IoFuture<'_, ()> {
        match self {
            Self::Raw(raw) => raw.write(offset, data, durability),
            Self::Qcow2(qcow2) => qcow2.write(offset, data, durability),
            Self::Filter(filter) => filter.storage().write(offset, data, durability),
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
            Self::Filter(filter) => filter.storage().write_zeroes(range, space, effort, durability),
        }
    }

    fn discard(&self, range: ByteRange) -> IoFuture<'_, ()> {
        match self {
            Self::Raw(raw) => raw.discard(range),
            Self::Qcow2(qcow2) => qcow2.discard(range),
            Self::Filter(filter) => filter.storage().discard(range),
        }
    }

    fn raise(&self, event: DebugEvent) -> Option<LocalFuture<'static, ()>> {
        Self::raise(self, event)
    }
}
