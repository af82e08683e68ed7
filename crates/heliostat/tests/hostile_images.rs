//! Images that name what they must not open: through a daemon, as an operator would be given them.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod common;

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

use serde_json::{Value, json};

use common::process::Daemon;
use common::qcow2::{name_backing, qemu_img, qemu_io};
use common::qmp::{Qmp, QmpError};
use common::{folder, start_heliostat, tool};

struct Scene {
    folder: tempfile::TempDir,
    qmp: Qmp,
    _daemon: Daemon,
}

impl Scene {
    /// A daemon, with a directory of images and one beside it that is none of theirs.
    fn new(arguments: &[&str]) -> Option<Self> {
        tool("qemu-img")?;
        let folder = folder();
        for directory in ["images", "other"] {
            fs::create_dir(folder.path().join(directory)).unwrap();
        }
        fs::write(folder.path().join("other/secret"), [7; 65536]).unwrap();
        qemu_img(folder.path(), &["create", "-q", "-f", "qcow2", "images/plain", "1M"]);
        let socket = folder.path().join("control");
        let arguments: Vec<_> =
            arguments.iter().map(|text| text.replace("DIR", folder.path().to_str().unwrap())).collect();
        let own = ["serve", "--control", socket.to_str().unwrap()].map(str::to_owned);
        let mut daemon = start_heliostat(own.iter().chain(&arguments));
        daemon.listens(&socket).unwrap();
        Some(Self { qmp: Qmp::connect(&socket).unwrap(), folder, _daemon: daemon })
    }

    fn at(&self, name: &str) -> std::path::PathBuf {
        self.folder.path().join(name)
    }

    /// An image in the directory of images that names a backing file.
    fn image(&self, name: &str, backing: &str, format: Option<&str>) {
        let path = self.at("images").join(name);
        fs::copy(self.at("images/plain"), &path).unwrap();
        name_backing(&path, backing, format);
    }

    /// Opens an image; says why not.
    fn open(&mut self, name: &str) -> Result<(), String> {
        let file = json!({ "driver": "file", "filename": self.at("images").join(name) });
        let spec = json!({ "driver": "qcow2", "node-name": "n", "file": file });
        match self.qmp.execute("blockdev-add", spec) {
            Ok(_) => Ok(()),
            Err(QmpError::Refused { description, .. }) => {
                assert_eq!(self.nodes(), json!([]), "what was made below is gone");
                Err(description)
            }
            Err(error) => panic!("{name}: {error}"),
        }
    }

    fn close(&mut self) {
        self.qmp.execute("blockdev-del", json!({ "node-name": "n" })).unwrap();
        assert_eq!(self.nodes(), json!([]));
    }

    fn nodes(&mut self) -> Value {
        self.qmp.execute("query-named-block-nodes", json!({})).unwrap()
    }

    fn refused(&mut self, name: &str, because: &str) {
        let text = self.open(name).expect_err(name);
        assert!(text.contains(because), "{name}: {text}");
    }
}

fn make_fifo(path: &Path) {
    assert!(std::process::Command::new("mkfifo").arg(path).status().unwrap().success());
}

#[test]
fn names_that_lead_out_of_the_images_directory_are_refused_with_what_to_do() {
    let Some(mut scene) = Scene::new(&[]) else { return };
    symlink("../other/secret", scene.at("images/link")).unwrap();
    symlink("../other", scene.at("images/away")).unwrap();
    let absolute = scene.at("other/secret");
    for (name, backing) in [
        ("up", "../other/secret"),
        ("absolute", absolute.to_str().unwrap()),
        ("linked", "link"),
        ("through", "away/secret"),
        ("shadow", "/etc/shadow"),
        ("nothing", "/etc/there-is-no-such-file"),
        ("memory", "/proc/self/mem"),
    ] {
        scene.image(name, backing, Some("raw"));
        scene.refused(name, "--allow-path");
    }
}

#[test]
fn what_is_no_disk_and_what_is_no_path_is_refused() {
    let Some(mut scene) = Scene::new(&[]) else { return };
    make_fifo(&scene.at("images/fifo"));
    scene.image("on-fifo", "fifo", Some("raw"));
    scene.refused("on-fifo", "to be a regular file");
    fs::create_dir(scene.at("images/directory")).unwrap();
    scene.image("on-directory", "directory", Some("raw"));
    scene.refused("on-directory", "to be a regular file");
    scene.image("on-json", "json:{\"driver\":\"file\",\"filename\":\"/etc/shadow\"}", Some("raw"));
    scene.refused("on-json", "no path");
    scene.image("on-nbd", "nbd:localhost:10809", Some("raw"));
    scene.refused("on-nbd", "no path");
    scene.image("unknown", "plain", Some("vmdk"));
    scene.refused("unknown", "Unknown driver 'vmdk'");
}

#[test]
fn loops_and_endless_chains_end() {
    let Some(mut scene) = Scene::new(&[]) else { return };
    scene.image("self", "self", Some("qcow2"));
    scene.refused("self", "infinite loop");
    scene.image("one", "two", Some("qcow2"));
    scene.image("two", "./one", Some("qcow2"));
    scene.refused("one", "infinite loop");
    for number in 0..216 {
        scene.image(&format!("deep{number}"), &format!("deep{}", number + 1), Some("qcow2"));
    }
    fs::copy(scene.at("images/plain"), scene.at("images/deep216")).unwrap();
    scene.refused("deep0", "is below 200 images");
    scene.open("deep17").unwrap();
    scene.close();
}

#[test]
fn an_operator_who_gives_a_chain_that_loops_is_told() {
    let Some(mut scene) = Scene::new(&[]) else { return };
    let file = json!({ "driver": "file", "filename": scene.at("images/plain") });
    let below = json!({ "driver": "qcow2", "file": file, "read-only": true });
    let spec = json!({ "driver": "qcow2", "node-name": "n", "file": file, "backing": below });
    let refused = scene.qmp.execute("blockdev-add", spec).unwrap_err().to_string();
    assert!(refused.contains("infinite loop"), "{refused}");
}

#[test]
fn a_format_that_an_image_does_not_say_is_not_guessed_unless_that_is_allowed() {
    let Some(mut scene) = Scene::new(&[]) else { return };
    scene.image("no-format", "plain", None);
    scene.refused("no-format", "--probe-backing");
    let Some(mut scene) = Scene::new(&["--probe-backing"]) else { return };
    scene.image("no-format", "plain", None);
    scene.open("no-format").unwrap();
    let nodes = scene.nodes();
    let formats: Vec<_> =
        nodes.as_array().unwrap().iter().map(|node| node["drv"].as_str().unwrap()).collect();
    assert_eq!(formats, ["qcow2", "file", "qcow2", "file"]);
    scene.close();
}

#[test]
fn a_directory_that_the_operator_allows_is_open_to_images() {
    let Some(mut scene) = Scene::new(&["--allow-path", "DIR/other"]) else { return };
    scene.image("allowed", "../other/secret", Some("raw"));
    scene.open("allowed").unwrap();
    let nodes = scene.nodes();
    let below = nodes.as_array().unwrap().iter().find(|node| node["drv"] == "raw").unwrap();
    assert_eq!(below["ro"], true, "nobody writes what an image stands on");
    scene.close();
    scene.image("shadow", "/etc/shadow", Some("raw"));
    scene.refused("shadow", "--allow-path");
}

#[test]
fn a_data_file_passes_the_same_gate() {
    let Some(mut scene) = Scene::new(&[]) else { return };
    let secret = scene.at("other/data");
    let option = format!("data_file={}", secret.display());
    let folder = scene.folder.path().to_owned();
    qemu_img(&folder, &["create", "-q", "-f", "qcow2", "-o", &option, "images/out", "1M"]);
    scene.refused("out", "data file");
    let inside = scene.at("images/data");
    let option = format!("data_file={}", inside.display());
    qemu_img(&folder, &["create", "-q", "-f", "qcow2", "-o", &option, "images/in", "1M"]);
    qemu_io(&folder, "images/in", &["write 0 4k"]);
    scene.open("in").unwrap();
    scene.close();
}
