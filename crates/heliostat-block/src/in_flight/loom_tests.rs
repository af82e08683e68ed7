//! The gate and the count, in all interleavings that loom knows up to a bound. A wake-up that is lost shows as a
//! deadlock, which loom reports; it ends the whole test run, since both threads panic.

use loom::future::block_on;
use loom::sync::Arc;
use loom::thread;

use super::*;

/// All interleavings with up to six forced switches between threads, or `LOOM_MAX_PREEMPTIONS`: what wakes whom
/// is a lock and a list inside `event-listener`, which makes many small steps of each of ours.
fn model(work: impl Fn() + Send + Sync + 'static) {
    let mut model = loom::model::Builder::new();
    model.preemption_bound = model.preemption_bound.or(Some(6));
    model.check(work);
}

#[test]
fn loom_who_waits_for_quiet_hears_of_the_last_to_leave() {
    model(|| {
        let in_flight = Arc::new(InFlight::default());
        assert!(in_flight.try_enter());
        let leaver = Arc::clone(&in_flight);
        let leaving = thread::spawn(move || leaver.leave());
        in_flight.close();
        block_on(in_flight.wait_quiet());
        assert_eq!(in_flight.count(), 0);
        leaving.join().unwrap();
    });
}

#[test]
fn loom_who_waits_for_quiet_hears_of_one_that_was_refused() {
    model(|| {
        let in_flight = Arc::new(InFlight::default());
        in_flight.close();
        let other = Arc::clone(&in_flight);
        let refused = thread::spawn(move || assert!(!other.try_enter()));
        block_on(in_flight.wait_quiet());
        refused.join().unwrap();
        assert_eq!(in_flight.count(), 0);
    });
}

#[test]
fn loom_behind_a_closed_and_quiet_gate_nobody_is_inside() {
    model(|| {
        let in_flight = Arc::new(InFlight::default());
        let inside = Arc::new(AtomicU64::new(0));
        let (other, count) = (Arc::clone(&in_flight), Arc::clone(&inside));
        let request = thread::spawn(move || {
            if other.try_enter() {
                // What a request does to a disk is ordered by nothing but the gate.
                count.fetch_add(1, Ordering::Relaxed);
                count.fetch_sub(1, Ordering::Relaxed);
                other.leave();
            }
        });
        in_flight.close();
        block_on(in_flight.wait_quiet());
        assert_eq!(inside.load(Ordering::Relaxed), 0);
        in_flight.open();
        request.join().unwrap();
        assert!(in_flight.try_enter());
    });
}

#[test]
fn loom_who_waits_at_the_gate_hears_that_it_opens() {
    model(|| {
        let in_flight = Arc::new(InFlight::default());
        in_flight.close();
        let other = Arc::clone(&in_flight);
        let entering = thread::spawn(move || {
            block_on(other.enter());
            other.leave();
        });
        in_flight.open();
        entering.join().unwrap();
        assert_eq!(in_flight.count(), 0);
    });
}

#[test]
fn loom_a_gate_with_two_holders_opens_once_both_are_gone() {
    model(|| {
        let in_flight = Arc::new(InFlight::default());
        in_flight.close();
        let other = Arc::clone(&in_flight);
        let second = thread::spawn(move || {
            other.close();
            assert!(!other.try_enter(), "its own hold is on");
            other.open();
        });
        assert!(!in_flight.try_enter());
        in_flight.open();
        second.join().unwrap();
        assert!(in_flight.try_enter());
    });
}

#[test]
fn loom_what_a_holder_has_let_in_is_waited_for_behind_the_next_closed_gate() {
    model(|| {
        let in_flight = Arc::new(InFlight::default());
        in_flight.close();
        in_flight.enter_closed();
        let other = Arc::clone(&in_flight);
        let request = thread::spawn(move || other.leave());
        in_flight.open();
        in_flight.close();
        block_on(in_flight.wait_quiet());
        assert_eq!(in_flight.count(), 0);
        request.join().unwrap();
    });
}
