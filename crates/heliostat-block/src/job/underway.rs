//! [`Underway`]: what a mirror has started and not seen end: copies, halves of guests' writes, a flush, a look.
//!
//! It carries work out, here or on a lane, and gives back what has ended; what that means is `mirror`'s to say.

use std::sync::Arc;
use std::task::{Context, Poll};

use event_listener::EventListener;
use futures_util::stream::{FuturesUnordered, StreamExt};

use super::Job;
use super::copy::{Copied, CopyError, Route};
use super::doubling::{Copying, TargetHalf};
use super::lanes::{Errand, Lanes, Returns};
use super::sample::compare;
use super::scan::{Scanned, scan};
use super::unflushed::Begun;
use crate::clock::{LocalFuture, yield_once};
use crate::error::BlockError;
use crate::limits::COPIES_IN_FLIGHT_MAX;
use crate::range::ByteRange;

/// Something that has ended.
pub(crate) enum Done {
    Copied(Begun, Copying, Result<Copied, CopyError>),
    Half(Begun, TargetHalf, Result<(), BlockError>),
    Flushed(Result<(), BlockError>),
    Scanned(Result<Scanned, BlockError>),
    /// Of places that were compared, those that differ.
    Sampled(Result<Vec<ByteRange>, CopyError>),
}

/// The same, and the stint of the job in which it was begun.
pub(crate) struct Ended {
    pub(crate) stint: u64,
    pub(crate) done: Done,
}

/// What is under way.
pub(crate) struct Underway {
    route: Arc<Route>,
    job: Arc<Job>,
    work: FuturesUnordered<LocalFuture<'static, Ended>>,
    lanes: Option<Arc<Lanes>>,
    returns: Arc<Returns>,
    copies: usize,
}

impl Underway {
    pub(crate) fn new(job: Arc<Job>, route: Arc<Route>) -> Self {
        let (work, returns) = (FuturesUnordered::new(), Arc::default());
        Self { route, job, work, lanes: None, returns, copies: 0 }
    }

    /// Lets it send copies to `lanes`.
    pub(crate) fn use_lanes(&mut self, lanes: Arc<Lanes>) {
        self.lanes = Some(lanes);
    }

    /// Whether nothing is under way.
    pub(crate) fn is_idle(&self) -> bool {
        self.copies == 0 && self.work.is_empty()
    }

    /// Copies in flight, here and on lanes.
    pub(crate) const fn copies(&self) -> usize {
        self.copies
    }

    /// How many copies are worth having in flight. Where lanes share them, two for each core: more would all
    /// be this thread's to do while a lane idles.
    pub(crate) fn depth(&self, elsewhere: bool) -> usize {
        let lanes = self.lanes.as_ref().filter(|_| elsewhere && self.route.is_cached());
        match lanes.map_or(0, |lanes| lanes.count()) {
            0 => COPIES_IN_FLIGHT_MAX,
            lanes => COPIES_IN_FLIGHT_MAX.min(2 * lanes + 2),
        }
    }

    /// Starts a copy; on a lane, if `elsewhere` allows it and one is free.
    pub(crate) async fn copy(&mut self, begun: Begun, copying: Copying, elsewhere: bool) -> Option<Ended> {
        self.copies += 1;
        let mut copying = copying;
        if let Some(lanes) = self.lanes.as_ref().filter(|_| elsewhere && self.route.is_cached()) {
            let route = Arc::clone(&self.route);
            match lanes.send(Errand {
                route,
                stint: self.job.orders().stint,
                begun,
                copying,
                returns: Arc::clone(&self.returns),
            }) {
                Ok(()) => return None,
                Err(errand) => copying = errand.copying,
            }
        }
        self.copy_here(begun, copying).await
    }

    /// Does itself what waits for a lane, for want of anything better to do.
    pub(crate) async fn take_back(&mut self) -> Option<Ended> {
        let errand = self.lanes.as_ref()?.take_back(&self.returns)?;
        self.copy_here(errand.begun, errand.copying).await
    }

    async fn copy_here(&mut self, begun: Begun, copying: Copying) -> Option<Ended> {
        let route = Arc::clone(&self.route);
        let copy = async move {
            let copied = route.copy(copying.range()).await;
            Done::Copied(begun, copying, copied)
        };
        self.launch(copy).await
    }

    /// Starts to write the target's half of a guest's write.
    pub(crate) async fn half(&mut self, begun: Begun, half: TargetHalf) -> Option<Ended> {
        let route = Arc::clone(&self.route);
        let write = async move {
            let written = route.write_half(&half).await;
            Done::Half(begun, half, written)
        };
        self.launch(write).await
    }

    /// Starts to look at the source from `from` on.
    pub(crate) async fn scan(&mut self, from: u64, target_is_zero: bool) -> Option<Ended> {
        let route = Arc::clone(&self.route);
        let look = async move { Done::Scanned(scan(&route, from, route.belief(target_is_zero)).await) };
        self.launch(look).await
    }

    /// Starts to compare the two sides at `places`.
    pub(crate) async fn sample(&mut self, places: Vec<ByteRange>) -> Option<Ended> {
        let route = Arc::clone(&self.route);
        self.launch(async move { Done::Sampled(compare(&route, places).await) }).await
    }

    /// Starts to flush the target.
    pub(crate) async fn flush(&mut self) -> Option<Ended> {
        let route = Arc::clone(&self.route);
        self.launch(async move { Done::Flushed(route.flush().await) }).await
    }

    /// Runs `work` as far as it goes at once, and keeps it where it goes no further.
    async fn launch(&mut self, work: impl Future<Output = Done> + 'static) -> Option<Ended> {
        // As it is now: who has just heard of an error may have resumed the job since its orders were last looked at.
        let stint = self.job.orders().stint;
        let mut work: LocalFuture<'static, Ended> =
            Box::pin(async move { Ended { stint, done: work.await } });
        match std::future::poll_fn(|cx| Poll::Ready(work.as_mut().poll(cx))).await {
            Poll::Ready(ended) => {
                // What ends at once would otherwise keep the thread from everything else on it.
                yield_once().await;
                Some(self.seen(ended))
            }
            Poll::Pending => {
                self.work.push(work);
                None
            }
        }
    }

    /// The next that has ended; `None` when nothing has. The task hears when something does, but for what comes
    /// back from lanes: for that there is [`Underway::listen`].
    pub(crate) fn poll_ended(&mut self, cx: &mut Context<'_>) -> Option<Ended> {
        if let Some((stint, begun, copying, copied)) = self.returns.take_one() {
            return Some(self.seen(Ended { stint, done: Done::Copied(begun, copying, copied) }));
        }
        match self.work.poll_next_unpin(cx) {
            Poll::Ready(Some(ended)) => Some(self.seen(ended)),
            Poll::Ready(None) | Poll::Pending => None,
        }
    }

    /// Hears of the next copy that comes back from a lane.
    pub(crate) fn listen(&self) -> EventListener {
        self.returns.listen()
    }

    const fn seen(&mut self, ended: Ended) -> Ended {
        if let Done::Copied(..) = ended.done {
            self.copies -= 1;
        }
        ended
    }
}
