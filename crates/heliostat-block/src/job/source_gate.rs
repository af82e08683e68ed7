//! [`SourceGate`]: the source's gate in the hands of a mirror that is about to end.
//!
//! While it is closed, guests wait: it knows since when. Opens by itself when dropped. Called by `mirror`.

use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use super::mirror_step::Gate;
use crate::clock::{LocalFuture, Moment};
use crate::limits::{PAUSE_BUDGET_LAST, PAUSE_LAST};
use crate::node::Node;
use crate::tracked::Drained;

/// Open, closing or closed.
pub(crate) struct SourceGate {
    state: State,
    closed_at: Moment,
    /// How long guests may be held the next time.
    patience: Duration,
}

enum State {
    Open,
    Closing(LocalFuture<'static, Drained>),
    Closed(Drained),
}

impl SourceGate {
    pub(crate) const fn open() -> Self {
        Self { state: State::Open, closed_at: Moment::START, patience: PAUSE_BUDGET_LAST }
    }

    pub(crate) const fn view(&self) -> Gate {
        match self.state {
            State::Open => Gate::Open,
            State::Closing(_) => Gate::Closing,
            State::Closed(_) => Gate::Closed,
        }
    }

    /// Closes it: no request passes from now on. [`SourceGate::poll_drained`] says when those inside are out.
    pub(crate) async fn close(&mut self, source: Arc<Node>, now: Moment) {
        self.closed_at = now;
        self.state = State::Closing(Box::pin(async move { source.drain().await }));
        // The drain closes the gate when it is first polled.
        std::future::poll_fn(|cx| Poll::Ready(self.poll_drained(cx))).await;
    }

    /// Says, once, that everything that was inside is out.
    pub(crate) fn poll_drained(&mut self, cx: &mut Context<'_>) -> bool {
        let State::Closing(drain) = &mut self.state else { return false };
        match drain.as_mut().poll(cx) {
            Poll::Ready(drained) => {
                self.state = State::Closed(drained);
                true
            }
            Poll::Pending => false,
        }
    }

    /// What stands behind the closed gate.
    pub(crate) const fn drained(&self) -> Option<&Drained> {
        match &self.state {
            State::Closed(drained) => Some(drained),
            _ => None,
        }
    }

    /// When guests have been held long enough; `None` while it is open.
    pub(crate) fn held_until(&self) -> Option<Moment> {
        (self.view() != Gate::Open).then(|| self.closed_at + self.patience)
    }

    /// Believes that it is open, which it is not: for a test that plants this.
    pub(crate) fn lose(&mut self) {
        std::mem::forget(std::mem::replace(&mut self.state, State::Open));
    }

    /// Opens it; says how long it was closed. Held too long, guests are held for twice as long the next time,
    /// so that a target that is slow to flush has its end too.
    pub(crate) fn reopen(&mut self, now: Moment) -> Duration {
        if self.held_until().is_some_and(|until| until <= now) {
            self.patience = (self.patience * 2).min(PAUSE_LAST);
        }
        self.state = State::Open;
        now.since(self.closed_at)
    }
}
