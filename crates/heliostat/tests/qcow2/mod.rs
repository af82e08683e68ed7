//! A qcow2 image in memory that a test damages byte by byte, and the two programs that judge it.
//!
//! Knows only as much of the format as is needed to find its tables.

#![allow(dead_code, reason = "each test file uses its part of this")]

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::Value;

use crate::common::heliostat;

/// The COPIED flag of L1 and L2 entries.
pub const COPIED: u64 = 1 << 63;
/// The flag of compressed clusters.
pub const COMPRESSED: u64 = 1 << 62;
const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;

/// What a program said of an image: exit status and counts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verdict {
    pub status: Option<i32>,
    /// Corruptions, leaks, check errors, clusters (all, allocated, fragmented, compressed), the image's end. None
    /// where the image could not be looked at.
    pub counts: Option<[u64; 8]>,
}

impl Verdict {
    fn of(output: &Output) -> Self {
        const KEYS: [&str; 8] = [
            "corruptions",
            "leaks",
            "check-errors",
            "total-clusters",
            "allocated-clusters",
            "fragmented-clusters",
            "compressed-clusters",
            "image-end-offset",
        ];
        let counts = serde_json::from_slice::<Value>(&output.stdout)
            .ok()
            .map(|said| KEYS.map(|key| said[key].as_u64().unwrap_or(0)));
        Self { status: output.status.code(), counts }
    }

    pub fn is_clean(&self) -> bool {
        self.status == Some(0)
    }
}

/// What `qemu-img check` says, with further arguments.
pub fn qemu_check(path: &Path, arguments: &[&str]) -> Verdict {
    let mut command = Command::new("qemu-img");
    // It looks for a data file of no absolute name where it stands itself, not beside the image.
    command.current_dir(path.parent().unwrap());
    Verdict::of(&command.args(["check", "--output=json"]).args(arguments).arg(path).output().unwrap())
}

/// What `heliostat check` says, with further arguments.
pub fn our_check(path: &Path, arguments: &[&str]) -> Verdict {
    let all = ["check", "--json", path.to_str().unwrap()].into_iter().chain(arguments.iter().copied());
    Verdict::of(&heliostat(all))
}

/// Runs one of QEMU's tools, which must succeed.
pub fn qemu(program: &str, arguments: &[&str], folder: &Path) {
    let output = Command::new(program).args(arguments).current_dir(folder).output().unwrap();
    assert!(output.status.success(), "{program} {arguments:?}: {output:?}");
}

/// An image in memory.
#[derive(Clone)]
pub struct Image {
    pub bytes: Vec<u8>,
}

impl Image {
    /// Makes an image with QEMU's tools: options of `qemu-img create`, then commands of `qemu-io`.
    pub fn make(folder: &Path, options: &str, size: &str, commands: &[&str]) -> Self {
        let path = folder.join("made.qcow2");
        let mut create = vec!["create", "-q", "-f", "qcow2"];
        if !options.is_empty() {
            create.extend(["-o", options]);
        }
        create.extend(["made.qcow2", size]);
        qemu("qemu-img", &create, folder);
        for command in commands {
            match command.strip_prefix("snapshot ") {
                Some(name) => qemu("qemu-img", &["snapshot", "-c", name, "made.qcow2"], folder),
                None => qemu("qemu-io", &["-c", command, "made.qcow2"], folder),
            }
        }
        Self { bytes: std::fs::read(path).unwrap() }
    }

    pub fn save(&self, path: &Path) {
        std::fs::write(path, &self.bytes).unwrap();
    }

    /// A copy, damaged.
    pub fn damaged(&self, damage: impl FnOnce(&mut Self)) -> Self {
        let mut copy = self.clone();
        damage(&mut copy);
        copy
    }

    pub fn number(&self, at: u64, len: usize) -> u64 {
        let at = usize::try_from(at).unwrap();
        self.bytes[at..at + len].iter().fold(0, |number, byte| number << 8 | u64::from(*byte))
    }

    pub fn u64(&self, at: u64) -> u64 {
        self.number(at, 8)
    }

    pub fn put(&mut self, at: u64, value: &[u8]) {
        let at = usize::try_from(at).unwrap();
        self.bytes.resize(self.bytes.len().max(at + value.len()), 0);
        self.bytes[at..at + value.len()].copy_from_slice(value);
    }

    pub fn put64(&mut self, at: u64, value: u64) {
        self.put(at, &value.to_be_bytes());
    }

    pub fn put32(&mut self, at: u64, value: u32) {
        self.put(at, &value.to_be_bytes());
    }

    pub fn cluster_size(&self) -> u64 {
        1 << self.number(20, 4)
    }

    pub fn l1(&self) -> u64 {
        self.u64(40)
    }

    pub fn refcount_table(&self) -> u64 {
        self.u64(48)
    }

    pub fn block(&self) -> u64 {
        self.u64(self.refcount_table())
    }

    pub fn snapshots(&self) -> u64 {
        self.u64(64)
    }

    /// Where the first L2 table is.
    pub fn l2(&self) -> u64 {
        self.u64(self.l1()) & OFFSET_MASK
    }

    /// Where entry `index` of the first L2 table is: half as many where entries are extended.
    pub fn l2_at(&self, index: u64) -> u64 {
        let is_extended = self.number(4, 4) >= 3 && self.u64(72) & 16 != 0;
        self.l2() + index * if is_extended { 16 } else { 8 }
    }

    pub fn set_l2(&mut self, index: u64, value: u64) {
        self.put64(self.l2_at(index), value);
    }

    /// Changes an entry of the first L2 table.
    pub fn change_l2(&mut self, index: u64, change: impl FnOnce(u64) -> u64) {
        let at = self.l2_at(index);
        self.put64(at, change(self.u64(at)));
    }

    pub fn set_l1(&mut self, value: u64) {
        self.put64(self.l1(), value);
    }

    pub fn set_block(&mut self, index: u64, value: u64) {
        self.put64(self.refcount_table() + 8 * index, value);
    }

    /// Sets a reference count of 2^`order` bits.
    pub fn set_count(&mut self, cluster: u64, count: u64) {
        let order = if self.number(4, 4) >= 3 { self.number(96, 4) } else { 4 };
        if order < 3 {
            let bits = 1 << order;
            let at = self.block() + cluster * bits / 8;
            let shift = cluster * bits % 8;
            let mask = ((1_u64 << bits) - 1) << shift;
            let byte = (self.number(at, 1) & !mask) | count << shift;
            self.put(at, &[u8::try_from(byte).unwrap()]);
            return;
        }
        let width = 1 << (order - 3);
        let at = self.block() + cluster * width;
        self.put(at, &count.to_be_bytes()[8 - usize::try_from(width).unwrap()..]);
    }

    /// Where the extension of that type begins in the header.
    pub fn extension(&self, kind: u32) -> u64 {
        let found = self.bytes.windows(4).position(|bytes| bytes == kind.to_be_bytes());
        u64::try_from(found.unwrap()).unwrap()
    }

    /// The cluster in which the host keeps guest cluster `index` of the first L2 table.
    pub fn cluster_of(&self, index: u64) -> u64 {
        (self.u64(self.l2_at(index)) & OFFSET_MASK) / self.cluster_size()
    }
}

/// What happens to an image that was put right with `--repair all`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Afterwards {
    /// Both programs say that it is sound.
    Sound,
    /// The same, but `qemu-img` is not asked to put it right: it takes most of a minute for it.
    SoundAfterLong,
    /// It stays as it is, for the reason given.
    Left(&'static str),
}

/// Compares the two programs on a damaged image: their verdicts; that each accepts what the other has put right.
pub fn compare(folder: &Path, name: &str, image: &Image, afterwards: Afterwards) {
    let at = |file: &str| -> PathBuf { folder.join(file) };
    let path = at("damaged.qcow2");
    image.save(&path);
    let theirs = qemu_check(&path, &[]);
    assert_eq!(our_check(&path, &[]), theirs, "{name}");
    assert_eq!(std::fs::read(&path).unwrap(), image.bytes, "{name}: a check has written");

    let ours = at("ours.qcow2");
    image.save(&ours);
    let said = our_check(&ours, &["--repair", "all"]);
    let after = qemu_check(&ours, &[]);
    assert_eq!(our_check(&ours, &[]), after, "{name}, put right by us");
    if matches!(afterwards, Afterwards::Sound | Afterwards::SoundAfterLong) {
        assert!(after.is_clean(), "{name}, put right by us: {after:?}");
        assert!(said.is_clean(), "{name}, what we say after putting it right: {said:?}");
    } else {
        assert!(!after.is_clean(), "{name} is sound: {afterwards:?} is out of date");
    }

    let other = at("theirs.qcow2");
    image.save(&other);
    if afterwards != Afterwards::SoundAfterLong {
        qemu_check(&other, &["-r", "all"]);
    }
    // Sometimes it makes a file so long that it cannot look at it itself.
    if std::fs::metadata(&other).unwrap().len() < 1 << 34 {
        assert_eq!(our_check(&other, &[]), qemu_check(&other, &[]), "{name}, put right by qemu-img");
    }

    // Giving back what leaks makes nothing worse: neither more corruptions nor more leaks.
    let leaks = at("leaks.qcow2");
    image.save(&leaks);
    our_check(&leaks, &["--repair", "leaks"]);
    let after = qemu_check(&leaks, &[]);
    assert_eq!(our_check(&leaks, &[]), after, "{name}, leaks given back by us");
    if let (Some(before), Some(after)) = (theirs.counts, after.counts) {
        assert!(after[0] <= before[0] && after[1] <= before[1], "{name}: {before:?} became {after:?}");
    }
}
