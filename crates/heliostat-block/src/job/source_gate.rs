//! [`SourceGate`]: the source's gate in the hands of a mirror that is about to end; and those below it, where the target
//! is to take the place of a node there.
//!
//! The gates below are closed last, when nothing is left to be copied: copies pass them. Behind them is nothing of the
//! source's then, but others may be reading. While it is closed, guests wait: it knows since when. Opens by itself when dropped. Called by `mirror`.

use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use super::mirror_step::Gate;
use crate::clock::{Clock, LocalFuture, Moment};
use crate::limits::{PAUSE_BUDGET_LAST, PAUSE_LAST};
use crate::node::Node;
use crate::tracked::Drained;

/// Open, closing or closed.
pub(crate) struct SourceGate {
    state: State,
    closed_at: Moment,
    /// How long guests may be held the next time.
    patience: Duration,
    /// The nodes below the source down to the one that is replaced, from the top down; none where that is the source.
    below: Vec<Arc<Node>>,
    closed_below: Vec<Drained>,
}

enum State {
    Open,
    Closing(LocalFuture<'static, Drained>),
    Closed(Drained),
}

impl SourceGate {
    pub(crate) const fn open() -> Self {
        Self {
            state: State::Open,
            closed_at: Moment::START,
            patience: PAUSE_BUDGET_LAST,
            below: Vec::new(),
            closed_below: Vec::new(),
        }
    }

    /// Says which gates are closed below.
    pub(crate) fn replace(&mut self, below: Vec<Arc<Node>>) {
        self.below = below;
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

    /// Whether those below are closed with nothing behind them, as many as there are to be.
    pub(crate) fn is_closed_below(&self) -> bool {
        self.closed_below.len() == self.below.len()
    }

    /// Closes those below and waits until they are quiet, but not for longer than guests may be held; says whether they
    /// are.
    pub(crate) async fn close_below(&mut self, clock: &dyn Clock) -> bool {
        let Some(until) = self.held_until() else { return false };
        let mut timer = clock.sleep_until(until);
        for node in &self.below {
            let mut drain = pin!(node.drain());
            let quiet = std::future::poll_fn(|cx| match drain.as_mut().poll(cx) {
                Poll::Ready(quiet) => Poll::Ready(Some(quiet)),
                Poll::Pending => timer.as_mut().poll(cx).map(|()| None),
            });
            let Some(drained) = quiet.await else { return false };
            self.closed_below.push(drained);
        }
        true
    }

    /// What stands behind the closed gate, and what behind the lowest.
    pub(crate) fn drained(&self) -> Option<(&Drained, &Drained)> {
        match &self.state {
            State::Closed(source) => Some((source, self.closed_below.last().unwrap_or(source))),
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
        self.closed_below.clear();
        self.state = State::Open;
        now.since(self.closed_at)
    }
}
