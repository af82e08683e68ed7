//! Every bound of the core, each with the reason for its number.

use std::time::Duration;

/// The smallest granularity of a dirty bitmap: a sector (MIRROR.md section 2, as QEMU).
pub const GRANULARITY_MIN: u32 = 512;
/// The largest granularity (MIRROR.md section 2, as QEMU).
pub const GRANULARITY_MAX: u32 = 64 << 20;
/// The most bytes a bit of a bitmap that is not a mirror's: what qcow2 and QEMU allow.
pub const BITMAP_GRANULARITY_MAX: u32 = 1 << 31;
/// The granularity where the target has no clusters (MIRROR.md section 2, as QEMU).
pub const GRANULARITY_DEFAULT: u32 = 64 << 10;

/// The largest payload that one NBD request may carry: what `doc/proto.md` tells clients to expect from a
/// server that states no maximum, and what other servers take.
pub const NBD_PAYLOAD_MAX: u32 = 32 << 20;

/// The longest option of an NBD handshake that is looked at: room for a name and fifteen queries of the longest
/// length that the document allows. Clients send a few dozen bytes.
pub const NBD_OPTION_LEN_MAX: usize = 64 << 10;

/// The most options in one NBD handshake. `nbdinfo --list` asks three or four times for each export.
pub const NBD_OPTIONS_MAX: usize = 16 << 10;

/// The most bytes that a client may send in one NBD handshake, also in options too long to be looked at.
pub const NBD_HANDSHAKE_BYTES_MAX: usize = 4 << 20;

/// The longest NBD payload that is skipped after a refusal, so that the next request can be found; the
/// document asks that 32 MiB be no reason to disconnect. Whoever announces more loses the connection.
pub const NBD_SKIP_MAX: u32 = 64 << 20;

/// An NBD write at least this long whose payload has not arrived whole gets an aligned buffer of its own,
/// which the rest is received into. Shorter ones are cut out of the receive buffer.
pub const NBD_OWN_BUFFER_MIN: usize = 32 << 10;

/// The most contexts that an NBD export offers: all bitmaps that a node may have, and as many again of other
/// nodes.
pub const NBD_CONTEXTS_MAX: usize = 258;

/// The most extents in one answer to NBD's block status, of all its contexts together but for one each (32 or
/// 64 KiB of reply); clients ask on from where it ends.
pub const NBD_EXTENTS_MAX: usize = 4096;

/// The most chunks of one NBD reply, or distinct filled ranges of one read, that a client puts up with. A
/// server that keeps to the document's advice of 512-byte multiples cannot exceed it below 2 MiB, and real
/// ones send a handful.
pub const NBD_CHUNKS_MAX: usize = 4096;

/// The longest list of extents in one answer that a client passes over, in bytes: 512 times what it keeps. Servers bound
/// theirs to 16 MiB or less.
pub const NBD_EXTENTS_LEN_MAX: usize = 32 << 20;

/// The most errors in one answer that a client takes; it keeps the first. A server may say several, each for an offset.
pub const NBD_FAILURES_MAX: usize = 64;

/// Requests that a client has in flight on one connection: as many as the Linux client sends, which every server must
/// live with. More wait for answers.
pub const NBD_LINE_REQUESTS_MAX: usize = 128;

/// How many connections may be lost with a request in flight on them before it fails: a server that dies of it would
/// be killed by it for ever.
pub const NBD_REPLAYS_MAX: u32 = 32;

/// Connections beside others that a server may close before it has answered anything on them, within
/// [`NBD_UNWELCOME_TIME`] of their making, before it gets one only: each costs all others.
pub const NBD_UNWELCOME_MAX: u32 = 3;

/// See [`NBD_UNWELCOME_MAX`]. Long enough for a server that looks at the connection in a busy thread first.
pub const NBD_UNWELCOME_TIME: Duration = Duration::from_secs(1);

/// The pause before the second attempt to reach an NBD server again; the first is made at once. Each is twice the
/// one before.
pub const RECONNECT_PAUSE_FIRST: Duration = Duration::from_millis(100);
/// The longest such pause: a server that is back is noticed within it.
pub const RECONNECT_PAUSE_LAST: Duration = Duration::from_secs(5);

/// How long a server has still to answer what nobody needs any more, so that one that is well keeps its connections;
/// much less than what a person calls at once.
pub const GIVE_UP_GRACE: Duration = Duration::from_millis(300);

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

/// How long a guest waits for the target's half of its write before it is answered without
/// (MIRROR.md section 5): longer than a healthy target ever takes, shorter than a guest's patience.
pub const TARGET_DEADLINE_DEFAULT: Duration = Duration::from_secs(1);

/// What the last copies at the closed gate may take, at the first try. Well under what a guest notices.
pub const PAUSE_BUDGET_FIRST: Duration = Duration::from_millis(4);
/// The same, at most, after many tries: `max-pause-ms` of MIRROR.md section 5.
pub const PAUSE_BUDGET_LAST: Duration = Duration::from_millis(100);

/// What a target is assumed to take, in bytes a second, before a copy has shown it: a slow disk.
pub const RATE_ASSUMED: u64 = 100 << 20;

/// The least that a flush must have covered for its time to say what the medium takes.
pub const FLUSH_SAMPLE_MIN: u64 = 1 << 20;

/// What may always be left when the gate closes, however slow the target: a few granules, or the end would wait
/// for a guest to be quiet.
pub const LEFT_ALWAYS: u64 = 128 << 10;

/// The longest time that guests are ever held at the gate, after attempts with shorter ones have failed: still
/// less than what a guest's own block layer takes for an error.
pub const PAUSE_LAST: Duration = Duration::from_secs(5);

/// Halves of guests' writes that a mirror starts before it looks at anything else: as many as a deep queue of one
/// guest holds.
pub const HALVES_PER_TURN: usize = 16;

/// A guest that made no request for so long does not want the other cores at this moment.
pub const GUEST_QUIET: Duration = Duration::from_millis(100);

/// How long a mirror that is in step waits after a mark before it copies, so that neighbours and repeats become
/// one copy. A guest that writes one block again and again then costs 500 copies a second at most.
pub const GATHER: Duration = Duration::from_millis(2);

/// How long a mirror rests after the first error that is ignored.
pub const REST_FIRST: Duration = Duration::from_millis(100);
/// The longest rest; each is twice the one before.
pub const REST_LAST: Duration = Duration::from_secs(5);

/// Places spread over a disk that are compared when a target is back: enough that an empty one is surely told from the
/// right one, few enough to take no time that anybody notices.
pub const SAMPLE_SPREAD: u64 = 64;
/// Places copied last that are compared besides: what a target that went back a little lacks.
pub const SAMPLE_RECENT: usize = 32;
/// Places that got data from a mirror's beginning on, of which half as many to so many are compared besides: where little
/// of a large disk was copied, those that are spread over it tell nothing.
pub const SAMPLE_KEPT: usize = 64;
/// The most that is compared of a granule.
pub const SAMPLE_LEN_MAX: u64 = 64 << 10;

/// The most that a mirror writes to a target behind a network before it flushes that: what a cut may cost.
pub const FLUSH_REMOTE_EVERY: u64 = 4 << 30;

/// How often a mirror tells its figures; a person sees no more often.
pub const TICK: Duration = Duration::from_millis(50);
