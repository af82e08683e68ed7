//! The program's parts, for its binary and its tests. Not an interface for other programs.

#![forbid(unsafe_code)]

pub mod front;
pub mod serve;
