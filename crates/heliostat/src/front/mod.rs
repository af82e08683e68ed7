//! Front ends: what speaks to clients. Each turns untrusted bytes into requests, hands them to
//! [`crate::serve`], and sends the answers; none touches an image's bytes but through a node.

pub mod nbd;
