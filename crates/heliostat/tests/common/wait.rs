//! Waiting for what another process does: looks again and again, with a deadline, never longer than needed.
//!
//! The one place where test code may sleep (`cargo xtask tidy` sees to it); also used by the benchmarks.

use std::io;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

/// How long a test waits for something that takes milliseconds on a quiet machine. Long, because reaching it
/// is a failure, and a loaded machine is none.
pub const LIMIT: Duration = Duration::from_secs(30);

/// Time between two looks: short beside what tests wait for, long beside the cost of a look.
const PAUSE: Duration = Duration::from_millis(2);

/// Looks until `look` gives something.
///
/// # Errors
/// `TimedOut`, naming `what`, once `limit` has passed.
pub fn until<T>(what: &str, limit: Duration, mut look: impl FnMut() -> Option<T>) -> io::Result<T> {
    let deadline = Instant::now() + limit;
    loop {
        if let Some(seen) = look() {
            return Ok(seen);
        }
        if Instant::now() >= deadline {
            return Err(io::Error::new(io::ErrorKind::TimedOut, format!("waited {limit:?} for {what}")));
        }
        thread::sleep(PAUSE);
    }
}

/// Connects to a Unix socket as soon as somebody listens there.
///
/// # Errors
/// `TimedOut` when nobody has within [`LIMIT`].
pub fn for_socket(path: &Path) -> io::Result<UnixStream> {
    until(&format!("a server at {}", path.display()), LIMIT, || UnixStream::connect(path).ok())
}
