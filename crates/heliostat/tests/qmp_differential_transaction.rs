//! As `qmp_differential.rs`, for `transaction`.
//!
//! QEMU's daemon ends with a fault when a transaction has to take back the action of switching a bitmap on that is not
//! there, or a merge of no bitmaps: these are tried on ours alone.

mod common;
mod qmp;

use std::process::Command;

use common::qcow2::qemu_img;
use qmp::transcript::Step::{self, Do, Meanwhile};
use qmp::transcript::compare_on;
use serde_json::{Value, json};

fn open(node: &str) -> Step {
    let file = json!({ "driver": "file", "filename": format!("DIR/{node}.qcow2") });
    Do("blockdev-add", json!({ "driver": "qcow2", "node-name": node, "file": file }))
}

fn bitmap(verb: &str, node: &str, name: &str, more: &Value) -> Value {
    let mut data = json!({ "node": node, "name": name });
    for (key, value) in more.as_object().into_iter().flatten() {
        data[key] = value.clone();
    }
    json!({ "type": format!("block-dirty-bitmap-{verb}"), "data": data })
}

fn merge(node: &str, target: &str, bitmaps: Value) -> Value {
    json!({ "type": "block-dirty-bitmap-merge", "data": { "node": node, "target": target, "bitmaps": bitmaps } })
}

fn all(actions: &[Value]) -> Step {
    Do("transaction", json!({ "actions": actions }))
}

fn list() -> Step {
    Do("query-named-block-nodes", json!({ "flat": true }))
}

const IMAGES: [&str; 4] = ["a", "b", "o", "p"];

fn compare(script: Vec<Step>) {
    let script: Vec<Step> = IMAGES.iter().map(|node| open(node)).chain(script).collect();
    compare_on(&script, |peer| {
        for image in IMAGES {
            qemu_img(peer.folder(), &["create", "-q", "-f", "qcow2", &format!("{image}.qcow2"), "1M"]);
        }
    });
}

fn snapshot(node: &str, overlay: &str) -> Value {
    json!({ "type": "blockdev-snapshot", "data": { "node": node, "overlay": overlay } })
}

/// Onto a new overlay, named as its file is.
fn snapshot_to(node: &str, file: &str) -> Value {
    named_snapshot_to(
        &json!({ "node-name": node, "snapshot-node-name": file, "snapshot-file": format!("DIR/{file}") }),
    )
}

fn named_snapshot_to(data: &Value) -> Value {
    json!({ "type": "blockdev-snapshot-sync", "data": data })
}

fn abort() -> Value {
    json!({ "type": "abort", "data": {} })
}

fn exports() -> Step {
    Do("query-block-exports", json!({}))
}

fn with_exports(script: Vec<Step>) -> Vec<Step> {
    let start = Do("nbd-server-start", json!({ "addr": { "type": "unix", "data": { "path": "DIR/nbd" } } }));
    let export = |node: &str| {
        let id = format!("e{node}");
        Do(
            "block-export-add",
            json!({ "type": "nbd", "id": id, "name": id, "node-name": node, "writable": true }),
        )
    };
    std::iter::once(start).chain(["a", "b"].map(export)).chain(script).collect()
}

#[test]
fn all_of_it_is_done_or_nothing() {
    let none = json!({});
    compare(vec![
        all(&[
            bitmap("add", "a", "x", &none),
            bitmap("add", "a", "y", &json!({ "disabled": true, "persistent": true })),
            bitmap("add", "b", "x", &json!({ "granularity": 4096 })),
            merge("a", "y", json!(["x", { "node": "b", "name": "x" }])),
            bitmap("clear", "a", "x", &none),
            bitmap("enable", "a", "y", &none),
            bitmap("disable", "b", "x", &none),
        ]),
        list(),
        all(&[bitmap("add", "a", "z", &none), bitmap("add", "a", "x", &none)]),
        all(&[bitmap("add", "a", "z", &none), bitmap("clear", "zz", "x", &none)]),
        all(&[bitmap("add", "a", "z", &none), merge("a", "z", json!(["nope"]))]),
        all(&[bitmap("disable", "a", "x", &none), bitmap("remove", "a", "nope", &none)]),
        all(&[bitmap("add", "a", "z", &none), abort()]),
        all(&[abort()]),
        list(),
        all(&[bitmap("remove", "a", "x", &none), bitmap("add", "a", "x", &none)]),
        all(&[bitmap("remove", "a", "x", &none), bitmap("clear", "a", "x", &none)]),
        list(),
        all(&[bitmap("remove", "a", "x", &none), bitmap("disable", "a", "y", &none)]),
        all(&[]),
        list(),
    ]);
}

#[test]
fn arguments_are_refused_in_the_same_words() {
    let none = json!({});
    let x = || bitmap("add", "a", "x", &none);
    let with = |properties: Value| Do("transaction", json!({ "actions": [x()], "properties": properties }));
    compare(vec![
        Do("transaction", json!({})),
        Do("transaction", json!({ "actions": 5 })),
        all(&[json!(5)]),
        all(&[json!({})]),
        all(&[json!({ "type": 5 })]),
        all(&[json!({ "type": "nope", "data": {} })]),
        all(&[json!({ "type": "block-dirty-bitmap-add" })]),
        all(&[json!({ "data": {} })]),
        all(&[json!({ "type": "block-dirty-bitmap-add", "data": { "node": "a" } })]),
        all(&[json!({ "type": "block-dirty-bitmap-add", "data": { "node": "a", "name": "x" }, "foo": 1 })]),
        all(&[bitmap("add", "a", "x", &json!({ "foo": 2 }))]),
        Do("transaction", json!({ "actions": [], "foo": 1 })),
        Do("transaction", json!({ "actions": [], "properties": 1 })),
        Do("transaction", json!({ "actions": [], "properties": {} })),
        Do("transaction", json!({ "actions": [], "properties": { "completion-mode": "grouped" } })),
        with(json!({ "completion-mode": "zork" })),
        with(json!({ "foo": 1 })),
        with(json!({ "completion-mode": "grouped" })),
        with(json!({ "completion-mode": "individual" })),
        list(),
    ]);
}

#[test]
fn snapshots_of_several_nodes_are_taken_or_none() {
    let none = json!({});
    compare(with_exports(vec![
        all(&[snapshot("a", "o"), snapshot("b", "zz")]),
        all(&[snapshot("a", "o"), snapshot("zz", "p")]),
        all(&[snapshot("a", "o"), bitmap("clear", "b", "nope", &none)]),
        all(&[snapshot("a", "o"), snapshot("b", "p"), abort()]),
        all(&[bitmap("add", "b", "x", &none), snapshot("a", "o"), snapshot("b", "o")]),
        all(&[snapshot("a", "o"), snapshot("o", "o")]),
        all(&[snapshot("a", "o"), snapshot("a", "o")]),
        all(&[snapshot("a", "o"), snapshot("a", "p")]),
        list(),
        exports(),
        all(&[snapshot("a", "o"), bitmap("add", "o", "x", &none), snapshot("b", "p")]),
        exports(),
        list(),
        all(&[snapshot("o", "a"), snapshot("b", "p")]),
        Do("blockdev-del", json!({ "node-name": "a" })),
        Do("block-export-del", json!({ "id": "ea" })),
    ]));
}

/// A guest of the export of `node` writes.
fn write(node: &'static str, what: &'static str) -> Step {
    Meanwhile(Box::new(move |peer| {
        let uri = format!("nbd+unix:///e{node}?socket={}/nbd", peer.folder().display());
        let output = Command::new("qemu-io").args(["-f", "raw", "-c", what, &uri]).output();
        assert!(output.expect("the test has looked for it").status.success());
    }))
}

/// As libvirt keeps its checkpoints over a snapshot: the overlay gets bitmaps of the names that its base has, and a
/// backup takes what both say.
#[test]
fn bitmaps_stay_on_the_node_that_guests_leave_and_others_of_their_names_go_on_above_it() {
    let (none, kept) = (json!({}), json!({ "persistent": true }));
    compare(with_exports(vec![
        all(&[bitmap("add", "a", "x", &none), bitmap("add", "a", "off", &json!({ "disabled": true }))]),
        write("a", "write 0 64k"),
        list(),
        all(&[
            bitmap("add", "o", "x", &none),
            snapshot("a", "o"),
            bitmap("add", "o", "y", &none),
            bitmap("add", "a", "late", &none),
        ]),
        list(),
        write("a", "write 128k 64k"),
        list(),
        all(&[
            bitmap("add", "o", "all", &json!({ "disabled": true })),
            merge("o", "all", json!([{ "node": "a", "name": "x" }, { "node": "o", "name": "x" }])),
        ]),
        list(),
        all(&[bitmap("clear", "a", "x", &none), bitmap("disable", "a", "late", &none)]),
        all(&[bitmap("remove", "a", "off", &none)]),
        list(),
        // What an image keeps stays as it is.
        all(&[bitmap("add", "b", "kept", &kept), bitmap("add", "b", "passing", &none)]),
        write("b", "write 0 64k"),
        all(&[snapshot("b", "p"), bitmap("add", "p", "kept", &kept)]),
        all(&[bitmap("clear", "b", "kept", &none)]),
        all(&[bitmap("remove", "b", "kept", &none)]),
        all(&[merge("b", "kept", json!(["passing"]))]),
        all(&[merge("b", "passing", json!(["kept"]))]),
        all(&[merge("p", "kept", json!([{ "node": "b", "name": "kept" }]))]),
        all(&[bitmap("add", "p", "passing", &none), bitmap("remove", "b", "passing", &none)]),
    ]));
}

#[test]
fn a_snapshot_of_an_overlay_of_the_same_transaction_stands_on_that() {
    compare(with_exports(vec![
        all(&[snapshot("a", "o"), snapshot("o", "a")]),
        all(&[snapshot("a", "o"), snapshot("b", "a")]),
        all(&[snapshot("a", "o"), snapshot("o", "p")]),
        exports(),
        all(&[snapshot_to("p", "n"), snapshot_to("b", "m"), snapshot_to("n", "n2")]),
        exports(),
    ]));
}

#[test]
fn nodes_of_nobodys_use_are_refused_in_the_same_words() {
    compare(vec![
        all(&[snapshot("a", "o"), snapshot("b", "o")]),
        all(&[snapshot("a", "o"), snapshot("o", "a")]),
        all(&[snapshot("a", "o"), snapshot("o", "o")]),
        all(&[snapshot("a", "o"), bitmap("add", "b", "z", &json!({})), snapshot("o", "p")]),
        list(),
    ]);
}

#[test]
fn snapshots_that_make_their_overlays_are_taken_or_none() {
    let none = json!({});
    compare(with_exports(vec![
        all(&[snapshot_to("a", "n"), snapshot_to("zz", "m")]),
        all(&[
            snapshot_to("a", "n"),
            named_snapshot_to(&json!({ "device": "zz", "snapshot-file": "DIR/m" })),
        ]),
        all(&[snapshot_to("a", "n"), named_snapshot_to(&json!({ "snapshot-file": "DIR/m" }))]),
        all(&[
            snapshot_to("a", "n"),
            named_snapshot_to(&json!({ "node-name": "b", "snapshot-file": "DIR/m" })),
        ]),
        all(&[snapshot_to("a", "n"), snapshot_to("b", "n")]),
        all(&[snapshot_to("a", "n"), snapshot_to("b", "a")]),
        all(&[snapshot_to("a", "n"), snapshot_to("a", "m")]),
        all(&[snapshot_to("a", "n"), snapshot_to("b", "none/m")]),
        all(&[
            snapshot_to("a", "n"),
            named_snapshot_to(&json!({
                "node-name": "b", "snapshot-node-name": "m", "snapshot-file": "DIR/n",
            })),
        ]),
        all(&[
            snapshot_to("a", "n"),
            named_snapshot_to(&json!({
                "node-name": "b", "snapshot-node-name": "m", "snapshot-file": "DIR/m", "format": "zork",
            })),
        ]),
        all(&[
            snapshot_to("a", "n"),
            named_snapshot_to(&json!({
                "node-name": "b", "snapshot-node-name": "m", "snapshot-file": "DIR/nope", "mode": "existing",
            })),
        ]),
        all(&[snapshot_to("a", "n"), snapshot_to("b", "m"), abort()]),
        all(&[snapshot_to("a", "n"), bitmap("add", "n", "x", &none), bitmap("clear", "n", "y", &none)]),
        exports(),
        list(),
        all(&[
            snapshot_to("a", "n3"),
            snapshot_to("b", "m3"),
            bitmap("add", "n3", "x", &none),
            bitmap("add", "m3", "x", &none),
        ]),
        exports(),
        all(&[snapshot_to("a", "n4")]),
    ]));
}

#[test]
fn a_snapshots_arguments_are_refused_in_the_same_words() {
    let grouped = |action: Value| {
        let properties = json!({ "completion-mode": "grouped" });
        Do("transaction", json!({ "actions": [action], "properties": properties }))
    };
    compare(vec![
        all(&[snapshot("a", "o"), json!({ "type": "blockdev-snapshot", "data": { "node": "b" } })]),
        all(&[
            snapshot("a", "o"),
            json!({ "type": "blockdev-snapshot", "data": { "node": "b", "overlay": 5 } }),
        ]),
        all(&[named_snapshot_to(&json!({ "node-name": "a" }))]),
        all(&[named_snapshot_to(&json!({ "node-name": "a", "snapshot-file": "DIR/n", "mode": "zork" }))]),
        grouped(snapshot("a", "o")),
        grouped(snapshot_to("a", "n")),
        list(),
    ]);
}

/// Numbers that a seed leads to.
struct Drawn(u64);

impl Drawn {
    fn below(&mut self, count: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        usize::try_from((self.0 >> 33) % u64::try_from(count).expect("small")).expect("less than the count")
    }
}

/// Transactions of some actions each, on nodes that are there, that some of them make, and that are not there. The node
/// that is left is always of a chain that somebody uses: of others ours lets none go into the middle.
fn drawn_transactions(seed: u64) -> Vec<Step> {
    let mut drawn = Drawn(seed);
    let mut nodes: Vec<String> = ["a", "b", "zz"].map(str::to_owned).into();
    let mut script = Vec::new();
    for round in 0..14 {
        let mut actions = Vec::new();
        for index in 0..=drawn.below(3) {
            let node = nodes[drawn.below(nodes.len())].clone();
            let overlay = match drawn.below(4) {
                0 => nodes[drawn.below(nodes.len())].as_str(),
                1 => IMAGES[drawn.below(2)],
                _ => IMAGES[2 + drawn.below(2)],
            };
            let new = format!("n{round}-{index}");
            actions.push(match drawn.below(9) {
                0..=3 => snapshot(&node, overlay),
                4..=6 => {
                    nodes.push(new.clone());
                    snapshot_to(&node, &new)
                }
                7 => bitmap("add", &node, &new, &json!({})),
                _ => abort(),
            });
        }
        script.extend([all(&actions), exports()]);
    }
    script
}

#[test]
fn drawn_transactions_are_taken_and_refused_alike() {
    for seed in 0..12 {
        eprintln!("seed {seed}");
        compare(with_exports(drawn_transactions(seed)));
    }
}
