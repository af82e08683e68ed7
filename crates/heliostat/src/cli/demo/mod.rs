//! `heliostat demo`: a disk that moves while it is being written to, and the proof that nothing was lost.
pub mod guest;
mod load;
mod pattern;
mod proof;
mod random;
mod record;
