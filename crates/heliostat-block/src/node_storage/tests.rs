//! One node on another: what is in flight where, and who waits for whom.

use std::pin::pin;

use futures_util::FutureExt;

use super::*;
use crate::driver::throttle::Throttle;
use crate::driver::{Driver, Filter};
use crate::job::test_disk::{Disk, Ticking, node_of};
use crate::name::NodeName;
use crate::named_bitmap::{self, Change, NamedBitmap};
use crate::node::NodeOptions;
use crate::throttle::{Counted, Limits, ThrottleGroup};

const LEN: usize = 64 << 10;

/// A disk, a node of it, and a node on that.
fn stack() -> (Arc<Disk>, Arc<Node>, Arc<Node>) {
    let (disk, clock) = (Disk::of(vec![0; LEN]), Arc::new(Ticking::default()));
    let lower = node_of("lower", disk.clone(), &clock);
    let upper = node_of("upper", NodeStorage::new(Arc::clone(&lower)), &clock);
    (disk, lower, upper)
}

async fn write(node: &Arc<Node>) {
    let tracked = node.enter().await;
    let written = tracked.write(0, Bytes::from(vec![7; 4096]), Durability::Cached).await;
    assert!(written.is_ok(), "{written:?}");
}

#[test]
fn a_request_through_the_upper_node_is_in_flight_in_both_and_a_drain_above_waits_for_it() {
    let (disk, lower, upper) = stack();
    disk.hold_writes();
    let mut writing = pin!(write(&upper));
    assert!(writing.as_mut().now_or_never().is_none());
    assert_eq!((upper.in_flight(), lower.in_flight()), (1, 1));
    let mut draining = pin!(upper.drain());
    assert!(draining.as_mut().now_or_never().is_none());
    disk.release();
    assert!(writing.now_or_never().is_some());
    assert!(draining.now_or_never().is_some());
    assert_eq!(lower.in_flight(), 0, "what it sent below has ended, too");
}

#[test]
fn a_request_waits_while_the_lower_gate_is_closed_and_then_goes_on() {
    let (disk, lower, upper) = stack();
    let drained = lower.drain().now_or_never().expect("nothing is in flight");
    let mut writing = pin!(write(&upper));
    assert!(writing.as_mut().now_or_never().is_none());
    assert_eq!(disk.shown()[0], 0);
    drop(drained);
    assert!(writing.now_or_never().is_some());
    assert_eq!(disk.shown()[0], 7);
}

#[test]
fn a_write_through_the_upper_node_marks_the_lower_ones_bitmaps() {
    let (_, lower, upper) = stack();
    let bitmap = Arc::new(crate::dirty_bitmap::DirtyBitmap::new(lower.size(), 4096).unwrap());
    let named = NamedBitmap::new("lower".to_owned(), Arc::clone(&bitmap));
    named_bitmap::change(&[(Arc::clone(&lower), Change::Add(named))]);
    write(&upper).now_or_never().expect("the disk answers at once");
    assert_eq!(bitmap.dirty_bytes(), 4096);
}

#[test]
fn what_was_written_before_the_lower_node_was_only_read_is_flushed() {
    let (disk, lower, upper) = stack();
    write(&upper).now_or_never().expect("the disk answers at once");
    lower.set_options(NodeOptions { read_only: true, ..lower.options() });
    let flushed = async { upper.enter().await.flush().await };
    assert!(flushed.now_or_never().expect("the disk answers at once").is_ok());
    assert_eq!(disk.flushes(), 1);
}

#[test]
fn a_drain_does_not_wait_for_a_limit_below() {
    let clock = Arc::new(Ticking::default());
    let disk = Disk::of(vec![0; LEN]);
    let bottom = node_of("bottom", disk, &clock);
    let mut limits = Limits::default();
    limits.get_mut(Counted::RequestsTotal).rate = 1;
    let clock: Arc<dyn crate::clock::Clock> = clock;
    let group = ThrottleGroup::new(limits, Arc::clone(&clock)).unwrap();
    let throttle = Driver::Filter(Filter::Throttle(Throttle::new(Spot::of(bottom), group)));
    let lower =
        Node::new(NodeName::new("lower").unwrap(), throttle, NodeOptions::default(), Arc::clone(&clock));
    let raw = Driver::Raw(crate::driver::Raw::whole(NodeStorage::new(lower)));
    let upper = Node::new(NodeName::new("upper").unwrap(), raw, NodeOptions::default(), clock);
    let mut writes: Vec<_> = (0..5).map(|_| Box::pin(write(&upper))).collect();
    writes.retain_mut(|writing| writing.as_mut().now_or_never().is_none());
    assert!(!writes.is_empty(), "the limit holds them up");
    let mut draining = Box::pin(upper.drain());
    assert!(draining.as_mut().now_or_never().is_none());
    writes.retain_mut(|writing| writing.as_mut().now_or_never().is_none());
    assert!(writes.is_empty(), "nobody waits for the limit any more");
    drop(draining.now_or_never().expect("it is quiet"));
    let mut late = Box::pin(write(&upper));
    assert!(late.as_mut().now_or_never().is_none(), "after the drain the limit holds again");
}

#[test]
fn throttling_that_has_changed_its_group_waits_for_the_limits_of_that() {
    let clock = Arc::new(Ticking::default());
    let bottom = node_of("bottom", Disk::of(vec![0; LEN]), &clock);
    let clock: Arc<dyn crate::clock::Clock> = clock;
    let group = |rate: u64| {
        let mut limits = Limits::default();
        limits.get_mut(Counted::RequestsTotal).rate = rate;
        ThrottleGroup::new(limits, Arc::clone(&clock)).unwrap()
    };
    let (slow, free) = (group(1), group(0));
    let throttle = Throttle::new(Spot::of(bottom), Arc::clone(&slow));
    let driver = Driver::Filter(Filter::Throttle(throttle));
    let node = Node::new(NodeName::new("n").unwrap(), driver, NodeOptions::default(), Arc::clone(&clock));
    let passes = || (0..5).all(|_| Box::pin(write(&node)).now_or_never().is_some());
    assert!(!passes());
    let drained = node.drain().now_or_never().expect("what waited was dropped");
    node.throttle().unwrap().change_group(Arc::clone(&free));
    drop(drained);
    assert!(passes(), "the new group has no limits");
    assert!(!slow.has_members() && free.has_members());
    node.throttle().unwrap().change_group(slow);
    assert!(!passes());
    drop(node);
    assert!(!free.has_members());
}

/// A disk that hears when it is given up.
struct Heard {
    disk: Arc<Disk>,
    given_up: AtomicU64,
}

impl Storage for Heard {
    fn traits(&self) -> Traits {
        self.disk.traits()
    }

    fn size(&self) -> u64 {
        self.disk.size()
    }

    fn allocated_size(&self) -> Option<u64> {
        self.disk.allocated_size()
    }

    fn read(&self, offset: u64, buffer: Buffer) -> IoFuture<'_, Buffer> {
        self.disk.read(offset, buffer)
    }

    fn write(&self, offset: u64, data: Bytes, durability: Durability) -> IoFuture<'_, ()> {
        self.disk.write(offset, data, durability)
    }

    fn write_zeroes(
        &self,
        range: ByteRange,
        space: ZeroSpace,
        effort: ZeroEffort,
        durability: Durability,
    ) -> IoFuture<'_, ()> {
        self.disk.write_zeroes(range, space, effort, durability)
    }

    fn discard(&self, range: ByteRange) -> IoFuture<'_, ()> {
        self.disk.discard(range)
    }

    fn flush(&self) -> IoFuture<'_, ()> {
        self.disk.flush()
    }

    fn extents(&self, range: ByteRange) -> IoFuture<'_, Vec<Extent>> {
        self.disk.extents(range)
    }

    fn give_up(&self) {
        self.given_up.fetch_add(1, Ordering::SeqCst);
    }
}

#[test]
fn giving_up_one_of_two_nodes_on_a_third_leaves_what_the_other_waits_for_alone() {
    let (disk, clock) = (Disk::of(vec![0; LEN]), Arc::new(Ticking::default()));
    let heard = Arc::new(Heard { disk: Arc::clone(&disk), given_up: AtomicU64::new(0) });
    let lower = node_of("lower", heard.clone(), &clock);
    let [target, guests] =
        ["target", "guests"].map(|name| node_of(name, NodeStorage::new(Arc::clone(&lower)), &clock));
    disk.hold_writes();
    let mut copying = Box::pin(write(&target));
    assert!(copying.as_mut().now_or_never().is_none());
    let mut writing = Box::pin(write(&guests));
    assert!(writing.as_mut().now_or_never().is_none());
    target.give_up();
    assert_eq!(heard.given_up.load(Ordering::SeqCst), 0);
    // A request that nobody waits for any more has left.
    drop(writing);
    target.give_up();
    assert_eq!(heard.given_up.load(Ordering::SeqCst), 1);
    disk.release();
    assert!(copying.now_or_never().is_some());
    target.give_up();
    assert_eq!(heard.given_up.load(Ordering::SeqCst), 2, "nothing is in flight");
}
