//! The core of heliostat: what decides, orders, maps, marks and copies.
//!
//! Nothing here touches a file, a socket, a thread, wall time or chance: those come in through
//! [`storage::Storage`] and [`clock::Clock`]. That is what lets the simulator run this very code
//! through thousands of histories.

#![forbid(unsafe_code)]

#[cfg(not(target_pointer_width = "64"))]
compile_error!("heliostat runs on 64-bit machines only: offsets and lengths of disks must fit in usize");

pub mod any_alignment;
mod blocks;
pub mod buffer;
pub mod clock;
pub mod convert;
pub mod debug_event;
pub mod dirty_bitmap;
pub mod driver;
pub mod error;
pub mod graph;
mod in_flight;
pub mod job;
pub mod latency;
pub mod limits;
pub mod map;
pub mod name;
pub mod named_bitmap;
pub mod nbd;
pub mod node;
pub(crate) mod node_options;
pub mod node_storage;
pub mod planted;
pub mod range;
mod range_lock;
pub mod span;
pub mod statistics;
pub mod storage;
pub mod throttle;
pub mod tracked;
