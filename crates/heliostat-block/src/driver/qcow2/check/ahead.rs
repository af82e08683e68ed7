//! [`clusters`]: reads tables ahead of who looks at them, several at once, so that a check waits for a disk as often
//! as a copy would. Only reads; memory is bounded. Called by whoever goes through many tables.

use futures_util::future::join_all;
use futures_util::stream::{self, Stream, StreamExt};

use super::super::error::FormatError;
use super::super::file::ImageFile;
use super::super::layout::Layout;
use super::counts::cluster_at;
use crate::buffer::Buffer;
use crate::convert::usize_from;

/// Tables that are read at once: enough to hide the latency of a remote disk.
const AT_ONCE_MAX: u64 = 32;
/// Their bytes at most; where one is longer than half of it, two all the same.
const BYTES_MAX: u64 = 4 << 20;

/// How many clusters of so many bytes are read at once.
fn at_once(cluster_size: u64) -> usize {
    usize_from((BYTES_MAX / cluster_size).clamp(2, AT_ONCE_MAX))
}

/// Reads clusters, in the order of `wanted`: each with what comes with it. `None` is nothing to read.
///
/// Nothing is being read while the caller has one in hand: a read may hold a block of the file, and whoever writes
/// there, or reads it too, would wait for a read that nobody polls.
pub(super) fn clusters<'a, T: 'a>(
    file: &'a ImageFile,
    layout: Layout,
    wanted: impl IntoIterator<Item = (Option<u64>, T), IntoIter: 'a>,
) -> impl Stream<Item = Result<(Option<Buffer>, T), FormatError>> + 'a {
    let read = move |offset| async move { Ok(file.read(cluster_at(offset, layout)).await?) };
    batches(at_once(layout.cluster_size()), wanted, read)
}

/// As [`clusters`], by way of `read`.
fn batches<'a, B: 'a, T: 'a, R: Future<Output = Result<B, FormatError>> + 'a>(
    at_once: usize,
    wanted: impl IntoIterator<Item = (Option<u64>, T), IntoIter: 'a>,
    read: impl Fn(u64) -> R + Copy + 'a,
) -> impl Stream<Item = Result<(Option<B>, T), FormatError>> + 'a {
    let mut wanted = wanted.into_iter();
    let batches = std::iter::from_fn(move || {
        let batch: Vec<_> = wanted.by_ref().take(at_once).collect();
        (!batch.is_empty()).then_some(batch)
    });
    let read = move |(offset, with): (Option<u64>, T)| async move {
        Ok(match offset {
            Some(offset) => (Some(read(offset).await?), with),
            None => (None, with),
        })
    };
    stream::iter(batches).then(move |batch| join_all(batch.into_iter().map(read))).flat_map(stream::iter)
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::pin::pin;

    use super::*;
    use crate::clock::yield_once;
    use crate::driver::qcow2::layout::{CLUSTER_BITS_MAX, CLUSTER_BITS_MIN};
    use crate::driver::qcow2::test_memory::{Memory, run};

    /// Reads that say how many of them there were, and how many at once.
    #[derive(Default)]
    struct Reads {
        all: Cell<usize>,
        under_way: Cell<usize>,
        most: Cell<usize>,
    }

    impl Reads {
        /// Reads twice what was asked for; the later it was asked, the sooner it ends. What is odd cannot be read.
        async fn read(&self, offset: u64) -> Result<u64, FormatError> {
            self.all.set(self.all.get() + 1);
            self.under_way.set(self.under_way.get() + 1);
            self.most.set(self.most.get().max(self.under_way.get()));
            for _ in 0..100 - offset.min(100) {
                yield_once().await;
            }
            self.under_way.set(self.under_way.get() - 1);
            if offset.is_multiple_of(2) {
                Ok(2 * offset)
            } else {
                Err(FormatError::Invalid(offset.to_string()))
            }
        }

        /// What comes of reading `wanted`, `at_once` at a time; whoever gets it takes a while over each.
        fn all(&self, at_once: usize, wanted: &[Option<u64>]) -> Vec<Result<(Option<u64>, usize), String>> {
            let wanted = wanted.iter().enumerate().map(|(number, offset)| (*offset, number));
            let mut stream = pin!(batches(at_once, wanted, |offset| self.read(offset)));
            let mut got = Vec::new();
            run(async {
                while let Some(next) = stream.next().await {
                    assert_eq!(self.under_way.get(), 0, "nobody polls a read meanwhile");
                    yield_once().await;
                    got.push(next.map_err(|error| error.to_string()));
                }
            });
            got
        }
    }

    #[test]
    fn clusters_come_in_the_order_in_which_they_are_wanted_whichever_is_read_first() {
        let wanted: Vec<_> = [0, 90, 4, 80, 80, 2, 50].map(Some).into();
        for at_once in 1..9 {
            let expected =
                wanted.iter().enumerate().map(|(number, offset)| Ok((offset.map(|it| 2 * it), number)));
            assert_eq!(Reads::default().all(at_once, &wanted), expected.collect::<Vec<_>>());
        }
    }

    #[test]
    fn no_more_are_read_at_once_than_may_be_and_no_fewer() {
        let reads = Reads::default();
        reads.all(3, &[Some(0); 10]);
        assert_eq!((reads.all.get(), reads.most.get()), (10, 3));
    }

    #[test]
    fn as_many_are_read_at_once_as_fit_into_the_memory_and_two_of_the_largest() {
        for bits in CLUSTER_BITS_MIN..=CLUSTER_BITS_MAX {
            let (size, count) = (1_u64 << bits, at_once(1 << bits));
            assert!((2..=usize_from(AT_ONCE_MAX)).contains(&count), "{size}");
            assert!(crate::convert::u64_from(count) * size <= BYTES_MAX, "{size}");
        }
        assert_eq!((at_once(1 << 16), at_once(1 << 21), at_once(1 << 23)), (32, 2, 2));
    }

    #[test]
    fn an_error_comes_in_its_place_and_the_rest_all_the_same() {
        let got = Reads::default().all(4, &[Some(2), Some(1), Some(4), Some(3), Some(6)]);
        let expected =
            [Ok((Some(4), 0)), Err("1".to_owned()), Ok((Some(8), 2)), Err("3".to_owned()), Ok((Some(12), 4))];
        assert_eq!(got, expected);
    }

    #[test]
    fn nothing_after_the_batch_with_an_error_is_read_for_who_stops_there() {
        let reads = Reads::default();
        let wanted = [1, 2, 4, 6, 8].map(|offset| (Some(offset), ()));
        let mut stream = pin!(batches(2, wanted, |offset| reads.read(offset)));
        assert!(run(stream.next()).is_some_and(|first| first.is_err()));
        assert_eq!(reads.all.get(), 2);
    }

    #[test]
    fn where_there_is_nothing_to_read_nothing_is_read() {
        let reads = Reads::default();
        assert_eq!(reads.all(2, &[]), []);
        assert_eq!(reads.all(2, &[None, None, None]), [Ok((None, 0)), Ok((None, 1)), Ok((None, 2))]);
        assert_eq!(reads.all.get(), 0);
    }

    #[test]
    fn what_is_wanted_of_an_empty_image_reads_as_zero() {
        let layout = Layout { cluster_bits: 9, refcount_order: 4, extended_l2: false, version: 3 };
        let file = ImageFile::new(Memory::of(Vec::new()));
        let mut stream = pin!(clusters(&file, layout, [(Some(512), 'a'), (None, 'b')]));
        let first = run(stream.next()).unwrap().unwrap();
        assert_eq!((first.0.unwrap().to_vec(), first.1), (vec![0; 512], 'a'));
        assert!(matches!(run(stream.next()), Some(Ok((None, 'b')))));
        assert!(run(stream.next()).is_none());
    }
}
