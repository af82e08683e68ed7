//! What a power cut leaves of an image, at every request that a resize, a repair or a close makes of its files: a
//! storage in memory keeps a journal of what it is asked for, and from that every image is made that could be left.
#![allow(clippy::unwrap_used, reason = "a test")]

use futures_util::FutureExt;

use super::create::{CreateOptions, Preallocation, create};
use super::error::FormatError;
use super::test_memory::{Change, Journal, Memory, lock};
use super::*;
use crate::clock::{Clock, LocalFuture, Moment};
use crate::convert::u64_from;
use crate::driver::{Driver, Raw};
use crate::name::NodeName;
use crate::node::NodeOptions;
use crate::storage::{Durability, Storage};

/// No file becomes longer: enough for all that is made here, and not for what the driver would grow ahead.
const SIZE_MAX: u64 = 1 << 20;

/// The file of that number.
fn memory(number: usize, bytes: Vec<u8>, journal: &Journal) -> Arc<Memory> {
    let (size_max, journal) = (AtomicU64::new(SIZE_MAX), Arc::clone(journal));
    Arc::new(Memory { size_max, number, journal, ..Memory::new(bytes) })
}

struct Standing;

impl Clock for Standing {
    fn now(&self) -> Moment {
        Moment::from_start(std::time::Duration::ZERO)
    }

    fn sleep_until(&self, _: Moment) -> LocalFuture<'static, ()> {
        Box::pin(std::future::pending())
    }
}

fn now<T>(future: impl Future<Output = T>) -> T {
    future.now_or_never().expect("it waits for nothing")
}

/// The files of an image: the image itself, and its external data file where it has one; what is below it.
#[derive(Clone)]
struct Files {
    bytes: Vec<Vec<u8>>,
    below: Option<Vec<u8>>,
}

impl Files {
    fn open(&self) -> Result<Opened, FormatError> {
        let journal = Journal::default();
        let open = |(number, bytes): (usize, &Vec<u8>)| memory(number, bytes.clone(), &journal);
        let files: Vec<_> = self.bytes.iter().enumerate().map(open).collect();
        let below = self.below.as_ref().map(|bytes| {
            let driver = Driver::Raw(Raw::whole(open((9, bytes))));
            Node::new(NodeName::new("below").unwrap(), driver, NodeOptions::default(), Arc::new(Standing))
        });
        let options = OpenOptions {
            backing: below,
            data_file: files.get(1).map(|file| -> Arc<dyn Storage> { Arc::<Memory>::clone(file) }),
            ..OpenOptions::default()
        };
        let image = now(Qcow2::open(Arc::<Memory>::clone(&files[0]), options))?;
        Ok(Opened { image, files, journal, below: self.below.clone() })
    }

    /// Every combination of files that a power cut at some moment of `journal` could leave: of what was not flushed,
    /// nothing, everything, one change, or all but one.
    fn crashes(&self, journal: &[(usize, Change)], mut judge: impl FnMut(&Self, usize)) {
        for moment in 0..=journal.len() {
            let left: Vec<Vec<Vec<u8>>> =
                (0..self.bytes.len()).map(|number| self.left(number, &journal[..moment])).collect();
            for image in &left[0] {
                for data in left.get(1).unwrap_or(&vec![Vec::new()]) {
                    let bytes = [image, data].into_iter().take(left.len()).cloned().collect();
                    judge(&Self { bytes, below: self.below.clone() }, moment);
                }
            }
        }
    }

    fn left(&self, number: usize, journal: &[(usize, Change)]) -> Vec<Vec<u8>> {
        let own: Vec<&Change> =
            journal.iter().filter(|(file, _)| *file == number).map(|(_, change)| change).collect();
        let flushed = own.iter().rposition(|change| matches!(change, Change::Flush)).unwrap_or(0);
        let mut durable = self.bytes[number].clone();
        own[..flushed].iter().for_each(|change| change.apply(&mut durable));
        let cached = &own[flushed..];
        let with = |keeps: &dyn Fn(usize) -> bool| {
            let mut bytes = durable.clone();
            for (at, change) in cached.iter().enumerate() {
                if keeps(at) {
                    change.apply(&mut bytes);
                }
            }
            bytes
        };
        let mut left = vec![with(&|_| false), with(&|_| true)];
        for one in 0..cached.len() {
            left.extend([with(&|at| at == one), with(&|at| at != one)]);
        }
        left.sort();
        left.dedup();
        left
    }
}

struct Opened {
    image: Arc<Qcow2>,
    files: Vec<Arc<Memory>>,
    journal: Journal,
    below: Option<Vec<u8>>,
}

impl Opened {
    fn write(&self, offset: u64, len: usize, byte: u8) {
        now(self.image.write(offset, Bytes::from(vec![byte; len]), Durability::Cached)).unwrap();
    }

    fn content(&self) -> Vec<u8> {
        let len = usize_from(self.image.size());
        now(self.image.read(0, Buffer::copy_of(&vec![0xee; len]))).unwrap().to_vec()
    }

    fn files(&self) -> Files {
        let bytes = self.files.iter().map(|file| file.content()).collect();
        Files { bytes, below: self.below.clone() }
    }
}

fn make(options: &CreateOptions, below: Option<Vec<u8>>) -> Files {
    let empty = |number| memory(number, Vec::new(), &Journal::default());
    let (image, data) = (empty(0), empty(1));
    let data_file = options.data_file.as_ref().map(|_| ImageFile::new(Arc::<Memory>::clone(&data)));
    now(create(&ImageFile::new(Arc::<Memory>::clone(&image)), data_file.as_ref(), options)).unwrap();
    let mut bytes = vec![image.content()];
    bytes.extend(data_file.map(|_| data.content()));
    Files { bytes, below }
}

fn is_sound(files: &Files, what: &str) {
    let memory = memory(0, files.bytes[0].clone(), &Journal::default());
    let report = now(check::check(&ImageFile::new(memory), check::CheckOptions::default())).unwrap();
    assert_eq!((report.corruptions, report.check_errors), (0, 0), "{what}: {report:?}");
}

const CLUSTER: u64 = 512;
/// Not the end of a cluster of 4 KiB, nor of a subcluster of 16 KiB.
const OLD: u64 = 80 * CLUSTER + 512;

/// What disk is made longer.
struct Case {
    name: &'static str,
    options: CreateOptions,
    below: Option<usize>,
    /// Makes of an image with data in it one that is to be made longer.
    change: fn(&mut Files),
}

fn cases() -> Vec<Case> {
    let base = || CreateOptions { size: OLD, cluster_bits: 12, ..CreateOptions::default() };
    let data_file = || CreateOptions { data_file: Some(b"data".to_vec()), ..base() };
    let case = |name, options, below| Case { name, options, below, change: |_| () };
    vec![
        case("plain", base(), None),
        case("version 2", CreateOptions { version: 2, ..base() }, None),
        case("small clusters", CreateOptions { cluster_bits: 9, ..base() }, None),
        case("subclusters", CreateOptions { cluster_bits: 14, extended_l2: true, ..base() }, None),
        case("over a longer disk", base(), Some(60 << 10)),
        case(
            "subclusters over a longer disk",
            CreateOptions { cluster_bits: 14, extended_l2: true, ..base() },
            Some(60 << 10),
        ),
        case("version 2 over a longer disk", CreateOptions { version: 2, ..base() }, Some(50 << 10)),
        case("over a disk that ends a little later", base(), Some(usize_from(OLD) + 512)),
        case("external data", data_file(), None),
        case("raw external data", CreateOptions { data_file_raw: true, ..data_file() }, None),
        Case {
            name: "a longer raw external data file",
            options: CreateOptions { data_file_raw: true, ..data_file() },
            below: None,
            change: |files| files.bytes[1].resize(200 << 10, 0xdd),
        },
        Case {
            name: "a last cluster that somebody else uses too",
            options: base(),
            below: None,
            change: |files| share_last_cluster(&mut files.bytes[0]),
        },
    ]
}

/// Counts the last guest cluster twice, as a snapshot would that has it too.
fn share_last_cluster(bytes: &mut [u8]) {
    let header = Header::decode(bytes).unwrap();
    let number = |bytes: &[u8], at: u64| {
        u64::from_be_bytes(bytes[usize_from(at)..usize_from(at) + 8].try_into().unwrap())
    };
    let table = number(bytes, header.l1.offset) & entry::OFFSET_MASK;
    let at = table + OLD / header.layout.cluster_size() * 8;
    let host = number(bytes, at) & entry::OFFSET_MASK;
    bytes[usize_from(at)] &= 0x7f;
    let block = number(bytes, header.refcount_table.offset);
    bytes[usize_from(block + (host >> header.layout.cluster_bits) * 2) + 1] = 2;
}

/// Makes an image with old bytes wherever a longer disk could show them.
fn filled(case: &Case) -> Files {
    let longer = CreateOptions { size: OLD + (64 << 10), ..case.options.clone() };
    let below = case.below.map(|len| vec![0xbb; len]);
    let opened = make(&longer, below).open().unwrap();
    // The data of the last cluster, and of what is cut off; not everywhere, where something is below.
    let from = if case.below.is_some() { OLD - 700 } else { 1000 };
    opened.write(from, usize_from(OLD + (16 << 10) - from), 0xaa);
    now(opened.image.flush()).unwrap();
    now(opened.image.resize(OLD, Preallocation::Off)).unwrap();
    now(opened.image.close()).unwrap();
    let mut files = opened.files();
    (case.change)(&mut files);
    files
}

#[test]
fn whatever_a_crash_leaves_of_a_resize_what_is_gained_reads_as_zero() {
    let how = [Preallocation::Off, Preallocation::Metadata, Preallocation::Falloc, Preallocation::Full];
    for (case, how) in cases().iter().flat_map(|case| how.map(|how| (case, how))) {
        let files = filled(case);
        let opened = files.open().unwrap();
        let before = opened.content();
        assert_eq!(u64_from(before.len()), OLD);
        lock(&opened.journal).clear();
        let new = OLD + (24 << 10) + 512;
        now(opened.image.resize(new, how)).unwrap();
        let journal = lock(&opened.journal).clone();
        let mut after = before.clone();
        after.resize(usize_from(new), 0);
        assert!(opened.content() == after, "{}, {how:?}", case.name);
        let (mut shorter, mut longer) = (0, 0);
        files.crashes(&journal, |left, moment| {
            let what =
                format!("{}, {how:?}, a crash before request {moment} of {}", case.name, journal.len());
            let opened = left.open().unwrap_or_else(|error| panic!("{what}: {error}"));
            let content = opened.content();
            let expected = if opened.image.size() == OLD { &before } else { &after };
            let wrong = content.iter().zip(expected).position(|(one, other)| one != other);
            assert_eq!((content.len(), wrong), (expected.len(), None), "{what}");
            if opened.image.is_data_file_raw {
                let mut alone = left.bytes[1].clone();
                alone.resize(expected.len(), 0);
                assert!(alone == *expected, "{what}: the data file alone");
            }
            is_sound(left, &what);
            *if content.len() == before.len() { &mut shorter } else { &mut longer } += 1;
        });
        assert!(shorter > 0 && longer > 0);
        now(opened.image.close()).unwrap();
        is_sound(&opened.files(), case.name);
    }
}

#[test]
fn a_crash_while_a_disk_is_made_shorter_loses_nothing_before_the_header_says_so() {
    for case in cases() {
        let files = filled(&case);
        let opened = files.open().unwrap();
        let before = opened.content();
        lock(&opened.journal).clear();
        let new = 5 * 4096 + 512;
        now(opened.image.resize(new, Preallocation::Off)).unwrap();
        let journal = lock(&opened.journal).clone();
        files.crashes(&journal, |left, moment| {
            let what = format!("{}, a crash before request {moment} of {}", case.name, journal.len());
            let opened = left.open().unwrap_or_else(|error| panic!("{what}: {error}"));
            let content = opened.content();
            assert!(content.len() == before.len() || u64_from(content.len()) == new, "{what}");
            assert!(content == before[..content.len()], "{what}");
            is_sound(left, &what);
        });
        // What a crash has left mapped beyond the end does not come back.
        let last = files.left(0, &journal[..journal.len() / 2]);
        for image in last {
            let mut bytes = files.bytes.clone();
            bytes[0] = image;
            let opened = Files { bytes, ..files.clone() }.open().unwrap();
            let size = opened.image.size();
            now(opened.image.resize(OLD + (200 << 10), Preallocation::Off)).unwrap();
            let content = opened.content();
            assert!(content[usize_from(size)..].iter().all(|byte| *byte == 0), "{}", case.name);
        }
    }
}

#[test]
fn a_resize_that_fails_leaves_the_disk_and_takes_no_space() {
    let files = make(&CreateOptions { size: OLD, cluster_bits: 12, ..CreateOptions::default() }, None);
    let opened = files.open().unwrap();
    opened.write(0, usize_from(OLD), 0xaa);
    let before = opened.content();
    assert!(now(opened.image.resize(2 * SIZE_MAX, Preallocation::Full)).is_err());
    assert!(opened.content() == before);
    assert_eq!(opened.image.size(), OLD);
    now(opened.image.close()).unwrap();
    let left = opened.files();
    is_sound(&left, "what is left");
    assert!(left.bytes[0].len() < usize_from(SIZE_MAX / 2), "{} bytes", left.bytes[0].len());
    assert!(left.open().unwrap().content() == before);
}

mod bitmaps_and_counts;
