//! What touches the host: system calls, io_uring, aligned memory, sockets, signals, the real clock.
//!
//! The only crate of the project that may hold `unsafe` code, and the only one that names the runtime. It
//! decides nothing: policy belongs to `heliostat-block` and to the program.

pub mod clock;
mod readiness;
pub mod runtime;
pub mod signal;
pub mod socket;
