//! [`Answer`]: waits for the end of a simulated request, which comes whether or not anybody waits.

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

use crate::world::World;

/// What a request brings back, when it has ended.
pub(crate) struct Slot<T> {
    answer: Option<io::Result<T>>,
    waker: Option<Waker>,
}

pub(crate) type Shared<T> = Arc<Mutex<Slot<T>>>;

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl<T> Default for Slot<T> {
    fn default() -> Self {
        Self { answer: None, waker: None }
    }
}

/// A request has ended.
pub(crate) fn finish<T>(slot: &Shared<T>, answer: io::Result<T>) {
    let mut slot = lock(slot);
    slot.answer = Some(answer);
    let waker = slot.waker.take();
    drop(slot);
    if let Some(waker) = waker {
        waker.wake();
    }
}

/// Waits for the end of a request that has begun.
pub(crate) struct Answer<T> {
    pub(crate) slot: Shared<T>,
    pub(crate) world: Arc<World>,
    /// It has ended, or nobody minds that it is dropped before.
    pub(crate) ended: bool,
}

impl<T> Future for Answer<T> {
    type Output = io::Result<T>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<T>> {
        let mut slot = lock(&self.slot);
        let answer = slot.answer.take();
        slot.waker = Some(cx.waker().clone());
        drop(slot);
        match answer {
            Some(answer) => {
                self.ended = true;
                Poll::Ready(answer)
            }
            None => Poll::Pending,
        }
    }
}

impl<T> Drop for Answer<T> {
    fn drop(&mut self) {
        if !self.ended && !self.world.is_over() && !std::thread::panicking() {
            self.world.fail("a request to a storage was dropped before its end");
        }
    }
}

impl<T> Answer<T> {
    /// The answer to a request that was carried out at once.
    pub(crate) fn now(mut self) -> io::Result<T> {
        self.ended = true;
        let answer = lock(&self.slot).answer.take();
        answer.expect("carried out to its end at once")
    }
}
