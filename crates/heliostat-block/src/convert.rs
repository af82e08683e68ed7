//! Integer conversions that cannot lose anything on the 64-bit machines we run on.
//!
//! `as` between integers is forbidden in this project because it silently cuts; these are its replacements.

/// Converts a byte count to an index. Lossless: the crate refuses to build where `usize` is narrower.
#[inline]
#[must_use]
pub fn usize_from(value: u64) -> usize {
    usize::try_from(value).expect("usize has 64 bits, see lib.rs")
}

/// Converts an index to a byte count. Lossless.
#[inline]
#[must_use]
pub fn u64_from(value: usize) -> u64 {
    u64::try_from(value).expect("u64 holds every usize")
}
