//! Addresses of NBD exports where a verb takes a disk.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod common;

use std::path::Path;
use std::process::{Command, Output, Stdio};

use common::process::Daemon;
use common::{folder, heliostat, tool};

const SIZE: usize = 1 << 20;

/// A server of the file `name` in the folder. Answers its address, too.
fn serve(folder: &Path, name: &str) -> Option<(Daemon, String)> {
    let nbdkit = tool("nbdkit")?;
    let socket = folder.join(format!("{name}.sock"));
    let mut command = Command::new(nbdkit);
    command.arg("--foreground").stderr(Stdio::null()).arg("--unix").arg(&socket).arg("file");
    let mut server = Daemon::start(command.arg(folder.join(name))).unwrap();
    server.listens(&socket).unwrap();
    Some((server, format!("nbd+unix:///?socket={}", socket.display())))
}

fn said(output: &Output) -> String {
    [&output.stdout[..], &output.stderr].concat().iter().map(|byte| char::from(*byte)).collect()
}

#[test]
fn a_disk_is_mirrored_to_an_export_and_from_one_and_looked_at_there() {
    let folder = folder();
    let path = |name: &str| folder.path().join(name).display().to_string();
    let bytes: Vec<u8> = (0..SIZE).map(|at| u8::try_from(at % 251).unwrap()).collect();
    std::fs::write(path("source"), &bytes).unwrap();
    std::fs::write(path("copy"), vec![0; SIZE]).unwrap();
    std::fs::write(path("small"), vec![0; SIZE / 2]).unwrap();
    let Some((_server, copy)) = serve(folder.path(), "copy") else { return };
    let Some((_other, small)) = serve(folder.path(), "small") else { return };
    let run = |arguments: &[&str]| heliostat(arguments);

    let mirrored = run(&["mirror", "-q", &path("source"), &copy]);
    assert!(mirrored.status.success(), "{}", said(&mirrored));
    assert!(std::fs::read(path("copy")).unwrap() == bytes);
    let compared = run(&["compare", &path("source"), &copy]);
    assert!(compared.status.success(), "{}", said(&compared));
    for verb in ["info", "map"] {
        let looked = run(&[verb, &copy]);
        assert!(looked.status.success(), "{}", said(&looked));
    }
    let back = run(&["mirror", "-q", &copy, &path("back")]);
    assert!(back.status.success(), "{}", said(&back));
    assert!(std::fs::read(path("back")).unwrap() == bytes);

    let refused = run(&["mirror", "-q", &path("source"), &small]);
    assert!(!refused.status.success() && said(&refused).contains("smaller"), "{}", said(&refused));
    assert!(std::fs::read(path("small")).unwrap().iter().all(|byte| *byte == 0));
}

#[test]
fn what_is_no_export_is_said_with_what_would_help() {
    let folder = folder();
    let nowhere = format!("nbd+unix:///x?socket={}", folder.path().join("none").display());
    for (address, help) in [
        (nowhere.as_str(), "start the server"),
        ("nbd://", "write nbd://HOST/EXPORT"),
        ("nbds://localhost/x", "add --tls-certificates FOLDER"),
    ] {
        let refused = heliostat(["info", address]);
        assert!(!refused.status.success() && said(&refused).contains(help), "{address}: {}", said(&refused));
    }
}
