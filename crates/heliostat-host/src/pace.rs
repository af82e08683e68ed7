//! [`Pace`]: whether writing in the calling thread still pays, or the kernel makes writers wait.
//!
//! A page-cached write is a copy until the kernel throttles writers; then it sleeps, and everything else on
//! the thread with it. That shows as a call that lasts long. It may also only look so, when another program
//! took the processor away during the call. So the first long call makes us suspicious: for a while each call
//! is watched for whether it slept by its own doing, and only one that did moves writes to the ring, for a
//! while that doubles as long as it goes on.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// A call that lasts longer has waited: copying the longest inline request takes a tenth of this.
const SLOW: Duration = Duration::from_millis(1);

/// How long calls are watched after a slow one. Watching costs a third of a microsecond each.
const SUSPICION: Duration = Duration::from_secs(2);

/// How long writes go by the ring at first and at most. The shortest is what one throttled writer sleeps; the
/// longest, what a user accepts until a disk that recovered is fast again.
const DETOUR_MIN: Duration = Duration::from_millis(200);
const DETOUR_MAX: Duration = Duration::from_secs(5);

/// What is known about recent calls, shared by threads. Times are microseconds since `start`.
#[derive(Debug)]
pub(crate) struct Pace {
    start: Instant,
    suspicious_until: AtomicU64,
    detour_until: AtomicU64,
    detour_len: AtomicU64,
}

/// One call under way.
pub(crate) struct Watch {
    began: Instant,
    /// How often the thread had slept before; known only while we are suspicious.
    sleeps: Option<u64>,
}

impl Pace {
    pub(crate) fn new() -> Self {
        Self {
            start: Instant::now(),
            suspicious_until: AtomicU64::new(0),
            detour_until: AtomicU64::new(0),
            detour_len: AtomicU64::new(0),
        }
    }

    fn micros(&self, moment: Instant) -> u64 {
        micros(moment.saturating_duration_since(self.start))
    }

    /// To be asked before a call; `None` when it should go by the ring.
    pub(crate) fn start(&self) -> Option<Watch> {
        let began = Instant::now();
        let now = self.micros(began);
        if now < self.detour_until.load(Ordering::Relaxed) {
            return None;
        }
        let is_suspicious = now < self.suspicious_until.load(Ordering::Relaxed);
        Some(Watch { began, sleeps: is_suspicious.then(sleeps_of_this_thread) })
    }

    /// To be told after the call.
    pub(crate) fn end(&self, watch: Watch) {
        let ended = Instant::now();
        if ended.saturating_duration_since(watch.began) < SLOW {
            return;
        }
        let slept = watch.sleeps.is_some_and(|before| sleeps_of_this_thread() > before);
        self.note_slow(self.micros(ended), slept);
    }

    fn note_slow(&self, now: u64, slept: bool) {
        self.suspicious_until.store(now + micros(SUSPICION), Ordering::Relaxed);
        if !slept {
            return;
        }
        let (last_end, last_len) =
            (self.detour_until.load(Ordering::Relaxed), self.detour_len.load(Ordering::Relaxed));
        let is_soon = last_len > 0 && now < last_end + micros(SUSPICION);
        let len = if is_soon { (last_len * 2).min(micros(DETOUR_MAX)) } else { micros(DETOUR_MIN) };
        self.detour_len.store(len, Ordering::Relaxed);
        self.detour_until.store(now + len, Ordering::Relaxed);
        // Still suspicious when it is over.
        self.suspicious_until.store(now + len + micros(SUSPICION), Ordering::Relaxed);
    }
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

/// How often this thread has given up the processor because it had to wait.
fn sleeps_of_this_thread() -> u64 {
    // SAFETY: rusage is a C struct of integers; all zeroes is a value of it.
    let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
    // SAFETY: it writes one rusage, which we own.
    let result = unsafe { libc::getrusage(libc::RUSAGE_THREAD, &raw mut usage) };
    if result == 0 { u64::try_from(usage.ru_nvcsw).unwrap_or(0) } else { 0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_call_that_lost_the_processor_only_makes_suspicious() {
        let pace = Pace::new();
        pace.note_slow(0, false);
        assert!(pace.start().is_some_and(|watch| watch.sleeps.is_some()));
    }

    #[test]
    fn calls_that_slept_lead_to_longer_and_longer_detours_up_to_a_bound() {
        let pace = Pace::new();
        let mut now = 0;
        let mut lens = Vec::new();
        for _ in 0..7 {
            pace.note_slow(now, true);
            let until = pace.detour_until.load(Ordering::Relaxed);
            lens.push((until - now) / 1000);
            now = until + 1000;
        }
        assert_eq!(lens, [200, 400, 800, 1600, 3200, 5000, 5000]);
        assert!(pace.start().is_none(), "by the ring");
        pace.note_slow(now + micros(Duration::from_secs(60)), true);
        assert_eq!(pace.detour_len.load(Ordering::Relaxed), 200_000, "a fresh start after a good while");
    }

    #[test]
    fn a_sleep_of_this_thread_is_counted_and_work_is_not() {
        let before = sleeps_of_this_thread();
        // Sleeps on purpose: that a sleep is counted is the promise.
        std::thread::sleep(Duration::from_millis(1));
        assert!(sleeps_of_this_thread() > before);
    }
}
