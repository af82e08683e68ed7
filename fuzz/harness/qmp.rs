//! What the QMP fuzz target does with its bytes. Also built into a test of `heliostat`, which replays the
//! committed corpus.

use heliostat::control::json;
use heliostat::control::splitter::{Piece, Splitter};

/// The pieces of `bytes` when they arrive `step` at a time, or all at once for 0.
fn pieces(step: u8, bytes: &[u8]) -> Vec<Piece> {
    let mut splitter = Splitter::default();
    let packets = bytes.chunks(if step == 0 { usize::MAX } else { usize::from(step) });
    let mut pieces = Vec::new();
    for mut packet in packets {
        pieces.extend(std::iter::from_fn(|| splitter.next(&mut packet)));
        assert!(packet.is_empty(), "everything is taken");
    }
    pieces
}

/// Any bytes as a control client's. The first one says in packets of what length the rest arrives.
pub fn line(data: &[u8]) {
    let Some((&step, data)) = data.split_first() else { return };
    let pieces = pieces(step, data);
    assert_eq!(pieces, self::pieces(0, data), "where packets end makes no difference");
    for piece in pieces {
        let Piece::Message(text) = piece else { continue };
        if let Ok(value) = json::parse(&text) {
            let written = json::write(&value);
            assert!(written.is_ascii(), "what is written goes over any wire");
            // Numbers that are whole are written as such, as QEMU does, and read back so.
            let again = json::parse(written.as_bytes()).expect("what is written is read back");
            let settled = json::write(&again);
            let back = json::parse(settled.as_bytes()).expect("what is written is read back");
            assert_eq!(json::write(&back), settled, "the same each time");
        }
    }
}
