//! A disk served over NBD without a mirror: fio's random requests of 4 KiB on tmpfs, page-cached.

use std::path::Path;
use std::time::Duration;

use anyhow::Result;

use super::Row;
use crate::bench::contender::{Contender, ControlledDaemon, DiskOptions, serve_disk};
use crate::bench::fio::Load;
use crate::bench::report::{Figure, Goal, Sample};
use crate::bench::scene::{GIB, Scene};

use Contender::{NbdkitFile, Ours, QemuNbd, QemuStorageDaemon};

const WRITES_DEPTH_1: Figure = "writes/s depth 1";
const WRITES_DEPTH_16: Figure = "writes/s depth 16";
const READS_DEPTH_16: Figure = "reads/s depth 16";

pub const RANDOM: Row = Row {
    name: "nbd",
    work: "guest 4 KiB random requests over NBD, page-cached on tmpfs, no mirror",
    contenders: &[Ours, QemuStorageDaemon, QemuNbd, NbdkitFile],
    measure,
    goals: |medians| {
        let over = |other, figure| medians.ours_over(other, figure);
        vec![
            Goal::at_least(
                "depth 1: at least 1.5 times its writes",
                over(QemuStorageDaemon, WRITES_DEPTH_1),
                1.5,
            ),
            Goal::at_least("depth 16: at least 2.5 times", over(QemuStorageDaemon, WRITES_DEPTH_16), 2.5),
            Goal::at_least("depth 1: past nbdkit file", over(NbdkitFile, WRITES_DEPTH_1), 1.0),
            Goal::at_least("depth 16: past nbdkit file", over(NbdkitFile, WRITES_DEPTH_16), 1.0),
        ]
    },
};

fn measure(scene: &Scene, contender: Contender) -> Result<Sample> {
    let disk = scene.full_disk(scene.memory(), scene.size(GIB))?;
    let socket = scene.memory().join("nbd");
    if matches!(contender, Ours | QemuStorageDaemon) {
        let mut daemon = ControlledDaemon::start(contender, scene.memory())?;
        daemon.add_disk("disk", &disk, DiskOptions::default())?;
        daemon.export("disk", &socket)?;
        let sample = loads(scene, &socket)?;
        daemon.quit()?;
        Ok(sample)
    } else {
        let _server = serve_disk(contender, &disk, &socket)?;
        loads(scene, &socket)
    }
}

fn loads(scene: &Scene, socket: &Path) -> Result<Sample> {
    let mut sample = Sample::default();
    let kinds = [
        (WRITES_DEPTH_1, "randwrite", 1),
        (WRITES_DEPTH_16, "randwrite", 16),
        (READS_DEPTH_16, "randread", 16),
    ];
    for (figure, pattern, depth) in kinds {
        let load = Load {
            socket,
            export: "disk",
            pattern,
            depth,
            connections: 1,
            size: scene.size(GIB),
            time: Duration::from_secs(if scene.is_quick() { 1 } else { 3 }),
            rate: None,
        };
        sample = sample.with(figure, load.requests_a_second(scene.memory())?);
    }
    Ok(sample)
}
