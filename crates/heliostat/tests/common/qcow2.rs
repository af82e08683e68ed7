//! qcow2 images for tests: made by `qemu-img`, judged by it, and bent where that needs bytes that no tool writes.

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use super::tool;

/// Runs `qemu-img` in `folder`. `None`, having said so, where it is not installed.
pub fn try_qemu_img(folder: &Path, arguments: &[&str]) -> Option<Output> {
    let program = tool("qemu-img")?;
    Some(Command::new(program).current_dir(folder).args(arguments).output().expect("it was found"))
}

/// Runs `qemu-img` in `folder`, which must succeed. Says what it printed.
pub fn qemu_img(folder: &Path, arguments: &[&str]) -> String {
    let output = try_qemu_img(folder, arguments).expect("the test has looked for it");
    assert!(output.status.success(), "qemu-img {arguments:?}: {output:?}");
    String::from_utf8(output.stdout).expect("ASCII")
}

/// Lets `qemu-io` do things to an image in `folder`.
pub fn qemu_io(folder: &Path, image: &str, commands: &[&str]) {
    let program = tool("qemu-io").expect("it comes with qemu-img");
    let mut command = Command::new(program);
    command.current_dir(folder).arg(image);
    for step in commands {
        command.args(["-c", step]);
    }
    let output = command.output().expect("it was found");
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success() && !said.contains("failed"), "qemu-io {commands:?}: {output:?}");
}

/// Writes into the header of a version 3 image that it stands on `name`, of `format`, whatever is there.
pub fn name_backing(image: &Path, name: &str, format: Option<&str>) {
    let mut bytes = fs::read(image).expect("it was made");
    let number = |at: usize| u32::from_be_bytes(bytes[at..at + 4].try_into().expect("four bytes"));
    let start = usize::try_from(number(100)).expect("a header's length");
    let mut extensions = Vec::new();
    if let Some(format) = format {
        extensions.extend(0xe279_2aca_u32.to_be_bytes());
        extensions.extend(u32::try_from(format.len()).expect("short").to_be_bytes());
        extensions.extend(format.as_bytes());
        extensions.resize(extensions.len().next_multiple_of(8), 0);
    }
    extensions.extend([0; 8]);
    let place = start + extensions.len();
    bytes[start..start + 2048].fill(0);
    bytes[start..place].copy_from_slice(&extensions);
    bytes[place..place + name.len()].copy_from_slice(name.as_bytes());
    bytes[8..16].copy_from_slice(&u64::try_from(place).expect("small").to_be_bytes());
    bytes[16..20].copy_from_slice(&u32::try_from(name.len()).expect("short").to_be_bytes());
    fs::write(image, bytes).expect("it was writable");
}

/// Puts an extension behind those of a version 3 image without a backing file.
pub fn add_extension(image: &Path, kind: u32, data: &[u8]) {
    let mut bytes = fs::read(image).expect("it was made");
    let number = |at: usize| {
        let number = u32::from_be_bytes(bytes[at..at + 4].try_into().expect("four bytes"));
        usize::try_from(number).expect("it fits")
    };
    let mut at = number(100);
    while number(at) != 0 {
        at += 8 + number(at + 4).next_multiple_of(8);
    }
    bytes[at..at + 4].copy_from_slice(&kind.to_be_bytes());
    bytes[at + 4..at + 8].copy_from_slice(&u32::try_from(data.len()).expect("short").to_be_bytes());
    bytes[at + 8..at + 8 + data.len()].copy_from_slice(data);
    let end = at + 8 + data.len().next_multiple_of(8);
    bytes[end..end + 8].fill(0);
    fs::write(image, bytes).expect("it was writable");
}

/// Asks `qemu-img check`, which must find nothing.
pub fn assert_sound(folder: &Path, image: &str) {
    qemu_img(folder, &["check", "-q", image]);
}

/// Asks `qemu-img compare`, which must find no difference.
pub fn assert_same(folder: &Path, a: (&str, &str), b: (&str, &str)) {
    let output = try_qemu_img(folder, &["compare", "-f", a.1, "-F", b.1, a.0, b.0]);
    let output = output.expect("the test has looked for it");
    assert!(output.status.success(), "{a:?} and {b:?}: {output:?}");
}
