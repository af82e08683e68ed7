//! heliostat, the program, as a library: what `main.rs` and the end to end tests share.
//!
//! It touches image bytes only through nodes; what touches the host is in `heliostat-host`.

#![forbid(unsafe_code)]

pub mod control;
pub mod daemon;
