//! The Python package `qemu.qmp`, QEMU's own client library, drives our daemon.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod common;
mod qmp;

use std::process::Command;

use common::qcow2::{assert_same, assert_sound, qemu_img, qemu_io};
use qmp::Peer;
use qmp::wire::Wire;
use serde_json::{Value, json};

/// A mirror from its start to the pivot, with events awaited, errors caught and the end of the daemon.
const PROGRAM: &str = r#"
import asyncio, sys
from qemu.qmp import EventListener, ExecuteError, QMPClient

async def main(socket):
    client = QMPClient('test')
    await client.connect(socket)
    assert client.greeting.QMP.version['qemu']['major'] == 10
    names = {command['name'] for command in await client.execute('query-commands')}
    assert {'blockdev-mirror', 'quit'} <= names
    for node in 's', 't':
        options = {'driver': 'null-co', 'node-name': node, 'size': 1 << 20}
        await client.execute('blockdev-add', options)
    try:
        await client.execute('block-job-cancel', {'device': 'nobody'})
        raise SystemExit('no error came')
    except ExecuteError as error:
        assert error.error_class == 'DeviceNotActive', error
    arguments = {'job-id': 'j', 'device': 's', 'target': 't', 'sync': 'full'}
    with client.listener(('BLOCK_JOB_READY', 'BLOCK_JOB_COMPLETED')) as events:
        await client.execute('blockdev-mirror', arguments)
        event = await events.get()
        assert event['event'] == 'BLOCK_JOB_READY' and event['data']['len'] == 1 << 20, event
        await client.execute('block-job-complete', {'device': 'j'})
        event = await events.get()
        assert event['event'] == 'BLOCK_JOB_COMPLETED' and 'error' not in event['data'], event
    assert await client.execute('query-block-jobs') == []
    await client.execute('quit')
    try:
        await client.disconnect()
    except EOFError:
        pass  # The daemon has hung up first, which it may.

asyncio.run(asyncio.wait_for(main(sys.argv[1]), 30))
"#;

#[test]
fn the_python_client_starts_watches_and_completes_a_mirror() {
    let Some(python) = common::python_with_qmp() else { return };
    let peer = Peer::ours();
    let output = Command::new(python).args(["-c", PROGRAM]).arg(peer.socket()).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(peer.ends_well());
}

/// Moves a chain of three images, layer by layer, as an orchestrator does: the lower layers are there already, the
/// target is made by `drive-mirror`, the job waits for `finalize` and `dismiss`, and the source is let go of.
const MOVE: &str = r#"
import asyncio, sys
from qemu.qmp import EventListener, QMPClient

async def main(socket, folder):
    client = QMPClient('move')
    await client.connect(socket)
    def image(name):
        return {'driver': 'file', 'filename': folder + '/' + name}
    options = {'driver': 'qcow2', 'node-name': 'disk', 'file': image('top.qcow2')}
    await client.execute('blockdev-add', options)
    address = {'type': 'unix', 'data': {'path': folder + '/nbd'}}
    await client.execute('nbd-server-start', {'addr': address})
    export = {'type': 'nbd', 'id': 'guest', 'node-name': 'disk', 'name': 'disk', 'writable': True}
    await client.execute('block-export-add', export)
    arguments = {
        'job-id': 'move', 'device': 'disk', 'target': folder + '/new.qcow2', 'node-name': 'moved', 'sync': 'top',
        'auto-finalize': False, 'auto-dismiss': False, 'copy-mode': 'write-blocking',
    }
    with client.listener() as events:
        async def said(name, status=None):
            while True:
                event = await events.get()
                if event['event'] == name and status in (None, event['data'].get('status')):
                    return event['data']
        await client.execute('drive-mirror', arguments)
        await said('BLOCK_JOB_READY')
        await client.execute('job-complete', {'id': 'move'})
        await said('BLOCK_JOB_PENDING')
        await client.execute('job-finalize', {'id': 'move'})
        assert 'error' not in await said('BLOCK_JOB_COMPLETED')
        await said('JOB_STATUS_CHANGE', 'concluded')
        jobs = await client.execute('query-jobs')
        assert [job['status'] for job in jobs] == ['concluded'], jobs
        await client.execute('job-dismiss', {'id': 'move'})
        await said('JOB_STATUS_CHANGE', 'null')
    exports = await client.execute('query-block-exports')
    assert [export['node-name'] for export in exports] == ['moved'], exports
    await client.execute('blockdev-del', {'node-name': 'disk'})
    nodes = await client.execute('query-named-block-nodes', {'flat': True})
    files = {node['file'] for node in nodes}
    assert folder + '/top.qcow2' not in files and folder + '/new.qcow2' in files, files
    await client.execute('quit')
    try:
        await client.disconnect()
    except EOFError:
        pass

asyncio.run(asyncio.wait_for(main(*sys.argv[1:]), 30))
"#;

/// A chain of three in the folder of `peer`.
fn chain(peer: &Peer) {
    let folder = peer.folder();
    qemu_img(folder, &["create", "-q", "-f", "qcow2", "base.qcow2", "8M"]);
    qemu_io(folder, "base.qcow2", &["write -P 1 0 4M"]);
    qemu_img(folder, &["create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", "mid.qcow2"]);
    qemu_io(folder, "mid.qcow2", &["write -P 2 1M 1M", "write -z 3M 64k"]);
    qemu_img(folder, &["create", "-q", "-f", "qcow2", "-b", "mid.qcow2", "-F", "qcow2", "top.qcow2"]);
    qemu_io(folder, "top.qcow2", &["write -P 3 2M 100k", "write -z 6M 64k", "write -P 4 7M 4k"]);
}

fn judge(folder: &std::path::Path) {
    for image in ["top.qcow2", "new.qcow2"] {
        assert_sound(folder, image);
    }
    assert_same(folder, ("top.qcow2", "qcow2"), ("new.qcow2", "qcow2"));
    let info: Value =
        serde_json::from_str(&qemu_img(folder, &["info", "--output=json", "new.qcow2"])).unwrap();
    assert!(info["backing-filename"].as_str().unwrap().ends_with("mid.qcow2"), "{info}");
    assert_eq!(info["backing-filename-format"], "qcow2");
}

#[test]
fn the_python_client_moves_the_top_of_a_chain_of_three() {
    let Some(python) = common::python_with_qmp() else { return };
    let Some(_) = common::tool("qemu-img") else { return };
    let peer = Peer::ours();
    chain(&peer);
    let mut command = Command::new(python);
    let output = command.args(["-c", MOVE]).arg(peer.socket()).arg(peer.folder()).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    peer.ends_well_but(judge);
}

#[test]
fn a_plain_socket_client_moves_the_top_of_a_chain_of_three() {
    let Some(_) = common::tool("qemu-img") else { return };
    let peer = Peer::ours();
    chain(&peer);
    let folder = peer.folder().to_str().unwrap().to_owned();
    qemu_img(
        peer.folder(),
        &["create", "-q", "-f", "qcow2", "-b", &format!("{folder}/mid.qcow2"), "-F", "qcow2", "new.qcow2"],
    );
    let mut wire = Wire::negotiated(&peer.socket());
    let mut execute = |command: &str, arguments: Value| {
        let reply = wire.execute(command, &arguments);
        assert!(reply.get("return").is_some(), "{command} {arguments}: {reply}");
        reply["return"].clone()
    };
    let image = |node: &str, file: &str, backing: Value| {
        let file = json!({ "driver": "file", "filename": format!("{folder}/{file}") });
        json!({ "driver": "qcow2", "node-name": node, "file": file, "backing": backing })
    };
    execute("blockdev-add", image("base", "base.qcow2", Value::Null));
    let mut mid = image("mid", "mid.qcow2", json!("base"));
    mid["read-only"] = json!(true);
    execute("blockdev-add", mid);
    execute("blockdev-add", image("disk", "top.qcow2", json!("mid")));
    execute("blockdev-add", image("moved", "new.qcow2", json!("mid")));
    execute(
        "blockdev-mirror",
        json!({
            "job-id": "move", "device": "disk", "target": "moved", "sync": "top", "auto-finalize": false,
            "auto-dismiss": false,
        }),
    );
    // The job's status is asked for until it is there: this client reads no events.
    let mut comes_to = |status: &str| {
        common::wait::until(status, common::wait::LIMIT, || {
            let jobs = wire.execute("query-jobs", &json!({}));
            (jobs["return"][0]["status"] == status).then_some(())
        })
        .unwrap();
    };
    comes_to("ready");
    let mut wire_2 = Wire::negotiated(&peer.socket());
    let mut execute = |command: &str, arguments: Value| {
        let reply = wire_2.execute(command, &arguments);
        assert!(reply.get("return").is_some(), "{command} {arguments}: {reply}");
    };
    execute("block-job-complete", json!({ "device": "move" }));
    comes_to("pending");
    execute("block-job-finalize", json!({ "id": "move" }));
    comes_to("concluded");
    execute("block-job-dismiss", json!({ "id": "move" }));
    execute("blockdev-del", json!({ "node-name": "disk" }));
    execute("blockdev-del", json!({ "node-name": "moved" }));
    execute("blockdev-del", json!({ "node-name": "mid" }));
    execute("blockdev-del", json!({ "node-name": "base" }));
    execute("quit", json!({}));
    peer.ends_well_but(judge);
}
