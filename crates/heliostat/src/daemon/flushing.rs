//! How much is left to flush when gates close: flushing beside clients until that is short.
//!
//! It knows no nodes and closes no gates. Called by `snapshot`.

use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::{Either, select};
use heliostat_block::clock::{Clock, Moment};
use heliostat_block::node::Node;

use super::DaemonError;

/// The longest that guests of all disks wait at closed gates, for what is in flight at the slowest and for the flush
/// behind them: less than the 30 s after which drivers in guests take a disk for dead.
pub(super) const GATES_MAX: Duration = Duration::from_secs(20);

/// The longest that is flushed beside clients, while no other change of nodes, exports or jobs can be made: for some ten
/// gigabytes in the host's page cache on a slow disk. What has become durable until then need not be flushed again when
/// it is tried again.
const BESIDE_CLIENTS_MAX: Duration = Duration::from_secs(120);

/// How long it is waited.
#[derive(Clone, Copy, Debug)]
pub(super) struct Bounds {
    pub(super) beside_clients: Duration,
    /// From their closing on.
    pub(super) gates: Duration,
}

impl Default for Bounds {
    fn default() -> Self {
        Self { beside_clients: BESIDE_CLIENTS_MAX, gates: GATES_MAX }
    }
}

/// How long a flush takes after which gates may close: the one behind them has what came meanwhile, and takes about as
/// long.
const SHORT: Duration = Duration::from_millis(500);

/// How often it is tried to get there: clients that write faster than the disk takes it never let it.
const TRIES: usize = 4;

/// Flushes again and again until it took no longer than [`SHORT`], at most [`TRIES`] times.
///
/// # Errors
/// As `flush`, which is not called again then.
pub(super) async fn flush_until_short(
    clock: &dyn Clock,
    flush: impl AsyncFn() -> Result<(), DaemonError>,
) -> Result<(), DaemonError> {
    for _ in 0..TRIES {
        let began = clock.now();
        flush().await?;
        if clock.now().since(began) <= SHORT {
            break;
        }
    }
    Ok(())
}

/// Waits for `work` no longer than until `deadline`. `None`: it has not ended by then, and was dropped.
///
/// # Cancel safety
/// As that of `work`.
pub(super) async fn until<T>(
    clock: &dyn Clock,
    deadline: Moment,
    work: impl Future<Output = T>,
) -> Option<T> {
    match select(pin!(work), clock.sleep_until(deadline)).await {
        Either::Left((done, _)) => Some(done),
        Either::Right(_) => None,
    }
}

/// What says which of `nodes`, whose gates were closed, have not come to rest.
pub(super) fn undrained(nodes: &[Arc<Node>], limit: Duration) -> DaemonError {
    let busy = nodes.iter().filter(|node| node.in_flight() > 0).map(|node| format!("'{}'", node.name()));
    DaemonError::Undrained { nodes: busy.collect::<Vec<_>>().join(", "), limit }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use futures_util::FutureExt;
    use heliostat_block::clock::{LocalFuture, Moment};

    use super::*;

    #[derive(Default)]
    struct Stopped(Mutex<Moment>);

    impl Clock for Stopped {
        fn now(&self) -> Moment {
            *self.0.lock().unwrap()
        }

        fn sleep_until(&self, _: Moment) -> LocalFuture<'static, ()> {
            Box::pin(std::future::pending())
        }
    }

    /// How many flushes there are where they take so many milliseconds, one after the other.
    fn flushes(take: &[u64]) -> usize {
        let clock = Stopped::default();
        let left = Mutex::new(take.iter());
        let flush = async || {
            let takes = *left.lock().unwrap().next().expect("it has stopped before");
            let mut now = clock.0.lock().unwrap();
            *now = *now + Duration::from_millis(takes);
            Ok(())
        };
        flush_until_short(&clock, flush).now_or_never().unwrap().unwrap();
        take.len() - left.lock().unwrap().len()
    }

    #[test]
    fn it_is_flushed_beside_clients_until_little_is_left() {
        assert_eq!(flushes(&[3, 3]), 1);
        assert_eq!(flushes(&[9000, 3]), 2);
        assert_eq!(flushes(&[9000, 2000, 400, 3]), 3);
        assert_eq!(flushes(&[9000; 20]), TRIES, "not for ever");
    }
}
