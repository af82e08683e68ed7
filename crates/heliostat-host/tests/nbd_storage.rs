//! The NBD storage against servers of others: requests of all kinds, those that a server does not offer, servers that
//! go away and come back.

#![allow(clippy::unwrap_used, reason = "a test")]

mod common;
#[path = "nbd/server.rs"]
mod server;

use std::future::Future;
use std::time::Duration;

use bytes::Bytes;
use common::{DRIVERS, pattern};
use heliostat_block::buffer::Buffer;
use heliostat_block::nbd::ReplyStyle;
use heliostat_block::nbd::link::LinkState;
use heliostat_block::range::ByteRange;
use heliostat_block::storage::{Durability, ExtentStatus, Storage, ZeroEffort, ZeroSpace};
use heliostat_host::nbd::{NbdOptions, NbdStorage, Tls};
use heliostat_host::runtime::{Driver, block_on_with};
use heliostat_host::tls::{Credentials, CredentialsSettings, Endpoint, PeerCheck};
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa, KeyPair,
    KeyUsagePurpose,
};
use server::{PATIENCE, Server, options};

const MIB: u64 = 1 << 20;

fn run<F: Future>(driver: Driver, future: F) -> F::Output {
    block_on_with(driver, future).unwrap()
}

fn range(offset: u64, len: u64) -> ByteRange {
    ByteRange::new(offset, len).unwrap()
}

async fn read(storage: &NbdStorage, offset: u64, len: usize) -> Bytes {
    storage.read(offset, Buffer::zeroed(len)).await.unwrap().freeze()
}

/// Writes, zeroes, discards, flushes and reads; each must show what it should.
async fn exercise(storage: &NbdStorage) {
    let data = pattern(1, 3 * MIB, 5);
    storage.write(4096, data.clone(), Durability::Cached).await.unwrap();
    assert!(read(storage, 4096, data.len()).await == data);
    let fua = pattern(2, 8192, 0);
    storage.write(MIB, fua.clone(), Durability::Fua).await.unwrap();
    assert!(read(storage, MIB, 8192).await == fua);
    for (offset, space, durability) in
        [(2 * MIB, ZeroSpace::Keep, Durability::Fua), (MIB, ZeroSpace::MayUnmap, Durability::Cached)]
    {
        storage.write_zeroes(range(offset, 65536), space, ZeroEffort::Any, durability).await.unwrap();
        assert!(read(storage, offset, 65536).await.iter().all(|byte| *byte == 0));
    }
    assert!(read(storage, MIB + 65536, 65536).await == data.slice((1 << 20) + 61440..(1 << 20) + 126_976));
    storage.discard(range(0, 65536)).await.unwrap();
    storage.flush().await.unwrap();
    assert_eq!(storage.losses(), 0);
    let mut at = 0;
    while at < storage.size() {
        let extents = storage.extents(range(at, storage.size() - at)).await.unwrap();
        assert_eq!(extents[0].range.offset(), at);
        at = extents.last().unwrap().range.end();
    }
}

#[test]
fn all_kinds_of_requests_work_with_qemu() {
    for driver in DRIVERS {
        let directory = common::disk_directory();
        let file = directory.path().join("disk");
        std::fs::File::create(&file).unwrap().set_len(8 * MIB).unwrap();
        let server = Server::qemu(&directory.path().join("socket"), &file, &[]);
        let storage = server.open(driver);
        assert_eq!(storage.size(), 8 * MIB);
        let extents = run(driver, storage.extents(range(0, 8 * MIB))).unwrap();
        assert_eq!(extents[0].status, ExtentStatus::Hole, "a new file");
        run(driver, exercise(&storage));
        let status = storage.status();
        assert_eq!(status.state, LinkState::Up);
        assert_eq!(status.found.unwrap().terms.replies, ReplyStyle::Extended);
    }
}

#[test]
fn a_dirty_bitmap_shows_as_extents() {
    let directory = common::disk_directory();
    let [image, socket] = ["disk", "socket"].map(|name| directory.path().join(name));
    let path = image.to_str().unwrap();
    common::run("qemu-img", &["create", "-q", "-f", "qcow2", path, "1M"]).unwrap();
    common::run("qemu-img", &["bitmap", "--add", "-g", "64k", path, "b0"]).unwrap();
    common::run("qemu-io", &["-c", "write -P 7 128k 64k", path]).unwrap();
    let server = Server::qemu_of("qcow2", &socket, &image, &["--bitmap=b0"]);
    let options = |bitmap: &str| NbdOptions { bitmap: Some(bitmap.to_owned()), ..server.options() };
    let storage = NbdStorage::open(options("qemu:dirty-bitmap:b0")).unwrap();
    let extents = run(Driver::Auto, storage.extents(range(0, MIB))).unwrap();
    let extents: Vec<_> = extents.iter().map(|extent| (extent.range, extent.status)).collect();
    let (clean, dirty) = (ExtentStatus::Data, ExtentStatus::Absent);
    let rest = range(192 << 10, MIB - (192 << 10));
    assert_eq!(extents, [(range(0, 128 << 10), clean), (range(128 << 10, 64 << 10), dirty), (rest, clean)]);
    let once = NbdOptions { open_timeout: Duration::ZERO, ..options("qemu:dirty-bitmap:b1") };
    let error = NbdStorage::open(once).unwrap_err();
    assert!(error.to_string().contains("qemu:dirty-bitmap:b1"), "{error}");
}

#[test]
fn what_a_server_does_not_offer_is_replaced() {
    let without: [&[&str]; 6] = [
        &["memory", "8M"],
        &["--filter=nozero", "memory", "8M", "zeromode=none"],
        &["--filter=fua", "memory", "8M"],
        &["--filter=noextents", "memory", "8M"],
        &["--no-sr", "memory", "8M"],
        &["--filter=blocksize-policy", "memory", "8M", "blocksize-minimum=4k", "blocksize-maximum=64k"],
    ];
    for driver in DRIVERS {
        for arguments in without {
            let directory = common::disk_directory();
            let server = Server::nbdkit(&directory.path().join("socket"), arguments);
            let storage = server.open(driver);
            run(driver, exercise(&storage));
        }
    }
}

#[test]
fn a_request_longer_than_the_server_takes_is_cut_in_pieces() {
    let directory = common::disk_directory();
    let file = directory.path().join("disk");
    std::fs::File::create(&file).unwrap().set_len(96 * MIB).unwrap();
    let server = Server::qemu(&directory.path().join("socket"), &file, &[]);
    let storage = server.open(Driver::Auto);
    let data = pattern(3, 80 * MIB, 0);
    run(Driver::Auto, async {
        storage.write(MIB, data.clone(), Durability::Cached).await.unwrap();
        assert!(read(&storage, MIB, data.len()).await == data);
        let all = range(0, 96 * MIB);
        storage.write_zeroes(all, ZeroSpace::MayUnmap, ZeroEffort::Any, Durability::Cached).await.unwrap();
        assert!(read(&storage, 0, 96 << 20).await.iter().all(|byte| *byte == 0));
    });
}

#[test]
fn a_server_that_comes_back_in_time_is_not_noticed_but_counted() {
    for driver in DRIVERS {
        let directory = common::disk_directory();
        let file = directory.path().join("disk");
        std::fs::File::create(&file).unwrap().set_len(8 * MIB).unwrap();
        let socket = directory.path().join("socket");
        let server = Server::qemu(&socket, &file, &[]);
        let options = NbdOptions { reconnect_delay: PATIENCE, ..server.options() };
        let storage = NbdStorage::open_with(driver, options).unwrap();
        let data = pattern(4, MIB, 0);
        run(driver, storage.write(0, data.clone(), Durability::Cached)).unwrap();
        server.kill();
        let _server = run(driver, async {
            let write = storage.write(MIB, data.clone(), Durability::Cached);
            let restart = async { Server::qemu(&socket, &file, &[]) };
            let (written, server) = futures_util::join!(write, restart);
            written.unwrap();
            assert!(read(&storage, MIB, data.len()).await == data);
            storage.flush().await.unwrap();
            server
        });
        let status = storage.status();
        assert_eq!((status.state, status.reconnects), (LinkState::Up, 1));
        // Each connection that was cut off counts.
        assert!(storage.losses() > 0);
    }
}

#[test]
fn without_a_delay_requests_fail_at_once_and_work_again_later() {
    let directory = common::disk_directory();
    let file = directory.path().join("disk");
    std::fs::File::create(&file).unwrap().set_len(MIB).unwrap();
    let socket = directory.path().join("socket");
    let server = Server::qemu(&socket, &file, &[]);
    let storage = server.open(Driver::Auto);
    server.kill();
    let write = || run(Driver::Auto, storage.write(0, Bytes::from_static(&[7; 512]), Durability::Cached));
    let error = write().unwrap_err();
    assert!(error.to_string().starts_with("the NBD server is not reached: "), "{error}");
    assert_eq!(storage.status().state, LinkState::Down);
    let _server = Server::qemu(&socket, &file, &[]);
    let deadline = std::time::Instant::now() + PATIENCE;
    while let Err(error) = write() {
        assert!(std::time::Instant::now() < deadline, "{error}");
    }
    assert_eq!(storage.status().state, LinkState::Up);
}

#[test]
fn an_export_of_another_size_is_not_taken_for_the_same() {
    let directory = common::disk_directory();
    let socket = directory.path().join("socket");
    let server = Server::nbdkit(&socket, &["memory", "1M"]);
    let options = NbdOptions { reconnect_delay: PATIENCE, ..server.options() };
    let storage = NbdStorage::open(options).unwrap();
    server.kill();
    let _server = Server::nbdkit(&socket, &["memory", "2M"]);
    let error = run(Driver::Auto, storage.read(0, Buffer::zeroed(512))).unwrap_err();
    assert!(error.to_string().contains("2097152 bytes now, not 1048576"), "{error}");
    assert_eq!(storage.status().state, LinkState::Changed);
}

/// A folder with certificates for both sides, in QEMU's layout.
fn certificates() -> tempfile::TempDir {
    let directory = common::disk_directory();
    let path = |name: &str| directory.path().join(name);
    let mut params = CertificateParams::new(Vec::new()).unwrap();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.distinguished_name.push(DnType::CommonName, "authority");
    let authority = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
    std::fs::write(path("ca-cert.pem"), authority.pem()).unwrap();
    let usages =
        [("server", ExtendedKeyUsagePurpose::ServerAuth), ("client", ExtendedKeyUsagePurpose::ClientAuth)];
    for (side, usage) in usages {
        let mut params = CertificateParams::new(vec!["localhost".to_owned()]).unwrap();
        params.extended_key_usages = vec![usage];
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::KeyEncipherment];
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &authority).unwrap();
        std::fs::write(path(&format!("{side}-cert.pem")), certificate.pem()).unwrap();
        std::fs::write(path(&format!("{side}-key.pem")), key.serialize_pem()).unwrap();
    }
    directory
}

#[test]
fn connections_are_private_where_that_is_asked_for() {
    for driver in DRIVERS {
        let folder = certificates();
        let load = |peers| {
            let (dir, endpoint) = (folder.path().to_owned(), Endpoint::Client);
            Credentials::load(CredentialsSettings { dir, endpoint, peers }).unwrap()
        };
        let socket = folder.path().join("socket");
        let file = folder.path().join("disk");
        std::fs::File::create(&file).unwrap().set_len(8 * MIB).unwrap();
        let object =
            format!("tls-creds-x509,id=tls0,endpoint=server,verify-peer=yes,dir={}", folder.path().display());
        let server = Server::qemu(&socket, &file, &["--object", &object, "--tls-creds=tls0"]);
        let tls = Tls { credentials: load(PeerCheck::Required), host: "localhost".to_owned() };
        let options = NbdOptions { tls: Some(tls.clone()), reconnect_delay: PATIENCE, ..server.options() };
        let storage = NbdStorage::open_with(driver, options.clone()).unwrap();
        run(driver, exercise(&storage));
        server.kill();
        let _server = Server::qemu(&socket, &file, &["--object", &object, "--tls-creds=tls0"]);
        assert!(run(driver, read(&storage, MIB, 512)).iter().all(|byte| *byte == 0));
        let once = NbdOptions { open_timeout: Duration::ZERO, ..options };
        let elsewhere = Tls { host: "example.org".to_owned(), ..tls };
        let error = NbdStorage::open(NbdOptions { tls: Some(elsewhere), ..once.clone() }).unwrap_err();
        assert!(error.to_string().contains("example.org"), "{error}");
        let error = NbdStorage::open(NbdOptions { tls: None, ..once }).unwrap_err();
        assert!(error.to_string().to_lowercase().contains("tls"), "{error}");
    }
}

#[test]
fn opening_says_why_it_failed() {
    let directory = common::disk_directory();
    let socket = directory.path().join("socket");
    let once = NbdOptions { open_timeout: Duration::ZERO, ..options(&socket) };
    let error = NbdStorage::open(once.clone()).unwrap_err();
    assert!(error.to_string().starts_with("Failed to connect to "), "{error}");
    let server = Server::nbdkit(&socket, &["-r", "memory", "1M"]);
    drop(NbdStorage::open(NbdOptions { read_only: true, ..server.options() }).unwrap());
    let error = NbdStorage::open(once).unwrap_err();
    assert_eq!(error.to_string(), "the export is read-only");
}
