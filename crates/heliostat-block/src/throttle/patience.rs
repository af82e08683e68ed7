//! [`Patience`]: how long the requests of one owner wait for limits: until it is over.
//!
//! A request does not say whose it is on its way down to a limit. So that is looked up when it gets there: nothing on
//! that way hands it to another task, and whoever polls it is its owner. Used by mirrors, which read their source beside
//! guests whose requests go on waiting.

use std::cell::RefCell;
use std::future::poll_fn;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use event_listener::{Event, EventListener};

thread_local! {
    /// Whose requests are polled on this thread at this moment.
    static OWNER: RefCell<Option<Arc<Patience>>> = const { RefCell::new(None) };
}

/// How long the requests of one owner wait for limits.
#[derive(Debug, Default)]
pub(crate) struct Patience {
    is_over: AtomicBool,
    ended: Event,
}

/// Puts back whose it was before.
struct Lent(Option<Arc<Patience>>);

impl Patience {
    /// From now on none of the owner's requests waits for a limit. They count all the same.
    pub(crate) fn end(&self) {
        self.is_over.store(true, Ordering::SeqCst);
        self.ended.notify(usize::MAX);
    }

    /// Says whether it has ended.
    pub(crate) fn is_over(&self) -> bool {
        self.is_over.load(Ordering::SeqCst)
    }

    /// Hears of its end, if that has not come yet.
    pub(super) fn listen(&self) -> EventListener {
        self.ended.listen()
    }

    /// Whose request it is that is polled at this moment, where that has said so.
    pub(super) fn of_owner() -> Option<Arc<Self>> {
        OWNER.with_borrow(Clone::clone)
    }

    /// Carries out `work`, whose requests are the owner's.
    ///
    /// # Cancel safety
    /// That of `work`.
    pub(crate) async fn lend<T>(self: &Arc<Self>, work: impl Future<Output = T>) -> T {
        let mut work = pin!(work);
        poll_fn(|cx| {
            let _lent = Lent(OWNER.replace(Some(Arc::clone(self))));
            work.as_mut().poll(cx)
        })
        .await
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        OWNER.set(self.0.take());
    }
}
