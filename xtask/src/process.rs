//! Runs other programs: shows what they print while it comes, and keeps it for whoever must read it.

use std::io::{IsTerminal, Read, Write};
use std::process::{Command, Stdio};
use std::thread;

use anyhow::{Context, Result};

/// What a program left behind.
pub struct Finished {
    /// Whether it ended with status 0.
    pub success: bool,
    /// All that it printed on both streams, without colours. Each stream is in order.
    pub output: String,
}

/// Makes a command that runs in the workspace's root without standard input.
pub fn command(program: &str, arguments: &[&str]) -> Command {
    let mut command = Command::new(program);
    command.args(arguments).current_dir(crate::workspace::root()).stdin(Stdio::null());
    if std::io::stdout().is_terminal() {
        // The output goes through a pipe, so the tools would think that nobody sees colours.
        command.env("CARGO_TERM_COLOR", "always");
    }
    command
}

/// Makes a `cargo` command, with the very cargo that runs this.
pub fn cargo(arguments: &[&str]) -> Command {
    let cargo = std::env::var("CARGO").unwrap_or_else(|_| "cargo".to_owned());
    command(&cargo, arguments)
}

/// Runs `command` to its end; shows its output and returns it.
///
/// # Errors
/// When it cannot be started.
pub fn run(command: &mut Command) -> Result<Finished> {
    let program = command.get_program().to_string_lossy().into_owned();
    let mut child = command
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot start {program}"))?;
    let stdout = child.stdout.take().expect("standard output was asked for as a pipe");
    let stderr = child.stderr.take().expect("standard error was asked for as a pipe");
    let (printed, complained) = thread::scope(|scope| {
        let printed = scope.spawn(|| pass_on(stdout));
        let complained = pass_on(stderr);
        (printed.join().expect("pass_on does not panic"), complained)
    });
    let status = child.wait().with_context(|| format!("waiting for {program}"))?;
    let bytes = [printed, complained].concat();
    Ok(Finished { success: status.success(), output: without_colours(&String::from_utf8_lossy(&bytes)) })
}

/// Runs `command` silently; says whether it ended well.
pub fn succeeds(command: &mut Command) -> bool {
    command.stdout(Stdio::null()).stderr(Stdio::null()).status().is_ok_and(|status| status.success())
}

fn pass_on(mut from: impl Read) -> Vec<u8> {
    let mut all = Vec::new();
    let mut piece = [0; 4096];
    // An error ends the stream as its end does: the exit status is what counts.
    while let Ok(count @ 1..) = from.read(&mut piece) {
        all.extend_from_slice(&piece[..count]);
        let mut stdout = std::io::stdout().lock();
        // Nobody left to read it; the program still has to end.
        let _ = stdout.write_all(&piece[..count]).and_then(|()| stdout.flush());
    }
    all
}

/// Removes the escape sequences that colour a terminal.
fn without_colours(text: &str) -> String {
    let mut plain = String::with_capacity(text.len());
    let mut rest = text;
    while let Some((before, after)) = rest.split_once("\x1b[") {
        plain.push_str(before);
        rest = after.trim_start_matches(|c: char| !c.is_ascii_alphabetic());
        rest = rest.get(1..).unwrap_or("");
    }
    plain.push_str(rest);
    plain
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn colours_are_taken_out() {
        assert_eq!(without_colours("\x1b[32;1mok\x1b[0m 3 \x1b[Kend"), "ok 3 end");
        assert_eq!(without_colours("plain"), "plain");
        assert_eq!(without_colours("cut \x1b["), "cut ");
    }

    #[test]
    fn output_of_both_streams_is_kept_and_the_status_told() {
        let finished = run(&mut command("sh", &["-c", "echo out; echo err >&2; exit 3"])).unwrap();
        assert!(!finished.success);
        assert!(finished.output.contains("out\n") && finished.output.contains("err\n"));
    }
}
