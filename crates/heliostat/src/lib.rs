//! The program: front ends, control, command line. Tests and benchmarks use its parts from here.
//!
//! Bytes of an image are touched through a node only; what touches the host is `heliostat-host`'s.

#![forbid(unsafe_code)]

pub mod cli;
