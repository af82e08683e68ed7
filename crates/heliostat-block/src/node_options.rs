//! [`NodeOptions`]: how a node is to behave, and the cell in which it keeps that. Values; read by every request, so one
//! load.

use std::sync::atomic::{AtomicU8, Ordering};

/// What becomes of space that is no longer needed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Discard {
    /// Kept: discards do nothing, and zeroed ranges stay allocated (`discard=ignore`, said explicitly).
    Ignore,
    /// Clients' discards do nothing, zeroed ranges may become holes. What is meant when nothing is said.
    #[default]
    ZeroesOnly,
    /// Given back (`discard=unmap`).
    Unmap,
}

/// What becomes of written data that is all zero.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DetectZeroes {
    /// Written like any other.
    #[default]
    Off,
    /// Written as zeroes by the cheapest way that keeps the space.
    On,
    /// Becomes a hole.
    Unmap,
}

/// How a node is to behave.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NodeOptions {
    /// Writes are refused.
    pub read_only: bool,
    /// What becomes of space that is no longer needed.
    pub discard: Discard,
    /// What becomes of written data that is all zero.
    pub detect_zeroes: DetectZeroes,
}

/// The options of a node that is in use.
pub(crate) struct OptionsCell(AtomicU8);

const READ_ONLY: u8 = 1;
const DISCARDS: [(Discard, u8); 3] = [(Discard::Ignore, 0), (Discard::ZeroesOnly, 2), (Discard::Unmap, 4)];
const DISCARD: u8 = 6;
const DETECTIONS: [(DetectZeroes, u8); 3] =
    [(DetectZeroes::Off, 0), (DetectZeroes::On, 8), (DetectZeroes::Unmap, 16)];
const DETECTION: u8 = 24;

impl OptionsCell {
    pub(crate) fn new(options: NodeOptions) -> Self {
        Self(AtomicU8::new(packed(options)))
    }

    pub(crate) fn load(&self) -> NodeOptions {
        unpacked(self.0.load(Ordering::Acquire))
    }

    pub(crate) fn store(&self, options: NodeOptions) {
        self.0.store(packed(options), Ordering::Release);
    }
}

const fn packed(options: NodeOptions) -> u8 {
    let discard = match options.discard {
        Discard::Ignore => DISCARDS[0].1,
        Discard::ZeroesOnly => DISCARDS[1].1,
        Discard::Unmap => DISCARDS[2].1,
    };
    let detection = match options.detect_zeroes {
        DetectZeroes::Off => DETECTIONS[0].1,
        DetectZeroes::On => DETECTIONS[1].1,
        DetectZeroes::Unmap => DETECTIONS[2].1,
    };
    discard | detection | if options.read_only { READ_ONLY } else { 0 }
}

fn unpacked(bits: u8) -> NodeOptions {
    let discard = DISCARDS.iter().find(|(_, word)| *word == bits & DISCARD);
    let detection = DETECTIONS.iter().find(|(_, word)| *word == bits & DETECTION);
    NodeOptions {
        read_only: bits & READ_ONLY != 0,
        discard: discard.map_or(Discard::Ignore, |(discard, _)| *discard),
        detect_zeroes: detection.map_or(DetectZeroes::Off, |(detection, _)| *detection),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_stored_is_loaded_again() {
        for read_only in [true, false] {
            for (discard, _) in DISCARDS {
                for (detect_zeroes, _) in DETECTIONS {
                    let options = NodeOptions { read_only, discard, detect_zeroes };
                    assert_eq!(OptionsCell::new(options).load(), options);
                }
            }
        }
    }
}
