//! [`Signals`]: requests to end (SIGTERM, Ctrl-C, a closed terminal) as events.
//!
//! The program makes one, early in `main`, and awaits it on whatever thread it likes. Decides nothing about
//! what a signal means.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use signal_hook_registry::SigId;

use crate::readiness;

/// What a process was asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Signal {
    /// SIGTERM: end.
    Terminate,
    /// SIGINT: end, said at a terminal with Ctrl-C.
    Interrupt,
    /// SIGHUP: the terminal is gone.
    HangUp,
}

const ALL: [(Signal, i32); 3] =
    [(Signal::Terminate, libc::SIGTERM), (Signal::Interrupt, libc::SIGINT), (Signal::HangUp, libc::SIGHUP)];

/// What the handler writes to and [`Signals`] reads.
#[derive(Debug, Default)]
struct Seen {
    /// How many of each in [`ALL`] came and were not taken yet.
    counts: [AtomicU32; ALL.len()],
}

/// The requests to end that this process gets, from now on.
///
/// When it is dropped the signals are ignored; they do not end the process again.
#[derive(Debug)]
pub struct Signals {
    seen: Arc<Seen>,
    /// An eventfd that can be read when there may be something in `seen`.
    wake: Arc<OwnedFd>,
    handlers: Vec<SigId>,
}

impl Signals {
    /// Takes over SIGTERM, SIGINT and SIGHUP: they no longer end the process. One that whoever started the
    /// process had it ignore stays ignored, as with SIGHUP under `nohup` and with SIGINT in a shell script's
    /// background. Nor does SIGXFSZ end it, which comes with a write beyond the host's limit for files; the
    /// write fails, and that is enough. Child processes start with the default behaviour.
    ///
    /// # Errors
    /// When the host has no descriptor left.
    pub fn install() -> io::Result<Self> {
        let wake = Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
        let mut signals = Self { seen: Arc::default(), wake, handlers: Vec::new() };
        for (index, (_, number)) in ALL.iter().enumerate() {
            if is_ignored(*number)? {
                continue;
            }
            let (seen, wake) = (Arc::clone(&signals.seen), Arc::clone(&signals.wake));
            let note = move || {
                seen.counts[index].fetch_add(1, Ordering::Relaxed);
                // Full is as good as written: somebody will be woken.
                let _ = rustix::io::write(&wake, &1_u64.to_ne_bytes());
            };
            // SAFETY: the action runs at any point of any thread. It touches an atomic and makes one system
            // call that is async-signal-safe and leaves errno alone (rustix makes it without libc); it takes
            // no lock, allocates nothing and cannot panic, as `index` is within the array by its making.
            let handler = unsafe { signal_hook_registry::register(*number, note) }?;
            signals.handlers.push(handler);
        }
        // SAFETY: the action does nothing.
        let ignorer = unsafe { signal_hook_registry::register(libc::SIGXFSZ, || ()) }?;
        signals.handlers.push(ignorer);
        Ok(signals)
    }

    /// Takes one that came and was not taken yet.
    pub fn take(&mut self) -> Option<Signal> {
        // Emptied before the counters are read: a signal between the two makes the next wait short, not long.
        let _ = rustix::io::read(&self.wake, &mut [0; 8]);
        let ((signal, _), _) = ALL.iter().zip(&self.seen.counts).find(|(_, count)| {
            count.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |count| count.checked_sub(1)).is_ok()
        })?;
        // There may be more, and the eventfd was emptied.
        let _ = rustix::io::write(&self.wake, &1_u64.to_ne_bytes());
        Some(*signal)
    }

    /// Waits for the next one, on a thread that runs [`crate::runtime`].
    ///
    /// # Errors
    /// When the host refuses to wait for it.
    ///
    /// # Cancel safety
    /// Dropping it loses no signal.
    pub async fn next(&mut self) -> io::Result<Signal> {
        loop {
            if let Some(signal) = self.take() {
                return Ok(signal);
            }
            readiness::readable(&self.wake).await?;
        }
    }

    /// Waits for the next one, blocking the thread.
    ///
    /// # Errors
    /// When the host refuses to wait for it.
    pub fn wait(&mut self) -> io::Result<Signal> {
        loop {
            if let Some(signal) = self.take() {
                return Ok(signal);
            }
            match poll(&mut [PollFd::new(&self.wake, PollFlags::IN)], None) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

/// Says whether the process ignores a signal.
fn is_ignored(number: i32) -> io::Result<bool> {
    let mut action = MaybeUninit::<libc::sigaction>::zeroed();
    // SAFETY: without a new action the call only writes the present one, into memory made for it.
    if unsafe { libc::sigaction(number, std::ptr::null(), action.as_mut_ptr()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: all zeroes are a value of this type of plain numbers, and the call has succeeded.
    let action = unsafe { action.assume_init() };
    Ok(action.sa_sigaction == libc::SIG_IGN)
}

impl Drop for Signals {
    fn drop(&mut self) {
        for handler in self.handlers.drain(..) {
            signal_hook_registry::unregister(handler);
        }
    }
}

/// Readable when there may be one to take: for event loops that are not ours.
impl AsFd for Signals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }
}

impl AsRawFd for Signals {
    fn as_raw_fd(&self) -> RawFd {
        self.wake.as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    use rustix::process::{Signal as Kill, getpid, kill_process};

    use super::*;
    use crate::runtime::block_on;

    #[test]
    fn each_signal_is_delivered_once_even_when_it_comes_before_it_is_awaited() {
        let mut signals = Signals::install().unwrap();
        assert_eq!(signals.take(), None);
        kill_process(getpid(), Kill::TERM).unwrap();
        block_on(async {
            assert_eq!(signals.next().await.unwrap(), Signal::Terminate);
            assert!(futures_util::poll!(std::pin::pin!(signals.next())).is_pending());
            kill_process(getpid(), Kill::INT).unwrap();
            kill_process(getpid(), Kill::HUP).unwrap();
            assert_eq!(signals.next().await.unwrap(), Signal::Interrupt);
        })
        .unwrap();
        assert_eq!(signals.wait().unwrap(), Signal::HangUp);
        assert_eq!(signals.take(), None);
    }
}
