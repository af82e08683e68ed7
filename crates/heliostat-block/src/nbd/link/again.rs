//! When to try to reach a server again, and whether what answers then is what was lost.

use std::time::Duration;

use crate::limits::{RECONNECT_PAUSE_FIRST, RECONNECT_PAUSE_LAST};
use crate::nbd::Access;
use crate::nbd::client::Found;
use crate::nbd::wire::transmission_flag;

/// How long to wait before the next attempt, when there were `attempts` in vain: not at all at first, then twice as long
/// each time, up to a bound; a part of it is chance, so that the clients of a server that is back do not come all at
/// once.
pub(super) fn pause(attempts: u32, jitter: u32) -> Duration {
    let Some(doublings) = attempts.checked_sub(1) else { return Duration::ZERO };
    let longest = RECONNECT_PAUSE_FIRST.saturating_mul(1 << doublings.min(16)).min(RECONNECT_PAUSE_LAST);
    let half = longest / 2;
    half + half.mul_f64(f64::from(jitter) / f64::from(u32::MAX))
}

/// Says what of an export that was found again is not as it was, if anything that somebody relies on.
pub(super) fn compare(first: &Found, again: &Found) -> Result<(), String> {
    let (was, is) = (&first.terms, &again.terms);
    let lost = |flag: u16| first.flags & flag != 0 && again.flags & flag == 0;
    if was.size != is.size {
        return Err(format!("the export has {} bytes now, not {}", is.size, was.size));
    }
    if was.access == Access::Writable && is.access == Access::ReadOnly {
        return Err("the export is read-only now".to_owned());
    }
    if is.block_sizes.minimum() > was.block_sizes.minimum() {
        return Err(format!(
            "the export's minimum block size is {} now, not {}",
            is.block_sizes.minimum(),
            was.block_sizes.minimum()
        ));
    }
    if is.block_sizes.payload_max() < was.block_sizes.payload_max() {
        return Err(format!(
            "the export takes {} bytes at once now, not {}",
            is.block_sizes.payload_max(),
            was.block_sizes.payload_max()
        ));
    }
    if lost(transmission_flag::SEND_FLUSH) {
        return Err("the export takes no flushes now".to_owned());
    }
    Ok(())
}
