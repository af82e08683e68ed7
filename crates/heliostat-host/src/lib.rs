//! What touches the host: system calls, io_uring, aligned memory, sockets, signals, the real clock.
//!
//! The only crate of the project that may hold `unsafe` code, and the only one that names the runtime. It
//! decides nothing: policy belongs to `heliostat-block` and to the program.

mod blocking;
pub mod clock;
mod extents;
mod fallocate;
pub mod file;
mod length;
pub mod lock;
pub mod nbd;
pub mod open;
mod pace;
pub mod pinned;
mod probe;
mod readiness;
mod ring;
pub mod runtime;
pub mod signal;
pub mod socket;
pub mod span;
pub mod stream;
pub mod tls;
mod writeback;
