//! How much is left to flush when gates close: flushing beside clients until that is short.
//!
//! It knows no nodes and closes no gates. Called by `snapshot`.

use std::pin::pin;
use std::time::Duration;

use futures_util::future::{Either, select};
use heliostat_block::clock::{Clock, Moment};

use super::DaemonError;

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
