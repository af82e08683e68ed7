//! A mirror to another host, over a line with a delay that is cut for a while: no guest waits for longer than agreed,
//! and the copy is right in the end.
//!
//! The other host is a network namespace; takes root and `/dev/net/tun`.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod common;
#[path = "common/nbd.rs"]
mod nbd;
#[path = "common/nbd_target.rs"]
mod nbd_target;

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::Duration;

use serde_json::json;

use nbd_target::{Mode, PROMPT, Stage};

/// The two ends of the line: of a network of their own, so that lines of other processes are not taken for it.
fn ends() -> [String; 2] {
    let network = std::process::id() % (1 << 14);
    [1, 2].map(|end| format!("10.213.{}.{}", network >> 6, (network & 63) * 4 + end))
}

/// What the guest may wait for the target.
const DEADLINE: Duration = Duration::from_millis(300);

/// The line to the other host; that is gone when it is dropped.
struct Line {
    process: Child,
    answers: BufReader<ChildStdout>,
}

impl Line {
    /// `None`, having said so, where there can be none.
    fn new() -> Option<Self> {
        let python = common::tool("python3")?;
        common::tool("nsenter")?;
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/common/far_host.py");
        let [here, there] = ends();
        let mut command = Command::new(python);
        command
            .args([script, &here, &there])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit());
        let mut process = command.spawn().unwrap();
        let answers = BufReader::new(process.stdout.take().unwrap());
        let mut line = Self { process, answers };
        if line.answer() == "ready" {
            return Some(line);
        }
        common::skip("there is no line to another host: it takes root and /dev/net/tun");
        None
    }

    fn order(&mut self, order: &str) {
        writeln!(self.process.stdin.as_mut().unwrap(), "{order}").unwrap();
        assert_eq!(self.answer(), "done");
    }

    fn answer(&mut self) -> String {
        let mut answer = String::new();
        self.answers.read_line(&mut answer).unwrap();
        answer.trim().to_owned()
    }

    fn nbdkit(&self) -> Command {
        let mut command = Command::new("nsenter");
        command.args(["--target", &self.process.id().to_string(), "--net", "nbdkit", "--port", "10809"]);
        command
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        // It may have ended already; there is nobody to tell.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn survives_an_outage(mode: Mode) -> Option<Duration> {
    let mut stage = Stage::new()?;
    let mut line = Line::new()?;
    line.order("delay 3");
    stage.start_elsewhere(line.nbdkit());
    let server = json!({ "type": "inet", "host": ends()[1], "port": "10809" });
    stage.add_target_at(server, 60, &json!({}));
    stage.mirror(mode, &json!({ "target-deadline-ms": 300 }));
    stage.ready();
    let guest = stage.guest();
    line.order("cut");
    stage.degraded(true);
    line.order("mend");
    stage.degraded(false);
    let longest = guest.stop();
    stage.ends_with_a_copy();
    Some(longest)
}

#[test]
fn a_mirror_to_another_host_survives_an_outage_of_the_line() {
    for mode in [Mode::Background, Mode::WriteBlocking] {
        let Some(longest) = survives_an_outage(mode) else { return };
        assert!(longest < DEADLINE + PROMPT, "{mode:?}: {longest:?}");
    }
}
