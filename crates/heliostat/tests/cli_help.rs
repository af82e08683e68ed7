//! The help as people see it: a change shows here.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod common;

use common::heliostat;

fn help(arguments: &[&str]) -> String {
    let output = heliostat(arguments);
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn every_verb_has_its_help() {
    let verbs =
        ["demo", "serve", "mirror", "job", "create", "info", "check", "map", "compare", "completions"];
    for verb in verbs {
        insta::assert_snapshot!(format!("help_{verb}"), help(&[verb, "--help"]));
    }
    insta::assert_snapshot!("help", help(&["--help"]));
}

#[test]
fn the_version_is_said() {
    assert_eq!(help(&["--version"]), format!("heliostat {}\n", env!("CARGO_PKG_VERSION")));
}

#[test]
fn shells_get_completions() {
    for shell in ["bash", "zsh", "fish"] {
        let script = help(&["completions", shell]);
        assert!(script.contains("heliostat") && script.contains("mirror"), "{shell}");
    }
}

#[test]
fn what_is_no_verb_is_a_usage_error() {
    for arguments in [&["mirorr"][..], &[], &["mirror", "one"], &["serve", "--no-such-thing"]] {
        assert_eq!(heliostat(arguments).status.code(), Some(2), "{arguments:?}");
    }
}
