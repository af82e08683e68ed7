//! [`Share`]: the right to be in a call that blocks, on one of the process's blocking threads.
//!
//! All runtimes share the threads, so that their number has one bound. One file whose medium hangs must not take
//! them all, so every file has a share of its own, and waits at its own door before it waits with the others.
//! Whoever needs a thread comes this way; it decides nothing about the work.

use std::collections::VecDeque;
use std::future::poll_fn;
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, OnceLock, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use compio::BufResult;
use compio::buf::IntoInner;
use compio::driver::AsyncifyPool;
use compio::driver::op::Asyncify;
use compio::runtime::Runtime;

use crate::runtime::InFlight;

/// Threads of the whole process that may be inside a blocking call at once. Sixteen in use is what a disk with deep
/// queues needs; four times that keeps the others going when some files hang.
const THREADS: usize = 64;

/// Of those, how many one file may have: as many as a mirror has copies in flight, so that without io_uring a
/// healthy file is as fast as with all of them; and few enough that three files which hang leave a fourth its own.
pub(crate) const THREADS_OF_ONE: usize = 16;

/// Threads beyond those, for work that nobody waits for.
const DETACHED_THREADS: usize = 16;

/// How long such a thread waits for more work before it ends.
const IDLE: Duration = Duration::from_secs(10);

/// The blocking threads. They refuse work beyond their number, and the runtime would spin until they take it; so
/// whoever gives them some has a [`Permit`].
pub(crate) fn pool() -> &'static AsyncifyPool {
    static POOL: OnceLock<AsyncifyPool> = OnceLock::new();
    POOL.get_or_init(|| AsyncifyPool::new(THREADS + DETACHED_THREADS, IDLE))
}

/// Starts `work` on a blocking thread, from any thread, and does not wait. Says whether it could.
pub(crate) fn run_detached(work: impl FnOnce() + Send + 'static) -> bool {
    pool().dispatch(work).is_ok()
}

/// The share of all that opens connections.
pub(crate) fn connecting() -> &'static Share {
    static CONNECTING: LazyLock<Share> = LazyLock::new(Share::new);
    &CONNECTING
}

/// One user's share of the blocking threads: a file's, however it is opened.
#[derive(Clone, Debug)]
pub(crate) struct Share(Arc<Door>);

/// The right to be in a blocking call; ends when dropped, which must not be before the call has ended.
#[derive(Debug)]
pub(crate) struct Permit {
    _of_all: Seat,
    _own: Seat,
}

impl Share {
    pub(crate) fn new() -> Self {
        Self(Door::new(THREADS_OF_ONE))
    }

    /// Waits for the right, behind those of this share who came before, and then of all.
    ///
    /// # Cancel safety
    /// Dropped before it returns, it gives up its place.
    pub(crate) async fn enter(&self) -> Permit {
        static ALL: LazyLock<Arc<Door>> = LazyLock::new(|| Door::new(THREADS));
        let own = self.0.enter().await;
        Permit { _of_all: ALL.enter().await, _own: own }
    }

    /// Runs `work` on a blocking thread, and returns what it returns.
    ///
    /// # Cancel safety
    /// Dropped before a thread has begun with the work, it may leave it undone; from then on the work runs to its
    /// end.
    ///
    /// # Panics
    /// Outside of a runtime's thread, or with the panic of `work`.
    pub(crate) async fn run<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> T {
        let permit = self.enter().await;
        let in_flight = InFlight::new();
        let operation = Asyncify::new(move || {
            let _in_flight = in_flight;
            // The permit goes with the answer, since until that is taken the thread is not free.
            BufResult(Ok(0), (work(), permit))
        });
        let BufResult(_, operation) = Runtime::with_current(|runtime| runtime.submit(operation)).await;
        let (output, _permit) = operation.into_inner();
        output
    }
}

/// Lets so many in at once, in the order in which they came.
#[derive(Debug)]
struct Door {
    seats: usize,
    /// Protects only itself; held to look, to push or to take out. As long as requests are in flight, which front
    /// ends and jobs bound.
    line: Mutex<Line>,
}

#[derive(Debug, Default)]
struct Line {
    /// By id, which is the order of arrival. The first ones, as many as there are seats, are in.
    entries: VecDeque<Entry>,
    next_id: u64,
}

#[derive(Debug)]
struct Entry {
    id: u64,
    /// Who waits for it to be in.
    waker: Option<Waker>,
}

/// A place in the line, or behind the door; given up when dropped.
#[derive(Debug)]
struct Seat {
    door: Arc<Door>,
    id: u64,
}

impl Door {
    fn new(seats: usize) -> Arc<Self> {
        Arc::new(Self { seats, line: Mutex::default() })
    }

    async fn enter(self: &Arc<Self>) -> Seat {
        let seat = self.queue_up();
        poll_fn(|cx| self.poll_is_in(seat.id, cx)).await;
        seat
    }

    fn queue_up(self: &Arc<Self>) -> Seat {
        let mut line = self.line();
        let id = line.next_id;
        line.next_id += 1;
        line.entries.push_back(Entry { id, waker: None });
        Seat { door: Arc::clone(self), id }
    }

    fn poll_is_in(&self, id: u64, cx: &Context<'_>) -> Poll<()> {
        let mut line = self.line();
        let place = line.place_of(id);
        if place < self.seats {
            return Poll::Ready(());
        }
        line.entries[place].waker = Some(cx.waker().clone());
        Poll::Pending
    }

    /// Takes an entry out. Says whom to wake: the one who is in by that.
    fn leave(&self, id: u64) -> Option<Waker> {
        let mut line = self.line();
        let place = line.place_of(id);
        line.entries.remove(place);
        let last_in = line.entries.get_mut(self.seats - 1).filter(|_| place < self.seats)?;
        last_in.waker.take()
    }

    fn line(&self) -> MutexGuard<'_, Line> {
        self.line.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Line {
    fn place_of(&self, id: u64) -> usize {
        self.entries.partition_point(|entry| entry.id < id)
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        let next = self.door.leave(self.id);
        if let Some(next) = next {
            next.wake();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::sync::mpsc;

    use futures_util::FutureExt;
    use futures_util::future::join_all;

    use super::*;
    use crate::runtime::{Driver, block_on_with, spawn_local};

    const BOTH: [Driver; 2] = [Driver::IoUring, Driver::Polling];

    #[test]
    fn a_door_lets_in_as_many_as_there_are_seats_in_the_order_of_arrival() {
        let door = Door::new(2);
        let first = door.enter().now_or_never().unwrap();
        let second = door.enter().now_or_never().unwrap();
        let mut third = Box::pin(door.enter());
        let mut fourth = Box::pin(door.enter());
        assert!(third.as_mut().now_or_never().is_none());
        assert!(fourth.as_mut().now_or_never().is_none());
        drop(second);
        assert!(fourth.as_mut().now_or_never().is_none(), "behind the third, which has not looked yet");
        assert!(door.enter().now_or_never().is_none(), "behind both");
        let third = third.as_mut().now_or_never().unwrap();
        assert!(fourth.as_mut().now_or_never().is_none());
        drop(first);
        let fourth = fourth.as_mut().now_or_never().unwrap();
        drop((third, fourth));
        assert!(door.line().entries.is_empty());
    }

    #[test]
    fn who_is_let_in_is_woken_and_who_goes_away_lets_the_next_one_in() {
        let door = Door::new(1);
        let first = door.enter().now_or_never().unwrap();
        let wakes = Arc::new(AtomicUsize::new(0));
        let counted = Arc::clone(&wakes);
        let waker = futures_util::task::waker(Arc::new(Count(counted)));
        let mut cx = Context::from_waker(&waker);
        let mut waiting = [Box::pin(door.enter()), Box::pin(door.enter()), Box::pin(door.enter())];
        for one in &mut waiting {
            assert!(one.as_mut().poll(&mut cx).is_pending());
        }
        let [second, third, mut fourth] = waiting;
        drop(third);
        assert_eq!(wakes.load(Ordering::SeqCst), 0, "nobody is in by that");
        drop(first);
        assert_eq!(wakes.load(Ordering::SeqCst), 1, "the second");
        drop(second);
        assert_eq!(wakes.load(Ordering::SeqCst), 2, "it was in, though it never knew: the fourth is");
        assert!(fourth.as_mut().poll(&mut cx).is_ready());
    }

    struct Count(Arc<AtomicUsize>);

    impl futures_util::task::ArcWake for Count {
        fn wake_by_ref(this: &Arc<Self>) {
            this.0.fetch_add(1, Ordering::SeqCst);
        }
    }

    #[test]
    fn more_blocking_calls_than_threads_all_end() {
        for driver in BOTH {
            block_on_with(driver, async {
                let shares: Vec<_> = (0..8).map(|_| Share::new()).collect();
                let calls = (0..THREADS * 3).map(|n| shares[n % 8].run(move || n));
                let ended = join_all(calls).await;
                assert!(ended.into_iter().eq(0..THREADS * 3));
            })
            .unwrap();
        }
    }

    /// Calls of one share that hang until they are let go.
    struct Hung {
        calls: Arc<AtomicUsize>,
        ended: Arc<AtomicUsize>,
        release: Vec<mpsc::Sender<()>>,
    }

    impl Hung {
        fn start(share: &Share, count: usize) -> Self {
            let mut hung = Self { calls: Arc::default(), ended: Arc::default(), release: Vec::new() };
            for _ in 0..count {
                let (release, released) = mpsc::channel();
                hung.release.push(release);
                let (share, calls, ended) = (share.clone(), Arc::clone(&hung.calls), Arc::clone(&hung.ended));
                spawn_local(async move {
                    share
                        .run(move || {
                            calls.fetch_add(1, Ordering::SeqCst);
                            let _ = released.recv();
                        })
                        .await;
                    ended.fetch_add(1, Ordering::SeqCst);
                });
            }
            hung
        }

        async fn wait_for(count: &AtomicUsize, at_least: usize) {
            while count.load(Ordering::SeqCst) < at_least {
                crate::runtime::yield_now().await;
            }
        }
    }

    #[test]
    fn a_file_that_hangs_does_not_stop_another() {
        for driver in BOTH {
            block_on_with(driver, async {
                let mut hung = Hung::start(&Share::new(), THREADS * 2);
                Hung::wait_for(&hung.calls, THREADS_OF_ONE).await;
                let other = Share::new();
                let ended = join_all((0..THREADS * 2).map(|n| other.run(move || n))).await;
                assert_eq!(ended.len(), THREADS * 2);
                assert_eq!(hung.calls.load(Ordering::SeqCst), THREADS_OF_ONE, "the others wait at its door");
                assert_eq!(hung.ended.load(Ordering::SeqCst), 0);
                hung.release.clear();
                Hung::wait_for(&hung.ended, THREADS * 2).await;
            })
            .unwrap();
        }
    }

    #[test]
    fn a_dropped_call_keeps_its_thread_until_it_has_ended() {
        block_on_with(Driver::Polling, async {
            let share = Share::new();
            let (release, released) = mpsc::channel::<()>();
            let released = Arc::new(Mutex::new(released));
            for _ in 0..THREADS_OF_ONE {
                let released = Arc::clone(&released);
                let mut call = Box::pin(share.run(move || released.lock().unwrap().recv()));
                assert!(futures_util::poll!(call.as_mut()).is_pending());
            }
            assert!(share.enter().now_or_never().is_none(), "all of its threads are busy");
            drop(release);
            drop(share.enter().await);
        })
        .unwrap();
    }
}
