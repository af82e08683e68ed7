//! What becomes of a simulated storage that is cut off from its medium, as one behind a network is. Called at moments
//! that the scenario draws.
//!
//! A server that comes back with another size is refused before any storage hears of it (`nbd::link`), so that is none
//! of these.

use heliostat_block::convert::usize_from;
use heliostat_block::range::ByteRange;

use super::{SimStorage, lock};
use crate::random::Random;

/// How a storage was cut off.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Cut {
    /// It was not: guests' data is there.
    Spared,
    /// It may have lost what was not flushed.
    Lossy,
    /// Another medium is in its place: an empty one, or an older state.
    Other,
}

impl SimStorage {
    /// A mirror copies everything here, and takes samples that are all there is; or none does any more. Only meanwhile
    /// may another medium come in the place of this one: who copies less cannot know.
    pub(crate) fn may_become_other(&self, may: bool) {
        lock(&self.state).may_become_other = may;
    }

    /// It was cut off from its medium, which may have crashed meanwhile: what was not flushed is lost then; or it is
    /// another one. Requests in flight go on, and succeed as if nothing had been. Not where guests' data is: they are
    /// told nothing of it.
    pub(crate) fn cut_off(&self, random: &mut Random) -> Cut {
        let mut state = lock(&self.state);
        if state.is_guests {
            return Cut::Spared;
        }
        state.losses += 1;
        let all = ByteRange::from_bounds(0, state.medium.size());
        if random.chance(700) && state.medium.lose(all) {
            state.medium.forget(1000, random);
        }
        let is_other = state.may_become_other && random.chance(300);
        let now = state.medium.durable().to_vec();
        if is_other {
            let older = state.older.take().filter(|_| random.chance(500));
            let older = older.filter(|older| older.len() == now.len());
            state.medium.become_other(older.unwrap_or_else(|| vec![0; usize_from(all.len())]));
        }
        state.older = Some(now);
        drop(state);
        self.world.trace(|| format!("{} was cut off, is other: {is_other}", self.name));
        if is_other { Cut::Other } else { Cut::Lossy }
    }
}
