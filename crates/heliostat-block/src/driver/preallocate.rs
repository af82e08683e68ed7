//! [`Preallocate`]: makes room behind what an image's file will be written to, in large steps (`preallocate` in QMP).
//!
//! Where a driver above says that it will write beyond the end, the file below becomes longer than that and its new
//! part takes space. Who looks sees the length that the driver above has made; the rest is cut off when that is made
//! shorter, and when the node is closed. A hint that cannot be followed is not: nothing fails for it. Knows no policy.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;

use crate::buffer::Buffer;
use crate::graph::Spot;
use crate::node_storage::NodeStorage;
use crate::range::ByteRange;
use crate::storage::{Durability, Extent, IoFuture, Storage, Traits, ZeroEffort, ZeroSpace};
use crate::throttle::Hurry;

/// How much room is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ahead {
    /// The file's length becomes a multiple of this many bytes; 0 for any.
    pub align: u64,
    /// Bytes behind what will be written.
    pub size: u64,
}

impl Ahead {
    /// How long a file becomes in which will be written up to `end`.
    fn length(self, end: u64) -> Option<u64> {
        end.checked_add(self.size)?.checked_next_multiple_of(self.align.max(1))
    }
}

/// Makes room ahead of writes.
pub struct Preallocate {
    below: NodeStorage,
    /// Where what is shown ends: not behind what is below. `u64::MAX` where all of it is shown.
    shown: AtomicU64,
    /// Held to look and to change, never across I/O.
    ahead: Mutex<Ahead>,
}

const ALL: u64 = u64::MAX;

impl Preallocate {
    /// Makes one over whatever node is at `child`.
    #[must_use]
    pub fn new(child: Arc<Spot>, ahead: Ahead) -> Self {
        Self { below: NodeStorage::of_layer(child), shown: AtomicU64::new(ALL), ahead: Mutex::new(ahead) }
    }

    pub(super) const fn below(&self) -> &NodeStorage {
        &self.below
    }

    /// Makes so much room from the next time on.
    pub fn change(&self, ahead: Ahead) {
        *self.ahead.lock().unwrap_or_else(PoisonError::into_inner) = ahead;
    }

    /// Cuts off what nobody has used. Nobody may use it any more.
    pub(super) async fn close(&self) -> io::Result<()> {
        let shown = self.size();
        if shown < self.below.size() {
            self.resize(shown).await?;
        }
        self.below.flush().await
    }

    async fn resize(&self, size: u64) -> io::Result<()> {
        let is_room = (self.size()..=self.below.size()).contains(&size);
        if is_room && size > self.size() {
            // It reads as zeroes, and nobody has been able to write there.
            self.shown.store(size, Ordering::Release);
            return Ok(());
        }
        self.below.set_size(size).await?;
        self.shown.store(ALL, Ordering::Release);
        Ok(())
    }

    async fn make_room(&self, end: u64) {
        let ahead = *self.ahead.lock().unwrap_or_else(PoisonError::into_inner);
        let (old, shown) = (self.below.size(), self.size());
        let Some(new) = ahead.length(end).filter(|new| end > old && *new > old) else { return };
        // Nobody sees, and writes to, what is being made.
        self.shown.store(shown, Ordering::Release);
        let gained = ByteRange::from_bounds(old, new);
        let (keep, any, cached) = (ZeroSpace::Keep, ZeroEffort::Any, Durability::Cached);
        let made = match self.below.set_size(new).await {
            Ok(()) => self.below.write_zeroes(gained, keep, any, cached).await,
            refused => refused,
        };
        if made.is_err() {
            // Whoever asked finds out what is possible by itself. A longer file than is shown is cut off at the end.
            let _ = self.below.set_size(old).await;
        }
    }
}

impl Storage for Preallocate {
    fn traits(&self) -> Traits {
        self.below.traits()
    }

    fn size(&self) -> u64 {
        self.shown.load(Ordering::Acquire).min(self.below.size())
    }

    fn set_size(&self, size: u64) -> IoFuture<'_, ()> {
        IoFuture::pending(self.resize(size))
    }

    fn expect_writes(&self, end: u64) -> IoFuture<'_, ()> {
        IoFuture::pending(async move {
            self.make_room(end).await;
            Ok(())
        })
    }

    fn allocated_size(&self) -> Option<u64> {
        self.below.allocated_size()
    }

    fn read(&self, offset: u64, buffer: Buffer) -> IoFuture<'_, Buffer> {
        self.below.read(offset, buffer)
    }

    fn write(&self, offset: u64, data: Bytes, durability: Durability) -> IoFuture<'_, ()> {
        self.below.write(offset, data, durability)
    }

    fn write_zeroes(
        &self,
        range: ByteRange,
        space: ZeroSpace,
        effort: ZeroEffort,
        durability: Durability,
    ) -> IoFuture<'_, ()> {
        self.below.write_zeroes(range, space, effort, durability)
    }

    fn discard(&self, range: ByteRange) -> IoFuture<'_, ()> {
        self.below.discard(range)
    }

    fn flush(&self) -> IoFuture<'_, ()> {
        self.below.flush()
    }

    fn extents(&self, range: ByteRange) -> IoFuture<'_, Vec<Extent>> {
        self.below.extents(range)
    }

    fn start_writeback(&self, range: ByteRange) {
        self.below.start_writeback(range);
    }

    fn hurry(&self, hurry: &mut Hurry) {
        self.below.hurry(hurry);
    }

    fn losses(&self) -> u64 {
        self.below.losses()
    }

    fn give_up(&self) {
        self.below.give_up();
    }

    fn out_of_reach(&self) -> Option<String> {
        self.below.out_of_reach()
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use std::sync::atomic::Ordering::Relaxed;

    use super::super::fault::{FaultInjector, InjectError, IoType, RequestLimits, Times};
    use super::super::qcow2::test_memory::{Memory, run};
    use super::super::{Driver, Filter, Raw};
    use super::*;
    use crate::debug_event::DebugEvent;
    use crate::job::test_disk::Ticking;
    use crate::name::NodeName;
    use crate::node::{Node, NodeOptions};

    const KIB: u64 = 1 << 10;

    /// A file of 4 KiB and the filter over it, both as nodes.
    fn stack(ahead: Ahead) -> (Arc<Memory>, Arc<Node>) {
        let (file, clock) = (Memory::of(vec![7; 4 << 10]), Arc::new(Ticking::default()));
        let node = |name: &str, driver| {
            Node::new(NodeName::new(name).expect("a name"), driver, NodeOptions::default(), clock.clone())
        };
        let lower = node("file", Driver::Raw(Raw::whole(file.clone())));
        let filter = Filter::Preallocate(Preallocate::new(Spot::of(lower), ahead));
        (file, node("filter", Driver::Filter(filter)))
    }

    const AHEAD: Ahead = Ahead { align: 32 << 10, size: 64 << 10 };

    #[test]
    fn who_will_write_finds_room_that_nobody_else_sees() {
        let (file, node) = stack(AHEAD);
        let above = NodeStorage::new(Arc::clone(&node));
        run(above.expect_writes(5 * KIB)).unwrap();
        assert_eq!((file.size(), node.size(), above.size()), (96 * KIB, 4 * KIB, 4 * KIB));
        run(above.set_size(80 * KIB)).unwrap();
        assert_eq!((file.size(), node.size()), (96 * KIB, 80 * KIB));
        run(above.expect_writes(96 * KIB)).unwrap();
        assert_eq!(file.size(), 96 * KIB, "there is room");
        run(above.write(79 * KIB, Bytes::from(vec![1; 1 << 10]), Durability::Cached)).unwrap();
        run(above.expect_writes(97 * KIB)).unwrap();
        assert_eq!((file.size(), node.size()), (192 * KIB, 80 * KIB));
        run(above.set_size(300 * KIB)).unwrap();
        assert_eq!((file.size(), node.size()), (300 * KIB, 300 * KIB));
        let bytes = file.content();
        let written = |at: &u64| if *at < 4 * KIB { 7 } else { u8::from((79 * KIB..80 * KIB).contains(at)) };
        assert!((0..300 * KIB).all(|at| bytes[crate::convert::usize_from(at)] == written(&at)));
    }

    #[test]
    fn room_that_nobody_used_goes_when_the_file_is_cut_or_closed() {
        for is_cut in [true, false] {
            let (file, node) = stack(AHEAD);
            let above = NodeStorage::new(Arc::clone(&node));
            run(above.expect_writes(5 * KIB)).unwrap();
            run(above.set_size(8 * KIB)).unwrap();
            if is_cut {
                run(above.set_size(6 * KIB)).unwrap();
                assert_eq!((file.size(), node.size()), (6 * KIB, 6 * KIB));
            } else {
                run(node.close()).unwrap();
                assert_eq!(file.size(), 8 * KIB);
            }
        }
    }

    #[test]
    fn where_there_is_no_room_to_make_what_is_needed_is_still_had() {
        let (file, node) = stack(AHEAD);
        let above = NodeStorage::new(Arc::clone(&node));
        file.size_max.store(20 * KIB, Relaxed);
        run(above.expect_writes(5 * KIB)).unwrap();
        assert_eq!((file.size(), node.size()), (4 * KIB, 4 * KIB));
        run(above.set_size(20 * KIB)).unwrap();
        assert_eq!((file.size(), node.size()), (20 * KIB, 20 * KIB));
    }

    #[test]
    fn room_that_takes_no_space_is_given_back() {
        let (file, clock) = (Memory::of(vec![7; 4 << 10]), Arc::new(Ticking::default()));
        let lower = Driver::Raw(Raw::whole(file.clone()));
        let fails = InjectError {
            event: DebugEvent::None,
            state: None,
            io: Some(IoType::WriteZeroes),
            errno: 28,
            offset: None,
            times: Times::Once,
            immediately: true,
        };
        let node = |name: &str, driver| {
            Node::new(NodeName::new(name).expect("a name"), driver, NodeOptions::default(), clock.clone())
        };
        let lower = Spot::of(node("file", lower));
        let faults = FaultInjector::new(lower, RequestLimits::default(), vec![fails], Vec::new());
        let faults = node("faults", Driver::Filter(Filter::Faults(faults)));
        let filter = Preallocate::new(Spot::of(faults), AHEAD);
        run(filter.expect_writes(5 * KIB)).unwrap();
        assert_eq!((file.size(), filter.size()), (4 * KIB, 4 * KIB));
        run(filter.expect_writes(5 * KIB)).unwrap();
        assert_eq!((file.size(), filter.size()), (96 * KIB, 4 * KIB));
    }

    #[test]
    fn a_resize_makes_no_room_and_an_image_does_through_other_filters() {
        let (file, node) = stack(AHEAD);
        run(node.resize(8 * KIB, super::super::Preallocation::Off)).unwrap();
        assert_eq!(file.size(), 8 * KIB);
        let raw = Driver::Raw(Raw::whole(NodeStorage::new(node)));
        let window = Node::new(
            NodeName::new("raw").unwrap(),
            raw,
            NodeOptions::default(),
            Arc::new(Ticking::default()),
        );
        let image_file = super::super::qcow2::file::ImageFile::new(NodeStorage::new(window));
        run(image_file.write(9 * KIB, Bytes::from_static(b"x"))).unwrap();
        assert_eq!(file.size(), (32 << 20) + 64 * KIB);
    }
}
