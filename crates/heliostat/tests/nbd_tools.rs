//! The NBD server and the tools that people use with it.

#![allow(clippy::unwrap_used, reason = "a test")]

mod common;
#[path = "common/nbd.rs"]
mod nbd;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use heliostat::front::nbd::{ExportSettings, ServerSettings};
use heliostat_block::nbd::Access;
use heliostat_host::open::Cache;

use common::{folder, folder_on_disk, tool};
use nbd::{Memory, Served};

const SIZE: usize = 24 << 20;

/// Runs a tool to its end; answers what it printed.
fn run(command: &mut Command) -> String {
    let output = command.output().unwrap();
    let text = [output.stdout, output.stderr].concat();
    let text = String::from_utf8_lossy(&text).into_owned();
    assert!(output.status.success(), "{command:?}: {text}");
    text
}

/// Bytes with holes in between, the same each time.
fn image() -> Vec<u8> {
    let mut bytes = vec![0; SIZE];
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    for _ in 0..60 {
        for _ in 0..9 {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
        }
        let offset = usize::try_from(state).unwrap() % (SIZE - 200_000);
        let len = usize::try_from(state >> 32).unwrap() % 200_000;
        let value = u8::try_from(state % 255).unwrap() + 1;
        bytes[offset..offset + len].fill(value);
        bytes[offset] = 0xee;
    }
    bytes
}

/// An image that a tool may read, an empty one behind a server, and their folder.
fn scene(folder: &Path, cache: Cache) -> (PathBuf, PathBuf, Served) {
    let (source, disk) = (folder.join("source"), folder.join("disk"));
    fs::write(&source, image()).unwrap();
    fs::File::create(&disk).unwrap().set_len(SIZE.try_into().unwrap()).unwrap();
    let served = Served::with_file(&disk, cache);
    (source, disk, served)
}

#[test]
fn nbdinfo_understands_what_is_offered() {
    let Some(nbdinfo) = tool("nbdinfo") else { return };
    let served = Served::start(ServerSettings::default());
    for name in ["first", "second"] {
        let node = served.node(name, Memory::new(1 << 20));
        let description = format!("the {name} disk");
        let is_second = name == "second";
        let access = if is_second { Access::ReadOnly } else { Access::Writable };
        let settings = served.settings(name, &node);
        let settings = ExportSettings { description, access, is_default: is_second, ..settings };
        served.server.add_export(settings).unwrap();
    }
    let list = run(Command::new(&nbdinfo).args(["--list", "--json"]).arg(served.uri("")));
    let list: serde_json::Value = serde_json::from_str(&list).unwrap();
    assert_eq!(list["protocol"], "newstyle-fixed");
    assert_eq!(list["structured"], true);
    let exports = list["exports"].as_array().unwrap();
    assert_eq!(exports.len(), 2);
    for (export, name) in exports.iter().zip(["first", "second"]) {
        assert_eq!(export["export-name"], name);
        assert_eq!(export["description"], format!("the {name} disk"));
        assert_eq!(export["export-size"], 1 << 20);
        assert_eq!(export["contexts"], serde_json::json!(["base:allocation"]));
        assert_eq!(export["is_read_only"], name == "second");
        assert_eq!(export["can_fast_zero"], name == "first");
        for able in ["can_multi_conn", "can_flush", "can_fua", "can_df", "can_cache"] {
            assert_eq!(export[able], true, "{able}");
        }
    }
    assert!(run(Command::new(&nbdinfo).arg(served.uri(""))).contains("export=\"second\""));
    let missing = Command::new(&nbdinfo).arg(served.uri("third")).output().unwrap();
    assert!(!missing.status.success());
}

#[test]
fn nbdinfo_sees_where_the_holes_are() {
    let Some(nbdinfo) = tool("nbdinfo") else { return };
    let folder = folder();
    let (_, _, served) = scene(folder.path(), Cache::Page);
    served.guest("disk").write(8 << 20, &[7; 1 << 20]);
    let map = run(Command::new(nbdinfo).args(["--map", "--json"]).arg(served.uri("disk")));
    let map: serde_json::Value = serde_json::from_str(&map).unwrap();
    let extents = map.as_array().unwrap().iter();
    let extents: Vec<_> =
        extents.map(|extent| (&extent["offset"], &extent["length"], &extent["type"])).collect();
    let json = |number: u32| serde_json::json!(number);
    let expected = [
        (json(0), json(8 << 20), json(3)),
        (json(8 << 20), json(1 << 20), json(0)),
        (json(9 << 20), json(15 << 20), json(3)),
    ];
    assert_eq!(extents, expected.each_ref().map(|(offset, len, kind)| (offset, len, kind)));
}

#[test]
fn nbdcopy_copies_in_and_out() {
    let Some(nbdcopy) = tool("nbdcopy") else { return };
    for cache in [Cache::Page, Cache::Direct] {
        let folder = folder_on_disk();
        let (source, disk, served) = scene(folder.path(), cache);
        run(Command::new(&nbdcopy).arg("--flush").arg(&source).arg(served.uri("disk")));
        assert!(fs::read(&disk).unwrap() == image(), "copied in, {cache:?}");
        let back = folder.path().join("back");
        run(Command::new(&nbdcopy).arg(served.uri("disk")).arg(&back));
        assert!(fs::read(&back).unwrap() == image(), "copied out, {cache:?}");
    }
}

#[test]
fn qemu_img_converts_and_compares() {
    let Some(qemu_img) = tool("qemu-img") else { return };
    let folder = folder();
    let (source, disk, served) = scene(folder.path(), Cache::Page);
    let uri = served.uri("disk");
    let qemu_img = |arguments: &[&str], files: &[&str]| {
        run(Command::new(&qemu_img).args(arguments).args(files));
    };
    let source = source.to_str().unwrap();
    let back = folder.path().join("back.qcow2");
    let back = back.to_str().unwrap();
    qemu_img(&["convert", "-n", "-W", "-m", "8", "-f", "raw", "-O", "raw"], &[source, &uri]);
    assert!(fs::read(&disk).unwrap() == image());
    qemu_img(&["info", "--output=json"], &[&uri]);
    qemu_img(&["compare", "-f", "raw", "-F", "raw"], &[source, &uri]);
    qemu_img(&["convert", "-f", "raw", "-O", "qcow2"], &[&uri, back]);
    qemu_img(&["compare", "-f", "raw", "-F", "qcow2"], &[source, back]);
}

#[test]
fn qemu_io_does_every_kind_of_request() {
    let Some(qemu_io) = tool("qemu-io") else { return };
    for cache in [Cache::Page, Cache::Direct] {
        let folder = folder_on_disk();
        let (_, _, served) = scene(folder.path(), cache);
        let commands = [
            "write -P 7 1000 5000",
            "read -P 7 1000 5000",
            "read -P 0 6000 1000",
            "flush",
            "write -z 4k 64k",
            "read -P 0 4k 64k",
            "write -z -u 1M 1M",
            "write -f -P 9 100 512",
            "read -P 9 100 512",
            "discard 4M 1M",
            "aio_write -P 3 8M 3M",
            "aio_write -P 4 12M 10M",
            "aio_flush",
            "read -P 3 8M 3M",
            "read -P 4 12M 10M",
            "map",
        ];
        let mut qemu_io = Command::new(&qemu_io);
        qemu_io.args(["-f", "raw"]);
        qemu_io.args(commands.iter().flat_map(|command| ["-c", command]));
        let said = run(qemu_io.arg(served.uri("disk")));
        assert!(!said.contains("failed") && !said.contains("rror"), "{cache:?}: {said}");
    }
}

#[test]
fn fio_finds_every_block_as_it_wrote_it() {
    let Some(fio) = tool("fio") else { return };
    let folder = folder();
    let (_, _, served) = scene(folder.path(), Cache::Page);
    for (depth, sizes) in [("1", "4k-4k"), ("16", "512-128k"), ("64", "4k-4k")] {
        let mut fio = Command::new(&fio);
        // Fio leaves a file of its state where it was started.
        fio.current_dir(folder.path()).arg("--verify_state_save=0");
        fio.args(["--name=v", "--ioengine=nbd", "--rw=randrw", "--size=16M", "--verify=crc32c"]);
        // Blocks of several lengths overlap; two writes of them at once may end in either order.
        fio.args(["--do_verify=1", "--verify_fatal=1", "--serialize_overlap=1", "--output-format=terse"]);
        fio.arg(format!("--iodepth={depth}")).arg(format!("--bsrange={sizes}"));
        run(fio.arg(format!("--uri={}", served.uri("disk"))));
    }
}
