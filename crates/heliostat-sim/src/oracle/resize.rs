//! Disks that become longer and shorter: part of the oracle.
//!
//! While a resize is under way, and after one that failed, a crash may leave either size. What a disk gains is zero
//! from the moment on at which anybody can see it.

use heliostat_block::range::ByteRange;

use super::{Oracle, Put, Segment, Write, WriteId};

impl Oracle {
    /// Somebody begins to make the disk `size` bytes long.
    pub(crate) fn begin_resize(&mut self, size: u64) {
        let moment = self.tick();
        self.crash_sizes.insert(size);
        self.size_min = self.size_min.min(size);
        let gained = ByteRange::from_bounds(self.size, size);
        if gained.is_empty() {
            return;
        }
        // What an earlier resize that failed has left there is zero as well.
        let end = self.segments.last_key_value().map_or(size, |(_, last)| last.end.max(size));
        self.cut(self.size);
        drop(self.segments.split_off(&self.size));
        let put = Put::Gained;
        self.writes.push(Write {
            range: gained,
            put,
            begun: moment,
            ended: moment,
            good: true,
            doubtful: false,
        });
        let id = WriteId(self.writes.len() - 1);
        self.segments.insert(self.size, Segment { end, visible: vec![id], crash: vec![id] });
        for reading in self.readings.values_mut().filter(|reading| reading.range.overlaps(gained)) {
            reading.allowed.push((gained, vec![id]));
        }
        // They wait until this is over, or have been dropped and may still land.
        let waiting: Vec<_> = (0..self.writes.len())
            .filter(|at| self.writes[*at].ended == u64::MAX)
            .filter_map(|at| Some((WriteId(at), self.writes[at].range.intersection(gained)?)))
            .collect();
        for (write, range) in waiting {
            self.each(range, |segment| {
                segment.visible.push(write);
                segment.crash.push(write);
            });
        }
    }

    /// It has ended. A disk that has its new size has it durably.
    pub(crate) fn end_resize(&mut self, size: u64, good: bool) {
        self.tick();
        if !good {
            return;
        }
        self.cut(size);
        drop(self.segments.split_off(&size));
        self.size = size;
        self.crash_sizes = [size].into();
    }

    /// All that has been written, zeroed or discarded, or was to be: where, and whether it has certainly been tried. A
    /// discard may be too small for its storage.
    pub(crate) fn writes(&self) -> impl Iterator<Item = (ByteRange, bool)> {
        let all = self.writes.iter().filter(|write| !matches!(write.put, Put::Image(_) | Put::Gained));
        // What reached beyond the end was refused, perhaps.
        let was_tried = |write: &Write| {
            let is_discard = matches!(write.put, Put::Discard);
            write.ended != u64::MAX && !is_discard && write.range.end() <= self.size_min
        };
        all.map(move |write| (write.range, was_tried(write)))
    }

    /// The least that the disk has been long, or was to be.
    pub(crate) const fn size_min(&self) -> u64 {
        self.size_min
    }

    /// Says what is wrong with the size of a disk, if anything is.
    pub(super) fn check_size(&self, len: u64, crash: bool) -> Result<(), String> {
        let is_right = if crash { self.crash_sizes.contains(&len) } else { self.size == len };
        if is_right {
            return Ok(());
        }
        Err(format!("it has {len} bytes, not {}; after a crash {:?}", self.size, self.crash_sizes))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(len: usize, byte: u8) -> Vec<u8> {
        vec![byte; len]
    }

    #[test]
    fn what_a_disk_gains_is_zero_and_a_crash_leaves_either_size() {
        let mut oracle = Oracle::new(with(8, 1));
        oracle.begin_resize(16);
        let longer = [with(8, 1), with(8, 0)].concat();
        let wrong = [with(8, 1), with(8, 1)].concat();
        assert!(oracle.check_crash_of_image(&with(8, 1)).is_ok());
        assert!(oracle.check_crash_of_image(&longer).is_ok());
        assert!(oracle.check_crash_of_image(&wrong).is_err());
        assert!(oracle.check_crash_of_image(&with(9, 1)).is_err());
        oracle.end_resize(16, true);
        assert!(oracle.check_crash_of_image(&with(8, 1)).is_err());
        assert!(oracle.check_image(&longer).is_ok());
    }

    #[test]
    fn what_was_cut_off_does_not_come_back_and_what_waited_may() {
        let mut oracle = Oracle::new(with(16, 1));
        oracle.begin_resize(8);
        assert!(oracle.check_crash_of_image(&with(16, 1)).is_ok());
        oracle.end_resize(8, true);
        let waiting = oracle.begin_write(ByteRange::from_bounds(8, 16), Put::Pattern);
        oracle.begin_resize(16);
        oracle.end_resize(16, true);
        let old = with(16, 1);
        let zero = [with(8, 1), with(8, 0)].concat();
        let new = [with(8, 1), oracle.data(waiting)].concat();
        assert!(oracle.check_image(&old).is_err());
        assert!(oracle.check_image(&zero).is_ok() && oracle.check_image(&new).is_ok());
        assert_eq!(oracle.writes().filter(|(_, was_tried)| !was_tried).count(), 1);
    }
}
