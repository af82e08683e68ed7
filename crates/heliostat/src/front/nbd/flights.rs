//! [`Flights`]: the requests of a connection that have been started and have not ended; [`Awake`]: whether it sleeps.
//!
//! Never drops a request that was started. Called by the connection's loop.

use std::cell::Cell;
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll};

use futures_util::stream::{FuturesUnordered, StreamExt};

/// Requests that have been started and have not ended. Nothing takes one out but its end.
pub(super) struct Flights<F> {
    /// Memory of a request that ended at once, for the next one.
    spare: Option<Pin<Box<F>>>,
    running: FuturesUnordered<Pin<Box<F>>>,
}

impl<F: Future<Output = ()>> Flights<F> {
    pub(super) fn new() -> Self {
        Self { spare: None, running: FuturesUnordered::new() }
    }

    /// Starts a request. Most end at once; the others are polled again by [`Flights::poll_ended`], which is
    /// to be called before the task sleeps.
    pub(super) fn start(&mut self, request: F, cx: &mut Context<'_>) {
        let mut place = match self.spare.take() {
            Some(mut place) => {
                place.set(request);
                place
            }
            None => Box::pin(request),
        };
        match place.as_mut().poll(cx) {
            Poll::Ready(()) => self.spare = Some(place),
            Poll::Pending => self.running.push(place),
        }
    }

    /// Gets on with those that can. Says whether any ended.
    pub(super) fn poll_ended(&mut self, cx: &mut Context<'_>) -> bool {
        let mut has_ended = false;
        while !self.running.is_empty() && self.running.poll_next_unpin(cx).is_ready() {
            has_ended = true;
        }
        has_ended
    }
}

/// Whether a connection sleeps; counted together with the thread's other connections, and with the server's.
pub(super) struct Awake {
    count: Rc<Cell<usize>>,
    all: Arc<AtomicUsize>,
    is_awake: bool,
}

impl Awake {
    pub(super) fn new(count: &Rc<Cell<usize>>, all: &Arc<AtomicUsize>) -> Self {
        Self { count: Rc::clone(count), all: Arc::clone(all), is_awake: false }
    }

    pub(super) fn wake(&mut self) {
        if !self.is_awake {
            self.count.set(self.count.get() + 1);
            self.all.fetch_add(1, Ordering::Relaxed);
            self.is_awake = true;
        }
    }

    pub(super) fn sleep(&mut self) {
        if self.is_awake {
            self.count.set(self.count.get() - 1);
            self.all.fetch_sub(1, Ordering::Relaxed);
            self.is_awake = false;
        }
    }

    /// Says whether no other thread of the server has a connection with anything to do.
    pub(super) fn is_only_thread(&self) -> bool {
        self.all.load(Ordering::Relaxed) == self.count.get()
    }

    /// Says whether no other connection of this thread has anything to do.
    pub(super) fn is_alone(&self) -> bool {
        self.count.get() == usize::from(self.is_awake)
    }
}

impl Drop for Awake {
    fn drop(&mut self) {
        self.sleep();
    }
}

impl<F> Flights<F> {
    /// Says whether all that were started have ended.
    pub(super) fn are_over(&self) -> bool {
        self.running.is_empty()
    }

    /// How many have not ended.
    pub(super) fn len(&self) -> usize {
        self.running.len()
    }
}
