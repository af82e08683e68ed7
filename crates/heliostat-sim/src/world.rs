//! [`World`]: simulated time, what is due when, and what has gone wrong. [`Executor`]: tasks on one thread.
//!
//! Nothing here knows of disks. Time stands still while a task may run, but for what a step is said to cost,
//! and jumps to the next thing due when none may. Which of several tasks runs next is drawn from the seed.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Wake, Waker};
use std::time::Duration;

use heliostat_block::clock::{Clock, LocalFuture, Moment};

use crate::random::Random;

/// The most steps of one run. Fifty times what the longest honest run was seen to take.
const STEPS_MAX: u64 = 3_000_000;
/// The most simulated time of one run: everything in it is over in a few minutes, or never.
const TIME_MAX: Duration = Duration::from_secs(3600);

/// How often, per mille, a task with a core of its own goes on where another asks for the time.
const BESIDE: u64 = 500;

/// What is to happen at a moment.
enum Due {
    Wake(Waker),
    Act(Box<dyn FnOnce() + Send>),
}

/// Time, and what is wrong. Shared by everything in a run.
pub(crate) struct World {
    state: Mutex<State>,
}

struct State {
    now: Duration,
    next: u64,
    due: BTreeMap<(Duration, u64), Due>,
    failure: Option<String>,
    tracing: bool,
    /// The run is over: what is dropped from now on is no concern.
    over: bool,
    /// The task that runs at this moment is a lane.
    on_lane: bool,
}

impl World {
    pub(crate) fn new(tracing: bool) -> Arc<Self> {
        let state = State {
            now: Duration::ZERO,
            next: 0,
            due: BTreeMap::new(),
            failure: None,
            tracing,
            over: false,
            on_lane: false,
        };
        Arc::new(Self { state: Mutex::new(state) })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn time(&self) -> Duration {
        self.state().now
    }

    /// Lets `act` happen at `at`, whatever the tasks do.
    pub(crate) fn at(&self, at: Duration, act: impl FnOnce() + Send + 'static) {
        let mut state = self.state();
        let key = (at.max(state.now), state.next);
        state.next += 1;
        state.due.insert(key, Due::Act(Box::new(act)));
    }

    /// Remembers the first thing that is wrong; the run ends soon after.
    pub(crate) fn fail(&self, what: impl Into<String>) {
        let what = what.into();
        self.trace(|| format!("FAILED: {what}"));
        let mut state = self.state();
        if !state.over {
            state.failure.get_or_insert(what);
        }
    }

    pub(crate) fn failure(&self) -> Option<String> {
        self.state().failure.clone()
    }

    /// Says what happens, where somebody wants to read it.
    pub(crate) fn trace(&self, what: impl FnOnce() -> String) {
        let (tracing, now) = {
            let state = self.state();
            (state.tracing && !state.over, state.now)
        };
        if tracing {
            #[expect(clippy::print_stdout, reason = "a trace is asked for on the command line")]
            {
                println!("{:>12.6} {}", now.as_secs_f64(), what());
            }
        }
    }

    /// Ends the run, as a power cut does: nothing that is due happens any more. What waits here holds storages and
    /// nodes, and they hold this world, so it would never go away by itself.
    pub(crate) fn end(&self) {
        let due = {
            let mut state = self.state();
            state.over = true;
            std::mem::take(&mut state.due)
        };
        drop(due);
    }

    /// Says whether a lane's task runs at this moment.
    pub(crate) fn is_on_lane(&self) -> bool {
        self.state().on_lane
    }

    /// Says whether a lane's task runs from now on.
    pub(crate) fn set_on_lane(&self, on_lane: bool) {
        self.state().on_lane = on_lane;
    }

    pub(crate) fn is_over(&self) -> bool {
        self.state().over
    }

    fn pass(&self, time: Duration) {
        self.state().now += time;
    }

    /// Lets happen what is due by now; jumps to the next thing if `jump`. Says whether anything happened.
    fn let_happen(&self, jump: bool) -> bool {
        let mut happened = false;
        loop {
            let due = {
                let mut state = self.state();
                let Some(first) = state.due.first_entry() else { return happened };
                let at = first.key().0;
                if at > state.now && (!jump || happened) {
                    return happened;
                }
                let Some((_, due)) = state.due.pop_first() else { return happened };
                state.now = state.now.max(at);
                due
            };
            happened = true;
            match due {
                Due::Wake(waker) => waker.wake(),
                Due::Act(act) => act(),
            }
        }
    }
}

/// The simulated clock.
pub(crate) struct SimClock(pub(crate) Arc<World>);

impl Clock for SimClock {
    fn now(&self) -> Moment {
        // The core asks for the time between any two things it does; there another core may have gone on.
        if !self.0.is_on_lane() {
            Executor::step_beside();
        }
        Moment::from_start(self.0.time())
    }

    fn sleep_until(&self, deadline: Moment) -> LocalFuture<'static, ()> {
        Box::pin(Sleep { world: Arc::clone(&self.0), until: deadline.since_start(), key: None })
    }
}

impl SimClock {
    pub(crate) fn sleep(&self, time: Duration) -> LocalFuture<'static, ()> {
        self.sleep_until(self.now() + time)
    }
}

struct Sleep {
    world: Arc<World>,
    until: Duration,
    key: Option<(Duration, u64)>,
}

impl Future for Sleep {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let world = Arc::clone(&self.world);
        let mut state = world.state();
        if let Some(key) = self.key.take() {
            state.due.remove(&key);
        }
        if state.now >= self.until {
            return Poll::Ready(());
        }
        let key = (self.until, state.next);
        state.next += 1;
        state.due.insert(key, Due::Wake(cx.waker().clone()));
        drop(state);
        self.key = Some(key);
        Poll::Pending
    }
}

impl Drop for Sleep {
    fn drop(&mut self) {
        if let Some(key) = self.key {
            self.world.state().due.remove(&key);
        }
    }
}

/// Which tasks may run. In the order in which they were woken, so that the draw is the same in every run.
#[derive(Default)]
struct Runnable(Mutex<Vec<usize>>);

impl Runnable {
    fn list(&self) -> MutexGuard<'_, Vec<usize>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn add(&self, task: usize) {
        let mut list = self.list();
        if !list.contains(&task) {
            list.push(task);
        }
    }
}

struct TaskWaker {
    task: usize,
    runnable: Arc<Runnable>,
}

impl Wake for TaskWaker {
    fn wake(self: Arc<Self>) {
        self.runnable.add(self.task);
    }
}

struct Task {
    name: String,
    work: LocalFuture<'static, ()>,
    waker: Waker,
}

struct Tasks {
    /// By number; a task that has ended leaves its place empty.
    running: Vec<Option<Task>>,
    left: usize,
    /// The numbers of those that have a core of their own.
    beside: Vec<usize>,
    /// Draws when they go on in the middle of another task's step.
    random: Random,
}

/// Runs tasks on this thread, until all have ended.
#[derive(Clone)]
pub(crate) struct Executor {
    tasks: Rc<RefCell<Tasks>>,
    runnable: Arc<Runnable>,
}

thread_local! {
    /// The one that runs. A clock is shared by threads, so it cannot hold an executor.
    static CURRENT: RefCell<Option<Executor>> = const { RefCell::new(None) };
}

impl Executor {
    pub(crate) fn new(random: Random) -> Self {
        let tasks = Tasks { running: Vec::new(), left: 0, beside: Vec::new(), random };
        Self { tasks: Rc::new(RefCell::new(tasks)), runnable: Arc::default() }
    }

    /// Spawns a task that has a core of its own: it may also go on in the middle of another one's step, where
    /// that one asks for the time.
    pub(crate) fn spawn_beside(&self, name: impl Into<String>, work: impl Future<Output = ()> + 'static) {
        let number = self.tasks.borrow().running.len();
        self.spawn(name, work);
        self.tasks.borrow_mut().beside.push(number);
    }

    /// Lets one of the tasks that have a core of their own take a step, or none.
    fn step_beside() {
        let Some(executor) = CURRENT.with_borrow(Clone::clone) else { return };
        let number = {
            let mut tasks = executor.tasks.borrow_mut();
            if tasks.beside.is_empty() || !tasks.random.chance(BESIDE) {
                return;
            }
            let Tasks { beside, random, .. } = &mut *tasks;
            let mut list = executor.runnable.list();
            let first = random.index(beside.len());
            let turns = (0..beside.len()).map(|turn| beside[(first + turn) % beside.len()]);
            let found = turns.filter_map(|task| list.iter().position(|other| *other == task)).next();
            found.map(|place| list.swap_remove(place))
        };
        number.into_iter().for_each(|number| executor.step(number));
    }

    pub(crate) fn spawn(&self, name: impl Into<String>, work: impl Future<Output = ()> + 'static) {
        let mut tasks = self.tasks.borrow_mut();
        let task = tasks.running.len();
        let waker = Waker::from(Arc::new(TaskWaker { task, runnable: Arc::clone(&self.runnable) }));
        tasks.running.push(Some(Task { name: name.into(), work: Box::pin(work), waker }));
        tasks.left += 1;
        drop(tasks);
        self.runnable.add(task);
    }

    /// Runs until no task is left or something has failed. Each step takes up to `cost` of simulated time.
    /// Says how many steps were taken.
    pub(crate) fn run(&self, world: &World, random: &mut Random, cost: Duration) -> u64 {
        CURRENT.set(Some(self.clone()));
        let mut steps = 0;
        while self.tasks.borrow().left > 0 && world.failure().is_none() && !world.is_over() {
            world.let_happen(false);
            let next = {
                let mut list = self.runnable.list();
                if list.is_empty() {
                    None
                } else {
                    Some(random.index(list.len())).map(|i| list.swap_remove(i))
                }
            };
            match next {
                Some(task) => self.step(task),
                None if world.let_happen(true) => {}
                None => world.fail(format!("deadlock: nothing is due, but these wait: {}", self.names())),
            }
            steps += 1;
            if !cost.is_zero() {
                world.pass(random.even_time(cost));
            }
            if steps > STEPS_MAX || world.time() > TIME_MAX {
                world.fail(format!(
                    "no end: {steps} steps, {:?}, still there: {}",
                    world.time(),
                    self.names()
                ));
            }
        }
        steps
    }

    fn step(&self, number: usize) {
        let Some(mut task) = self.tasks.borrow_mut().running[number].take() else { return };
        let ended = task.work.as_mut().poll(&mut Context::from_waker(&task.waker)).is_ready();
        let mut tasks = self.tasks.borrow_mut();
        if ended {
            tasks.left -= 1;
        } else {
            tasks.running[number] = Some(task);
        }
    }

    fn names(&self) -> String {
        let tasks = self.tasks.borrow();
        let names: Vec<_> = tasks.running.iter().flatten().map(|task| task.name.as_str()).collect();
        names.join(", ")
    }

    /// Drops every task that is left.
    fn clear(&self) {
        let left = std::mem::take(&mut self.tasks.borrow_mut().running);
        drop(left);
    }
}

/// A run that goes on. Dropped, it is over, also by a panic: tasks hold the executor that holds them, and what
/// is due holds the world that holds it, so both are emptied.
pub(crate) struct Running {
    pub(crate) world: Arc<World>,
    pub(crate) executor: Executor,
}

impl Drop for Running {
    fn drop(&mut self) {
        CURRENT.set(None);
        self.world.end();
        self.executor.clear();
        // Dropping tasks may have let something more be due.
        self.world.end();
    }
}
