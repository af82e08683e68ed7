//! The Python package `qemu.qmp`, QEMU's own client library, drives our daemon.

mod common;
mod qmp;

use std::process::Command;

use qmp::Peer;

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
