//! Persistent dirty bitmaps, as an image's bytes say; and what they must say.
//!
//! Shares no code with the driver. Follows the qcow2 specification, section "Bitmaps".

use heliostat_block::convert::{u64_from, usize_from};
use heliostat_block::range::ByteRange;

use super::format::{Image, OFFSET, number};

pub(crate) const IN_USE: u64 = 1;
pub(crate) const AUTO: u64 = 2;

/// A bitmap, as the directory names it.
#[derive(Clone, Debug)]
pub(crate) struct Bitmap {
    pub(crate) name: Vec<u8>,
    pub(crate) flags: u64,
    pub(crate) granularity: u64,
    /// Where its table is, and how many entries it has.
    pub(crate) table: (u64, u64),
}

/// What a bitmap was when the image was opened.
pub(crate) struct Found {
    bitmap: Bitmap,
    bits: Vec<bool>,
}

impl Found {
    /// Whether it can be believed.
    pub(crate) const fn is_believed(&self) -> bool {
        self.bitmap.flags & IN_USE == 0
    }
}

impl Image<'_> {
    /// All bitmaps that the directory names.
    pub(crate) fn bitmaps(&self) -> Vec<Bitmap> {
        let Some((mut at, _, count)) = self.bitmap_directory else { return Vec::new() };
        let field = |at: u64, len: usize| number(self.bytes, at, len);
        (0..count)
            .map(|_| {
                let (name_len, extra_len) = (field(at + 18, 2), field(at + 20, 4));
                let start = at + 24 + extra_len;
                let bitmap = Bitmap {
                    name: self.bytes[usize_from(start)..usize_from(start + name_len)].to_vec(),
                    flags: field(at + 12, 4),
                    granularity: 1 << field(at + 17, 1),
                    table: (field(at, 8), field(at + 8, 4)),
                };
                at = (start + name_len).next_multiple_of(8);
                bitmap
            })
            .collect()
    }

    /// Where the clusters of its bits begin.
    pub(crate) fn clusters_of(&self, bitmap: &Bitmap) -> Vec<u64> {
        let (offset, len) = bitmap.table;
        let entries = (0..len).map(|index| number(self.bytes, offset + index * 8, 8));
        entries.map(|entry| entry & OFFSET).filter(|offset| *offset != 0).collect()
    }

    fn bits(&self, bitmap: &Bitmap) -> Vec<bool> {
        let each = self.cluster_size() * 8;
        (0..self.size.div_ceil(bitmap.granularity))
            .map(|bit| {
                let entry = number(self.bytes, bitmap.table.0 + bit / each * 8, 8);
                match entry & OFFSET {
                    0 => entry & 1 != 0,
                    at => number(self.bytes, at + bit % each / 8, 1) >> (bit % 8) & 1 != 0,
                }
            })
            .collect()
    }

    /// What its bitmaps are before it is opened.
    pub(crate) fn found_bitmaps(&self) -> Vec<Found> {
        let all = self.bitmaps().into_iter();
        all.map(|bitmap| Found { bits: self.bits(&bitmap), bitmap }).collect()
    }

    /// Judges the bitmaps. Whatever one says that can be believed must cover `writes`: ranges, and whether each has
    /// certainly been tried. Beyond `size_min` the disk was not there all the time. `closed`: what could be believed
    /// when the image was opened can be again.
    ///
    /// # Errors
    /// The first thing that is wrong.
    pub(crate) fn check_bitmaps(
        &self,
        found: &[Found],
        (writes, size_min): (&[(ByteRange, bool)], u64),
        closed: bool,
    ) -> Result<(), String> {
        let now = self.bitmaps();
        if now.len() != found.len() {
            return Err(format!("{} bitmaps have become {}", found.len(), now.len()));
        }
        for (before, now) in found.iter().zip(now) {
            let name = String::from_utf8_lossy(&now.name).into_owned();
            let was = &before.bitmap;
            if (&now.name, now.granularity, now.flags & AUTO)
                != (&was.name, was.granularity, was.flags & AUTO)
            {
                return Err(format!("the bitmap {was:?} has become {now:?}"));
            }
            match (was.flags & IN_USE != 0, now.flags & IN_USE != 0) {
                (true, true) => continue,
                (true, false) => return Err(format!("the bitmap {name} was lost, and is believed again")),
                (false, true) if closed => return Err(format!("the bitmap {name} is lost by a close")),
                (false, true) => continue,
                (false, false) => {}
            }
            self.check_bits(before, &self.bits(&now), (writes, size_min))
                .map_err(|wrong| format!("the bitmap {name}: {wrong}"))?;
        }
        Ok(())
    }

    fn check_bits(
        &self,
        before: &Found,
        bits: &[bool],
        (writes, size_min): (&[(ByteRange, bool)], u64),
    ) -> Result<(), String> {
        let granularity = before.bitmap.granularity;
        let mut must = before.bits.clone();
        must.resize(bits.len(), false);
        let mut may = must.clone();
        must[usize_from(size_min.div_ceil(granularity)).min(bits.len())..].fill(false);
        let follows = before.bitmap.flags & AUTO != 0;
        for (range, was_tried) in writes.iter().filter(|(range, _)| follows && !range.is_empty()) {
            let end = usize_from(range.end().div_ceil(granularity)).min(bits.len());
            for granule in usize_from(range.offset() / granularity)..end {
                must[granule] |= was_tried;
                may[granule] = true;
            }
        }
        let wrong = (0..bits.len()).find(|bit| (must[*bit] && !bits[*bit]) || (bits[*bit] && !may[*bit]));
        match wrong {
            Some(bit) => {
                let at = u64_from(bit) * granularity;
                Err(format!("what it says of {at:#x} is wrong: {}", bits[bit]))
            }
            None => Ok(()),
        }
    }
}
