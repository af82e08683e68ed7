//! Waiting until a descriptor can be read or written, by a poll operation on the thread's ring.

use std::cell::RefCell;
use std::fmt;
use std::future::{Future, poll_fn};
use std::io;
use std::os::fd::OwnedFd;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use compio::BufResult;
use compio::driver::op::{Interest, PollOnce};
use compio::runtime::{Runtime, Submit};

/// A poll operation that the ring has, or had. Holds the descriptor open meanwhile.
type Armed = Submit<PollOnce<Arc<OwnedFd>>>;

fn arm(fd: &Arc<OwnedFd>, interest: Interest) -> Armed {
    Runtime::with_current(|runtime| runtime.submit(PollOnce::new(Arc::clone(fd), interest)))
}

/// Waits until `fd` can be read, or has failed.
///
/// # Cancel safety
/// Dropping it cancels the operation.
pub(crate) async fn readable(fd: &Arc<OwnedFd>) -> io::Result<()> {
    let BufResult(result, _) = arm(fd, Interest::Readable).await;
    result.map(|_| ())
}

/// What one descriptor is being polled for. An operation outlives the future that waited for it and serves the
/// next one, so that a task which waits for a socket and something else, again and again, costs the ring no
/// cancellation each time.
#[derive(Default)]
pub(crate) struct Readiness {
    readable: RefCell<Option<Armed>>,
    writable: RefCell<Option<Armed>>,
}

impl Readiness {
    /// Waits until `fd` can be read, or has failed. One waiter at a time. May return early.
    pub(crate) fn readable(&self, fd: &Arc<OwnedFd>) -> impl Future<Output = io::Result<()>> {
        poll_fn(move |cx| wait(&self.readable, fd, Interest::Readable, cx))
    }

    /// Waits until `fd` can be written, or has failed. One waiter at a time. May return early.
    pub(crate) fn writable(&self, fd: &Arc<OwnedFd>) -> impl Future<Output = io::Result<()>> {
        poll_fn(move |cx| wait(&self.writable, fd, Interest::Writable, cx))
    }

    /// Cancels what the ring holds.
    pub(crate) fn clear(&self) {
        self.readable.take();
        self.writable.take();
    }

    /// Says whether the ring may still hold the descriptor.
    pub(crate) fn is_armed(&self) -> bool {
        self.readable.borrow().is_some() || self.writable.borrow().is_some()
    }
}

fn wait(
    slot: &RefCell<Option<Armed>>,
    fd: &Arc<OwnedFd>,
    interest: Interest,
    cx: &mut Context<'_>,
) -> Poll<io::Result<()>> {
    let mut slot = slot.borrow_mut();
    let armed = slot.get_or_insert_with(|| arm(fd, interest));
    Pin::new(armed).poll(cx).map(|BufResult(result, _)| {
        *slot = None;
        result.map(|_| ())
    })
}

impl fmt::Debug for Readiness {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Readiness").field("is_armed", &self.is_armed()).finish()
    }
}
