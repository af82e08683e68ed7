//! `heliostat storage-daemon`, given the arguments that `qemu-storage-daemon` is given: the same clients move the same
//! disk with both, and both say the same of what is wrong with arguments.

mod common;
mod qmp;

use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use common::process::Daemon;
use common::{HELIOSTAT, tool, wait};
use qmp::wire::Wire;
use serde_json::{Value, json};

/// The two programs: how each is started.
fn programs() -> Option<[Vec<PathBuf>; 2]> {
    let qemu = tool("qemu-storage-daemon")?;
    Some([vec![qemu], vec![PathBuf::from(HELIOSTAT), PathBuf::from("storage-daemon")]])
}

fn command(program: &[PathBuf], arguments: &[String]) -> Command {
    let mut command = Command::new(&program[0]);
    command.args(&program[1..]).args(arguments).stdin(Stdio::null());
    command
}

/// Arguments in which `DIR` is a folder.
fn within(folder: &Path, arguments: &[&str]) -> Vec<String> {
    arguments.iter().map(|text| text.replace("DIR", &folder.to_string_lossy())).collect()
}

const DISK: [&str; 17] = [
    "--object",
    "throttle-group,id=limits,x-bps-total=1073741824",
    "--chardev",
    "socket,id=qmp,path=DIR/control,server=on,wait=off",
    "--monitor",
    "chardev=qmp,mode=control",
    "--blockdev",
    "driver=raw,node-name=source,discard=unmap,file.driver=throttle,file.throttle-group=limits,\
     file.file.driver=file,file.file.filename=DIR/source",
    "--blockdev",
    "{'driver': 'qcow2', 'node-name': 'target', 'file': {'driver': 'file', 'filename': 'DIR/target'}}",
    "--nbd-server",
    "addr.type=unix,addr.path=DIR/nbd,max-connections=5",
    "--export=nbd,id=e,node-name=source,name=disk,writable=on",
    "-T",
    "nothing",
    "--pidfile",
    "DIR/pid",
];

#[test]
fn the_same_arguments_and_the_same_client_move_a_disk_with_both() {
    let (Some(programs), Some(qemu_io), Some(qemu_img)) = (programs(), tool("qemu-io"), tool("qemu-img"))
    else {
        return;
    };
    for program in programs {
        let folder = common::folder();
        let path = |name: &str| folder.path().join(name);
        std::fs::write(path("source"), vec![7; 1 << 20]).unwrap();
        common::qcow2::qemu_img(folder.path(), &["create", "-q", "-f", "qcow2", "target", "1M"]);
        let mut daemon = Daemon::start(&mut command(&program, &within(folder.path(), &DISK))).unwrap();
        // Both write it when all options have been carried out.
        wait::until("the pid file", wait::LIMIT, || path("pid").exists().then_some(())).unwrap();
        let pid = || std::fs::read_to_string(path("pid")).unwrap().trim().parse::<u32>().ok();
        assert_eq!(wait::until("a pid in it", wait::LIMIT, pid).unwrap(), daemon.id());
        let uri = format!("nbd+unix:///disk?socket={}", path("nbd").display());
        let guest = |step: &str| {
            let output = Command::new(&qemu_io).args(["-f", "raw", "-c", step, &uri]).output().unwrap();
            assert!(output.status.success(), "{output:?}");
        };
        guest("write -P 1 0 64k");
        let mut wire = Wire::negotiated(&path("control"));
        let mirror = json!({ "job-id": "j", "device": "source", "target": "target", "sync": "full" });
        assert_eq!(wire.execute("blockdev-mirror", &mirror), json!({ "return": {} }));
        while wire.next()["event"] != "BLOCK_JOB_READY" {}
        guest("write -P 2 64k 64k");
        assert_eq!(wire.execute("job-complete", &json!({ "id": "j" })), json!({ "return": {} }));
        while wire.next()["data"]["status"] != "null" {}
        guest("write -P 3 128k 64k");
        assert_eq!(wire.execute("query-block-exports", &json!({}))["return"][0]["node-name"], "target");
        assert!(daemon.is_running().unwrap());
        assert!(daemon.stop().unwrap().success());
        assert!(!path("pid").exists());
        let compare = |first: &str, second: &str| {
            let mut command = Command::new(&qemu_img);
            command.args(["compare", "-f", "raw", "-F", "qcow2", first, second]);
            command.current_dir(folder.path()).output().unwrap().status
        };
        assert_eq!(compare("source", "target").code(), Some(1), "the last write went to the target only");
        let mut source = std::fs::read(path("source")).unwrap();
        assert_eq!((source[0], source[65536], source[131_072]), (1, 2, 7));
        source[131_072..196_608].fill(3);
        std::fs::write(path("source"), source).unwrap();
        assert!(compare("source", "target").success());
    }
}

/// Arguments that both refuse, in the same words.
const REFUSED: [&[&str]; 47] = [
    &["--zork"],
    &["--blockdev"],
    &["extra"],
    &["--blockdev", "foo"],
    &["--blockdev", "driver=foo,node-name=x"],
    &["--blockdev", "driver=null-co"],
    &["--blockdev", "driver=file,node-name=x,filename=/nonexistent"],
    &["--blockdev=driver=file,node-name=x,filename=/nonexistent"],
    &["--blockdev", "driver=qcow2,node-name=x,file.driver=file,file.filename=DIR/none"],
    &["--blockdev", "driver=qcow2,node-name=x,file.driver=file"],
    &["--blockdev", "driver=qcow2,node-name=x,file.driver=file,file.zork=1"],
    &["--blockdev", "driver=qcow2,node-name=x,file=n"],
    &["--blockdev", "driver=raw,node-name=x,file.driver=null-co,file.size=1G,file.size=2G"],
    &["--blockdev", "driver=raw,node-name=x,file=n,file.driver=null-co"],
    &["--blockdev", "driver=null-co,node-name=x,detect-zeroes=zork"],
    &["--blockdev", "driver=null-co,node-name=x,cache.direct=on,cache.no-flush=maybe"],
    &["--blockdev", "driver=null-co,node-name=x,read-only"],
    &["--blockdev", "driver=null-co,node-name=x,read-only=zz"],
    &["--blockdev", "driver=null-co,node-name=x,size=zz"],
    &["--blockdev", "driver=null-co,node-name=x,size=1M"],
    &["--blockdev", "driver=null-co,node-name=x,zork=1"],
    &["--blockdev", "driver=null-co,,node-name=x"],
    &["--blockdev", "=x"],
    &["--blockdev", "{'driver':'null-co'"],
    &["--blockdev", "{'driver':'null-co','node-name':'n'}x"],
    &["--blockdev", "{'driver':'null-co','node-name':5}"],
    &["--blockdev", "driver=null-co,node-name=a", "--blockdev", "driver=null-co,node-name=a"],
    &["--blockdev", "driver=null-co,node-name=#a"],
    &["--blockdev", "help"],
    &["--export", "id=e"],
    &["--export", "type=zork,id=e,node-name=x"],
    &["--export", "nbd,id=e,node-name=x"],
    &["--nbd-server", "addr.type=zork"],
    &["--nbd-server", "addr.type=unix"],
    &["--nbd-server", "addr.type=unix,addr.path=DIR/n,max-connections=-1"],
    &["--nbd-server", "addr.type=unix,addr.path=DIR/n,tls-creds=zz"],
    &["--nbd-server", "addr.type=unix,addr.path=DIR/n", "--nbd-server", "addr.type=unix,addr.path=DIR/m"],
    &["--monitor", "chardev=x"],
    &["--monitor", "zork=1"],
    &["--chardev", "socket"],
    &["--chardev", "zork,id=c"],
    &["--chardev", "socket,id=c,path=/nonexistent/x,server=on,wait=off"],
    &["--pidfile", "/nonexistent/pid"],
    &["--object", "zork,id=x"],
    &["--object", "throttle-group"],
    &["--object", "throttle-group,id=t,x-iops-total=zz"],
    &["--object", "throttle-group,id=t,zork=1"],
];

#[test]
fn wrong_arguments_are_refused_in_the_same_words() {
    let Some(programs) = programs() else { return };
    let mut wrong = Vec::new();
    for arguments in REFUSED {
        let said = programs.each_ref().map(|program| {
            let folder = common::folder();
            let output = command(program, &within(folder.path(), arguments)).output().unwrap();
            let text =
                String::from_utf8_lossy(&output.stderr).replace(&*folder.path().to_string_lossy(), "DIR");
            // Each puts its own name before it.
            let text = text.split_once("storage-daemon: ").map(|(_, text)| text.to_owned());
            (text, output.status.code())
        });
        if said[0] != said[1] {
            wrong.push(format!("to {arguments:?}\n  qemu: {:?}\n  ours: {:?}", said[0], said[1]));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn what_is_not_there_is_refused_with_what_to_do() {
    for (arguments, text) in [
        (&["--object", "secret,id=s,data=x"], "--object secret,id=s,data=x: heliostat has no encryption"),
        (&["--object", "tls-creds-psk,id=t,dir=/x"], "it takes no 'tls-creds-psk', but tls-creds-x509"),
        (
            &["--object", "tls-creds-x509,id=t,dir=/x"],
            "Unable to access credentials /x/ca-cert.pem: No such file",
        ),
        (&["--chardev", "stdio,id=c"], "heliostat has no char driver 'stdio', only socket"),
        (&["--chardev", "socket,id=c,host=0.0.0.0,port=0,server=on"], "can be reached from other hosts"),
        (
            &["--chardev", "socket,id=c,host=0.0.0.0,port=0,server=on"],
            "listen on 127.0.0.1 or [::1], or on a Unix",
        ),
    ] {
        let mut all = vec!["storage-daemon"];
        all.extend(arguments);
        let output = common::heliostat(all);
        assert_eq!(output.status.code(), Some(1));
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(said.starts_with("heliostat storage-daemon: ") && said.contains(text), "{said}");
    }
}

#[test]
fn its_version_reads_as_qemus_and_names_us() {
    let output = common::heliostat(["storage-daemon", "--daemonize", "--version"]);
    let said = String::from_utf8(output.stdout).unwrap();
    assert!(said.starts_with("heliostat storage-daemon version 10.0.2 (heliostat "), "{said}");
    let help = common::heliostat(["storage-daemon", "-h"]);
    assert!(String::from_utf8(help.stdout).unwrap().contains("--nbd-server addr.type=unix"));
}

#[test]
fn called_by_the_name_of_qemus_it_is_that() {
    let folder = common::folder();
    let name = folder.path().join("qemu-storage-daemon");
    std::os::unix::fs::symlink(HELIOSTAT, &name).unwrap();
    let output = Command::new(&name).arg("--version").output().unwrap();
    assert!(String::from_utf8(output.stdout).unwrap().starts_with("qemu-storage-daemon version 10.0.2 "));
    let output = Command::new(&name).arg("--zork").output().unwrap();
    assert_eq!(
        String::from_utf8(output.stderr).unwrap(),
        "qemu-storage-daemon: unrecognized option '--zork'\n"
    );
}

#[test]
fn in_the_background_it_leaves_its_parent_when_it_is_up() {
    let folder = common::folder();
    let path = |name: &str| folder.path().join(name);
    let arguments = [
        "--daemonize",
        "--pidfile",
        "pid",
        "--chardev",
        "socket,id=c,path=DIR/control,server=on,wait=off",
        "--monitor",
        "c",
        "--blockdev",
        "null-co,node-name=n",
    ];
    let program = [PathBuf::from(HELIOSTAT), PathBuf::from("storage-daemon")];
    let start =
        || command(&program, &within(folder.path(), &arguments)).current_dir(folder.path()).output().unwrap();
    let output = start();
    assert!(output.status.success() && output.stderr.is_empty(), "{output:?}");
    // It is up: no waiting.
    let pid: u32 = std::fs::read_to_string(path("pid")).unwrap().trim().parse().unwrap();
    let proc = PathBuf::from(format!("/proc/{pid}"));
    assert_eq!(std::fs::read_link(proc.join("cwd")).unwrap(), Path::new("/"));
    assert_eq!(std::fs::read_link(proc.join("fd/2")).unwrap(), Path::new("/dev/null"));
    let mut wire = Wire::negotiated(&path("control"));
    assert_eq!(wire.execute("query-named-block-nodes", &json!({}))["return"][0]["node-name"], "n");
    let second = start();
    let said = String::from_utf8(second.stderr).unwrap();
    assert!(!second.status.success());
    assert!(said.contains("Address already in use"), "a live socket is not taken away: {said}");
    assert_eq!(wire.execute("quit", &json!({})), json!({ "return": {} }));
    wait::until("its end", wait::LIMIT, || (!proc.exists()).then_some(())).unwrap();
    assert!(!path("pid").exists() && !path("control").exists());
}

#[test]
fn a_pid_file_that_another_holds_is_refused() {
    let Some(programs) = programs() else { return };
    for program in programs {
        let folder = common::folder();
        let arguments = within(folder.path(), &["--pidfile", "DIR/pid"]);
        let first = Daemon::start(&mut command(&program, &arguments)).unwrap();
        wait::until("the pid file", wait::LIMIT, || folder.path().join("pid").exists().then_some(()))
            .unwrap();
        let pid = || {
            let text = std::fs::read_to_string(folder.path().join("pid")).unwrap();
            (!text.is_empty()).then_some(())
        };
        wait::until("a pid in it", wait::LIMIT, pid).unwrap();
        let second = command(&program, &arguments).output().unwrap();
        let said = String::from_utf8(second.stderr).unwrap();
        let text = "cannot create PID file: Cannot lock pid file: Resource temporarily unavailable";
        assert!(said.contains(text), "{said}");
        assert!(first.stop().unwrap().success());
    }
}

#[test]
fn a_monitor_may_be_pretty_and_on_tcp() {
    let Some(programs) = programs() else { return };
    let answers = programs.map(|program| {
        let folder = common::folder();
        let port = free_port();
        let chardev = format!("socket,id=c,host=127.0.0.1,port={port},server=on,wait=off");
        let arguments = within(
            folder.path(),
            &["--chardev", &chardev, "--monitor", "chardev=c,pretty=on", "--pidfile", "DIR/pid"],
        );
        let _daemon = Daemon::start(&mut command(&program, &arguments)).unwrap();
        wait::until("the pid file", wait::LIMIT, || folder.path().join("pid").exists().then_some(())).unwrap();
        let mut stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
        stream.write_all(b"{'execute':'qmp_capabilities'}{'execute':'query-jobs','id':[1,{'a':[]}]}{'execute':'zork','id':'END'}").unwrap();
        let mut said = String::new();
        let mut piece = [0; 4096];
        while !said.contains("has not been found\"\r\n    }\r\n}\r\n") {
            let count = stream.read(&mut piece).unwrap();
            assert!(count > 0, "it hung up after {said}");
            said.push_str(std::str::from_utf8(&piece[..count]).unwrap());
        }
        let lines = said.lines().filter(|line| !line.contains("\"package\""));
        lines.collect::<Vec<_>>().join("\n")
    });
    assert_eq!(answers[1], answers[0], "left: ours, right: QEMU's");
}

/// A port that nobody had a moment ago.
fn free_port() -> u16 {
    let listener = std::net::TcpListener::bind(("127.0.0.1", 0)).expect("the loopback has free ports");
    listener.local_addr().expect("it is bound").port()
}

#[test]
fn it_takes_as_many_open_files_as_it_may() {
    let folder = common::folder();
    let control = folder.path().join("control");
    let mut command = Command::new("sh");
    command.args(["-c", "ulimit -Sn 256; exec \"$0\" serve --control \"$1\"", HELIOSTAT]).arg(&control);
    let mut daemon = Daemon::start(&mut command).unwrap();
    daemon.listens(&control).unwrap();
    let limits = std::fs::read_to_string(format!("/proc/{}/limits", daemon.id())).unwrap();
    let line = limits.lines().find_map(|line| line.strip_prefix("Max open files")).unwrap();
    let number = |text: &str| text.parse::<u64>().unwrap_or(u64::MAX);
    let [soft, hard] = [0, 1].map(|column| number(line.split_whitespace().nth(column).unwrap()));
    assert_eq!(soft, hard.min(65_536), "{line}");
}

#[test]
fn a_control_socket_is_its_owners_alone_whatever_the_mask() {
    for (mask, mode) in [("000", 0o600), ("022", 0o600), ("077", 0o600), ("0377", 0o400)] {
        let folder = common::folder();
        let socket = folder.path().join("control");
        let path = socket.to_string_lossy();
        let chardev = format!("socket,id=c,path={path},server=on,wait=off");
        let ways: [&[&str]; 2] = [
            &["serve", "--control", &path],
            &["storage-daemon", "--chardev", &chardev, "--monitor", "chardev=c"],
        ];
        for way in ways {
            let mut command = Command::new("sh");
            command.args(["-c", &format!("umask {mask}; exec \"$0\" \"$@\""), HELIOSTAT]).args(way);
            let mut daemon = Daemon::start(&mut command).unwrap();
            let there = || std::fs::metadata(&socket).ok();
            let there = wait::until("the socket", wait::LIMIT, there).unwrap();
            let found = std::os::unix::fs::PermissionsExt::mode(&there.permissions()) & 0o777;
            assert_eq!(found, mode, "{way:?} under {mask}: {found:o}");
            assert!(daemon.is_running().unwrap());
            assert!(daemon.stop().unwrap().success());
            assert!(!socket.exists());
        }
    }
}

#[test]
fn orders_are_taken_from_those_who_may_give_them() {
    let folder = common::folder();
    let control = folder.path().join("control");
    let control_path = control.to_string_lossy();
    let allow = ["--control-allow", "user:4711", "--control-allow", "group:4713"];
    let arguments = ["serve", "--control", &control_path].into_iter().chain(allow);
    let mut daemon = common::start_heliostat(arguments);
    daemon.listens(&control).unwrap();
    let greeting = |stream: UnixStream| {
        let mut stream = stream;
        stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
        let mut text = Vec::new();
        let mut byte = [0; 1];
        while stream.read(&mut byte).unwrap() == 1 && byte[0] != b'\n' {
            text.push(byte[0]);
        }
        serde_json::from_slice::<Value>(&text).unwrap()
    };
    let own = greeting(UnixStream::connect(&control).unwrap());
    assert!(own["QMP"].is_object(), "whoever runs it may: {own}");
    let Some(setpriv) = tool("setpriv") else { return };
    // The folder is ours alone; others need a way in, and a program that they may run.
    let open = || std::os::unix::fs::PermissionsExt::from_mode(0o755);
    std::fs::set_permissions(folder.path(), open()).unwrap();
    let program = folder.path().join("heliostat");
    std::fs::copy(common::HELIOSTAT, &program).unwrap();
    std::fs::set_permissions(&program, open()).unwrap();
    let as_user = |user: &str, group: &str| {
        let id = [format!("--reuid={user}"), format!("--regid={group}"), "--clear-groups".to_owned()];
        let mut command = Command::new(&setpriv);
        command.args(id).arg(&program).args(["job", "list", "--control"]).arg(&control);
        let output = command.output().unwrap();
        let text = [output.stdout, output.stderr].concat();
        (output.status.success(), String::from_utf8_lossy(&text).into_owned())
    };
    let (is_allowed, said) = as_user("4711", "4711");
    if !is_allowed && said.contains("setpriv") {
        return common::skip("cannot become another user here");
    }
    assert!(is_allowed && said.contains("There is no job"), "{said}");
    let (is_allowed, said) = as_user("4714", "4713");
    assert!(is_allowed, "by its group: {said}");
    let (is_allowed, refused) = as_user("4712", "4711");
    assert!(!is_allowed, "a user's number is no group's");
    assert!(refused.contains("the user 4712 may not give orders here"), "{refused}");
}
