//! A mirror of what stands on filters, whose target takes the place of a node below them.

use std::cell::RefCell;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Waker};

use bytes::Bytes;
use futures_util::FutureExt;

use super::mirror::MirrorOptions;
use super::test_disk::{Bench, Disk, SECTOR};
use super::{JobEvent, Verb};
use crate::buffer::Buffer;
use crate::clock::Clock;
use crate::driver::throttle::Throttle;
use crate::driver::{Driver, Filter};
use crate::graph::{Claims, Graph, Place, Role};
use crate::limits::PAUSE_BUDGET_LAST;
use crate::name::NodeName;
use crate::node::{Node, NodeOptions};
use crate::storage::Durability;
use crate::throttle::{Limits, ThrottleGroup};

const SECTORS: usize = 8;

fn disk(byte: u8) -> Arc<Disk> {
    Disk::of(vec![byte; SECTORS * SECTOR])
}

/// Puts a filter on `below`.
fn filter(bench: &Bench, name: &str, below: &Arc<Node>) -> (Arc<Node>, Arc<Place>) {
    let name = NodeName::new(name).unwrap();
    let place =
        bench.graph.attach(below, Role::Child { of: name.clone(), claims: Claims::default() }).unwrap();
    let clock: Arc<dyn Clock> = bench.clock.clone();
    let group = ThrottleGroup::new(Limits::default(), Arc::clone(&clock)).unwrap();
    let driver = Driver::Filter(Filter::Throttle(Throttle::new(Arc::clone(place.spot()), group)));
    let node = Node::new(name, driver, NodeOptions::default(), clock);
    bench.graph.add(Arc::clone(&node)).unwrap();
    (node, place)
}

fn export(graph: &Graph, node: &Arc<Node>, writable: bool) -> Arc<Place> {
    graph.attach(node, Role::Export { id: "export".to_owned(), writable }).unwrap()
}

/// A guest on two filters on a disk.
struct Stack {
    bench: Bench,
    low: Arc<Node>,
    middle: Arc<Node>,
    _places: [Arc<Place>; 2],
    source: Arc<Disk>,
    target: Arc<Disk>,
}

impl Stack {
    fn new() -> Self {
        let (source, target) = (disk(1), disk(0));
        let mut bench = Bench::new(Arc::clone(&source), Arc::clone(&target));
        let low = Arc::clone(&bench.source);
        bench.graph.detach(&bench.export);
        let (middle, at_low) = filter(&bench, "middle", &low);
        let (top, at_middle) = filter(&bench, "top", &middle);
        bench.export = export(&bench.graph, &top, true);
        bench.source = top;
        Self { bench, low, middle, _places: [at_low, at_middle], source, target }
    }

    /// Mirrors to the end, with the target in the place of the lowest node.
    fn replace_low(&self, mut beside: impl FnMut()) {
        let options = MirrorOptions { granularity: 512, ..MirrorOptions::default() };
        let (_job, mirror) = self.bench.mirror(options, |job, event| match event {
            JobEvent::Ready => job.ask(Verb::Complete).unwrap(),
            JobEvent::Completed(failure) => assert_eq!(*failure, None),
            JobEvent::Cancelled => panic!("nobody cancels it"),
            _ => {}
        });
        let mirror = mirror.with_replaced(vec![Arc::clone(&self.middle), Arc::clone(&self.low)]);
        self.bench.run(mirror.run(), &mut beside);
    }
}

async fn write(place: &Place, sector: usize, byte: u8) {
    let data = Bytes::from(vec![byte; SECTOR]);
    let offset = u64::try_from(sector * SECTOR).unwrap();
    place.enter().await.write(offset, data, Durability::Cached).await.unwrap();
}

async fn read(place: &Place) -> u8 {
    place.enter().await.read(0, Buffer::zeroed(SECTOR)).await.unwrap()[0]
}

#[test]
fn the_target_takes_the_place_of_a_node_below_filters_and_guests_stay_above_them() {
    let stack = Stack::new();
    let readers = [&stack.low, &stack.middle].map(|node| export(&stack.bench.graph, node, false));
    stack.replace_low(|| ());
    assert!(Arc::ptr_eq(&stack.bench.export.node(), &stack.bench.source));
    assert!(Arc::ptr_eq(&stack.middle.passes_on_to().unwrap(), &stack.bench.target));
    assert!(
        Arc::ptr_eq(&readers[0].node(), &stack.bench.target),
        "who read the replaced node reads the target"
    );
    assert!(Arc::ptr_eq(&readers[1].node(), &stack.middle));
    assert!(stack.bench.graph.roles(&stack.low).is_empty(), "nobody uses the replaced node any more");
    write(&stack.bench.export, 0, 9).now_or_never().expect("all gates are open");
    assert_eq!((stack.source.shown()[0], stack.target.shown()[0]), (1, 9));
    for reader in &readers {
        assert_eq!(read(reader).now_or_never().expect("all gates are open"), 9);
    }
}

#[test]
fn writes_beside_the_pivot_below_are_all_on_the_target() {
    let stack = Stack::new();
    let mut writes: Vec<Pin<Box<dyn Future<Output = usize>>>> = Vec::new();
    let acknowledged = RefCell::new([1; SECTORS]);
    let mut count = 0;
    let poll = |writes: &mut Vec<Pin<Box<dyn Future<Output = usize>>>>| {
        writes.retain_mut(|writing| {
            let polled = writing.as_mut().poll(&mut Context::from_waker(Waker::noop()));
            if let std::task::Poll::Ready(sector) = polled {
                acknowledged.borrow_mut()[sector] += 1;
            }
            polled.is_pending()
        });
    };
    stack.replace_low(|| {
        poll(&mut writes);
        // One at a time, so that the last to be acknowledged is what must be there.
        if writes.is_empty() && count < 400 {
            let sector = count % SECTORS;
            let byte = acknowledged.borrow()[sector] + 1;
            let export = Arc::clone(&stack.bench.export);
            count += 1;
            writes.push(Box::pin(async move {
                write(&export, sector, byte).await;
                sector
            }));
        }
    });
    poll(&mut writes);
    assert!(writes.is_empty(), "no gate is closed any more");
    let shown: Vec<_> = stack.target.shown().chunks(SECTOR).map(|sector| sector[0]).collect();
    assert_eq!(shown, *acknowledged.borrow());
}

#[test]
fn who_reads_below_for_long_holds_up_the_pivot_and_no_guest_for_longer_than_it_may() {
    for is_lowest in [true, false] {
        let stack = Stack::new();
        let node = if is_lowest { &stack.low } else { &stack.middle };
        let reader = export(&stack.bench.graph, node, false);
        let mut reading = Some(reader.enter().now_or_never().expect("the gate is open"));
        let (mut closed, mut opened) = (None, None);
        stack.replace_low(|| {
            let is_closed = stack.bench.export.enter().now_or_never().is_none();
            let now = stack.bench.clock.now();
            match (is_closed, closed, opened) {
                (true, None, _) => closed = Some(now),
                (false, Some(_), None) => {
                    opened = Some(now);
                    reading = None;
                }
                _ => {}
            }
        });
        let held = opened.expect("it opens while the reader is there").since(closed.expect("it closes"));
        assert!(held <= PAUSE_BUDGET_LAST * 2, "{held:?}");
        assert!(Arc::ptr_eq(&stack.middle.passes_on_to().unwrap(), &stack.bench.target));
    }
}
