//! qcow2: images that grow as they are written, on top of others.
//!
//! Written from the public specification (QEMU's `docs/interop/qcow2`) and from what QEMU's tools are seen to do.

pub mod entry;
pub mod error;
pub mod header;
pub mod layout;
