//! As `qmp_differential.rs`, for `transaction`.
//!
//! QEMU's daemon ends with a fault when a transaction has to take back the action of switching a bitmap on that is not
//! there, or a merge of no bitmaps: these are tried on ours alone.

mod common;
mod qmp;

use common::qcow2::qemu_img;
use qmp::transcript::Step::{self, Do};
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

fn compare(mut script: Vec<Step>) {
    script.insert(0, open("b"));
    script.insert(0, open("a"));
    compare_on(&script, |peer| {
        for image in ["a.qcow2", "b.qcow2"] {
            qemu_img(peer.folder(), &["create", "-q", "-f", "qcow2", image, "1M"]);
        }
    });
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
        all(&[bitmap("add", "a", "z", &none), json!({ "type": "abort", "data": {} })]),
        all(&[json!({ "type": "abort", "data": {} })]),
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
