//! Nodes on each other: who may stand beside whom, and in which order they are listed.

use heliostat_block::driver::Preallocation;
use heliostat_block::driver::qcow2::create::{self, CreateOptions};
use heliostat_block::driver::qcow2::file::ImageFile;

use super::super::{BitmapAction, BitmapSpec};
use super::*;

const MIB: u64 = 1 << 20;

fn named(name: &str) -> Child {
    Child::Named(name.to_owned())
}

fn null(name: &str) -> NodeSpec {
    NodeSpec::new(Some(name.to_owned()), DriverSpec::NullCo { size: MIB, read_zeroes: true })
}

fn raw(name: &str, file: &str, offset: u64, size: Option<u64>) -> NodeSpec {
    let driver = DriverSpec::Raw { file: named(file), offset: Some(offset), size, is_guess: false };
    NodeSpec::new(Some(name.to_owned()), driver)
}

fn read_only(spec: NodeSpec) -> NodeSpec {
    NodeSpec { read_only: true, ..spec }
}

fn is_in_use<T>(result: Result<T, DaemonError>) -> bool {
    matches!(result, Err(DaemonError::NodeInUse(_)))
}

/// Makes an image in the empty node `file`, which is opened anew.
fn make_image(daemon: &Daemon, file: &str, data: Option<&str>) {
    let image = |name: &str| ImageFile::new(daemon.below(name).unwrap().storage());
    let name = data.map(|data| data.as_bytes().to_vec());
    let options = CreateOptions { size: MIB, data_file: name, ..CreateOptions::default() };
    let data = data.map(image);
    runtime::block_on(create::create(&image(file), data.as_ref(), &options)).unwrap().unwrap();
    let path = daemon.below(file).unwrap().entry.path;
    daemon.remove_node(file).unwrap();
    daemon.add_node(&NodeSpec::file(file, path)).unwrap();
}

/// A daemon with the nodes `file`, which holds an image whose data are outside, and `data`.
fn with_data_file(folder: &Path) -> Arc<Daemon> {
    let daemon = Daemon::new();
    for name in ["file", "data"] {
        let path = folder.join(name);
        std::fs::write(&path, b"").unwrap();
        daemon.add_node(&NodeSpec::file(name, path)).unwrap();
    }
    make_image(&daemon, "file", Some("data"));
    daemon.remove_node("data").unwrap();
    daemon.add_node(&NodeSpec::file("data", folder.join("data"))).unwrap();
    daemon
}

fn image(data: Child) -> NodeSpec {
    let image = Qcow2Spec { data_file: Some(data), ..Qcow2Spec::new(named("file")) };
    NodeSpec::new(Some("image".to_owned()), DriverSpec::Qcow2(Box::new(image)))
}

#[test]
fn nobody_else_writes_where_an_image_has_its_data() {
    let folder = tempfile::tempdir().unwrap();
    let daemon = with_data_file(folder.path());
    daemon.add_node(&image(named("data"))).unwrap();
    assert!(is_in_use(daemon.add_node(&raw("beside", "data", 0, None))));
    assert!(is_in_use(daemon.add_node(&read_only(raw("beside", "data", 0, None)))));
    daemon.remove_node("image").unwrap();
    daemon.add_node(&raw("beside", "data", 0, None)).unwrap();
    assert!(is_in_use(daemon.add_node(&image(named("data")))));
}

#[test]
fn an_image_has_its_data_in_another_node_than_itself() {
    let folder = tempfile::tempdir().unwrap();
    let daemon = with_data_file(folder.path());
    assert!(is_in_use(daemon.add_node(&image(named("file")))));
    let above = NodeSpec { name: None, ..raw("", "file", 0, None) };
    assert!(is_in_use(daemon.add_node(&image(Child::New(Box::new(above))))));
    assert_eq!(daemon.nodes().len(), 2);
}

#[test]
fn a_node_beside_a_reader_of_its_bytes_does_not_become_writable() {
    let daemon = Daemon::new();
    daemon.add_node(&null("disk")).unwrap();
    let specs = [raw("first", "disk", 0, None), raw("second", "disk", 0, None)];
    for spec in &specs {
        daemon.add_node(&read_only(spec.clone())).unwrap();
    }
    let automatic = NodeSpec { auto_read_only: true, ..specs[0].clone() };
    for wanted in [specs.to_vec(), vec![specs[0].clone()], vec![automatic]] {
        assert!(is_in_use(daemon.reopen_nodes(&wanted)));
    }
    daemon.remove_node("second").unwrap();
    daemon.reopen_nodes(&specs[..1]).unwrap();
    assert!(!daemon.node("first").unwrap().options().read_only);
}

#[test]
fn a_window_of_a_window_of_a_fixed_one_leaves_the_file_as_long_as_it_is() {
    for start in [0, 3 * MIB] {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("disk");
        std::fs::File::create(&path).unwrap().set_len(4 * MIB).unwrap();
        let daemon = Daemon::new();
        daemon.add_node(&NodeSpec::file("disk", &path)).unwrap();
        daemon.add_node(&raw("first", "disk", start, Some(MIB))).unwrap();
        daemon.add_node(&raw("second", "first", 0, None)).unwrap();
        let third = daemon.add_node(&raw("third", "second", 0, None)).unwrap();
        let resized = runtime::block_on(third.resize(MIB / 2, Preallocation::Off)).unwrap();
        assert!(resized.is_err(), "from {start}");
        assert_eq!(std::fs::metadata(&path).unwrap().len(), 4 * MIB, "from {start}");
    }
}

#[test]
fn a_snapshot_leaves_writable_what_others_stand_on() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("file"), b"").unwrap();
    let daemon = Daemon::new();
    daemon.add_node(&NodeSpec::file("file", folder.path().join("file"))).unwrap();
    make_image(&daemon, "file", None);
    let image = DriverSpec::Qcow2(Box::new(Qcow2Spec::new(named("file"))));
    daemon.add_node(&NodeSpec::new(Some("overlay".to_owned()), image)).unwrap();
    daemon.add_throttle_group("g", heliostat_block::throttle::Limits::default()).unwrap();
    daemon.add_node(&null("disk")).unwrap();
    let filter = DriverSpec::Throttle { group: "g".to_owned(), file: named("disk") };
    daemon.add_node(&NodeSpec::new(Some("filter".to_owned()), filter)).unwrap();
    daemon.add_node(&raw("first", "filter", 0, Some(MIB / 2))).unwrap();
    daemon.add_node(&raw("second", "filter", MIB / 2, Some(MIB / 2))).unwrap();
    daemon.snapshot("first", "overlay").unwrap();
    let is_read_only = |name: &str| daemon.node(name).unwrap().options().read_only;
    assert_eq!(["first", "filter", "disk"].map(is_read_only), [true, false, false]);
}

#[test]
fn a_bitmap_is_not_on_a_node_that_writes_pass_by() {
    let daemon = Daemon::new();
    daemon.add_node(&null("disk")).unwrap();
    let above = raw("above", "disk", 0, None);
    let add = |node: &str| {
        let (node, name) = (node.to_owned(), "b".to_owned());
        let spec = BitmapSpec { node, name, granularity: None, persistent: false, disabled: false };
        daemon.change_bitmaps(&[BitmapAction::Add(spec)])
    };
    daemon.add_node(&above).unwrap();
    assert!(is_in_use(add("disk")));
    add("above").unwrap();
    daemon.remove_node("above").unwrap();
    add("disk").unwrap();
    assert!(is_in_use(daemon.add_node(&above)));
    daemon.add_node(&read_only(above.clone())).unwrap();
    assert!(is_in_use(daemon.reopen_nodes(&[above])));
}

/// A window over one that was made for it, over `disk`; all is only read.
fn window_of_a_window() -> NodeSpec {
    let below = read_only(NodeSpec { name: None, ..raw("", "disk", 0, None) });
    let file = Child::New(Box::new(below));
    let driver = DriverSpec::Raw { file, offset: None, size: None, is_guess: false };
    read_only(NodeSpec::new(Some("above".to_owned()), driver))
}

#[test]
fn a_bitmap_two_nodes_below_hears_of_whoever_becomes_a_writer() {
    let daemon = Daemon::new();
    daemon.add_node(&null("disk")).unwrap();
    let bitmap = BitmapSpec {
        node: "disk".to_owned(),
        name: "b".to_owned(),
        granularity: None,
        persistent: false,
        disabled: false,
    };
    daemon.change_bitmaps(&[BitmapAction::Add(bitmap)]).unwrap();
    daemon.add_node(&window_of_a_window()).unwrap();
    let child = daemon.below("above").unwrap().entry.child.unwrap();
    let writable = raw("above", child.as_str(), 0, None);
    assert!(is_in_use(daemon.reopen_nodes(std::slice::from_ref(&writable))));
    let remove = BitmapAction::Remove("disk".to_owned(), "b".to_owned());
    daemon.change_bitmaps(&[remove]).unwrap();
    daemon.reopen_nodes(&[writable]).unwrap();
}

#[test]
fn a_reader_two_nodes_below_is_beside_no_writer() {
    let daemon = Daemon::new();
    daemon.add_node(&null("disk")).unwrap();
    daemon.add_node(&window_of_a_window()).unwrap();
    daemon.add_node(&read_only(raw("beside", "disk", 0, None))).unwrap();
    let child = daemon.below("above").unwrap().entry.child.unwrap();
    let writable = raw("above", child.as_str(), 0, None);
    assert!(is_in_use(daemon.reopen_nodes(std::slice::from_ref(&writable))));
    daemon.remove_node("beside").unwrap();
    daemon.reopen_nodes(&[writable]).unwrap();
    assert!(is_in_use(daemon.add_node(&read_only(raw("beside", "disk", 0, None)))), "the other way round");
}

#[test]
fn nobody_writes_past_a_node_that_is_only_read() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk");
    std::fs::File::create(&path).unwrap().set_len(MIB).unwrap();
    let daemon = Daemon::new();
    daemon.add_node(&NodeSpec::file("disk", &path)).unwrap();
    daemon.add_node(&read_only(raw("reader", "disk", 0, None))).unwrap();
    let above = daemon.add_node(&raw("above", "reader", 0, None)).unwrap();
    assert!(above.options().read_only);
    let reopened = daemon.reopen_nodes(&[raw("above", "reader", 0, None)]);
    assert!(matches!(reopened, Err(DaemonError::OpenedReadOnly(_))), "{reopened:?}");
    daemon.reopen_nodes(&[raw("reader", "disk", 0, None)]).unwrap();
    daemon.reopen_nodes(&[raw("above", "reader", 0, None)]).unwrap();
    assert!(!above.options().read_only);
}

#[test]
fn a_node_that_another_filter_reads_too_is_not_replaced() {
    let folder = tempfile::tempdir().unwrap();
    let daemon = Daemon::new();
    daemon.add_throttle_group("g", heliostat_block::throttle::Limits::default()).unwrap();
    for name in ["low", "target"] {
        let path = folder.path().join(name);
        std::fs::File::create(&path).unwrap().set_len(MIB).unwrap();
        daemon.add_node(&NodeSpec { read_only: name == "low", ..NodeSpec::file(name, &path) }).unwrap();
    }
    let throttle = |name: &str| {
        let file = Child::Named("low".to_owned());
        let driver = DriverSpec::Throttle { group: "g".to_owned(), file };
        read_only(NodeSpec::new(Some(name.to_owned()), driver))
    };
    daemon.add_node(&throttle("a")).unwrap();
    daemon.add_node(&throttle("b")).unwrap();
    let mut spec = crate::daemon::MirrorSpec::new("j", "a", "target");
    spec.replaces = Some("low".to_owned());
    let refused = daemon.start_mirror(&spec);
    assert!(matches!(refused, Err(DaemonError::NodeBusy(_))), "{:?}", refused.err());
    daemon.remove_node("b").unwrap();
    daemon.start_mirror(&spec).unwrap();
    daemon.shutdown().unwrap();
}
