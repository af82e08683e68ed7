//! Control: QMP on a Unix socket.

pub mod json;
pub mod splitter;
