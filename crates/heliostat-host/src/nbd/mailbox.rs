//! [`Mailbox`]: requests on their way to the thread that has the connections, and answers on their way back.
//!
//! Locks are held to push or to take out. Called by the storage on any thread, and by the connections' thread.

use std::future::poll_fn;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Poll, Waker};

use async_lock::{Semaphore, SemaphoreGuardArc};
use heliostat_block::nbd::client_reply::Answered;
use heliostat_block::nbd::link::{LinkError, Wanted};

/// Requests of one storage that have no answer: more than its users have in flight, each of which is bounded too. One
/// more waits.
const REQUESTS_MAX: usize = 1024;

pub(super) type Outcome = Result<Answered, LinkError>;

/// Where the storage's users put their requests.
pub(super) struct Mailbox {
    mail: Mutex<Mail>,
    permits: Arc<Semaphore>,
}

struct Mail {
    letters: Vec<Letter>,
    /// Of the thread, when it sleeps.
    waker: Option<Waker>,
    /// Nobody will take letters out.
    is_shut: bool,
    /// The storage is gone.
    is_abandoned: bool,
    /// Nobody needs the answers to what was taken out so far, nor to so many of the letters.
    given_up: Option<usize>,
    /// There may be reads that nobody waits for any more.
    has_let_go: bool,
}

/// What was taken out of the mailbox at once.
pub(super) struct Post {
    pub(super) letters: Vec<Letter>,
    /// Nobody needs the answers to what was taken out before, nor to the first so many of these.
    pub(super) given_up: Option<usize>,
    /// Of those taken out so far and of these some may be owed to nobody any more.
    pub(super) has_let_go: bool,
}

/// A request, and where its answer goes.
pub(super) struct Letter {
    pub(super) wanted: Wanted,
    pub(super) owed: Owed,
}

/// An answer that is owed. Dropped unpaid it says that the link is closed.
pub(super) struct Owed {
    answer: Arc<Answer>,
    is_paid: bool,
    /// Given back when the answer is there, whether or not anybody waits for it.
    _permit: SemaphoreGuardArc,
}

#[derive(Default)]
struct Answer(Mutex<Waiting>);

#[derive(Default)]
struct Waiting {
    outcome: Option<Outcome>,
    waker: Option<Waker>,
    is_let_go: bool,
}

/// Somebody who waits for an answer.
struct Asker<'a> {
    mailbox: &'a Mailbox,
    answer: Arc<Answer>,
    /// It may go away: the answer makes no difference then.
    is_read: bool,
    is_answered: bool,
}

impl Mailbox {
    pub(super) fn new() -> Arc<Self> {
        let mail = Mail {
            letters: Vec::new(),
            waker: None,
            is_shut: false,
            is_abandoned: false,
            given_up: None,
            has_let_go: false,
        };
        Arc::new(Self { mail: Mutex::new(mail), permits: Arc::new(Semaphore::new(REQUESTS_MAX)) })
    }

    /// Has a request carried out.
    ///
    /// # Cancel safety
    /// Dropped once polled, it leaves the request on its way; but of a read, or of a look at the layout, nothing.
    pub(super) async fn ask(&self, wanted: Wanted) -> Outcome {
        let permit = match self.permits.try_acquire_arc() {
            Some(permit) => permit,
            None => self.permits.acquire_arc().await,
        };
        let answer = Arc::new(Answer::default());
        let owed = Owed { answer: Arc::clone(&answer), is_paid: false, _permit: permit };
        let is_read = matches!(wanted, Wanted::Read { .. } | Wanted::BlockStatus { .. });
        let mut asker = Asker { mailbox: self, answer, is_read, is_answered: false };
        self.post(Letter { wanted, owed });
        let outcome = poll_fn(|cx| {
            let mut waiting = asker.answer.lock();
            match waiting.outcome.take() {
                Some(outcome) => Poll::Ready(outcome),
                None => {
                    waiting.waker = Some(cx.waker().clone());
                    Poll::Pending
                }
            }
        })
        .await;
        asker.is_answered = true;
        outcome
    }

    fn post(&self, letter: Letter) {
        let mut mail = self.mail();
        if mail.is_shut {
            // Paid by being dropped, without the lock.
            drop(mail);
            return drop(letter);
        }
        mail.letters.push(letter);
        let waker = mail.waker.take();
        drop(mail);
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    /// Says that no more requests come.
    pub(super) fn abandon(&self) {
        self.change(|mail| mail.is_abandoned = true);
    }

    /// Says that nobody needs the answers to what was put in so far.
    pub(super) fn give_up(&self) {
        self.change(|mail| mail.given_up = Some(mail.letters.len()));
    }

    fn change(&self, change: impl FnOnce(&mut Mail)) {
        let mut mail = self.mail();
        change(&mut mail);
        let waker = mail.waker.take();
        drop(mail);
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    pub(super) fn is_abandoned(&self) -> bool {
        self.mail().is_abandoned
    }

    /// Takes out what is there; where nothing is, `waker` will be woken when there is.
    pub(super) fn take(&self, waker: &Waker) -> Post {
        let mut mail = self.mail();
        if mail.letters.is_empty() {
            match &mut mail.waker {
                Some(known) => known.clone_from(waker),
                none => *none = Some(waker.clone()),
            }
        }
        let has_let_go = std::mem::take(&mut mail.has_let_go);
        Post { letters: std::mem::take(&mut mail.letters), given_up: mail.given_up.take(), has_let_go }
    }

    /// Takes no more letters; those inside are answered.
    pub(super) fn shut(&self) {
        let mut mail = self.mail();
        mail.is_shut = true;
        let letters = std::mem::take(&mut mail.letters);
        drop(mail);
        drop(letters);
    }

    fn mail(&self) -> MutexGuard<'_, Mail> {
        self.mail.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Answer {
    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn give(&self, outcome: Outcome) {
        let mut waiting = self.lock();
        waiting.outcome = Some(outcome);
        let waker = waiting.waker.take();
        drop(waiting);
        if let Some(waker) = waker {
            waker.wake();
        }
    }
}

impl Drop for Asker<'_> {
    fn drop(&mut self) {
        if self.is_read && !self.is_answered {
            self.answer.lock().is_let_go = true;
            self.mailbox.change(|mail| mail.has_let_go = true);
        }
    }
}

impl Owed {
    /// Whether nobody waits for it.
    pub(super) fn is_let_go(&self) -> bool {
        self.answer.lock().is_let_go
    }

    /// Gives the answer.
    pub(super) fn pay(mut self, outcome: Outcome) {
        self.is_paid = true;
        self.answer.give(outcome);
    }
}

impl Drop for Owed {
    fn drop(&mut self) {
        if !self.is_paid {
            self.answer.give(Err(LinkError::Closed));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::future::Future;

    use heliostat_block::buffer::Buffer;

    use super::*;

    #[test]
    fn what_is_put_in_before_it_is_given_up_is_given_up_and_what_comes_after_is_not() {
        let mailbox = Mailbox::new();
        let mut asked: Vec<_> = (0..3).map(|_| Box::pin(mailbox.ask(Wanted::Flush))).collect();
        let mut cx = std::task::Context::from_waker(Waker::noop());
        for (number, ask) in asked.iter_mut().enumerate() {
            assert!(ask.as_mut().poll(&mut cx).is_pending());
            if number == 1 {
                mailbox.give_up();
            }
        }
        let Post { letters, given_up, .. } = mailbox.take(Waker::noop());
        assert_eq!((letters.len(), given_up), (3, Some(2)));
        assert_eq!(mailbox.take(Waker::noop()).given_up, None, "once");
    }

    #[test]
    fn a_read_that_is_dropped_is_owed_to_nobody_and_a_flush_that_is_dropped_is() {
        let mailbox = Mailbox::new();
        let read = Wanted::Read { offset: 0, buffer: Buffer::zeroed(512) };
        let [mut read, mut flush] = [read, Wanted::Flush].map(|wanted| Box::pin(mailbox.ask(wanted)));
        let mut cx = std::task::Context::from_waker(Waker::noop());
        assert!(read.as_mut().poll(&mut cx).is_pending() && flush.as_mut().poll(&mut cx).is_pending());
        drop(flush);
        let Post { letters, has_let_go, .. } = mailbox.take(Waker::noop());
        assert!(!has_let_go);
        drop(read);
        assert!(mailbox.take(Waker::noop()).has_let_go);
        assert!(!mailbox.take(Waker::noop()).has_let_go, "once");
        let let_go: Vec<_> = letters.iter().map(|letter| letter.owed.is_let_go()).collect();
        assert_eq!(let_go, [true, false]);
    }
}
