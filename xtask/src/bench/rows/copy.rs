//! A copy from file to file on the command line.

use std::path::Path;
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result, ensure};

use super::Row;
use crate::bench::contender::{Contender, our_program};
use crate::bench::report::{Figure, Goal, Medians, Sample};
use crate::bench::scene::{GIB, MIB, Scene, ensure_equal, mib, occupied};

use Contender::{Cp, Nbdcopy, Ours, QemuImg};

const TIME: Figure = "s";
const OCCUPIED: Figure = "target MiB";

pub const FILES: Row = Row {
    name: "copy",
    work: "copy of a raw file on tmpfs, 4 GiB with 2 GiB in 32 places, on the command line",
    contenders: &[Ours, QemuImg, Nbdcopy, Cp],
    measure,
    goals: |medians| {
        let none_faster = |medians: &Medians| {
            let others = [QemuImg, Nbdcopy, Cp].map(|other| medians.ours_over(other, TIME));
            others.into_iter().collect::<Option<Vec<_>>>().map(|all| all.into_iter().fold(0.0, f64::max))
        };
        vec![Goal::at_most("no slower than the fastest of them", none_faster(medians), 1.0)]
    },
};

fn measure(scene: &Scene, contender: Contender) -> Result<Sample> {
    let (size, places, len) = (scene.size(4 * GIB), 32, scene.size(64 * MIB));
    let source = scene.sparse_disk(scene.memory(), size, places, len)?;
    let target = scene.memory().join("target");
    let _ = std::fs::remove_file(&target);
    let mut command = command(contender, &source, &target);
    let start = Instant::now();
    let output = command.output().with_context(|| format!("starting {}", contender.name()))?;
    let took = start.elapsed().as_secs_f64();
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr).trim());
    let occupied = occupied(&target)?;
    ensure_equal(&source, &target, [(0, size)].into_iter())?;
    std::fs::remove_file(&target)?;
    Ok(Sample::default().with(TIME, took).with(OCCUPIED, mib(occupied)))
}

fn command(contender: Contender, source: &Path, target: &Path) -> Command {
    let (program, arguments): (_, &[&str]) = match contender {
        QemuImg => ("qemu-img".into(), &["convert", "-f", "raw", "-O", "raw"]),
        Nbdcopy => ("nbdcopy".into(), &["--"]),
        Cp => ("cp".into(), &["--sparse=auto", "--"]),
        _ => (our_program(), &["mirror"]),
    };
    let mut command = Command::new(program);
    command.args(arguments).arg(source).arg(target).stdin(std::process::Stdio::null());
    command
}
