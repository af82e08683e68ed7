//! Commands on a node over nothing and over a fault injector: what is printed.

use heliostat_block::graph::Claims;

use super::*;
use crate::daemon::{Child, DriverSpec, FaultLimits, FaultSpec, NodeSpec};

fn with_a_node() -> Arc<Daemon> {
    let daemon = Daemon::new();
    let null = DriverSpec::NullCo { size: 1 << 20, read_zeroes: true };
    let image = Child::New(Box::new(NodeSpec::new(None, null)));
    let (limits, claims) = (FaultLimits::default(), heliostat_block::graph::Claims::default());
    let faults = FaultSpec { image, config: None, limits, errors: Vec::new(), states: Vec::new(), claims };
    let node = NodeSpec::new(Some("n".to_owned()), DriverSpec::Faults(Box::new(faults)));
    daemon.add_node(&node).unwrap();
    let raw =
        DriverSpec::Raw { file: Child::Named("n".to_owned()), offset: None, size: None, is_guess: false };
    daemon.add_node(&NodeSpec::new(Some("r".to_owned()), raw)).unwrap();
    daemon
}

/// What is printed, but for lines that tell a time.
fn says(daemon: &Daemon, line: &str) -> String {
    let text = run(daemon, "r", line).unwrap();
    text.lines().filter(|line| !line.ends_with("ops/sec)")).collect::<Vec<_>>().join("|")
}

#[test]
fn what_is_wrong_is_said_in_qemu_ios_words() {
    let daemon = with_a_node();
    let table = [
        ("zork", "command \"zork\" not found"),
        ("write", "bad argument count 0 to write, expected at least 2 arguments"),
        ("length 5", "bad argument count 1 to length, expected 0 arguments"),
        ("resume", "bad argument count 0 to resume, expected 1 arguments"),
        ("write 0 zz", "Parsing error: non-numeric argument, or extraneous/unrecognized suffix -- zz"),
        ("read 0 9E", "Parsing error: argument too large -- 9E"),
        ("read -P zz 0 1k", "zz is not a valid pattern byte"),
        ("write -n 0 512", "-n requires -z to be specified"),
        ("write -u 0 512", "-u requires -z to be specified"),
        ("write -zP 3 0 512", "Only one of -z, -P, and -s can be specified at the same time"),
        ("write -c 0 64k", "write failed: Operation not supported"),
        ("write 0 2M", "write failed: Input/output error"),
        ("discard 2M 1k", "discard failed: Input/output error"),
        ("read 0 32769k", "length cannot exceed 33554432, given 33555456"),
        ("write 0 32769k", "length cannot exceed 33554432, given 33555456"),
        ("read -v 0 1025k", "length cannot exceed 1048576 with -v, given 1049600"),
        ("break zork B", "Could not set breakpoint: No such file or directory"),
        ("resume A", "Could not resume request: No such file or directory"),
        ("remove_break A", "Could not remove breakpoint A: No such file or directory"),
        ("sleep zz", "zz is not a valid number"),
    ];
    for (line, expected) in table {
        assert_eq!(says(&daemon, line), expected, "{line}");
    }
}

#[test]
fn requests_are_carried_out_and_reported() {
    let daemon = with_a_node();
    let table = [
        ("write -P 7 0 64k", "wrote 65536/65536 bytes at offset 0"),
        ("read -P 0 512 512", "read 512/512 bytes at offset 512"),
        (
            "read -P 8 0 4k",
            "Pattern verification failed at offset 0, 4096 bytes|read 4096/4096 bytes at offset 0",
        ),
        ("write -z -u 0 4k", "wrote 4096/4096 bytes at offset 0"),
        ("discard 0 4k", "discard 4096/4096 bytes at offset 0"),
        ("write -q 0 4k", ""),
        ("flush", ""),
        ("length", "1 MiB"),
    ];
    for (line, expected) in table {
        assert_eq!(says(&daemon, line), expected, "{line}");
    }
}

#[test]
fn requests_that_are_held_up_take_no_more_than_a_bounded_memory() {
    let daemon = with_a_node();
    let null = DriverSpec::NullCo { size: 1 << 30, read_zeroes: true };
    let faults = FaultSpec {
        claims: Claims::default(),
        image: Child::New(Box::new(NodeSpec::new(None, null))),
        config: None,
        limits: FaultLimits::default(),
        errors: Vec::new(),
        states: Vec::new(),
    };
    let faults = Child::New(Box::new(NodeSpec::new(None, DriverSpec::Faults(Box::new(faults)))));
    let raw = DriverSpec::Raw { file: faults, offset: None, size: None, is_guess: false };
    daemon.add_node(&NodeSpec::new(Some("big".to_owned()), raw)).unwrap();
    let ask = |line: &str| run(&daemon, "big", line);
    for (tag, at) in [("A", "0"), ("B", "32M")] {
        for line in
            [format!("break write_aio {tag}"), format!("aio_write {at} 32M"), format!("wait_break {tag}")]
        {
            assert_eq!(ask(&line).unwrap(), "", "{line}");
        }
    }
    for line in ["aio_write 64M 512", "write 64M 512", "read 64M 512"] {
        assert!(matches!(ask(line), Err(DaemonError::TooMany { .. })), "{line}");
    }
    assert_eq!(ask("discard -q 64M 512").unwrap(), "", "it has no data");
    assert_eq!([ask("resume A").unwrap(), ask("resume B").unwrap()], ["", ""]);
    assert!(ask("aio_flush").unwrap().contains("wrote 33554432/33554432 bytes at offset 33554432"));
    assert!(ask("write 64M 512").unwrap().starts_with("wrote 512/512"));
}

#[test]
fn a_write_is_held_up_at_a_breakpoint_and_goes_on() {
    let daemon = with_a_node();
    for line in ["break write_aio A", "aio_write -P 3 0 4k", "wait_break A"] {
        assert_eq!(says(&daemon, line), "", "{line}");
    }
    assert_eq!(says(&daemon, "aio_read 512 512"), "", "others go on");
    assert_eq!(says(&daemon, "resume A"), "");
    let said = says(&daemon, "aio_flush");
    assert!(said.contains("wrote 4096/4096 bytes at offset 0") && said.contains("read 512/512"), "{said}");
    assert_eq!(says(&daemon, "aio_flush"), "");
}

#[test]
fn the_end_of_the_daemon_does_not_wait_for_a_request_that_is_held_up() {
    let daemon = with_a_node();
    says(&daemon, "break write_aio A");
    says(&daemon, "aio_write 0 4k");
    says(&daemon, "wait_break A");
    daemon.shutdown().unwrap();
    assert!(daemon.nodes().is_empty());
}

#[test]
fn the_end_of_the_daemon_does_not_wait_for_a_limit() {
    let daemon = with_a_node();
    let mut limits = heliostat_block::throttle::Limits::default();
    limits.get_mut(heliostat_block::throttle::Counted::BytesTotal).rate = 1;
    daemon.add_throttle_group("g", limits).unwrap();
    let throttle = DriverSpec::Throttle { group: "g".to_owned(), file: Child::Named("r".to_owned()) };
    daemon.add_node(&NodeSpec::new(Some("t".to_owned()), throttle)).unwrap();
    for _ in 0..3 {
        run(&daemon, "t", "aio_write 0 64k").unwrap();
    }
    daemon.shutdown().unwrap();
    assert!(daemon.nodes().is_empty());
}

#[test]
fn nodes_on_each_other_are_reopened_in_any_order_while_a_request_is_between_them() {
    use futures_util::FutureExt;

    let daemon = with_a_node();
    // Above it has begun, below it has not.
    says(&daemon, "break write_aio A");
    says(&daemon, "aio_write 0 4k");
    says(&daemon, "wait_break A");
    let image =
        daemon.nodes().iter().find_map(|entry| entry.filter.as_ref().and(entry.child.clone())).unwrap();
    let (limits, claims) = (FaultLimits::default(), heliostat_block::graph::Claims::default());
    let (errors, states, image) = (Vec::new(), Vec::new(), Child::Named(image.to_string()));
    let lower =
        DriverSpec::Faults(Box::new(FaultSpec { image, config: None, limits, errors, states, claims }));
    let file = Child::Named("n".to_owned());
    let upper = DriverSpec::Raw { file, offset: None, size: None, is_guess: false };
    let specs =
        [("n", lower), ("r", upper)].map(|(name, driver)| NodeSpec::new(Some(name.to_owned()), driver));
    let (sender, reopened) = std::sync::mpsc::channel();
    let other = Arc::clone(&daemon);
    std::thread::spawn(move || sender.send(other.reopen_nodes(&specs)));
    let is_closed = |name: &str| daemon.node(name).unwrap().enter().now_or_never().is_none();
    while !is_closed("n") && !is_closed("r") {
        std::thread::yield_now();
    }
    says(&daemon, "resume A");
    reopened.recv_timeout(Duration::from_secs(30)).expect("nobody waits for ever").unwrap();
    assert!(says(&daemon, "aio_flush").starts_with("wrote 4096/4096"));
}
