//! Clients and servers of others: scripts of `nbdsh`, and `nbdkit` with filters that make it a bad server.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod common;

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use common::process::Daemon;
use common::{folder, heliostat, nbdsh, start_heliostat, tool};

const SIZE: usize = 1 << 20;

fn said(output: &Output) -> String {
    [&output.stdout[..], &output.stderr].concat().iter().map(|byte| char::from(*byte)).collect()
}

fn bytes() -> Vec<u8> {
    (0..SIZE).map(|at| u8::try_from(at % 251).unwrap()).collect()
}

fn address(socket: &Path) -> String {
    format!("nbd+unix:///disk?socket={}", socket.display())
}

/// Does every kind of request, and says what it does not find as it must be.
const ALL_REQUESTS: &str = "
import errno
import sys

h.add_meta_context('base:allocation')
h.connect_uri(sys.argv[-1])
size = 1 << 20
assert h.get_size() == size
assert h.get_structured_replies_negotiated()
for able in [h.can_flush, h.can_fua, h.can_trim, h.can_zero, h.can_fast_zero, h.can_cache, h.can_df, h.can_multi_conn]:
    assert able(), able
assert not h.is_read_only()
assert h.can_meta_context('base:allocation')

# Some servers are asked for what they never said they do; this one answers.
h.set_strict_mode(0)

def extents(offset, count, flags=0):
    seen = []
    def told(name, start, entries, error):
        assert name == 'base:allocation'
        seen.extend(zip(entries[::2], entries[1::2]))
    h.block_status(count, offset, told, flags)
    return seen

assert sum(length for length, _ in extents(0, size)) == size
assert all(kind == 3 for _, kind in extents(0, size))

h.pwrite(b'a' * 65536, 65536)
h.pwrite(b'b' * 4096, 512 * 1024, nbd.CMD_FLAG_FUA)
assert extents(65536, 65536) == [(65536, 0)]
assert len(extents(0, size, nbd.CMD_FLAG_REQ_ONE)) == 1

chunks = []
def chunk(data, offset, status, error):
    chunks.append((offset, len(data), status))
read = h.pread_structured(size, 0, chunk)
assert sum(length for _, length, _ in chunks) == size
assert read[65536:131072] == b'a' * 65536 and read[:65536] == bytes(65536)
assert read[524288:528384] == b'b' * 4096
chunks.clear()
assert h.pread_structured(size, 0, chunk, nbd.CMD_FLAG_DF) == read
assert len(chunks) == 1, chunks

h.zero(4096, 65536, nbd.CMD_FLAG_NO_HOLE)
assert h.pread(8192, 65536) == bytes(4096) + b'a' * 4096
h.zero(65536, 65536, nbd.CMD_FLAG_FUA)
assert h.pread(65536, 65536) == bytes(65536)
try:
    h.zero(4096, 512 * 1024, nbd.CMD_FLAG_FAST_ZERO)
    assert h.pread(4096, 512 * 1024) == bytes(4096)
except nbd.Error as error:
    assert error.errnum in (errno.ENOTSUP, errno.EOPNOTSUPP), error
h.pwrite(b'c' * 65536, 262144)
h.trim(65536, 262144)
h.cache(size, 0)
h.flush()

def refused(number, call, *arguments):
    try:
        call(*arguments)
    except nbd.Error as error:
        assert error.errnum == number, error
        return
    raise AssertionError('not refused')
refused(errno.EINVAL, h.pread, 4096, size)
refused(errno.ENOSPC, h.pwrite, bytes(4096), size)
refused(errno.EINVAL, h.trim, 4096, size)
refused(errno.ENOSPC, h.zero, 4096, size)
# It goes on after all that.
h.pwrite(b'z', size - 1)
assert h.pread(1, size - 1) == b'z'

# Many at once, of which each is answered once.
cookies = [h.aio_pwrite(nbd.Buffer.from_bytearray(bytearray([1 + at] * 4096)), at * 4096) for at in range(64)]
while h.aio_in_flight():
    h.poll(-1)
assert all(h.aio_command_completed(cookie) for cookie in cookies)
assert h.pread(64 * 4096, 0) == b''.join(bytes([1 + at] * 4096) for at in range(64))
h.shutdown()
print('all is well')
";

#[test]
fn a_script_of_nbdsh_finds_every_request_answered_as_it_must_be() {
    let Some(mut nbdsh) = nbdsh() else { return };
    let folder = folder();
    let (disk, socket) = (folder.path().join("disk"), folder.path().join("nbd"));
    std::fs::File::create(&disk).unwrap().set_len(SIZE.try_into().unwrap()).unwrap();
    let mut daemon = start_heliostat([Path::new("serve"), &disk, Path::new("--nbd"), &socket]);
    daemon.listens(&socket).unwrap();
    let script = ALL_REQUESTS.replace("sys.argv[-1]", &format!("'{}'", address(&socket)));
    let output = nbdsh.args(["-c", &script]).stdin(Stdio::null()).output().unwrap();
    assert!(output.status.success() && said(&output).contains("all is well"), "{}", said(&output));
    assert!(daemon.stop().unwrap().success());
    assert_eq!(std::fs::read(&disk).unwrap()[4096], 2);
}

/// `nbdkit` with the file `name` of the folder, filters, and what they are told.
fn nbdkit(folder: &Path, name: &str, filters: &[&str], told: &[&str]) -> Option<(Daemon, PathBuf)> {
    let program = tool("nbdkit")?;
    let socket = folder.join(format!("{name}.sock"));
    let mut command = Command::new(program);
    command.args(["--foreground", "--exportname", "disk"]).stderr(Stdio::null());
    command.args(filters.iter().map(|filter| format!("--filter={filter}")));
    command.arg("--unix").arg(&socket).arg("file").arg(folder.join(name)).args(told);
    let server = Daemon::start(&mut command).unwrap();
    Some((server, socket))
}

#[test]
fn a_server_that_is_slow_and_one_that_hides_its_errors_are_a_source_and_a_target() {
    let folder = folder();
    let path = |name: &str| folder.path().join(name);
    std::fs::write(path("source"), bytes()).unwrap();
    std::fs::write(path("copy"), vec![0; SIZE]).unwrap();
    // A MiB of eight million bits, at sixteen million a second.
    let rate = nbdkit(folder.path(), "source", &["rate"], &["rate=16M"]);
    let Some((mut slow, from)) = rate else { return };
    let told = ["retries=50", "retry-delay=1", "retry-exponential=no", "error-pwrite-rate=50%"];
    let retry = nbdkit(folder.path(), "copy", &["retry", "error"], &told);
    let Some((mut hiding, to)) = retry else { return };
    slow.listens(&from).unwrap();
    hiding.listens(&to).unwrap();
    let mirrored = heliostat(["mirror", "-q", &address(&from), &address(&to)]);
    assert!(mirrored.status.success(), "{}", said(&mirrored));
    assert!(std::fs::read(path("copy")).unwrap() == bytes());
}

#[test]
fn a_server_that_ends_with_its_last_client_ends_when_we_have_gone() {
    let folder = folder();
    let path = |name: &str| folder.path().join(name);
    std::fs::write(path("source"), bytes()).unwrap();
    let Some((mut server, socket)) = nbdkit(folder.path(), "source", &["exitlast"], &[]) else { return };
    // Whoever looked whether it listens would be its last client.
    common::wait::until("the socket", common::wait::LIMIT, || socket.exists().then_some(())).unwrap();
    assert!(server.is_running().unwrap());
    // It may be gone between one look and the next; that it ends is what matters.
    heliostat(["info", &address(&socket)]);
    assert!(server.wait().unwrap().success());
}
