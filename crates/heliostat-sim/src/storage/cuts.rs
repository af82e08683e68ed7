//! What becomes of a simulated storage that is cut off from its medium, as one behind a network is. Called at moments
//! that the scenario draws.

use heliostat_block::range::ByteRange;

use super::{SimStorage, lock};
use crate::random::Random;

impl SimStorage {
    /// It was cut off from its medium, which may have crashed meanwhile: what was not flushed is lost then. Requests in
    /// flight go on, and succeed as if nothing had been. Not where guests' data is: they are told nothing of it. Says
    /// whether it was.
    pub(crate) fn cut_off(&self, random: &mut Random) -> bool {
        let mut state = lock(&self.state);
        if state.is_guests {
            return false;
        }
        state.losses += 1;
        let all = ByteRange::from_bounds(0, state.medium.size());
        if random.chance(700) && state.medium.lose(all) {
            state.medium.forget(1000, random);
        }
        drop(state);
        self.world.trace(|| format!("{} was cut off", self.name));
        true
    }
}
