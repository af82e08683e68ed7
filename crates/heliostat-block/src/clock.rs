//! [`Clock`]: the only way in which the core learns what time it is.

use std::future::Future;
use std::pin::Pin;
use std::time::Duration;

/// A point in time: what has passed since the clock's own start. Monotonic; unrelated to the calendar.
///
/// Counts nanoseconds, for 584 years: each request takes two of these and their difference.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Moment(u64);

impl Moment {
    /// The clock's start.
    pub const START: Self = Self(0);

    /// The moment that lies `elapsed` after the clock's start.
    #[must_use]
    pub fn from_start(elapsed: Duration) -> Self {
        Self(u64::try_from(elapsed.as_nanos()).unwrap_or(u64::MAX))
    }

    /// The moment that lies so many nanoseconds after the clock's start.
    #[must_use]
    pub const fn from_nanoseconds(elapsed: u64) -> Self {
        Self(elapsed)
    }

    /// What has passed since the clock's start.
    #[must_use]
    pub const fn since_start(self) -> Duration {
        Duration::from_nanos(self.0)
    }

    /// What has passed since `earlier`; zero when `earlier` is later.
    #[must_use]
    pub const fn since(self, earlier: Self) -> Duration {
        Duration::from_nanos(self.0.saturating_sub(earlier.0))
    }
}

impl std::ops::Add<Duration> for Moment {
    type Output = Self;

    fn add(self, duration: Duration) -> Self {
        Self(self.0.saturating_add(Self::from_start(duration).0))
    }
}

/// A future that is used on the thread that made it.
pub type LocalFuture<'a, T> = Pin<Box<dyn Future<Output = T> + 'a>>;

/// Where time comes from: the real one in the program, a simulated one in the simulator.
pub trait Clock: Send + Sync + 'static {
    /// The time now.
    fn now(&self) -> Moment;

    /// Waits until `deadline`; at once if it has passed. Awaited on the thread that called it.
    ///
    /// # Cancel safety
    /// Dropping it leaves nothing behind.
    fn sleep_until(&self, deadline: Moment) -> LocalFuture<'static, ()>;
}

/// Lets the thread's other tasks and its ring have their turn.
pub(crate) async fn yield_once() {
    let mut yielded = false;
    std::future::poll_fn(|cx| {
        if std::mem::replace(&mut yielded, true) {
            return std::task::Poll::Ready(());
        }
        cx.waker().wake_by_ref();
        std::task::Poll::Pending
    })
    .await;
}
