//! Opening and creating: what is refused, with which words, and that nothing is harmed.
#![allow(clippy::unwrap_used, reason = "a test")]

mod common;

use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use common::{LoopDevice, SmallFileSystem, disk_directory, memory_directory, pattern, run, skipped};
use heliostat_block::range::ByteRange;
use heliostat_block::storage::{Durability, Storage};
use heliostat_host::file::FileStorage;
use heliostat_host::open::{Access, Cache, Existing, Locking, OpenError, OpenOptions};
use heliostat_host::runtime::block_on;

fn read_only() -> OpenOptions {
    OpenOptions { access: Access::ReadOnly, ..OpenOptions::default() }
}

/// Opens, and checks that the refusal names the file on one line.
fn refusal(path: &Path, options: &OpenOptions) -> OpenError {
    let error = FileStorage::open(path, options).expect_err("it must be refused");
    let text = error.to_string();
    assert!(text.contains(path.to_str().unwrap()), "{text}");
    assert!(!text.contains('\n') && text.len() < 300, "{text}");
    assert_eq!(error.path(), path);
    error
}

#[test]
fn a_missing_file_is_refused_and_not_created() {
    let directory = disk_directory();
    let path = directory.path().join("disk");
    for access in [Access::ReadWrite, Access::ReadWriteIfAllowed, Access::ReadOnly] {
        let options = OpenOptions { access, ..OpenOptions::default() };
        assert!(matches!(refusal(&path, &options), OpenError::Missing { .. }));
    }
    assert!(!path.exists());
    let nowhere = directory.path().join("no/such/disk");
    assert!(matches!(refusal(&nowhere, &read_only()), OpenError::Missing { .. }));
    let error = FileStorage::create(&nowhere, 1, Existing::Refuse, &OpenOptions::default()).unwrap_err();
    assert_eq!(error.errno(), 2);
}

#[test]
fn what_is_not_a_disk_is_refused_without_waiting_for_it() {
    let directory = disk_directory();
    let fifo = directory.path().join("fifo");
    run("mkfifo", &[fifo.to_str().unwrap()]).unwrap();
    let socket = directory.path().join("socket");
    let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    for (path, kind) in [
        (directory.path(), "a directory"),
        (fifo.as_path(), "a FIFO"),
        (socket.as_path(), "a socket"),
        (Path::new("/dev/null"), "a character device"),
    ] {
        for options in [OpenOptions::default(), read_only()] {
            let error = refusal(path, &options);
            assert!(error.to_string().contains(kind), "{error}");
        }
        let error = FileStorage::create(path, 1, Existing::Replace, &OpenOptions::default()).unwrap_err();
        assert!(error.to_string().contains(kind), "{error}");
    }
}

#[test]
fn an_unreadable_file_is_refused() {
    let directory = disk_directory();
    let path = directory.path().join("disk");
    std::fs::write(&path, "x").unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o000)).unwrap();
    if std::fs::read(&path).is_ok() {
        return skipped("the superuser may read everything");
    }
    assert!(matches!(refusal(&path, &read_only()), OpenError::Denied { .. }));
}

#[test]
fn a_read_only_file_system_is_said_and_can_be_read() {
    let Some(place) = SmallFileSystem::tmpfs() else { return };
    let path = place.path.join("disk");
    std::fs::write(&path, "contents").unwrap();
    run("mount", &["-o", "remount,ro", place.path.to_str().unwrap()]).unwrap();
    assert!(matches!(refusal(&path, &OpenOptions::default()), OpenError::ReadOnly { .. }));
    let options = OpenOptions { access: Access::ReadWriteIfAllowed, ..OpenOptions::default() };
    let storage = FileStorage::open(&path, &options).unwrap();
    assert!(storage.traits().read_only);
    block_on(async {
        assert_eq!(common::contents(&storage).await, b"contents");
        let error = storage.write(0, pattern(1, 1, 0), Durability::Cached).await.unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::ReadOnlyFilesystem);
    })
    .unwrap();
}

#[test]
fn an_empty_image_opens_and_takes_empty_requests() {
    let directory = disk_directory();
    let path = directory.path().join("disk");
    std::fs::write(&path, "").unwrap();
    for cache in [Cache::Page, Cache::Direct] {
        let options = OpenOptions { cache, ..OpenOptions::default() };
        let storage = FileStorage::open(&path, &options).unwrap();
        assert_eq!(storage.size(), 0);
        block_on(async {
            let empty = ByteRange::from_bounds(0, 0);
            assert!(storage.extents(empty).await.unwrap().is_empty());
            storage.write(0, pattern(1, 0, 0), Durability::Fua).await.unwrap();
            storage.flush().await.unwrap();
            assert!(storage.write(0, pattern(1, 1, 0), Durability::Cached).await.is_err());
            assert!(storage.read(0, heliostat_block::buffer::Buffer::zeroed(1)).await.is_err());
        })
        .unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().len(), 0);
    }
}

#[test]
fn an_image_that_grows_keeps_the_size_that_it_had() {
    let directory = disk_directory();
    let path = directory.path().join("disk");
    std::fs::write(&path, vec![1; 5000]).unwrap();
    let storage = FileStorage::open(&path, &OpenOptions::default()).unwrap();
    std::fs::File::options().write(true).open(&path).unwrap().set_len(9000).unwrap();
    assert_eq!(storage.size(), 5000);
    block_on(async {
        assert_eq!(common::contents(&storage).await, vec![1; 5000]);
        assert!(storage.write(4999, pattern(1, 2, 0), Durability::Cached).await.is_err());
    })
    .unwrap();
}

#[test]
fn an_image_that_was_cut_short_is_an_error_and_not_zeroes() {
    let directories = [Some(disk_directory()), memory_directory()];
    for directory in directories.into_iter().flatten() {
        let path = directory.path().join("disk");
        std::fs::write(&path, vec![1; 100_000]).unwrap();
        for cache in [Cache::Page, Cache::Direct] {
            let options = OpenOptions { cache, ..read_only() };
            let storage = FileStorage::open(&path, &options).unwrap();
            std::fs::File::options().write(true).open(&path).unwrap().set_len(50_000).unwrap();
            block_on(async {
                let buffer = heliostat_block::buffer::Buffer::zeroed(8192);
                let error = storage.read(65_536, buffer).await.unwrap_err();
                assert_eq!(error.kind(), std::io::ErrorKind::UnexpectedEof);
                let extents = storage.extents(ByteRange::from_bounds(65_536, 100_000)).await.unwrap();
                assert_eq!(extents[0].status, heliostat_block::storage::ExtentStatus::Data);
            })
            .unwrap();
            std::fs::File::options().write(true).open(&path).unwrap().set_len(100_000).unwrap();
        }
    }
}

#[test]
fn creating_makes_a_sparse_file_and_refuses_an_existing_one() {
    let directory = disk_directory();
    let path = directory.path().join("disk");
    let options = OpenOptions::default();
    let storage = FileStorage::create(&path, 1 << 40, Existing::Refuse, &options).unwrap();
    assert_eq!((storage.size(), storage.allocated_size()), (1 << 40, Some(0)));
    assert!(matches!(
        FileStorage::create(&path, 1, Existing::Refuse, &options),
        Err(OpenError::Exists { .. })
    ));
    assert!(matches!(
        FileStorage::create(&path, 1, Existing::Replace, &options),
        Err(OpenError::Locked { .. })
    ));
    assert_eq!(std::fs::metadata(&path).unwrap().len(), 1 << 40, "left alone");
    drop(storage);
    let storage = FileStorage::create(&path, 4096, Existing::Replace, &options).unwrap();
    assert_eq!(storage.size(), 4096);
}

#[test]
fn a_creation_that_fails_half_way_leaves_nothing_behind() {
    let directory = disk_directory();
    let path = directory.path().join("disk");
    // No file system has files of this size.
    let error = FileStorage::create(&path, u64::MAX, Existing::Refuse, &OpenOptions::default()).unwrap_err();
    assert!(error.to_string().contains(path.to_str().unwrap()));
    assert!(!path.exists(), "{error}");
}

#[test]
fn a_second_writer_is_told_who_has_the_image() {
    let directory = disk_directory();
    let path = directory.path().join("disk");
    let first = FileStorage::create(&path, 4096, Existing::Refuse, &OpenOptions::default()).unwrap();
    let error = refusal(&path, &OpenOptions::default());
    assert!(error.to_string().contains(&format!("pid {}", std::process::id())), "{error}");
    let _reader = FileStorage::open(&path, &read_only()).unwrap();
    let still = OpenOptions { locking: Locking::Still, ..read_only() };
    assert!(matches!(refusal(&path, &still), OpenError::Locked { .. }));
    let _trusting =
        FileStorage::open(&path, &OpenOptions { locking: Locking::Off, ..OpenOptions::default() }).unwrap();
    drop(first);
    let _second = FileStorage::open(&path, &OpenOptions::default()).unwrap();
}

#[test]
fn a_block_device_that_the_host_uses_is_not_written() {
    let Some(place) = SmallFileSystem::ext4() else { return };
    let device = place.device().unwrap();
    assert!(matches!(refusal(device, &OpenOptions::default()), OpenError::Busy { .. }));
    FileStorage::open(device, &read_only()).unwrap();
}

#[test]
fn a_read_only_device_is_said_and_can_be_read() {
    let directory = disk_directory();
    let Some(device) = LoopDevice::new(directory.path(), 1 << 20, 512) else { return };
    device.set_read_only();
    let error = refusal(&device.path, &OpenOptions::default());
    assert!(matches!(error, OpenError::ReadOnly { .. }), "{error}");
    let options = OpenOptions { access: Access::ReadWriteIfAllowed, ..OpenOptions::default() };
    let storage = FileStorage::open(&device.path, &options).unwrap();
    assert!(storage.traits().read_only);
    assert_eq!(storage.size(), 1 << 20);
}

#[test]
fn a_closed_image_can_be_opened_again_at_once_though_it_is_being_written_back() {
    let directory = disk_directory();
    let path = directory.path().join("disk");
    for _ in 0..50 {
        let storage =
            FileStorage::create(&path, 4 << 20, Existing::Replace, &OpenOptions::default()).unwrap();
        block_on(storage.write(0, pattern(1, 4 << 20, 0), Durability::Cached)).unwrap().unwrap();
        storage.start_writeback(ByteRange::from_bounds(0, 4 << 20));
    }
}
