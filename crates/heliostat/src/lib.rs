//! heliostat, the program, as a library: what `main.rs` and the end to end tests share.
//!
//! It touches image bytes only through nodes; what touches the host is in `heliostat-host`.

#![forbid(unsafe_code)]

pub mod cli;
//! heliostat, the program, as a library: what `main.rs`, the tests and the benchmarks share.
//!
//! Bytes of an image are touched through a node only; what touches the host is `heliostat-host`'s.

#![forbid(unsafe_code)]

pub mod daemon;
