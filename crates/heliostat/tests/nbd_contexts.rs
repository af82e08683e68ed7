//! What clients may ask of ranges: offered on the command line, and the same for a client before and after the disk
//! has moved.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod common;

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Command, Stdio};

use common::process::Daemon;
use common::qcow2::{qemu_img, qemu_io};
use common::scene::Scene;
use common::{folder, heliostat, nbdsh, start_heliostat, tool, wait};
use serde_json::{Value, json};

const GRANULE: u64 = 64 << 10;

/// A chain of two images, the upper one with a bitmap that has heard of one write. Served, with `more` arguments.
fn serve(folder: &Path, more: &[&str]) -> (Daemon, String) {
    qemu_img(folder, &["create", "-q", "-f", "qcow2", "base.qcow2", "1M"]);
    qemu_io(folder, "base.qcow2", &["write -P 1 0 256k"]);
    qemu_img(folder, &["create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", "top.qcow2"]);
    qemu_img(folder, &["bitmap", "--add", "-g", "64k", "top.qcow2", "saved"]);
    qemu_io(folder, "top.qcow2", &["write -P 2 128k 64k"]);
    let socket = folder.join("nbd");
    let arguments = ["serve".into(), folder.join("top.qcow2"), "--nbd".into(), socket.clone()];
    let mut daemon = start_heliostat(arguments.iter().map(AsRef::as_ref).chain(more.iter().map(Path::new)));
    daemon.listens(&socket).unwrap();
    (daemon, format!("nbd+unix:///disk?socket={}", socket.display()))
}

/// What `nbdinfo` sees of a context: offset, length, type.
fn map(nbdinfo: &Path, uri: &str, context: &str) -> Vec<[u64; 3]> {
    let output = Command::new(nbdinfo).args(["--json", &format!("--map={context}"), uri]).output().unwrap();
    assert!(output.status.success(), "{context}: {output:?}");
    let extents: Vec<Value> = serde_json::from_slice(&output.stdout).unwrap();
    let numbers = |extent: &Value| ["offset", "length", "type"].map(|key| extent[key].as_u64().unwrap());
    extents.iter().map(numbers).collect()
}

#[test]
fn a_bitmap_and_the_depth_are_offered_on_the_command_line() {
    let (Some(nbdinfo), Some(_)) = (tool("nbdinfo"), tool("qemu-img")) else { return };
    let folder = folder();
    for more in [&["--read-only"][..], &[]] {
        let options = [more, &["--nbd-bitmap", "saved", "--nbd-allocation-depth"]].concat();
        let (daemon, uri) = serve(folder.path(), &options);
        let dirty = map(&nbdinfo, &uri, "qemu:dirty-bitmap:saved");
        assert_eq!(dirty, [[0, 2 * GRANULE, 0], [2 * GRANULE, GRANULE, 1], [3 * GRANULE, 13 * GRANULE, 0]]);
        let depth = map(&nbdinfo, &uri, "qemu:allocation-depth");
        let rest = [4 * GRANULE, 12 * GRANULE, 0];
        assert_eq!(depth, [[0, 2 * GRANULE, 2], [2 * GRANULE, GRANULE, 1], [3 * GRANULE, GRANULE, 2], rest]);
        assert!(daemon.stop().unwrap().success());
        for image in ["top.qcow2", "base.qcow2"] {
            std::fs::remove_file(folder.path().join(image)).unwrap();
        }
    }
}

#[test]
fn without_the_options_neither_is_offered_and_a_bitmap_that_is_not_there_is_said() {
    let (Some(nbdinfo), Some(_)) = (tool("nbdinfo"), tool("qemu-img")) else { return };
    let folder = folder();
    let (daemon, uri) = serve(folder.path(), &[]);
    let list = Command::new(nbdinfo).args(["--json", "--list", &uri]).output().unwrap();
    let list: Value = serde_json::from_slice(&list.stdout).unwrap();
    assert_eq!(list["exports"][0]["contexts"], json!(["base:allocation"]));
    assert!(daemon.stop().unwrap().success());
    let (image, socket) = (folder.path().join("top.qcow2"), folder.path().join("nbd"));
    let refused =
        heliostat([Path::new("serve"), &image, Path::new("--nbd"), &socket, Path::new("--nbd-bitmap=x")]);
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(!refused.status.success() && said.contains("'x'") && said.contains("heliostat info"), "{said}");
}

/// A client that stays, and asks for the bitmap's ranges whenever it is told to.
const ASKS: &str = "
import sys
h.add_meta_context('qemu:dirty-bitmap:b')
h.connect_uri(sys.stdin.readline().strip())
while sys.stdin.readline():
    seen = []
    def told(name, offset, entries, error):
        for length, flags in zip(entries[::2], entries[1::2]):
            seen.append([offset, length, flags])
            offset += length
    h.block_status(h.get_size(), 0, told)
    print(seen, flush=True)
";

#[test]
fn a_client_sees_the_same_bitmap_before_and_after_the_pivot() {
    let Some(mut nbdsh) = nbdsh() else { return };
    let Some(mut scene) = Scene::new() else { return };
    scene.img(&["create", "-q", "-f", "qcow2", "s.qcow2", "1M"]);
    scene.img(&["create", "-q", "-f", "qcow2", "t.qcow2", "1M"]);
    scene.add("s", "s.qcow2", json!({}));
    scene.add("t", "t.qcow2", json!({}));
    let bitmap = json!({ "node": "s", "name": "b", "granularity": GRANULE, "persistent": true });
    scene.execute("block-dirty-bitmap-add", bitmap);
    let socket = scene.path().join("nbd");
    let address = json!({ "addr": { "type": "unix", "data": { "path": socket } } });
    scene.execute("nbd-server-start", address);
    scene.execute(
        "block-export-add",
        json!({
            "type": "nbd", "id": "e", "node-name": "s", "name": "d", "writable": true, "bitmaps": ["b"],
        }),
    );
    let uri = format!("nbd+unix:///d?socket={}", socket.display());
    scene.guest(&uri, &["write -P 1 128k 64k"]);

    let mut client = nbdsh.args(["-c", ASKS]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let mut orders = client.stdin.take().unwrap();
    let mut answers = BufReader::new(client.stdout.take().unwrap()).lines();
    writeln!(orders, "{uri}").unwrap();
    let mut asked = || -> Value {
        writeln!(orders, "go").unwrap();
        serde_json::from_str(&answers.next().expect("the client is there").unwrap()).unwrap()
    };
    assert_eq!(asked(), json!([[0, 131_072, 0], [131_072, 65536, 1], [196_608, 851_968, 0]]));
    scene.mirror(json!({}));
    scene.qmp.wait_event("BLOCK_JOB_READY", wait::LIMIT).unwrap();
    scene.guest(&uri, &["write -P 2 512k 64k"]);
    let both = json!([
        [0, 131_072, 0],
        [131_072, 65536, 1],
        [196_608, 327_680, 0],
        [524_288, 65536, 1],
        [589_824, 458_752, 0]
    ]);
    assert_eq!(asked(), both);
    scene.complete_now();
    assert_eq!(asked(), both, "after the pivot");
    // What is written on the target is heard of.
    scene.guest(&uri, &["write -P 3 0 64k"]);
    assert_eq!(asked()[0], json!([0, 65536, 1]));
    drop(orders);
    assert!(client.wait().unwrap().success());
    scene.end();
}
