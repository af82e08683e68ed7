//! What the control socket does with clients that behave and clients that do not.

mod common;
mod qmp;

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use common::wait::{self, LIMIT};
use qmp::Peer;
use qmp::wire::Wire;
use serde_json::{Value, json};

/// How much memory the daemon may hold beyond what it holds at rest, whatever a client does.
const MEMORY_MAX: u64 = 48 << 20;

/// More events than may wait for a client, in the daemon and in the kernel.
const EVENTS: usize = 12_000;

fn refused(text: &str) -> Value {
    json!({ "error": { "class": "GenericError", "desc": text } })
}

fn null_node(wire: &mut Wire, name: &str) {
    let options = json!({ "driver": "null-co", "node-name": name, "size": 1 << 20, "read-zeroes": true });
    assert_eq!(wire.execute("blockdev-add", &options)["return"], json!({}));
}

/// Inputs with as many replies as a daemon gives to them; each on a connection of its own.
const INPUTS: &[(&str, usize)] = &[
    ("{'execute':'query-jobs','id':1}{\"execute\":\"query-jobs\",\"id\":\"a\"}\r\n", 2),
    ("{'execute':\n'query-jobs'\n,\n'id':\n5}", 1),
    ("{'execute':\r\n'query-jobs'\r\n,\t'id':\r\n5}\r\n\r\n{'execute':'query-jobs'}\r\n", 2),
    ("{\"id\":6,'arguments':{},\"execute\":'query-jobs'}", 1),
    ("{'execute':'block-job-pause','arguments':{'device':'a','device':'b'}}", 1),
    ("{'execute':'query-jobs','arguments':{},'arguments':{}}", 1),
    ("{'execute':'query-jobs','id':null}", 1),
    ("{'execute':'query-jobs','id':[-1,0,true,null,'\\u00e9\\ud83d\\ude00\\n\\'\\/',123456789012345678]}", 1),
    ("{'execute':'query-jobs','id':'\u{e9}\u{1f600}\u{7f}'}", 1),
    ("{'execute':'query-jobs','execute':'query-block'}", 1),
    ("{'execute':'query-jobs','id':1,'id':2}", 1),
    ("{'exec':'query-jobs','id':7}", 1),
    ("{'id':7}", 1),
    ("{}", 1),
    ("[]", 1),
    ("[1,{'execute':'query-jobs'}]", 1),
    ("5\n", 1),
    ("'abc'", 1),
    ("null\n", 1),
    ("{'execute':5}", 1),
    ("{'execute':'query-jobs','arguments':5}", 1),
    ("{'execute':'query-jobs','arguments':null}", 1),
    ("{'execute':'query-jobs','arguments':{'x':1}}", 1),
    ("{'execute':'query-jobs','control':{'run-oob':true}}", 1),
    ("{'exec-oob':'query-jobs','id':3}", 1),
    ("{'execute':'zork','id':1}", 1),
    ("{'execute':'qmp_capabilities'}", 1),
    ("{'execute' 'query-jobs'}\n{'execute':'query-jobs'}\n", 2),
    ("{'execute':'query-jobs'\n}}\n{'execute':'query-jobs'}\n", 3),
    ("{'execute':'query-jobs',}\n{'execute':'query-jobs'}\n", 2),
    ("{'execute':'query-jobs'\n{'execute':'query-jobs'}\n}\n{'execute':'query-jobs'}\n", 2),
    ("garbage\n{'execute':'query-jobs'}\n", 2),
    ("}\n{'execute':'query-jobs'}\n", 2),
    ("]\n{'execute':'query-jobs'}\n", 2),
    ("\"abc\n{'execute':'query-jobs'}\n", 2),
    ("{'execute':'query-jobs','id':'\\ud83d'}\n{'execute':'query-jobs'}\n", 2),
    ("{'execute':'query-jobs','id':'\\x'}\n{'execute':'query-jobs'}\n", 2),
    ("{'execute':'query-jobs','id':tru}\n{'execute':'query-jobs'}\n", 2),
];

#[test]
fn what_comes_over_the_wire_is_answered_as_qemu_answers_it() {
    let Some(qemu) = Peer::qemu() else { return };
    let ours = Peer::ours();
    for (input, count) in INPUTS {
        let [theirs, ours] = [&qemu, &ours].map(|peer| {
            let mut wire = Wire::negotiated(&peer.socket());
            wire.send(input.as_bytes());
            let replies = (0..*count).map(|_| wire.line(LIMIT).expect("a reply comes"));
            replies.collect::<Vec<_>>()
        });
        assert_eq!(ours, theirs, "ours and QEMU's, to {input}");
    }
}

#[test]
fn before_the_negotiation_qemus_words_are_said() {
    let Some(qemu) = Peer::qemu() else { return };
    let ours = Peer::ours();
    for input in [
        "{'execute':'query-jobs'}",
        "{'execute':'zork'}",
        "{'execute':'qmp_capabilities','arguments':{'enable':['zork']}}",
        "{'execute':'qmp_capabilities','arguments':{'enable':5}}",
        "{'execute':'qmp_capabilities','arguments':{'zz':5}}",
        "{'execute':'qmp_capabilities','arguments':{'enable':['oob']}}{'exec-oob':'query-jobs'}",
    ] {
        let [theirs, ours] = [&qemu, &ours].map(|peer| {
            let mut wire = peer.connect();
            let mut greeting = wire.next();
            greeting["QMP"]["version"]["package"] = json!("");
            wire.send(input.as_bytes());
            (greeting, wire.line(LIMIT).unwrap())
        });
        assert_eq!(ours, theirs, "ours and QEMU's, to {input}");
    }
}

#[test]
fn a_command_may_come_byte_by_byte_and_several_at_once() {
    let peer = Peer::ours();
    let mut wire = Wire::negotiated(&peer.socket());
    for byte in b"{'execute':'query-jobs','id':1}" {
        wire.send(&[*byte]);
    }
    assert_eq!(wire.next(), json!({ "return": [], "id": 1 }));
    let many: String = (0..1000).map(|id| format!("{{'execute':'query-jobs','id':{id}}}")).collect();
    wire.send(many.as_bytes());
    for id in 0..1000 {
        assert_eq!(wire.next()["id"], id);
    }
}

#[test]
fn who_stops_sending_gets_its_replies_and_then_the_end() {
    let peer = Peer::ours();
    let mut wire = Wire::negotiated(&peer.socket());
    wire.send(b"{'execute':'query-jobs'}{'execute':'query-block'}");
    wire.finish_sending();
    assert_eq!(wire.next(), json!({ "return": [] }));
    assert_eq!(wire.next(), json!({ "return": [] }));
    assert_eq!(wire.line(LIMIT).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
}

#[test]
fn half_a_command_and_silence_harms_nobody() {
    let peer = Peer::ours();
    let mut silent = Wire::negotiated(&peer.socket());
    silent.send(b"{'execute':'query-");
    let mut other = Wire::negotiated(&peer.socket());
    assert_eq!(other.execute("query-jobs", &json!({})), json!({ "return": [] }));
    silent.send(b"jobs'}");
    assert_eq!(silent.next(), json!({ "return": [] }));
}

#[test]
fn a_message_nested_10000_deep_is_refused_and_the_next_one_taken() {
    let peer = Peer::ours();
    let mut wire = Wire::negotiated(&peer.socket());
    for (open, close) in [("[", "]"), ("{'a':", "}")] {
        let nested = format!("{}0{}\n", open.repeat(10_000), close.repeat(10_000));
        wire.send(nested.as_bytes());
        assert_eq!(wire.next(), refused("JSON nesting depth limit exceeded"));
        assert_eq!(wire.execute("query-jobs", &json!({})), json!({ "return": [] }));
    }
    // As deep as it may be.
    let id = format!("{}{}", "[".repeat(1023), "]".repeat(1023));
    wire.send(format!("{{'execute':'query-jobs','id':{id}}}").as_bytes());
    assert_eq!(wire.line(LIMIT).unwrap(), format!("{{\"return\": [], \"id\": {id}}}"));
}

#[test]
fn a_line_of_100_mib_costs_its_sender_the_connection_and_nobody_memory() {
    let mut peer = Peer::ours();
    let mut wire = Wire::negotiated(&peer.socket());
    let before = peer.process().resident_bytes_max().unwrap();
    wire.send(b"{'execute':'");
    let chunk = vec![b'x'; 1 << 20];
    // The daemon hangs up in the middle.
    let sent = (0..100).take_while(|_| wire.try_send(&chunk).is_ok()).count();
    assert!(sent < 100, "the daemon took it all");
    assert_eq!(wire.next(), refused("JSON token size limit exceeded"));
    assert!(wire.line(LIMIT).is_err());
    let mut other = Wire::negotiated(&peer.socket());
    assert_eq!(other.execute("query-jobs", &json!({})), json!({ "return": [] }));
    let after = peer.process().resident_bytes_max().unwrap();
    assert!(after - before < MEMORY_MAX, "{} MiB more", (after - before) >> 20);
}

#[test]
fn who_does_not_read_its_replies_is_not_obeyed_further_and_stops_nobody() {
    let mut peer = Peer::ours();
    let mut deaf = Wire::negotiated(&peer.socket());
    let before = peer.process().resident_bytes_max().unwrap();
    // Long replies, until the socket's buffers are full in both directions. A thread, because it will block.
    let sent = Arc::new(AtomicU64::new(0));
    let counter = Arc::clone(&sent);
    let flood = std::thread::spawn(move || {
        let command = format!("{{'execute':'query-jobs','id':'{}'}}", "x".repeat(512 << 10));
        while deaf.try_send(command.as_bytes()).is_ok() {
            counter.fetch_add(1, Ordering::Relaxed);
        }
    });
    let mut last = (0, 0);
    let is_full = || {
        let now = sent.load(Ordering::Relaxed);
        let looks = if now > 0 && now == last.0 { last.1 + 1 } else { 0 };
        last = (now, looks);
        // Not a single one in half a second, or more than would fit.
        (looks == 250 || now > 2 * (MEMORY_MAX >> 19)).then_some(())
    };
    wait::until("a full connection", LIMIT, is_full).unwrap();
    let mut other = Wire::negotiated(&peer.socket());
    for _ in 0..200 {
        assert!(other.execute("query-commands", &json!({}))["return"].is_array());
    }
    let after = peer.process().resident_bytes_max().unwrap();
    assert!(after - before < MEMORY_MAX, "{} MiB more", (after - before) >> 20);
    assert_eq!(other.execute("quit", &json!({})), json!({ "return": {} }));
    assert!(peer.ends_well(), "a deaf client does not keep the daemon from ending");
    flood.join().unwrap();
}

#[test]
fn who_does_not_read_its_events_loses_its_connection_and_stops_nobody() {
    let mut peer = Peer::ours();
    let mut deaf = Wire::negotiated(&peer.socket());
    let mut other = Wire::negotiated(&peer.socket());
    null_node(&mut other, "s");
    null_node(&mut other, "t");
    let before = peer.process().resident_bytes_max().unwrap();
    // Each is refused after two events, which both clients get.
    let arguments = json!({ "job-id": "j", "device": "s", "target": "t", "sync": "full", "speed": -1 });
    for _ in 0..EVENTS / 2 {
        let reply = other.execute("blockdev-mirror", &arguments);
        assert_eq!(reply, refused("Parameter 'speed' expects a non-negative value"));
    }
    let after = peer.process().resident_bytes_max().unwrap();
    assert!(after - before < MEMORY_MAX, "{} MiB more", (after - before) >> 20);
    let received = deaf.read_to_end();
    assert!(received < EVENTS * 100, "{received} bytes waited for it");
    assert_eq!(other.execute("query-jobs", &json!({})), json!({ "return": [] }));
}

#[test]
fn all_clients_hear_of_everything_and_see_the_same() {
    let peer = Peer::ours();
    let mut one = Wire::negotiated(&peer.socket());
    let mut other = Wire::negotiated(&peer.socket());
    let mut shy = peer.connect();
    null_node(&mut one, "s");
    null_node(&mut other, "t");
    let arguments = json!({ "job-id": "j", "device": "s", "target": "t", "sync": "full" });
    assert_eq!(other.execute("blockdev-mirror", &arguments), json!({ "return": {} }));
    let until_ready = |wire: &mut Wire| {
        let mut names = Vec::new();
        while names.last() != Some(&json!("BLOCK_JOB_READY")) {
            let event = wire.next();
            names.push(event["event"].clone());
            assert!(event["timestamp"]["seconds"].is_u64() && event["timestamp"]["microseconds"].is_u64());
        }
        names
    };
    assert_eq!(until_ready(&mut one).len(), 4);
    one.send(b"{'execute':'block-job-cancel','arguments':{'device':'j'}}");
    assert_eq!(one.next_reply(), json!({ "return": {} }));
    until_ready(&mut other);
    let ended = |wire: &mut Wire| loop {
        if wire.next()["data"]["status"] == "null" {
            return;
        }
    };
    ended(&mut one);
    ended(&mut other);
    assert!(shy.next()["QMP"].is_object());
    let nothing = shy.line(Duration::from_millis(50)).unwrap_err();
    assert_eq!(nothing.kind(), io::ErrorKind::TimedOut, "who has not negotiated gets no events");
}

/// Reads up to and with a message of that label, and notes the labels.
fn note_until(wire: &mut Wire, last: &str, log: &mut Vec<String>) {
    while log.last().is_none_or(|label| label != last) {
        let message = wire.next();
        let status = message["data"]["status"].as_str();
        let label = status.or(message["event"].as_str()).unwrap_or("reply");
        log.push(label.to_owned());
    }
}

#[test]
fn what_a_client_reads_of_its_job_is_in_order_however_fast_it_goes_on() {
    let peer = Peer::ours();
    let mut wire = Wire::negotiated(&peer.socket());
    null_node(&mut wire, "s");
    null_node(&mut wire, "t");
    let mut log = Vec::new();
    let rounds = 200;
    for _ in 0..rounds {
        wire.send(
            b"{'execute':'blockdev-mirror',\
              'arguments':{'job-id':'j','device':'s','target':'t','sync':'full'}}",
        );
        note_until(&mut wire, "BLOCK_JOB_READY", &mut log);
        wire.send(b"{'execute':'block-job-complete','arguments':{'device':'j'}}");
        note_until(&mut wire, "BLOCK_JOB_COMPLETED", &mut log);
        // Whoever has read that may rely on it, though the last status changes are still to come.
        wire.send(b"{'execute':'query-block-jobs','id':1}");
        wire.send(b"{'execute':'blockdev-del','arguments':{'node-name':'s'},'id':2}");
        wire.send(b"{'execute':'blockdev-add','arguments':{'driver':'null-co','node-name':'s','size':1048576},'id':3}");
        for (id, answer) in [(1, json!([])), (2, json!({})), (3, json!({}))] {
            loop {
                let message = wire.next();
                match message["data"]["status"].as_str() {
                    Some(status) => log.push(status.to_owned()),
                    None => break assert_eq!(message, json!({ "return": answer, "id": id })),
                }
            }
        }
    }
    note_until(&mut wire, "null", &mut log);
    let round = [
        "created",
        "running",
        "reply",
        "ready",
        "BLOCK_JOB_READY",
        "reply",
        "waiting",
        "pending",
        "BLOCK_JOB_COMPLETED",
        "concluded",
        "null",
    ];
    for (index, said) in log.chunks(round.len()).enumerate() {
        assert_eq!(said, round, "round {index}");
    }
    assert_eq!(log.len(), rounds * round.len());
}

#[test]
fn a_job_tells_qemus_fields_in_qemus_order_and_then_ours() {
    let peer = Peer::ours();
    let mut wire = Wire::negotiated(&peer.socket());
    null_node(&mut wire, "s");
    null_node(&mut wire, "t");
    let arguments = json!({ "job-id": "j", "device": "s", "target": "t", "sync": "none" });
    wire.execute("blockdev-mirror", &arguments);
    while wire.next()["event"] != "BLOCK_JOB_READY" {}
    let answer = wire.execute("query-block-jobs", &json!({}));
    let fields: Vec<&str> = answer["return"][0].as_object().unwrap().keys().map(String::as_str).collect();
    assert_eq!(
        fields,
        [
            "auto-finalize",
            "io-status",
            "device",
            "auto-dismiss",
            "busy",
            "len",
            "offset",
            "status",
            "paused",
            "speed",
            "ready",
            "type",
            "actively-synced",
            "source",
            "target",
            "copy-mode",
            "dirty-bytes",
            "unscanned",
            "copy-rate",
            "dirty-rate",
            "seconds-left",
            "data-copied",
            "zeroes-skipped",
            "errors-ignored",
        ]
    );
}

#[test]
fn a_client_too_many_is_told_so() {
    let peer = Peer::ours();
    let mut wires: Vec<_> = (0..64).map(|_| Wire::negotiated(&peer.socket())).collect();
    let mut late = peer.connect();
    assert_eq!(late.next(), refused("there are 64 clients already, which is the most"));
    assert!(late.line(LIMIT).is_err());
    wires.pop();
    let one_more = || Wire::connect(&peer.socket()).next().get("QMP").map(|_| ());
    wait::until("room for a client", LIMIT, one_more).unwrap();
}

#[test]
fn a_client_that_leaves_in_the_middle_of_its_command_leaves_nothing_half_done() {
    let peer = Peer::ours();
    for _ in 0..50 {
        let mut wire = Wire::negotiated(&peer.socket());
        wire.send(b"{'execute':'blockdev-add','arguments':{'driver':'null-co','node-name':'n'}}");
        drop(wire);
        let mut other = Wire::negotiated(&peer.socket());
        let deleted = || {
            let reply = other.execute("blockdev-del", &json!({ "node-name": "n" }));
            reply.get("return").map(|_| ())
        };
        wait::until("the node", LIMIT, deleted).unwrap();
    }
}

#[test]
fn a_second_daemon_leaves_a_live_socket_alone() {
    let peer = Peer::ours();
    let socket = peer.socket();
    let second =
        common::heliostat([std::path::Path::new("serve"), std::path::Path::new("--control"), &socket]);
    assert!(!second.status.success());
    let said = String::from_utf8(second.stderr).unwrap();
    assert!(said.contains("another program listens there"), "{said}");
    let mut wire = Wire::negotiated(&socket);
    assert_eq!(wire.execute("quit", &json!({})), json!({ "return": {} }));
    assert!(peer.ends_well());
    assert!(!socket.exists());
}
