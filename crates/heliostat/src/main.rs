//! heliostat: fronts a live disk and mirrors it while it is written to.
#![forbid(unsafe_code)]
fn main() {}
