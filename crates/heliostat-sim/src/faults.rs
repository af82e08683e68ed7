//! [`Profile`]: how a simulated storage behaves; and the [`Plan`] that it draws for each request.
//!
//! Only numbers: the storage carries them out. Nothing fails or hangs any more after
//! [`Profile::faults_until`], so that every run can come to an end.

use std::io;
use std::time::Duration;

use heliostat_block::range::ByteRange;

use crate::random::Random;

/// How a storage behaves. Chances are per mille.
#[derive(Clone, Debug)]
pub(crate) struct Profile {
    pub(crate) block_size: u32,
    /// Requests that are answered at once.
    pub(crate) inline: u64,
    pub(crate) delay_max: Duration,
    pub(crate) pieces_max: u64,
    pub(crate) hangs: u64,
    pub(crate) hang_max: Duration,
    pub(crate) read_errors: u64,
    pub(crate) write_errors: u64,
    pub(crate) flush_errors: u64,
    pub(crate) extents_errors: u64,
    pub(crate) faults_until: Duration,
    /// Whether it says where its holes are.
    pub(crate) knows_holes: bool,
    pub(crate) can_discard: bool,
    pub(crate) can_zero_fast: bool,
    /// Whether a write may be lost at a crash until it is flushed.
    pub(crate) cached: bool,
    /// Sectors in the cache that become durable by themselves while something else happens.
    pub(crate) writeback: u64,
    /// Hints to write back that fail.
    pub(crate) writeback_errors: u64,
    /// Whether what a failed flush has lost may disappear from what is read, too.
    pub(crate) forgets: bool,
}

/// What is asked of a storage.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Read,
    Write,
    Zero,
    Discard,
    Flush,
    Extents,
    Resize,
}

/// What will become of a request.
#[derive(Debug)]
pub(crate) struct Plan {
    /// Which part happens when. A part that a failing request leaves out is not there.
    pub(crate) pieces: Vec<(Duration, ByteRange)>,
    pub(crate) end: Duration,
    pub(crate) error: Option<i32>,
}

pub(crate) const EIO: i32 = 5;
pub(crate) const ENOSPC: i32 = 28;

impl Profile {
    /// Draws what becomes of a request.
    pub(crate) fn plan(&self, kind: Kind, range: ByteRange, now: Duration, random: &mut Random) -> Plan {
        let faulty = now < self.faults_until;
        let error = self.error(kind, faulty, random);
        let hangs = faulty && random.chance(self.hangs);
        let took = if hangs { random.even_time(self.hang_max) } else { random.time(self.delay_max) };
        let end = now + took;
        // A request that hangs has done its work at the start, or does it at the very end, or in between.
        let window = match random.below(4) {
            0 => (now, now + took / 16),
            1 => (end - took / 16, end),
            2 => (end, end),
            _ => (now, end),
        };
        let mut pieces = Vec::new();
        for piece in self.cut(range, random) {
            if error.is_none() || random.chance(500) {
                pieces.push((window.0 + random.even_time(window.1 - window.0), piece));
            }
        }
        Plan { pieces, end, error }
    }

    fn error(&self, kind: Kind, faulty: bool, random: &mut Random) -> Option<i32> {
        let chance = match kind {
            Kind::Read => self.read_errors,
            Kind::Write | Kind::Zero | Kind::Discard | Kind::Resize => self.write_errors,
            Kind::Flush => self.flush_errors,
            Kind::Extents => self.extents_errors,
        };
        if !faulty || !random.chance(chance) {
            return None;
        }
        let no_space = matches!(kind, Kind::Write | Kind::Zero) && random.chance(300);
        Some(if no_space { ENOSPC } else { EIO })
    }

    /// Cuts `range` where a storage may: between bytes if it has no blocks, else between sectors.
    fn cut(&self, range: ByteRange, random: &mut Random) -> Vec<ByteRange> {
        let unit = if self.block_size == 1 { 1 } else { 512 };
        let mut rest = range;
        let mut pieces = Vec::new();
        for _ in 1..random.between(1, self.pieces_max) {
            let at = rest.offset() + random.below(rest.len() / unit + 1) * unit;
            let at = at.min(rest.end());
            pieces.push(ByteRange::from_bounds(rest.offset(), at));
            rest = ByteRange::from_bounds(at, rest.end());
        }
        pieces.push(rest);
        pieces.retain(|piece| !piece.is_empty());
        pieces
    }
}

pub(crate) fn error(errno: i32) -> io::Error {
    io::Error::from_raw_os_error(errno)
}
