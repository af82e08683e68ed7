//! A host that forbids io_uring, as default container profiles do: everything works, by polling.
#![allow(clippy::unwrap_used, reason = "a test")]

mod common;

use std::io::IoSlice;

use common::{contents, disk_directory, pattern};
use heliostat_block::range::ByteRange;
use heliostat_block::storage::{Durability, Storage, ZeroEffort, ZeroSpace};
use heliostat_host::file::FileStorage;
use heliostat_host::open::{Cache, Discard, Existing, OpenOptions};
use heliostat_host::runtime::{Driver, block_on_with};
use heliostat_host::socket::{Address, Listener, Socket};
use seccompiler::{BpfProgram, SeccompAction, SeccompFilter};

/// Makes the kernel refuse io_uring to this thread and those that it starts.
fn deny_io_uring() {
    // The same numbers on every architecture.
    let calls = [425, 426, 427].map(|number| (number, Vec::new()));
    let filter = SeccompFilter::new(
        calls.into_iter().collect(),
        SeccompAction::Allow,
        SeccompAction::Errno(1), // EPERM
        std::env::consts::ARCH.try_into().unwrap(),
    )
    .unwrap();
    let program = BpfProgram::try_from(filter).unwrap();
    seccompiler::apply_filter(&program).unwrap();
}

fn denied(test: impl FnOnce() + Send) {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            deny_io_uring();
            test();
        });
        thread.join().unwrap();
    });
}

#[test]
fn polling_is_chosen_by_itself_and_io_uring_is_not_pretended() {
    denied(|| {
        assert_eq!(block_on_with(Driver::Auto, async { Driver::in_use() }).unwrap(), Driver::Polling);
        let error = block_on_with(Driver::IoUring, async {}).unwrap_err();
        assert!(error.to_string().contains("io_uring is not available"), "{error}");
    });
}

#[test]
fn a_file_is_written_zeroed_flushed_and_read() {
    denied(|| {
        let directory = disk_directory();
        for cache in [Cache::Page, Cache::Direct] {
            let path = directory.path().join("disk");
            let options = OpenOptions { cache, discard: Discard::Unmap, ..OpenOptions::default() };
            let storage = FileStorage::create(&path, (4 << 20) + 777, Existing::Replace, &options).unwrap();
            block_on_with(Driver::Auto, async {
                // More at once than there are blocking threads.
                let writes =
                    (0..256).map(|n| storage.write(n * 16384, pattern(n, 16384, 1), Durability::Cached));
                for result in futures_util::future::join_all(writes).await {
                    result.unwrap();
                }
                storage.write(4 << 20, pattern(9, 777, 3), Durability::Fua).await.unwrap();
                let zeroed = ByteRange::from_bounds(0, 16384);
                storage
                    .write_zeroes(zeroed, ZeroSpace::MayUnmap, ZeroEffort::Any, Durability::Fua)
                    .await
                    .unwrap();
                storage.discard(ByteRange::from_bounds(16384, 32768)).await.unwrap();
                storage.flush().await.unwrap();
                storage.start_writeback(ByteRange::from_bounds(0, 1 << 20));
                let now = contents(&storage).await;
                assert!(now[..32768].iter().all(|byte| *byte == 0));
                for n in 2..256_usize {
                    assert!(now[n * 16384..(n + 1) * 16384] == *pattern(n.try_into().unwrap(), 16384, 1));
                }
                assert!(now[4 << 20..] == *pattern(9, 777, 3));
            })
            .unwrap();
        }
    });
}

#[test]
fn sockets_are_served() {
    denied(|| {
        block_on_with(Driver::Auto, async {
            let listener = Listener::bind(&Address::Tcp("127.0.0.1:0".parse().unwrap())).unwrap();
            let client = Socket::connect(listener.address()).await.unwrap();
            let server = listener.accept().await.unwrap();
            client.send_now(&[IoSlice::new(b"hello")]).unwrap();
            let mut buffer = [0; 16];
            let received = loop {
                match server.recv_now(&mut buffer) {
                    Err(_) => server.readable().await.unwrap(),
                    Ok(received) => break received,
                }
            };
            assert_eq!(&buffer[..received], b"hello");
        })
        .unwrap();
    });
}
