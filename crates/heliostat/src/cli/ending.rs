//! The end of a program that serves: the first signal ends it in order, a second one asks what it waits for, a
//! third one is obeyed at once.

use std::sync::Arc;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::Duration;

use anyhow::{Context, Result};
use futures_util::future::{Either, select};
use heliostat_host::runtime::{STACK, block_on};
use heliostat_host::signal::{Signal, Signals};

use super::output::{Outcome, say};
use crate::daemon::Daemon;

/// How often signals are looked for while something else is waited for.
pub const LOOK_EVERY: Duration = Duration::from_millis(50);

/// Why a program that serves ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cause {
    /// A signal.
    Signal(Signal),
    /// The command `quit` on the control socket.
    Quit,
}

/// The number of a signal, as exit statuses have it.
#[must_use]
pub const fn number(signal: Signal) -> u8 {
    match signal {
        Signal::HangUp => 1,
        Signal::Interrupt => 2,
        Signal::Terminate => 15,
    }
}

/// Takes over the signals that ask for the end.
///
/// # Errors
/// When the host has no descriptor left.
pub fn signals() -> Result<Signals> {
    Signals::install().context("cannot wait for signals")
}

/// Waits until somebody wants the end.
///
/// # Errors
/// When the host gives no runtime to wait on.
pub fn wait(daemon: &Daemon, signals: &mut Signals) -> Result<Cause> {
    let cause = block_on(async {
        match select(Box::pin(signals.next()), Box::pin(daemon.quit_asked())).await {
            Either::Left((signal, _)) => signal.map(Cause::Signal),
            Either::Right(((), _)) => Ok(Cause::Quit),
        }
    });
    cause.and_then(|cause| cause).context("cannot wait for signals")
}

/// Ends the daemon in order: jobs are cancelled, requests end, everything is flushed. `Interrupted`, when
/// somebody insisted before that was done.
///
/// # Errors
/// When something could not be made durable.
pub fn end(daemon: &Arc<Daemon>, signals: &mut Signals) -> Result<Outcome> {
    let (done, is_done) = mpsc::channel();
    let ending = Arc::clone(daemon);
    std::thread::Builder::new()
        .name("end".to_owned())
        .stack_size(STACK)
        .spawn(move || done.send(ending.shutdown()))
        .context("cannot start a thread to end in order")?;
    let mut asked = false;
    loop {
        match is_done.recv_timeout(LOOK_EVERY) {
            Ok(result) => return result.map(|()| Outcome::Done).context("ended, but"),
            Err(RecvTimeoutError::Disconnected) => anyhow::bail!("the end itself failed"),
            Err(RecvTimeoutError::Timeout) => {}
        }
        match signals.take() {
            Some(signal) if asked => {
                say("heliostat: not waiting any more; what was not flushed may be lost");
                return Ok(Outcome::Interrupted(number(signal)));
            }
            Some(_) => {
                asked = true;
                say(format_args!("heliostat: waiting for {}; once more ends at once", daemon.waiting_for()));
            }
            None => {}
        }
    }
}
