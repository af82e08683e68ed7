//! [`Piece`]: a line of `qemu-img map`, and of ours.

use std::path::Path;
use std::sync::Arc;

use heliostat_block::map::{Content, Mapping};
use heliostat_block::node::Node;
use heliostat_block::range::ByteRange;
use serde_json::Value;

use crate::common::run;

/// A range of a disk whose bytes are in one place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    pub start: u64,
    pub len: u64,
    pub depth: u64,
    pub present: bool,
    pub zero: bool,
    pub data: bool,
    pub compressed: bool,
    pub offset: Option<u64>,
}

impl Piece {
    fn follows(&self, other: &Self) -> bool {
        let like = |piece: &Self| (piece.depth, piece.present, piece.zero, piece.data, piece.compressed);
        like(self) == like(other)
            && other.start + other.len == self.start
            && other.offset.map(|offset| offset + other.len) == self.offset
    }
}

/// The same with neighbours as one.
fn merged(pieces: impl IntoIterator<Item = Piece>) -> Vec<Piece> {
    let mut merged: Vec<Piece> = Vec::new();
    for piece in pieces {
        match merged.last_mut() {
            Some(last) if piece.follows(last) => last.len += piece.len,
            _ => merged.push(piece),
        }
    }
    merged
}

/// Takes away what is said of holes in the place of data.
pub fn forget_holes(pieces: &mut Vec<Piece>) {
    *pieces = merged(pieces.iter().map(|piece| Piece { zero: piece.zero && !piece.data, ..*piece }));
}

/// The parts of a disk of each of which two maps of it say one thing.
pub fn side_by_side(ours: &[Piece], theirs: &[Piece]) -> Vec<(Piece, Piece)> {
    let cut = |piece: &Piece, start: u64, end: u64| Piece {
        start,
        len: end - start,
        // Who allocates first has the first cluster: that there is a place is what is compared.
        offset: piece.offset.map(|_| start),
        ..*piece
    };
    let (mut one, mut other) = (ours.iter().peekable(), theirs.iter().peekable());
    let mut parts = Vec::new();
    let mut at = 0;
    while let (Some(ours), Some(theirs)) = (one.peek(), other.peek()) {
        let ends = [ours.start + ours.len, theirs.start + theirs.len];
        let end = ends[0].min(ends[1]);
        parts.push((cut(ours, at, end), cut(theirs, at, end)));
        at = end;
        if ends[0] == end {
            one.next();
        }
        if ends[1] == end {
            other.next();
        }
    }
    assert!(one.next().is_none() && other.next().is_none(), "the disks are not of one length");
    parts
}

/// What ours says of a node.
pub async fn ours(node: &Arc<Node>) -> Vec<Piece> {
    let size = node.size();
    let mut pieces = Vec::new();
    let mut from = 0;
    while from < size {
        let some = node.map(ByteRange::from_bounds(from, size)).await.unwrap();
        from = some.last().unwrap().range.end();
        pieces.extend(some.into_iter().map(piece));
    }
    merged(pieces)
}

fn piece(mapping: Mapping) -> Piece {
    let data = matches!(mapping.content, Content::Data | Content::Hollow | Content::Compressed);
    Piece {
        start: mapping.range.offset(),
        len: mapping.range.len(),
        depth: u64::try_from(mapping.depth).unwrap(),
        present: mapping.content != Content::Hole,
        zero: !data || mapping.content == Content::Hollow,
        data,
        compressed: mapping.content == Content::Compressed,
        offset: mapping.offset,
    }
}

/// What `qemu-img map` says of an image.
pub fn qemu(path: &Path) -> Vec<Piece> {
    let said = run("qemu-img", &["map", "--output=json", "-f", "qcow2", path.to_str().unwrap()]).unwrap();
    let said: Vec<Value> = serde_json::from_str(&said).unwrap();
    merged(said.iter().map(|piece| Piece {
        start: piece["start"].as_u64().unwrap(),
        len: piece["length"].as_u64().unwrap(),
        depth: piece["depth"].as_u64().unwrap(),
        present: piece["present"].as_bool().unwrap(),
        zero: piece["zero"].as_bool().unwrap(),
        data: piece["data"].as_bool().unwrap(),
        compressed: piece["compressed"].as_bool().unwrap(),
        offset: piece.get("offset").map(|offset| offset.as_u64().unwrap()),
    }))
}

/// Two lists beside each other, from where they differ; `None` where they do not.
pub fn difference<T: PartialEq + std::fmt::Debug>(ours: &[T], theirs: &[T]) -> Option<String> {
    let at = ours.iter().zip(theirs).position(|(one, other)| one != other);
    let at = at.or((ours.len() != theirs.len()).then(|| ours.len().min(theirs.len())))?;
    let some = |list: &[T]| list.iter().skip(at).take(4).map(|it| format!("  {it:?}\n")).collect::<String>();
    Some(format!("from number {at} on\nours:\n{}theirs:\n{}", some(ours), some(theirs)))
}
