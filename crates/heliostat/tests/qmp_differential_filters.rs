//! As `qmp_differential.rs`, for nodes that pass requests on: what `blkdebug`, `throttle`, `copy-on-read` and the null
//! drivers take, `preallocate`, and `throttle-group` objects.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod common;
mod qmp;

use common::qcow2::{qemu_img, try_qemu_img};
use qmp::Peer;
use qmp::transcript::Step::{self, Await, Differs, Do, Meanwhile};
use qmp::transcript::{Script, compare_on};
use serde_json::{Value, json};

fn compare(script: &Script) {
    let folder = common::folder();
    if try_qemu_img(folder.path(), &["--version"]).is_none() {
        return;
    }
    compare_on(script, |peer| {
        let make =
            |arguments: &[&str]| qemu_img(peer.folder(), &[&["create", "-q", "-f"], arguments].concat());
        peer.image("a", 1 << 20);
        make(&["qcow2", "q.qcow2", "1M"]);
        make(&["qcow2", "-b", "a", "-F", "raw", "over.qcow2"]);
        let config = |name: &str, text: &str| std::fs::write(peer.folder().join(name), text).unwrap();
        config("good", "# rules\n[inject-error]\nevent = \"read_aio\"\nerrno = \"28\"\n");
        config("event", "[inject-error]\nevent = \"zork\"\n");
        config("group", "[zork]\nevent = \"read_aio\"\n");
        config("none", "[inject-error]\nerrno = \"5\"\n");
        config("garbage", "garbage\n");
        config("form", "[inject-error]\nevent = \"read_aio\"\nerrno=\"5\"\n");
        config("key", "[inject-error]\nevent = \"read_aio\"\nzork = \"5\"\n");
        config("number", "[inject-error]\nevent = \"read_aio\"\nerrno = \"abc\"\n");
        config("flag", "[inject-error]\nevent = \"read_aio\"\nonce = \"abc\"\n");
        config("state", "[set-state]\nevent = \"read_aio\"\n");
    });
}

fn file() -> Value {
    json!({ "driver": "file", "filename": "DIR/a" })
}

fn with(mut options: Value, more: &Value) -> Step {
    for (key, value) in more.as_object().into_iter().flatten() {
        options[key] = value.clone();
    }
    Do("blockdev-add", options)
}

fn blkdebug(more: &Value) -> Step {
    with(json!({ "driver": "blkdebug", "node-name": "n", "image": file() }), more)
}

fn delete(node: &str) -> Step {
    Do("blockdev-del", json!({ "node-name": node }))
}

fn list() -> Step {
    Do("query-named-block-nodes", json!({ "flat": true }))
}

#[test]
fn fault_injectors_are_taken_and_refused_alike() {
    let mut script = Vec::new();
    for refused in [
        json!({ "align": 3 }),
        json!({ "align": 1_u64 << 31 }),
        json!({ "align": -1 }),
        json!({ "align": 512, "max-transfer": 100 }),
        json!({ "align": 4096, "max-transfer": 512 }),
        json!({ "align": 4096, "opt-write-zero": 512 }),
        json!({ "align": 4096, "max-write-zero": 512 }),
        json!({ "align": 4096, "opt-discard": 512 }),
        json!({ "align": 4096, "max-discard": 512 }),
        json!({ "align": "x" }),
        json!({ "inject-error": [{ "event": "zork" }] }),
        json!({ "inject-error": [{ "event": "read_aio", "iotype": "zork" }] }),
        json!({ "inject-error": { "event": "read_aio" } }),
        json!({ "inject-error": [{}] }),
        json!({ "inject-error": [{ "event": "read_aio", "zork": 1 }] }),
        json!({ "set-state": [{ "event": "read_aio" }] }),
        json!({ "take-child-perms": ["write"], "unshare-child-perms": ["zork"] }),
        json!({ "config": "/nonexistent" }),
        json!({ "config": "DIR/event" }),
        json!({ "config": "DIR/group" }),
        json!({ "config": "DIR/none" }),
        json!({ "config": "DIR/garbage" }),
        json!({ "config": "DIR/form" }),
        json!({ "config": "DIR/key" }),
        json!({ "config": "DIR/number" }),
        json!({ "config": "DIR/flag" }),
        json!({ "image": "zz" }),
        json!({ "image": null }),
        json!({ "zork": 1 }),
    ] {
        script.push(blkdebug(&refused));
    }
    for taken in [
        json!({}),
        json!({ "align": 0 }),
        json!({ "align": 4096, "max-transfer": 8192, "opt-discard": 65536 }),
        json!({ "max-transfer": 512 }),
        json!({ "config": "DIR/good" }),
        json!({ "config": "DIR/state" }),
        json!({ "inject-error": [{ "event": "read_aio", "errno": 99999, "sector": -1, "state": -5 }] }),
        json!({ "take-child-perms": ["write"], "unshare-child-perms": ["resize"] }),
    ] {
        script.extend([blkdebug(&taken), delete("n")]);
    }
    compare(&script);
}

#[test]
fn nodes_stand_on_each_other_alike() {
    let named = |driver: &str, node: &str, key: &str, below: &str| {
        Do("blockdev-add", json!({ "driver": driver, "node-name": node, key: below }))
    };
    let image = json!({ "driver": "file", "filename": "DIR/q.qcow2" });
    let script = vec![
        with(file(), &json!({ "node-name": "f" })),
        named("blkdebug", "n", "image", "f"),
        named("raw", "r", "file", "n"),
        list(),
        delete("f"),
        delete("n"),
        delete("r"),
        with(
            json!({ "driver": "raw", "node-name": "r", "file": "n" }),
            &json!({ "offset": 512, "size": 1024 }),
        ),
        delete("r"),
        blkdebug(&json!({ "node-name": "over", "image": "n" })),
        list(),
        delete("over"),
        delete("n"),
        delete("f"),
        Do(
            "blockdev-add",
            json!({
                "driver": "qcow2", "node-name": "q",
                "file": { "driver": "blkdebug", "node-name": "below", "image": image },
            }),
        ),
        delete("below"),
        named("blkdebug", "b2", "image", "q"),
        named("raw", "r3", "file", "b2"),
        delete("q"),
        delete("r3"),
        delete("b2"),
        delete("q"),
        list(),
    ];
    compare(&script);
}

#[test]
fn copy_on_read_is_taken_and_refused_alike() {
    let image = json!({
        "driver": "qcow2", "node-name": "over", "file": { "driver": "file", "filename": "DIR/over.qcow2" },
    });
    let add = |more: &Value| with(json!({ "driver": "copy-on-read", "node-name": "n", "file": image }), more);
    let mut given = image.clone();
    given["backing"] = json!({ "driver": "raw", "node-name": "bottom", "read-only": true, "file": file() });
    let script = vec![
        add(&json!({ "bottom": "zz" })),
        add(&json!({ "bottom": 5 })),
        add(&json!({ "read-only": true })),
        add(&json!({})),
        list(),
        delete("over"),
        delete("n"),
        add(&json!({ "file": given, "bottom": "bottom" })),
        delete("n"),
        add(&json!({ "file": file() })),
        delete("n"),
    ];
    compare(&script);
}

#[test]
fn nodes_over_nothing_are_taken_alike() {
    let mut script = Vec::new();
    for driver in ["null-co", "null-aio"] {
        for more in [
            json!({}),
            json!({ "size": 3000 }),
            json!({ "read-zeroes": true }),
            json!({ "latency-ns": 1000 }),
            json!({ "latency-ns": -1 }),
            json!({ "latency-ns": "1" }),
        ] {
            let add = with(json!({ "driver": driver, "node-name": "n" }), &more);
            script.extend([add, list(), delete("n")]);
        }
    }
    compare(&script);
}

fn object(id: &str, more: Value) -> Step {
    let mut options = json!({ "qom-type": "throttle-group", "id": id });
    for (key, value) in more.as_object().into_iter().flatten() {
        options[key] = value.clone();
    }
    Do("object-add", options)
}

fn get(path: &str, property: &str) -> Step {
    Do("qom-get", json!({ "path": path, "property": property }))
}

fn set(property: &str, value: Value) -> Step {
    Do("qom-set", json!({ "path": "g", "property": property, "value": value }))
}

fn refused_limits() -> Script {
    let limits = |limits: Value| object("x", json!({ "limits": limits }));
    vec![
        limits(json!({ "iops-total": -1 })),
        limits(json!({ "iops-total": 10, "iops-read": 5 })),
        limits(json!({ "bps-total-max": 10, "bps-write-max": 5 })),
        limits(json!({ "iops-total-max": 5 })),
        limits(json!({ "iops-total": 10, "iops-total-max": 5 })),
        limits(json!({ "iops-total": 10, "iops-total-max-length": 5 })),
        limits(json!({ "iops-total": 10_u64.pow(16) })),
        limits(json!({ "iops-total-max-length": 0 })),
        limits(json!({ "iops-total-max-length": 1_u64 << 33 })),
        limits(json!({ "bps-read": 1, "bps-read-max": 10_u64.pow(15), "bps-read-max-length": 5 })),
        limits(json!({ "iops-size": 10 })),
        limits(json!({ "zork": 0 })),
        limits(json!(5)),
        object("x", json!({ "x-iops-total": 50, "x-iops-read": 5 })),
        object("x", json!({ "x-zork": 5 })),
        object("x", json!({ "x-iops-total": -5 })),
        object("x", json!({ "x-iops-total-max-length": 0 })),
        object(
            "x",
            json!({ "x-iops-total-max-length": 1_u64 << 33, "x-iops-total": 1, "x-iops-total-max": 2 }),
        ),
        Do("object-add", json!({ "qom-type": "zork", "id": "x" })),
        Do("object-add", json!({ "qom-type": "throttle-group" })),
        object("1x", json!({})),
    ]
}

#[test]
fn throttle_groups_are_made_changed_and_refused_alike() {
    let mut script = refused_limits();
    script.extend([
        object("g", json!({})),
        object("g", json!({})),
        get("g", "limits"),
        get("/objects/g", "limits"),
        get("g", "type"),
        get("zork", "limits"),
        get("g", "zork"),
        set("limits", json!({ "iops-total": 100, "bps-total": 1_000_000 })),
        get("g", "limits"),
        set("limits", json!({ "iops-read": 7 })),
        set("limits", json!(5)),
        set("limits", json!({ "zork": 5 })),
        set("limits", json!({ "iops-total": "a" })),
        set("limits", json!({ "iops-total-max-length": 1_u64 << 33 })),
        get("g", "limits"),
        set("x-iops-total", json!(5)),
        get("g", "x-iops-total"),
        set("type", json!("a")),
        object("h", json!({ "x-iops-total": 50, "x-bps-total-max": 5, "x-bps-total": 2 })),
        get("h", "limits"),
        object("i", json!({ "limits": { "iops-total": 9 }, "x-iops-total": 50 })),
        get("i", "limits"),
        Do("object-del", json!({ "id": "zork" })),
        Do("object-del", json!({ "id": "i" })),
    ]);
    compare(&script);
}

#[test]
fn objects_are_found_by_their_paths_and_listed_alike() {
    let list = |path: &str| Do("qom-list", json!({ "path": path }));
    let mut script = vec![
        list("/objects"),
        object("g", json!({ "limits": { "iops-total": 9 } })),
        Do("qom-list", json!({})),
        Do("qom-list", json!({ "path": 5 })),
        Do("qom-list", json!({ "path": "/objects", "zork": 1 })),
        Do("qom-list", json!({ "path": "" })),
        Differs("qom-list", json!({ "path": "/" }), "chardevs and what is QEMU's own are not there"),
    ];
    let paths = [
        "",
        "/objects",
        "/objects/",
        "objects",
        "//objects",
        "/objects/g",
        "/objects//g",
        "/objects/g/",
        "objects/g",
        "g",
        "/g",
        "zork",
        "/zork",
        "/objects/zork",
        "/objects/g/limits",
        "g/limits",
        "/machine",
        "/objects/objects",
    ];
    for path in paths {
        script.extend([list(path), get(path, "type"), get(path, "limits"), get(path, "g")]);
    }
    script.extend([get("/", "type"), get("/", "objects"), get("/", "zork")]);
    for (path, property) in
        [("/objects", "type"), ("/objects", "g"), ("/objects", "zork"), ("/", "objects"), ("g", "zork")]
    {
        script.push(Do("qom-set", json!({ "path": path, "property": property, "value": 5 })));
    }
    script.extend([
        object("objects", json!({})),
        list("objects"),
        list("/objects/objects"),
        get("objects", "type"),
    ]);
    compare(&script);
}

#[test]
fn throttled_nodes_are_taken_and_keep_their_group_alike() {
    let throttle =
        |more: &Value| with(json!({ "driver": "throttle", "node-name": "n", "file": file() }), more);
    let script = vec![
        object("g", json!({ "limits": { "iops-total": 100 } })),
        throttle(&json!({ "throttle-group": "zork" })),
        throttle(&json!({})),
        throttle(&json!({ "throttle-group": "g" })),
        list(),
        Do("object-del", json!({ "id": "g" })),
        set("limits", json!({ "iops-total": 50 })),
        delete("n"),
        Do("object-del", json!({ "id": "g" })),
        Do("object-del", json!({ "id": "g" })),
    ];
    compare(&script);
}

/// A fault injector that asks for `take` below it, and lets others have all but `unshare`.
fn claiming(take: &Value, unshare: &Value) -> Step {
    let mut options = json!({ "driver": "blkdebug", "node-name": "n", "image": "below" });
    for (name, permissions) in [("take-child-perms", take), ("unshare-child-perms", unshare)] {
        if !permissions.is_null() {
            options[name] = permissions.clone();
        }
    }
    Do("blockdev-add", options)
}

#[test]
fn what_a_fault_injector_claims_below_it_keeps_readers_out_alike() {
    let reader = || Do("block-export-add", json!({ "type": "nbd", "id": "r", "node-name": "below" }));
    let all = json!(["consistent-read", "write", "write-unchanged", "resize"]);
    let single = all.as_array().unwrap().iter().map(|permission| json!([permission]));
    let lists: Vec<_> =
        single.chain([json!([]), json!(null), json!(["write", "write"]), all.clone()]).collect();
    let mut cases: Vec<_> = lists.iter().map(|list| (list.clone(), Value::Null)).collect();
    cases.extend(lists.iter().map(|list| (Value::Null, list.clone())));
    cases.push((all.clone(), all));
    for (take, unshare) in cases {
        let address = json!({ "addr": { "type": "unix", "data": { "path": "DIR/nbd" } } });
        let below = json!({ "driver": "file", "node-name": "below", "filename": "DIR/a" });
        compare(&vec![
            Do("nbd-server-start", address),
            Do("blockdev-add", below),
            reader(),
            claiming(&take, &unshare),
            delete("n"),
            Do("block-export-del", json!({ "id": "r" })),
            Step::Await("BLOCK_EXPORT_DELETED", "r"),
            claiming(&take, &unshare),
            list(),
            reader(),
            Do("query-block-exports", json!({})),
        ]);
    }
}

fn preallocate(more: &Value) -> Value {
    let mut options = json!({ "driver": "preallocate", "node-name": "p", "file": "f" });
    for (key, value) in more.as_object().into_iter().flatten() {
        options[key] = value.clone();
    }
    options
}

fn reopen(options: Value) -> Step {
    Do("blockdev-reopen", json!({ "options": [options] }))
}

#[test]
fn room_ahead_of_writes_is_taken_changed_and_refused_alike() {
    let add = |more: &Value| Do("blockdev-add", preallocate(more));
    let mut script = vec![
        Do("blockdev-add", json!({ "driver": "file", "node-name": "f", "filename": "DIR/a" })),
        Do("blockdev-add", json!({ "driver": "file", "node-name": "f2", "filename": "DIR/q.qcow2" })),
    ];
    for more in [
        json!({ "prealloc-align": 100 }),
        json!({ "prealloc-align": -512 }),
        json!({ "prealloc-align": "x" }),
        json!({ "prealloc-size": -1 }),
        json!({ "file": "zz" }),
        json!({ "zork": 1 }),
    ] {
        script.push(add(&more));
    }
    script.push(Do("blockdev-add", json!({ "driver": "preallocate", "node-name": "p" })));
    for more in [
        json!({}),
        json!({ "prealloc-align": 0, "prealloc-size": 0 }),
        json!({ "prealloc-align": 1536, "prealloc-size": 1_u64 << 62 }),
        json!({ "read-only": true }),
        json!({ "auto-read-only": true, "discard": "unmap", "detect-zeroes": "on" }),
    ] {
        script.extend([add(&more), list(), delete("f"), delete("p")]);
    }
    script.extend([
        add(&json!({})),
        Do("block_resize", json!({ "node-name": "p", "size": 2 << 20 })),
        list(),
        reopen(preallocate(&json!({ "prealloc-align": 100 }))),
        reopen(preallocate(&json!({ "file": file() }))),
        reopen(preallocate(&json!({ "read-only": true }))),
        list(),
        Do("block_resize", json!({ "node-name": "p", "size": 4 << 20 })),
        reopen(preallocate(&json!({ "prealloc-size": 1 << 20, "prealloc-align": 65536 }))),
        Do("block_resize", json!({ "node-name": "p", "size": 4 << 20 })),
        Differs(
            "blockdev-reopen",
            json!({ "options": [preallocate(&json!({}))] }),
            "what is not said goes back to its default, of every option",
        ),
        Differs(
            "blockdev-reopen",
            json!({ "options": [preallocate(&json!({ "file": "f2", "prealloc-size": 0, "prealloc-align": 512 }))] }),
            "in which file room is made stays",
        ),
    ]);
    compare(&script);
}

/// The file of the image `q.qcow2` is so long, and takes so much space.
fn file_is(what: &'static str, range: std::ops::Range<u64>) -> Step {
    Meanwhile(Box::new(move |peer: &Peer| {
        let file = std::fs::metadata(peer.folder().join("q.qcow2")).unwrap();
        let [len, space] = [file.len(), std::os::unix::fs::MetadataExt::blocks(&file) * 512];
        assert!(range.contains(&len) && range.contains(&space), "{what}: {len} bytes, {space} taken");
    }))
}

#[test]
fn an_image_finds_room_ahead_of_its_writes_and_leaves_none() {
    let guest = Meanwhile(Box::new(|peer: &Peer| {
        let uri = format!("nbd+unix:///q?socket={}", peer.folder().join("nbd").display());
        let mut command = std::process::Command::new("qemu-io");
        let written = command.args(["-f", "raw", "-c", "write 0 64k", &uri]);
        assert!(written.output().unwrap().status.success());
    }));
    let script = vec![
        Do("blockdev-add", json!({ "driver": "file", "node-name": "f", "filename": "DIR/q.qcow2" })),
        Do("blockdev-add", preallocate(&json!({}))),
        Do("blockdev-add", json!({ "driver": "qcow2", "node-name": "q", "file": "p" })),
        file_is("nothing written", 0..1 << 20),
        Do("nbd-server-start", json!({ "addr": { "type": "unix", "data": { "path": "DIR/nbd" } } })),
        Do("block-export-add", json!({ "type": "nbd", "id": "e", "node-name": "q", "writable": true })),
        guest,
        file_is("written", 128 << 20..192 << 20),
        Do("block_resize", json!({ "node-name": "p", "size": 3 << 20 })),
        Do("block-export-del", json!({ "id": "e", "mode": "hard" })),
        Await("BLOCK_EXPORT_DELETED", "e"),
        delete("q"),
        file_is("closed", 0..1 << 20),
        delete("p"),
        delete("f"),
    ];
    compare(&script);
}
