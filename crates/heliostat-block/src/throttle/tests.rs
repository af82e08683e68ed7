//! A group in simulated time: the limit is kept, members share it fairly, nobody is stuck.

use std::cell::RefCell;
use std::rc::Rc;
use std::task::{Context, Waker};
use std::time::Duration;

use futures_util::stream::{FuturesUnordered, StreamExt};

use super::*;
use crate::clock::LocalFuture;

/// A clock that a test moves on, to the next moment for which somebody waits.
#[derive(Clone, Default)]
struct Turning(Arc<Mutex<(Duration, Vec<Duration>)>>);

impl Turning {
    fn lock(&self) -> MutexGuard<'_, (Duration, Vec<Duration>)> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Moves on to the next moment that somebody waits for.
    fn turn(&self) -> Duration {
        let mut time = self.lock();
        let now = time.0;
        time.1.retain(|at| *at > now);
        time.0 = time.1.iter().min().copied().expect("somebody waits for a moment");
        time.0
    }
}

impl Clock for Turning {
    fn now(&self) -> Moment {
        Moment::from_start(self.lock().0)
    }

    fn sleep_until(&self, deadline: Moment) -> LocalFuture<'static, ()> {
        let clock = self.clone();
        self.lock().1.push(deadline.since_start());
        Box::pin(std::future::poll_fn(move |cx| match clock.now() >= deadline {
            true => std::task::Poll::Ready(()),
            false => {
                cx.waker().wake_by_ref();
                std::task::Poll::Pending
            }
        }))
    }
}

fn requests_a_second(rate: u64) -> Limits {
    let mut limits = Limits::default();
    limits.get_mut(Counted::RequestsTotal).rate = rate;
    limits
}

/// Runs members with so many requests in flight each for `seconds`; says how many each got through.
fn share(group: &Arc<ThrottleGroup>, clock: &Turning, depths: &[usize], seconds: u64) -> Vec<u64> {
    let counts = Rc::new(RefCell::new(vec![0; depths.len()]));
    let mut tasks = FuturesUnordered::new();
    for (index, depth) in depths.iter().enumerate() {
        let member = group.join();
        for _ in 0..*depth {
            let (group, counts) = (Arc::clone(group), Rc::clone(&counts));
            tasks.push(async move {
                loop {
                    group.admit(member, Direction::Write, 4096).await;
                    counts.borrow_mut()[index] += 1;
                }
            });
        }
    }
    let mut cx = Context::from_waker(Waker::noop());
    let end = clock.now().since_start() + Duration::from_secs(seconds);
    while clock.now().since_start() < end {
        // Until nobody has anything more to do at this moment.
        for _ in 0..tasks.len() * 2 {
            let _ = tasks.poll_next_unpin(&mut cx);
        }
        clock.turn();
    }
    drop(tasks);
    counts.take()
}

#[test]
fn members_share_the_limit_fairly_however_many_requests_each_has() {
    let clock = Turning::default();
    let group = ThrottleGroup::new(requests_a_second(100), Arc::new(clock.clone())).unwrap();
    let counts = share(&group, &clock, &[1, 8, 32], 60);
    let all: u64 = counts.iter().sum();
    assert!(all.abs_diff(6000) <= 120, "{counts:?}");
    for count in &counts {
        assert!(count.abs_diff(2000) <= 40, "{counts:?}");
    }
}

#[test]
fn a_request_that_waits_goes_by_new_limits() {
    let clock = Turning::default();
    let group = ThrottleGroup::new(requests_a_second(1), Arc::new(clock.clone())).unwrap();
    assert!(share(&group, &clock, &[2], 10)[0] <= 12);
    group.set_limits(requests_a_second(1000)).unwrap();
    assert!(share(&group, &clock, &[2], 10)[0] >= 9800);
}

#[test]
fn nothing_waits_while_somebody_waits_for_quiet() {
    use futures_util::FutureExt;

    let clock = Turning::default();
    let group = ThrottleGroup::new(requests_a_second(10), Arc::new(clock.clone())).unwrap();
    let member = group.join();
    let request = || -> LocalFuture<'_, ()> { Box::pin(group.admit(member, Direction::Write, 4096)) };
    let mut waiting: Vec<_> = (0..5).map(|_| request()).collect();
    let look = |waiting: &mut Vec<LocalFuture<'_, ()>>| {
        waiting.retain_mut(|request| request.as_mut().now_or_never().is_none());
    };
    look(&mut waiting);
    assert!(!waiting.is_empty());
    let mut hurry = Hurry::default();
    hurry.add(&group, member);
    look(&mut waiting);
    assert!(waiting.is_empty());
    drop(hurry);
    let late = group.admit(member, Direction::Write, 4096).now_or_never();
    assert!(late.is_none(), "what went on was counted");
}

#[test]
fn a_request_that_is_dropped_gives_up_its_place() {
    use futures_util::FutureExt;

    let clock = Turning::default();
    let group = ThrottleGroup::new(requests_a_second(10), Arc::new(clock.clone())).unwrap();
    let member = group.join();
    while group.admit(member, Direction::Read, 1).now_or_never().is_some() {}
    let mut first = Box::pin(group.admit(member, Direction::Read, 1));
    let mut second = Box::pin(group.admit(member, Direction::Read, 1));
    assert!(first.as_mut().now_or_never().is_none() && second.as_mut().now_or_never().is_none());
    clock.turn();
    drop(first);
    assert!(second.now_or_never().is_some());
}
