//! What queries answer, ours and `qemu-storage-daemon`'s side by side, with the order of the keys: nodes, statistics,
//! the graph, jobs.
//!
//! Meant to differ: QEMU's daemon counts nothing for its exports, ours does, and lists them in `query-blockstats`; a
//! mirror here has no filter node.

mod common;
mod qmp;

use std::process::Command;

use common::qcow2::qemu_img;
use qmp::wire::Wire;
use qmp::{Peer, Whose};
use serde_json::{Value, json};

/// Both, or `None` where there is no QEMU.
fn both() -> Option<[Peer; 2]> {
    common::tool("qemu-img")?;
    Some([Peer::qemu()?, Peer::ours()])
}

/// A value as text with its keys as they came, without what differs from run to run: folders and generated names.
fn plain(peer: &Peer, value: &Value) -> String {
    let text = value.to_string().replace(&peer.folder().to_string_lossy().into_owned(), "DIR");
    let mut parts = text.split("#block");
    let first = parts.next().unwrap_or_default().to_owned();
    parts.fold(first, |text, part| text + "#block" + part.trim_start_matches(|c: char| c.is_ascii_digit()))
}

/// Fails where two answers differ, with what stands around the first difference.
fn assert_same(ours: &str, theirs: &str) {
    let at = ours.bytes().zip(theirs.bytes()).take_while(|(ours, theirs)| ours == theirs).count();
    let around = |text: &str| text.chars().skip(at.saturating_sub(200)).take(400).collect::<String>();
    assert!(ours == theirs, "they differ around\n  ours: {}\n  qemu: {}", around(ours), around(theirs));
}

/// Says each command; all must succeed. QEMU's daemon takes one client at a time.
fn set_up(peer: &Peer, wire: &mut Wire, commands: &[(&str, Value)]) {
    for (command, arguments) in commands {
        let arguments = arguments.to_string().replace("DIR", &peer.folder().to_string_lossy());
        let arguments = serde_json::from_str(&arguments).expect("JSON still");
        let reply = wire.execute(command, &arguments);
        assert_eq!(reply, json!({ "return": {} }), "{:?}: {command} {arguments}", peer.whose());
    }
}

fn file(name: &str) -> Value {
    json!({ "driver": "file", "filename": format!("DIR/{name}"), "node-name": format!("{name}-file") })
}

/// A raw disk, a chain of images, an image with a data file, one that is only read, and exports of them.
fn furnished(peer: &Peer) -> Wire {
    let folder = peer.folder();
    peer.image("raw", 1 << 20);
    qemu_img(folder, &["create", "-q", "-f", "qcow2", "base", "1M"]);
    qemu_img(folder, &["create", "-q", "-f", "qcow2", "-b", "base", "-F", "qcow2", "middle"]);
    qemu_img(folder, &["create", "-q", "-f", "qcow2", "-b", "middle", "-F", "qcow2", "top"]);
    qemu_img(folder, &["create", "-q", "-f", "qcow2", "-o", "data_file=bytes", "outside", "1M"]);
    qemu_img(folder, &["create", "-q", "-f", "qcow2", "-o", "lazy_refcounts=on", "alone", "1M"]);
    qemu_img(folder, &["snapshot", "-c", "once", "middle"]);
    qemu_img(folder, &["bitmap", "--add", "top", "first"]);
    qemu_img(folder, &["bitmap", "--add", "top", "second"]);
    let mut wire = Wire::negotiated(&peer.socket());
    set_up(
        peer,
        &mut wire,
        &[
            ("blockdev-add", json!({ "driver": "raw", "node-name": "raw", "file": file("raw") })),
            ("blockdev-add", json!({ "driver": "qcow2", "node-name": "top", "file": file("top") })),
            (
                "blockdev-add",
                json!({
                    "driver": "qcow2", "node-name": "outside", "file": file("outside"), "data-file": file("bytes"),
                }),
            ),
            (
                "blockdev-add",
                json!({ "driver": "qcow2", "node-name": "alone", "read-only": true, "file": file("alone") }),
            ),
            ("nbd-server-start", json!({ "addr": { "type": "unix", "data": { "path": "DIR/nbd" } } })),
            ("block-export-add", json!({ "type": "nbd", "id": "e0", "node-name": "raw", "writable": true })),
            ("block-export-add", json!({ "type": "nbd", "id": "e1", "node-name": "top", "writable": true })),
            ("block-export-add", json!({ "type": "nbd", "id": "e2", "node-name": "alone" })),
            (
                "block-export-add",
                json!({ "type": "nbd", "id": "e3", "node-name": "outside", "writable": true }),
            ),
            ("block-export-add", json!({ "type": "nbd", "id": "e4", "node-name": "raw", "name": "again" })),
        ],
    );
    wire
}

/// What both answer to a query that is asked of what [`furnished`] makes, after `guest` has been at it.
fn answers(query: &str, arguments: Value, guest: &[(&str, &[&str])]) -> Option<[(Value, String); 2]> {
    let answers = both()?.map(|peer| {
        let mut wire = furnished(&peer);
        for (export, commands) in guest {
            qemu_io(&peer, export, commands);
        }
        let answer = wire.execute(query, &arguments)["return"].clone();
        let plain = plain(&peer, &answer);
        (answer, plain)
    });
    Some(answers)
}

/// A guest's requests; some may be refused.
fn qemu_io(peer: &Peer, export: &str, commands: &[&str]) {
    let program = common::tool("qemu-io").expect("it comes with qemu-img");
    let mut command = Command::new(program);
    command.args(["-f", "raw"]);
    for step in commands {
        command.args(["-c", step]);
    }
    let socket = peer.folder().join("nbd");
    command.arg(format!("nbd+unix:///{export}?socket={}", socket.display()));
    let output = command.output().expect("it was found");
    assert!(output.status.success(), "{output:?}");
}

/// Takes the numbers out of what depends on the file system, or is counted by one of both only.
fn without_numbers(value: &mut Value, keys: &[&str]) {
    match value {
        Value::Object(map) => {
            for (key, value) in map.iter_mut() {
                if keys.contains(&key.as_str()) {
                    *value = json!("some");
                }
                without_numbers(value, keys);
            }
        }
        Value::Array(list) => list.iter_mut().for_each(|value| without_numbers(value, keys)),
        _ => {}
    }
}

#[test]
fn nodes_are_described_with_their_keys_in_the_same_order() {
    for flat in [true, false] {
        let Some([theirs, ours]) = answers("query-named-block-nodes", json!({ "flat": flat }), &[]) else {
            return;
        };
        let plain = |(mut answer, _): (Value, String)| {
            without_numbers(
                &mut answer,
                &[
                    "date-sec",
                    "date-nsec",
                    "actual-size",
                    "filename",
                    "full-backing-filename",
                    "file",
                    "backing_file",
                ],
            );
            let text = answer.to_string();
            let mut parts = text.split("#block").map(str::to_owned);
            let first = parts.next().unwrap_or_default();
            parts.fold(first, |text, part| text + part.trim_start_matches(|c: char| c.is_ascii_digit()))
        };
        assert_same(&plain(ours), &plain(theirs));
    }
}

#[test]
fn a_raw_node_of_which_more_than_its_file_was_said_is_named_by_that() {
    let Some(peers) = both() else { return };
    let windows = [
        json!({}),
        json!({ "offset": 0 }),
        json!({ "size": 1 << 20 }),
        json!({ "offset": 0, "size": 1 << 20 }),
        json!({ "offset": 4096, "size": 65536 }),
    ];
    let [theirs, ours] = peers.map(|peer| {
        peer.image("raw", 1 << 20);
        qemu_img(peer.folder(), &["create", "-q", "-f", "qcow2", "-b", "raw", "-F", "raw", "top", "1M"]);
        let mut wire = Wire::negotiated(&peer.socket());
        set_up(&peer, &mut wire, &[("object-add", json!({ "qom-type": "throttle-group", "id": "g" }))]);
        let mut said = Vec::new();
        for window in &windows {
            let mut raw = json!({ "driver": "raw", "node-name": "n", "file": file("raw") });
            raw.as_object_mut().unwrap().extend(window.as_object().unwrap().clone());
            let on = [
                json!({ "driver": "qcow2", "node-name": "on", "file": file("top"), "backing": "n" }),
                json!({ "driver": "throttle", "node-name": "on", "throttle-group": "g", "file": "n" }),
            ];
            for on in on {
                set_up(&peer, &mut wire, &[("blockdev-add", raw.clone()), ("blockdev-add", on)]);
                let nodes = wire.execute("query-named-block-nodes", &json!({ "flat": true }));
                said.push(plain(&peer, &nodes));
                let remove = |node: &str| ("blockdev-del", json!({ "node-name": node }));
                set_up(&peer, &mut wire, &[remove("on"), remove("n")]);
            }
        }
        said
    });
    for (ours, theirs) in ours.iter().zip(&theirs) {
        assert_same(ours, theirs);
    }
    assert!(theirs[2].contains("\\\"offset\\\": 0"), "{}", theirs[2]);
}

#[test]
fn nodes_are_counted_with_the_same_keys_and_know_where_the_highest_write_ended() {
    let guest: [(&str, &[&str]); 1] = [("raw", &["write 0 64k", "write 300k 4k", "read 0 1M", "flush"])];
    let Some([mut theirs, mut ours]) = answers("query-blockstats", json!({ "query-nodes": true }), &guest)
        .map(|both| both.map(|(answer, _)| answer))
    else {
        return;
    };
    let raw = |answer: &Value| {
        let of = |name: &str| answer.as_array()?.iter().find(|entry| entry["node-name"] == name).cloned();
        (of("raw").expect("it is listed"), of("raw-file").expect("it is listed"))
    };
    for answer in [&theirs, &ours] {
        let (node, file) = raw(answer);
        assert_eq!(node["stats"]["wr_highest_offset"], 304 << 10);
        assert_eq!(file["stats"]["wr_highest_offset"], 304 << 10);
        assert_eq!(node["parent"], file);
    }
    let stats = raw(&ours).0["stats"].clone();
    assert_eq!(stats["wr_operations"], 2);
    assert_eq!(stats["wr_bytes"], 68 << 10);
    assert_eq!(stats["rd_bytes"], 1 << 20);
    assert!(stats["flush_operations"].as_u64() > Some(0));
    assert!(stats["wr_total_time_ns"].as_u64() > Some(0));
    // QEMU counts devices' requests only.
    let counted =
        ["rd", "wr", "flush"].map(|kind| format!("{kind}_operations,{kind}_bytes,{kind}_total_time_ns"));
    let counted = counted.join(",");
    let counted: Vec<_> = counted.split(',').collect();
    for answer in [&mut theirs, &mut ours] {
        without_numbers(answer, &counted);
    }
    let plain = |answer: &Value| {
        let text = answer.to_string();
        let mut parts = text.split("#block").map(str::to_owned);
        let first = parts.next().unwrap_or_default();
        parts.fold(first, |text, part| text + part.trim_start_matches(|c: char| c.is_ascii_digit()))
    };
    assert_same(&plain(&ours), &plain(&theirs));
}

#[test]
fn an_image_knows_how_far_its_file_was_written() {
    let guest: [(&str, &[&str]); 2] = [("top", &["write 0 128k"]), ("outside", &["write 512k 64k"])];
    let Some(both) = answers("query-blockstats", json!({ "query-nodes": true }), &guest) else { return };
    for (answer, _) in both {
        let end = |name: &str| {
            let entry = answer.as_array().unwrap().iter().find(|entry| entry["node-name"] == name);
            entry.expect("it is listed")["stats"]["wr_highest_offset"].as_u64().expect("a number")
        };
        assert_eq!(end("top"), 128 << 10);
        assert!(end("top-file") >= 128 << 10, "{answer}");
        assert_eq!(end("bytes-file"), 576 << 10);
    }
}

#[test]
fn exports_are_counted_across_a_pivot() {
    if common::tool("qemu-io").is_none() {
        return;
    }
    let peer = Peer::ours();
    peer.image("source", 1 << 20);
    peer.image("target", 1 << 20);
    let mut wire = Wire::negotiated(&peer.socket());
    set_up(
        &peer,
        &mut wire,
        &[
            ("blockdev-add", json!({ "driver": "raw", "node-name": "source", "file": file("source") })),
            ("blockdev-add", json!({ "driver": "raw", "node-name": "target", "file": file("target") })),
            ("nbd-server-start", json!({ "addr": { "type": "unix", "data": { "path": "DIR/nbd" } } })),
            (
                "block-export-add",
                json!({ "type": "nbd", "id": "e", "node-name": "source", "name": "disk", "writable": true }),
            ),
        ],
    );
    qemu_io(&peer, "disk", &["write 0 64k"]);
    let mirror = json!({ "job-id": "j", "device": "source", "target": "target", "sync": "full" });
    assert_eq!(wire.execute("blockdev-mirror", &mirror), json!({ "return": {} }));
    while wire.next()["event"] != "BLOCK_JOB_READY" {}
    assert_eq!(wire.execute("job-complete", &json!({ "id": "j" })), json!({ "return": {} }));
    while wire.next()["data"]["status"] != "null" {}
    qemu_io(&peer, "disk", &["write 0 64k", "read 0 4k", "discard 0 64k"]);
    let reply = wire.execute("query-blockstats", &json!({}));
    let export = &reply["return"][0];
    assert_eq!([&export["export"], &export["node-name"]], [&json!("e"), &json!("target")]);
    assert_eq!(export["stats"]["wr_operations"], 2);
    assert_eq!(export["stats"]["wr_bytes"], 128 << 10);
    assert_eq!(export["stats"]["rd_bytes"], 4096);
    assert_eq!(export["stats"]["unmap_operations"], 1);
    let nodes = wire.execute("query-blockstats", &json!({ "query-nodes": true }));
    let of = |name: &str| {
        let entry = nodes["return"].as_array().unwrap().iter().find(|entry| entry["node-name"] == name);
        entry.expect("it is listed")["stats"].clone()
    };
    assert_eq!(of("source")["wr_bytes"], 64 << 10);
    assert!(
        of("target")["wr_bytes"].as_u64() >= Some((1 << 20) + (64 << 10)),
        "the mirror's, and the guest's"
    );
}

#[test]
fn the_graph_is_shown_alike() {
    let Some([theirs, ours]) = answers("x-debug-query-block-graph", json!({}), &[]) else { return };
    assert_same(&ours.1, &theirs.1);
}

#[test]
fn a_job_is_in_the_graph_where_qemus_is_but_for_the_filter() {
    let Some(both) = both() else { return };
    let [theirs, ours] = both.map(|peer| {
        let mut wire = furnished(&peer);
        qemu_img(peer.folder(), &["create", "-q", "-f", "qcow2", "target", "1M"]);
        set_up(
            &peer,
            &mut wire,
            &[
                ("blockdev-add", json!({ "driver": "qcow2", "node-name": "target", "file": file("target") })),
                (
                    "blockdev-mirror",
                    json!({
                        "job-id": "j", "device": "raw", "target": "target", "sync": "none", "filter-node-name": "filter",
                    }),
                ),
            ],
        );
        let answer = wire.execute("x-debug-query-block-graph", &json!({}))["return"].clone();
        edges(&answer, peer.whose())
    });
    assert_eq!(ours, theirs);
}

/// The edges of a graph by name, sorted; QEMU's filter stands for what it filters.
fn edges(graph: &Value, whose: Whose) -> Vec<String> {
    let name = |id: &Value| {
        let node = graph["nodes"]
            .as_array()
            .expect("a list")
            .iter()
            .find(|node| node["id"] == *id)
            .expect("an end of an edge");
        let name = node["name"].as_str().expect("a name");
        match name {
            "filter" if whose == Whose::Qemu => "raw".to_owned(),
            _ => format!(
                "{}{}",
                name.trim_end_matches(|c: char| c.is_ascii_digit()),
                if name.is_empty() { "client" } else { "" }
            ),
        }
    };
    let all = graph["edges"].as_array().expect("a list").iter();
    let mut edges: Vec<_> = all
        .map(|edge| {
            let ends = [name(&edge["parent"]), name(&edge["child"])];
            (ends, format!("{} {} {}", edge["name"], edge["perm"], edge["shared-perm"]))
        })
        .filter(|(ends, _)| ends[0] != ends[1])
        .map(|(ends, edge)| format!("{} -> {}: {edge}", ends[0], ends[1]))
        .collect();
    edges.sort();
    edges
}

#[test]
fn jobs_are_listed_with_their_keys_in_the_same_order() {
    let Some(both) = both() else { return };
    let [theirs, ours] = both.map(|peer| {
        let mut wire = furnished(&peer);
        qemu_img(peer.folder(), &["create", "-q", "-f", "qcow2", "target", "1M"]);
        set_up(
            &peer,
            &mut wire,
            &[
                ("blockdev-add", json!({ "driver": "qcow2", "node-name": "target", "file": file("target") })),
                (
                    "blockdev-mirror",
                    json!({
                        "job-id": "j", "device": "raw", "target": "target", "sync": "full", "auto-dismiss": false,
                        "speed": 1,
                    }),
                ),
                ("job-cancel", json!({ "id": "j" })),
            ],
        );
        while wire.next()["data"]["status"] != "concluded" {}
        let mut answers = ["query-jobs", "query-block-jobs"].map(|query| wire.execute(query, &json!({}))["return"].clone());
        let keys = answers.each_mut().map(|answer| {
            let job = answer[0].as_object().expect("it waits to be dismissed");
            job.keys().filter(|key| is_qemus(key)).cloned().collect::<Vec<_>>()
        });
        (keys, answers[0].to_string().contains("Operation canceled"))
    });
    assert_eq!(ours, theirs);
    assert!(ours.1);
}

fn is_qemus(key: &str) -> bool {
    let ours = [
        "source",
        "target",
        "copy-mode",
        "dirty-bytes",
        "unscanned",
        "copy-rate",
        "dirty-rate",
        "seconds-left",
        "no-estimate",
        "data-copied",
        "zeroes-skipped",
        "errors-ignored",
        "guest-p99-us-before",
        "guest-p99-us-now",
        "last-pause-us",
    ];
    !ours.contains(&key)
}
