//! Every bound of the core, each with the reason for its number.

/// The smallest granularity of a dirty bitmap: a sector (MIRROR.md section 2, as QEMU).
pub const GRANULARITY_MIN: u32 = 512;
/// The largest granularity (MIRROR.md section 2, as QEMU).
pub const GRANULARITY_MAX: u32 = 64 << 20;
/// The granularity where the target has no clusters (MIRROR.md section 2, as QEMU).
pub const GRANULARITY_DEFAULT: u32 = 64 << 10;

/// The largest payload that one NBD request may carry: what `doc/proto.md` tells clients to expect from a
/// server that states no maximum, and what other servers take.
pub const NBD_PAYLOAD_MAX: u32 = 32 << 20;

/// The longest name of a node, as QEMU has it (31 characters), so that a name valid here is valid there.
pub const NODE_NAME_MAX: usize = 31;

/// The most jobs in one daemon. Each costs a thread while it runs; more than this is a mistake of the caller.
pub const JOBS_MAX: usize = 256;

/// Copies of one mirror in flight at once. As many as hide the latency of a remote target at 1 MiB each
/// within the default buffer; more only lengthens the queue in front of the guest.
pub const COPIES_IN_FLIGHT_MAX: usize = 16;

/// One copy's length at most: long enough for sequential throughput, short enough that a guest's request
/// behind it in a disk's queue waits a millisecond or two, not more.
pub const COPY_LEN_MAX: u64 = 1 << 20;

/// `buf-size` when none is given (MIRROR.md section 2, as QEMU).
pub const BUF_SIZE_DEFAULT: u64 = 16 << 20;
