//! The runtime of a data-plane thread: one io_uring, and tasks that stay on their thread.
//!
//! The only file that builds a compio runtime. The front ends and the mirror run on threads made here; it
//! must not know what they do. Where the kernel or a container profile refuses io_uring, readiness polling
//! and a pool of blocking threads take its place, with the same results and less speed.

use std::any::Any;
use std::cell::{Cell, RefCell};
use std::fmt;
use std::future::{Future, poll_fn};
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::pin::pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, mpsc};
use std::task::{Context, Poll, Waker};
use std::thread::JoinHandle;

use compio::driver::op::OpCodeFlag;
use compio::driver::{DriverType, ProactorBuilder};
use compio::runtime::{Runtime, RuntimeBuilder};
use futures_util::FutureExt;

use crate::blocking;

/// The environment variable that forces a [`Driver`]: `auto`, `io_uring` or `polling`. For tests, and for
/// hosts where io_uring is there but must not be used.
pub const DRIVER_VARIABLE: &str = "HELIOSTAT_IO";

/// How much bulk work gives way, as a nice value.
const NICENESS: i32 = 1;

/// Submissions that wait for the next look at the ring. More than a thread queues between two looks, so that
/// a cancellation always finds room; costs 64 bytes each.
const RING_ENTRIES: u32 = 1024;

/// What a thread of the data plane has to nest calls in: as much as a program's first one. A request that goes down a
/// chain of images nests a few for each: without optimisation 16 KiB. Only what is used takes memory.
pub const STACK: usize = 8 << 20;

/// Wake-ups from other threads that may wait for a thread to look. A waker that finds the queue full spins
/// until there is room, so it holds what all guests' threads together can wake at once.
const REMOTE_WAKES: usize = 1024;

/// How a thread asks the kernel for I/O.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Driver {
    /// io_uring where the kernel lets us, else polling.
    Auto,
    /// io_uring, or an error.
    IoUring,
    /// `epoll` for sockets and blocking threads for files.
    Polling,
}

impl Driver {
    /// Reads [`DRIVER_VARIABLE`]; [`Driver::Auto`] where it is not set.
    ///
    /// # Errors
    /// `InvalidInput` when it holds anything else than the three words.
    pub fn from_environment() -> io::Result<Self> {
        let Some(word) = std::env::var_os(DRIVER_VARIABLE) else {
            return Ok(Self::Auto);
        };
        match word.to_str() {
            Some("" | "auto") => Ok(Self::Auto),
            Some("io_uring") => Ok(Self::IoUring),
            Some("polling") => Ok(Self::Polling),
            _ => Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("{DRIVER_VARIABLE} is {}; it may be auto, io_uring or polling", word.display()),
            )),
        }
    }

    /// What the current thread's runtime uses; never [`Driver::Auto`].
    ///
    /// # Panics
    /// Outside of a runtime's thread.
    #[must_use]
    pub fn in_use() -> Self {
        match Runtime::with_current(Runtime::driver_type) {
            DriverType::IoUring => Self::IoUring,
            _ => Self::Polling,
        }
    }
}

impl fmt::Display for Driver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Auto => "auto",
            Self::IoUring => "io_uring",
            Self::Polling => "polling",
        })
    }
}

/// The ways to set up a ring, best first. A kernel that does not know a flag refuses the whole ring.
#[derive(Clone, Copy, Debug)]
enum Ring {
    /// Linux 6.1: completions are only looked at when we ask for them, which is what batches need.
    Deferred,
    /// Linux 5.19: no interrupt of the thread for a completion.
    Cooperative,
    /// Anything that has the operations at all.
    Plain,
}

fn ring(setup: Ring) -> ProactorBuilder {
    let mut proactor = proactor();
    proactor.driver_type(DriverType::IoUring).detect_opcode_support(OpCodeFlag::basic());
    match setup {
        // The flag is not optional with deferral: without it a look at the ring that does not sleep would
        // never see that completions wait.
        Ring::Deferred => proactor.single_issuer(true).defer_taskrun(true).taskrun_flag(true),
        Ring::Cooperative => proactor.coop_taskrun(true).taskrun_flag(true),
        Ring::Plain => &mut proactor,
    };
    proactor
}

fn proactor() -> ProactorBuilder {
    let mut proactor = ProactorBuilder::new();
    proactor.capacity(RING_ENTRIES).reuse_thread_pool(blocking::pool().clone());
    proactor
}

fn build(driver: Driver) -> io::Result<Runtime> {
    let mut builder = RuntimeBuilder::new();
    builder.sync_queue_size(REMOTE_WAKES);
    if driver != Driver::Polling {
        let mut refusal = None;
        for setup in [Ring::Deferred, Ring::Cooperative, Ring::Plain] {
            match builder.with_proactor(ring(setup)).build() {
                Ok(runtime) => return Ok(runtime),
                Err(error) => refusal = Some(error),
            }
        }
        if let (Driver::IoUring, Some(error)) = (driver, refusal) {
            return Err(io::Error::new(error.kind(), format!("io_uring is not available: {error}")));
        }
    }
    let mut polling = proactor();
    polling.driver_type(DriverType::Poll);
    builder.with_proactor(polling).build()
}

thread_local! {
    /// The panic of a task of this thread, on its way to the thread's main future.
    static FALLEN: Cell<Option<Box<dyn Any + Send>>> = const { Cell::new(None) };

    /// How often this thread has looked at its ring.
    static ROUND: Cell<u64> = const { Cell::new(0) };

    /// The tasks that wait for the next look. At most one entry for each time that one of them is polled.
    static YIELDED: RefCell<Vec<Waker>> = const { RefCell::new(Vec::new()) };

    /// The tasks of this thread, so that they can be told to end.
    static TASKS: RefCell<Tasks> = const { RefCell::new(Tasks::new()) };

    /// How many operations of this thread the kernel, or a blocking thread, is at.
    static IN_FLIGHT: Arc<AtomicUsize> = Arc::default();
}

/// Runs `future`, then ends what is left of its tasks and waits for what the kernel still does for them.
fn run<F: Future>(runtime: &Runtime, future: F) -> F::Output {
    let outcome = catch_unwind(AssertUnwindSafe(|| {
        let mut future = pin!(future);
        // The runtime polls this after every look at the ring, woken or not.
        runtime.block_on(poll_fn(|cx| {
            rethrow();
            ROUND.set(ROUND.get().wrapping_add(1));
            YIELDED.with_borrow_mut(|yielded| yielded.drain(..).for_each(Waker::wake));
            future.as_mut().poll(cx)
        }))
    }));
    wind_down(runtime);
    match outcome {
        Ok(output) => {
            rethrow();
            output
        }
        Err(panic) => resume_unwind(panic),
    }
}

/// Ends the tasks of this thread and waits until none of its operations is in flight. Closing a ring does not
/// wait for them, and the kernel would go on writing into memory that was given back.
fn wind_down(runtime: &Runtime) {
    TASKS.with_borrow_mut(Tasks::end);
    // Polled after every look at the ring.
    runtime.block_on(poll_fn(|_| {
        let are_gone = TASKS.with_borrow(|tasks| tasks.count == 0);
        let is_quiet = IN_FLIGHT.with(|count| count.load(Ordering::Acquire) == 0);
        if are_gone && is_quiet { Poll::Ready(()) } else { Poll::Pending }
    }));
    TASKS.set(Tasks::new());
}

/// The tasks of a thread.
struct Tasks {
    /// Who wakes the one in each place; `None` before it was polled, and where there is none.
    wakers: Vec<Option<Waker>>,
    free: Vec<usize>,
    count: usize,
    are_ending: bool,
}

impl Tasks {
    const fn new() -> Self {
        Self { wakers: Vec::new(), free: Vec::new(), count: 0, are_ending: false }
    }

    /// Tells them to end.
    fn end(&mut self) {
        self.are_ending = true;
        self.wakers.iter().flatten().for_each(Waker::wake_by_ref);
    }
}

/// A task's entry in [`TASKS`].
struct Place(usize);

impl Place {
    fn take() -> Self {
        TASKS.with_borrow_mut(|tasks| {
            tasks.count += 1;
            Self(tasks.free.pop().unwrap_or_else(|| {
                tasks.wakers.push(None);
                tasks.wakers.len() - 1
            }))
        })
    }

    /// Says whether the task must end; sees to it that it is woken when it must.
    fn must_end(&self, cx: &Context<'_>) -> bool {
        TASKS.with_borrow_mut(|tasks| {
            let waker = &mut tasks.wakers[self.0];
            if waker.is_none() {
                *waker = Some(cx.waker().clone());
            }
            tasks.are_ending
        })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        TASKS.with_borrow_mut(|tasks| {
            tasks.count -= 1;
            tasks.wakers[self.0] = None;
            tasks.free.push(self.0);
        });
    }
}

/// Counts an operation as in flight from before it is submitted until this is dropped, which must be when the
/// kernel is done with it, whether or not anybody still waits.
#[derive(Debug)]
pub(crate) struct InFlight(Arc<AtomicUsize>);

impl InFlight {
    /// To be made on the thread that submits the operation.
    pub(crate) fn new() -> Self {
        let count = IN_FLIGHT.with(Arc::clone);
        count.fetch_add(1, Ordering::Relaxed);
        Self(count)
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Release);
    }
}

fn rethrow() {
    if let Some(panic) = FALLEN.take() {
        resume_unwind(panic);
    }
}

/// A thread with a runtime of its own.
///
/// Dropping it lets the thread run on.
#[derive(Debug)]
pub struct Thread<T> {
    /// `None` comes only from a thread that found no runtime, and such a thread is not handed out.
    handle: JoinHandle<Option<T>>,
    driver: Driver,
}

impl<T: Send + 'static> Thread<T> {
    /// Starts a thread named `name` (the kernel shows 15 bytes of it) that runs the future which `body`
    /// makes, and ends with it. Tasks that are still running then are dropped, and what the kernel does for
    /// them is waited for; whoever needs them to end by themselves must await that in the future. The driver is what [`Driver::from_environment`] says.
    ///
    /// # Errors
    /// When the host gives no thread or no runtime.
    pub fn spawn<F, Fut>(name: &str, body: F) -> io::Result<Self>
    where
        F: FnOnce() -> Fut + Send + 'static,
        Fut: Future<Output = T>,
    {
        Self::spawn_with(Driver::from_environment()?, name, body)
    }

    /// As [`Thread::spawn`], with a driver.
    ///
    /// # Errors
    /// When the host gives no thread or no runtime of that kind.
    pub fn spawn_with<F, Fut>(driver: Driver, name: &str, body: F) -> io::Result<Self>
    where
        F: FnOnce() -> Fut + Send + 'static,
        Fut: Future<Output = T>,
    {
        let (built, is_built) = mpsc::sync_channel(1);
        let thread = std::thread::Builder::new().name(name.to_owned()).stack_size(STACK);
        let handle = thread.spawn(move || {
            let runtime = match build(driver) {
                Ok(runtime) => runtime,
                Err(error) => {
                    // The spawner waits for this; it cannot be gone.
                    let _ = built.send(Err(error));
                    return None;
                }
            };
            let _ = built.send(Ok(runtime.enter(Driver::in_use)));
            Some(run(&runtime, async { body().await }))
        })?;
        let driver = is_built.recv().map_err(|_| io::Error::other("a new thread ended at once"))??;
        Ok(Self { handle, driver })
    }

    /// What its runtime uses; never [`Driver::Auto`].
    #[must_use]
    pub const fn driver(&self) -> Driver {
        self.driver
    }

    /// Says whether it has ended, so that [`Thread::join`] would not wait.
    #[must_use]
    pub fn is_finished(&self) -> bool {
        self.handle.is_finished()
    }

    /// Waits, blocking, until it has ended.
    ///
    /// # Panics
    /// With the panic of the thread's future, or of a task on it.
    pub fn join(self) -> T {
        match self.handle.join() {
            Ok(output) => output.expect("a thread without a runtime is not handed out"),
            Err(panic) => resume_unwind(panic),
        }
    }
}

/// Runs `future` on the current thread, with a runtime made for it. Tasks that are still running when it ends
/// are dropped, and what the kernel does for them is waited for.
///
/// # Errors
/// When the host gives no runtime.
///
/// # Panics
/// With the panic of a task on it; on a thread that has a runtime already.
pub fn block_on<F: Future>(future: F) -> io::Result<F::Output> {
    block_on_with(Driver::from_environment()?, future)
}

/// As [`block_on`], with a driver.
///
/// # Errors
/// When the host gives no runtime of that kind.
///
/// # Panics
/// As [`block_on`].
pub fn block_on_with<F: Future>(driver: Driver, future: F) -> io::Result<F::Output> {
    assert!(Runtime::try_current().is_none(), "a thread has one runtime");
    let runtime = build(driver)?;
    Ok(run(&runtime, future))
}

/// Makes the current thread give way a little to others: where they want the processor too, it gets four fifths of
/// what they do. For work in bulk beside work that somebody waits for; not more, because guests wait for that work
/// too at the end. A host that refuses changes nothing.
pub fn give_way() {
    // On Linux a nice value is a thread's own (sched(7)).
    let _ = rustix::process::nice(NICENESS);
}

/// Starts a task on the current thread's runtime, which runs until it ends or the thread's main future does.
///
/// A panic in it is carried to the thread's main future, and so out of [`Thread::join`] or [`block_on`].
///
/// # Panics
/// Outside of a runtime's thread.
pub fn spawn_local(future: impl Future<Output = ()> + 'static) {
    let place = Place::take();
    let task = async move {
        // Dropped before the place is given up: what it drops belongs to the task.
        let mut future = pin!(AssertUnwindSafe(future).catch_unwind());
        let outcome = poll_fn(|cx| match place.must_end(cx) {
            true => Poll::Ready(Ok(())),
            false => future.as_mut().poll(cx),
        });
        if let Err(panic) = outcome.await {
            FALLEN.set(Some(panic));
            Runtime::with_current(Runtime::waker).wake();
        }
    };
    Runtime::with_current(|runtime| runtime.spawn(task)).detach();
}

/// Lets every task that is ready take its turn, and returns when the thread has looked at the ring once, which it
/// does without sleeping.
///
/// A loop of `recv_now` and this is a busy look at a socket during which disk completions of the same thread
/// go on. It costs one system call, however many tasks of the thread do the same.
///
/// # Cancel safety
/// Dropping it leaves nothing behind.
///
/// # Panics
/// Outside of a runtime's thread.
pub async fn yield_now() {
    let round = ROUND.get();
    poll_fn(|cx| {
        if ROUND.get() != round {
            return Poll::Ready(());
        }
        YIELDED.with_borrow_mut(|yielded| yielded.push(cx.waker().clone()));
        // A runtime that was woken does not sleep when it looks at the ring.
        Runtime::with_current(Runtime::waker).wake();
        Poll::Pending
    })
    .await;
}

#[cfg(test)]
mod tests {
    use std::rc::Rc;
    use std::sync::atomic::AtomicBool;
    use std::time::{Duration, Instant};

    use super::*;
    use crate::blocking::Share;
    use crate::clock::RealClock;
    use crate::socket::Socket;

    const BOTH: [Driver; 2] = [Driver::IoUring, Driver::Polling];

    #[test]
    fn a_thread_returns_what_its_future_returns() {
        for driver in BOTH {
            let thread = Thread::spawn_with(driver, "test", || async { Driver::in_use() }).unwrap();
            assert_eq!(thread.driver(), driver);
            assert_eq!(thread.join(), driver);
        }
    }

    #[test]
    fn a_panic_in_a_task_ends_its_thread_with_that_panic() {
        for driver in BOTH {
            let thread = Thread::spawn_with(driver, "test", || async {
                spawn_local(async { panic!("a task fell") });
                std::future::pending::<()>().await;
            })
            .unwrap();
            let panic = std::panic::catch_unwind(AssertUnwindSafe(|| thread.join())).unwrap_err();
            assert_eq!(panic.downcast_ref(), Some(&"a task fell"));
        }
    }

    #[test]
    fn tasks_that_are_left_are_dropped_with_what_they_hold() {
        struct Dropped(Rc<Cell<u32>>);
        impl Drop for Dropped {
            fn drop(&mut self) {
                self.0.set(self.0.get() + 1);
            }
        }
        for driver in BOTH {
            let dropped = Rc::new(Cell::new(0));
            block_on_with(driver, async {
                for n in 0..4 {
                    let held = Dropped(Rc::clone(&dropped));
                    spawn_local(async move {
                        let _held = held;
                        match n {
                            0 => {}
                            1 => std::future::pending().await,
                            2 => RealClock::new().sleep(Duration::from_secs(3600)).await,
                            _ => loop {
                                yield_now().await;
                            },
                        }
                    });
                }
                yield_now().await;
                // One that is not polled once before the end.
                let held = Dropped(Rc::clone(&dropped));
                spawn_local(async move { drop(held) });
            })
            .unwrap();
            assert_eq!(dropped.get(), 5);
        }
    }

    #[test]
    fn a_thread_does_not_end_before_what_it_started() {
        for driver in BOTH {
            let ended = Arc::new(AtomicBool::new(false));
            let by_call = Arc::clone(&ended);
            block_on_with(driver, async {
                let (go, may_go) = mpsc::channel();
                let share = Share::new();
                let mut call = Box::pin(share.run(move || {
                    may_go.recv().unwrap();
                    // Gives a thread that does not wait every chance to end first.
                    (0..10_000).for_each(|_| std::thread::yield_now());
                    by_call.store(true, Ordering::SeqCst);
                }));
                assert!(futures_util::poll!(call.as_mut()).is_pending());
                go.send(()).unwrap();
            })
            .unwrap();
            assert!(ended.load(Ordering::SeqCst));
        }
    }

    #[test]
    fn a_panic_in_the_last_turn_of_a_task_is_not_lost() {
        let fall = || block_on(async { spawn_local(async { panic!("a task fell") }) });
        assert!(std::panic::catch_unwind(fall).is_err());
    }

    #[test]
    fn yielding_lets_ring_completions_and_blocking_calls_go_on_without_sleeping() {
        for driver in BOTH {
            block_on_with(driver, async {
                let ended = Rc::new(Cell::new(0));
                let by_call = Rc::clone(&ended);
                spawn_local(async move {
                    Share::new().run(|| ()).await;
                    by_call.set(by_call.get() + 1);
                });
                let (one, other) = Socket::pair().unwrap();
                let by_ring = Rc::clone(&ended);
                spawn_local(async move {
                    one.readable().await.unwrap();
                    by_ring.set(by_ring.get() + 1);
                });
                yield_now().await;
                other.send_now(&[io::IoSlice::new(b"x")]).unwrap();
                while ended.get() < 2 {
                    yield_now().await;
                }
            })
            .unwrap();
        }
    }

    #[test]
    fn a_wake_from_another_thread_is_not_lost_while_a_task_yields() {
        for driver in BOTH {
            block_on_with(driver, async {
                let stop = Arc::new(AtomicBool::new(false));
                let seen = Arc::clone(&stop);
                spawn_local(async move {
                    while !seen.load(Ordering::Relaxed) {
                        yield_now().await;
                    }
                });
                let (event, is_set) =
                    (Arc::new(event_listener::Event::new()), Arc::new(AtomicBool::new(false)));
                for _ in 0..2000 {
                    is_set.store(false, Ordering::SeqCst);
                    let listener = event.listen();
                    let (remote, flag) = (Arc::clone(&event), Arc::clone(&is_set));
                    BOUNCER.with(|bouncer| {
                        bouncer
                            .send(Box::new(move || {
                                flag.store(true, Ordering::SeqCst);
                                remote.notify(1_usize);
                            }))
                            .unwrap();
                    });
                    listener.await;
                    assert!(is_set.load(Ordering::SeqCst));
                }
                stop.store(true, Ordering::Relaxed);
            })
            .unwrap();
        }
    }

    thread_local! {
        /// A thread that runs what it is sent.
        static BOUNCER: mpsc::Sender<Box<dyn FnOnce() + Send>> = {
            let (sender, receiver) = mpsc::channel::<Box<dyn FnOnce() + Send>>();
            std::thread::spawn(move || receiver.into_iter().for_each(|work| work()));
            sender
        };
    }

    #[test]
    fn sleeping_lasts_at_least_as_long_as_was_said() {
        for driver in BOTH {
            block_on_with(driver, async {
                let clock = RealClock::new();
                let before = Instant::now();
                clock.sleep(Duration::from_millis(5)).await;
                assert!(before.elapsed() >= Duration::from_millis(5));
            })
            .unwrap();
        }
    }
}
