//! What `# Cancel safety` says of the waits of the core: dropped at any point before they return, they leave
//! nothing behind. (A request that has entered is never dropped; that is the front ends' promise.)

use std::future::Future;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt;
use heliostat_block::clock::{Clock, LocalFuture, Moment};
use heliostat_block::driver::null::{NullStorage, ReadsZero};
use heliostat_block::driver::{Driver, Raw};
use heliostat_block::graph::{Graph, Place, Role};
use heliostat_block::name::NodeName;
use heliostat_block::node::{Node, NodeOptions};

/// A clock that stands.
struct Standing;

impl Clock for Standing {
    fn now(&self) -> Moment {
        Moment::from_start(Duration::ZERO)
    }

    fn sleep_until(&self, _: Moment) -> LocalFuture<'static, ()> {
        Box::pin(std::future::pending())
    }
}

fn node(name: &str) -> Arc<Node> {
    let driver = Driver::Raw(Raw::whole(Arc::new(NullStorage::new(4096, ReadsZero::Unsaid))));
    Node::new(NodeName::new(name).expect("a good name"), driver, NodeOptions::default(), Arc::new(Standing))
}

fn exported(node: &Arc<Node>) -> (Graph, Arc<Place>) {
    let graph = Graph::default();
    graph.add(Arc::clone(node)).expect("the only node");
    let place = graph
        .attach(node, Role::Export { id: "export".to_owned(), writable: true })
        .expect("nobody else is there");
    (graph, place)
}

/// Polls what must wait, several times, and drops it.
fn poll_and_drop<T>(polls: usize, wait: impl Future<Output = T>) {
    let mut wait = pin!(wait);
    for _ in 0..polls {
        assert!(wait.as_mut().now_or_never().is_none(), "it should wait");
    }
}

/// The node can be entered, left, drained and entered again.
fn is_usable(node: &Arc<Node>) {
    assert_eq!(node.in_flight(), 0);
    let tracked = node.enter().now_or_never().expect("the gate is open");
    assert_eq!(node.in_flight(), 1);
    drop(tracked);
    drop(node.drain().now_or_never().expect("nothing is in flight"));
    assert!(node.enter().now_or_never().is_some());
    assert_eq!(node.in_flight(), 0);
}

#[test]
fn a_dropped_wait_at_the_gate_has_not_entered() {
    for polls in 0..3 {
        let node = node("disk0");
        let (_graph, place) = exported(&node);
        let drained = node.drain().now_or_never().unwrap();
        poll_and_drop(polls, node.enter());
        poll_and_drop(polls, place.enter());
        assert_eq!(node.in_flight(), 0);
        drop(drained);
        is_usable(&node);
    }
}

#[test]
fn a_wait_that_was_woken_and_then_dropped_has_not_entered() {
    let node = node("disk0");
    let (_graph, place) = exported(&node);
    let drained = node.drain().now_or_never().unwrap();
    let mut dropped = Box::pin(place.enter());
    assert!(dropped.as_mut().now_or_never().is_none());
    let mut other = Box::pin(place.enter());
    assert!(other.as_mut().now_or_never().is_none());
    drop(drained);
    drop(dropped);
    assert!(other.now_or_never().is_some(), "the wake-up is not lost with the one that was dropped");
    is_usable(&node);
}

#[test]
fn a_dropped_wait_during_a_pivot_has_entered_neither_node() {
    for polls in 0..3 {
        let (source, target) = (node("disk0"), node("disk1"));
        let (graph, place) = exported(&source);
        graph.add(Arc::clone(&target)).unwrap();
        let drained = source.drain().now_or_never().unwrap();
        let target_drained = target.drain().now_or_never().unwrap();
        let mut wait = Box::pin(place.enter());
        assert!(wait.as_mut().now_or_never().is_none());
        graph.pivot(&drained, &target);
        drop(drained);
        for _ in 0..polls {
            assert!(wait.as_mut().now_or_never().is_none(), "the target's gate is closed");
        }
        drop(wait);
        drop(target_drained);
        is_usable(&source);
        is_usable(&target);
        let tracked = place.enter().now_or_never().unwrap();
        assert!(Arc::ptr_eq(tracked.node(), &target));
    }
}

#[test]
fn a_dropped_drain_opens_the_gate_again() {
    for polls in 0..3 {
        let node = node("disk0");
        let tracked = node.enter().now_or_never().unwrap();
        poll_and_drop(polls, node.drain());
        let second = node.enter().now_or_never().expect("the gate is open again");
        drop(tracked);
        drop(second);
        is_usable(&node);
    }
}

#[test]
fn a_dropped_drain_leaves_the_gate_to_another_holder() {
    let node = node("disk0");
    let tracked = node.enter().now_or_never().unwrap();
    let mut kept = Box::pin(node.drain());
    assert!(kept.as_mut().now_or_never().is_none());
    poll_and_drop(2, node.drain());
    assert!(node.enter().now_or_never().is_none(), "the other drain still holds the gate");
    drop(tracked);
    let drained = kept.now_or_never().expect("quiet");
    drop(drained);
    is_usable(&node);
}
