//! [`Patience`]: how long the requests of one owner wait, for limits and for reads of a server: until it is over.
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
use futures_util::future::{Either, select};

thread_local! {
    /// Whose requests are polled on this thread at this moment.
    static OWNER: RefCell<Option<Arc<Patience>>> = const { RefCell::new(None) };
}

/// Carries out a read for whoever asks for it at this moment, or `None` from the moment on at which that one does not
/// want it any more: a mirror that was cancelled does not wait for its source. `read` is dropped then, so it must be one
/// that leaves nothing behind; requests of others are not touched.
///
/// Called by storages that may wait for somebody who never answers, and where requests wait for each other's reads.
///
/// # Cancel safety
/// That of `read`.
pub async fn while_wanted<T>(read: impl Future<Output = T>) -> Option<T> {
    let Some(owner) = Patience::of_owner() else { return Some(read.await) };
    let ended = pin!(owner.listen());
    if owner.is_over() {
        return None;
    }
    match select(pin!(read), ended).await {
        Either::Left((done, _)) => Some(done),
        Either::Right(_) => None,
    }
}

/// How long the requests of one owner wait.
#[derive(Debug, Default)]
pub(crate) struct Patience {
    is_over: AtomicBool,
    ended: Event,
}

/// Puts back whose it was before.
struct Lent(Option<Arc<Patience>>);

impl Patience {
    /// From now on none of the owner's requests waits for a limit, though they count all the same; nor do its reads for a
    /// server.
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

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;
    use futures_util::future::pending;

    use super::*;

    #[test]
    fn a_read_ends_when_its_owner_does_not_want_it_and_others_go_on() {
        let owner = Arc::<Patience>::default();
        let mut of_owner = Box::pin(owner.lend(while_wanted(pending::<()>())));
        let mut of_other = Box::pin(while_wanted(pending::<()>()));
        assert!((&mut of_owner).now_or_never().is_none() && (&mut of_other).now_or_never().is_none());
        owner.end();
        assert_eq!(of_owner.now_or_never(), Some(None));
        assert!(of_other.now_or_never().is_none());
        assert_eq!(owner.lend(while_wanted(async { 7 })).now_or_never(), Some(None), "it is not even begun");
        assert_eq!(while_wanted(async { 7 }).now_or_never(), Some(Some(7)));
    }
}
