//! [`LinkStatus`]: how a link is, for people and for queries.

use std::time::Duration;

use crate::nbd::client::Found;

/// How a link is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LinkState {
    /// It has never been connected.
    Opening,
    /// There is a connection.
    Up,
    /// There is none; requests wait for the next one.
    Waiting,
    /// There has been none for so long that requests fail at once. Attempts go on.
    Down,
    /// What answers is not the export that it was; requests fail at once. Attempts go on.
    Changed,
    /// It is closed for good.
    Closed,
}

/// How a link is, and since when.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LinkStatus {
    /// How it is.
    pub state: LinkState,
    /// Why it is not up.
    pub reason: Option<String>,
    /// How long it has been up, or not.
    pub lasted: Duration,
    /// Connections in use.
    pub connections: usize,
    /// How often it came up again.
    pub reconnects: u64,
    /// How often what was written and not flushed, or was in flight, may have been lost.
    pub losses: u64,
    /// What was negotiated at first, which is what all that comes later is held to.
    pub found: Option<Found>,
}
