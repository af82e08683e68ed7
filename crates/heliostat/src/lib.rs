//! heliostat, the program, as a library: what `main.rs`, the tests and the benchmarks share.
//!
//! Bytes of an image are touched through a node only; what touches the host is `heliostat-host`'s.

#![forbid(unsafe_code)]

pub mod authz;
pub mod cli;
pub mod control;
pub mod daemon;
pub mod front;
pub mod serve;
