//! The injector over a disk in memory: what fails, what is held up, how requests are cut.

use std::pin::pin;

use futures_util::FutureExt;

use super::*;
use crate::job::test_disk::{Disk, Ticking, node_of};

fn over(limits: RequestLimits, errors: Vec<InjectError>) -> (Arc<Disk>, Arc<FaultInjector>) {
    let disk = Disk::of(vec![0; 64 << 10]);
    let node = node_of("disk0", disk.clone(), &Arc::new(Ticking::default()));
    (disk, FaultInjector::new(Spot::of(node), limits, errors, Vec::new()))
}

fn on(event: DebugEvent, errno: i32) -> InjectError {
    let (state, io, offset) = (None, None, None);
    InjectError { event, state, io, errno, offset, times: Times::Once, immediately: true }
}

fn write(injector: &FaultInjector, offset: u64, len: usize) -> Option<i32> {
    let data = Bytes::from(vec![7; len]);
    let written = injector.write(offset, data, Durability::Cached).now_or_never();
    written.expect("the disk answers at once").err().and_then(|error| error.raw_os_error())
}

#[test]
fn a_write_fails_once_with_the_number_that_was_asked_for_and_changes_nothing() {
    let (disk, injector) = over(RequestLimits::default(), vec![on(DebugEvent::Pwritev, 28)]);
    assert_eq!(write(&injector, 0, 512), Some(28));
    assert!(disk.shown().iter().all(|byte| *byte == 0));
    assert_eq!(write(&injector, 0, 512), None);
    assert_eq!(disk.shown()[..513].iter().filter(|byte| **byte == 7).count(), 512);
}

#[test]
fn a_request_is_held_up_at_a_breakpoint_until_it_is_resumed() {
    let (disk, injector) = over(RequestLimits::default(), Vec::new());
    injector.add_break(DebugEvent::Pwritev, "A").unwrap();
    let mut held_up = pin!(injector.write(0, Bytes::from(vec![7; 512]), Durability::Cached));
    assert!(held_up.as_mut().now_or_never().is_none());
    assert!(injector.wait_break("A").now_or_never().is_some());
    assert_eq!(write(&injector, 512, 512), None, "one breakpoint holds up one request");
    assert_eq!(disk.shown()[0], 0);
    injector.resume("A").unwrap();
    assert!(held_up.now_or_never().is_some());
    assert_eq!(disk.shown()[0], 7);
    assert_eq!(injector.resume("A"), Err(NoSuchBreak));
}

#[test]
fn a_request_that_is_dropped_is_not_held_up_any_more() {
    let (_, injector) = over(RequestLimits::default(), Vec::new());
    injector.add_break(DebugEvent::Pwritev, "A").unwrap();
    let mut held_up = Box::pin(injector.write(0, Bytes::from(vec![7; 512]), Durability::Cached));
    assert!(held_up.as_mut().now_or_never().is_none());
    drop(held_up);
    assert!(!injector.is_suspended("A"));
}

#[test]
fn requests_are_cut_at_the_limits_and_fail_piece_by_piece() {
    let at = InjectError { offset: Some(4096), ..on(DebugEvent::None, 5) };
    let limits = RequestLimits { transfer_max: 4096, ..RequestLimits::default() };
    let (disk, injector) = over(limits, vec![at]);
    assert_eq!(write(&injector, 0, 16 << 10), Some(5));
    let written = disk.shown().iter().filter(|byte| **byte == 7).count();
    assert_eq!(written, 4096, "the piece before the one that fails is there");
}

#[test]
fn zeroes_shorter_than_their_unit_are_written() {
    let never =
        InjectError { io: Some(IoType::WriteZeroes), times: Times::Always, ..on(DebugEvent::None, 5) };
    let limits = RequestLimits { zero_unit: 4096, ..RequestLimits::default() };
    let (_, injector) = over(limits, vec![never]);
    let zero = |start, end, effort| {
        let range = ByteRange::from_bounds(start, end);
        let zeroed = injector.write_zeroes(range, ZeroSpace::MayUnmap, effort, Durability::Cached);
        zeroed.now_or_never().expect("the disk answers at once").err().map(|error| error.kind())
    };
    assert_eq!(zero(512, 4096, ZeroEffort::Any), None);
    assert!(zero(512, 8192, ZeroEffort::Any).is_some(), "a whole unit is made zero, and that fails here");
    assert_eq!(zero(512, 4096, ZeroEffort::FastOnly), Some(io::ErrorKind::Unsupported));
}

#[test]
fn a_range_is_split_at_the_first_and_the_last_multiple() {
    let split = |start, end| {
        split(ByteRange::from_bounds(start, end), 10).iter().map(|part| part.len()).collect::<Vec<_>>()
    };
    assert_eq!(split(5, 35), [5, 20, 5]);
    assert_eq!(split(10, 30), [20]);
    assert_eq!(split(11, 19), [8]);
    assert_eq!(split(5, 10), [5]);
    assert_eq!(split(5, 12), [5, 2]);
    assert_eq!(split(10, 15), [5]);
}
