//! Simulated storage and clock, seeded executor, workload, faults, oracle.
#![forbid(unsafe_code)]
