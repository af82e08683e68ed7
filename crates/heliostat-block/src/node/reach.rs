//! A node whose bytes are somewhere else: whether that can be reached, and what becomes of requests that nobody needs.

use super::Node;

impl Node {
    /// Nobody needs what is in flight here any more; see [`crate::storage::Storage::give_up`].
    pub fn give_up(&self) {
        self.driver().give_up();
    }

    /// Why requests cannot be carried out at this moment, where somebody has to come back for that; see
    /// [`crate::storage::Storage::out_of_reach`].
    #[must_use]
    pub fn out_of_reach(&self) -> Option<String> {
        self.driver().out_of_reach()
    }
}
