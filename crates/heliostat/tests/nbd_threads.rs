//! The threads among which a server's connections are shared out. Alone in its file: it counts those of the process.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod common;
#[path = "common/nbd.rs"]
mod nbd;

use std::sync::Arc;
use std::thread::available_parallelism;

use heliostat::front::nbd::ServerSettings;
use heliostat_host::file::FileStorage;
use heliostat_host::open::OpenOptions;

use common::wait;
use nbd::Served;

const SIZE: usize = 2 << 20;

/// Threads of this process that serve NBD.
fn threads() -> usize {
    let tasks = std::fs::read_dir("/proc/self/task").unwrap();
    let names = tasks.filter_map(|task| std::fs::read_to_string(task.ok()?.path().join("comm")).ok());
    names.filter(|name| name.trim() == "nbd").count()
}

#[test]
fn connections_are_shared_out_among_threads_that_end_with_the_server() {
    const MOST: usize = 4;
    let folder = common::folder();
    let cores = available_parallelism().unwrap().get();
    for (memory_max, expected) in [(512 << 20, cores.min(MOST)), (128 << 20, 1)] {
        let path = folder.path().join("disk");
        std::fs::write(&path, vec![0; SIZE]).unwrap();
        let served = Served::start(ServerSettings { memory_max, ..ServerSettings::default() });
        let storage = FileStorage::open(&path, &OpenOptions::default()).unwrap();
        served.export("disk", served.node("disk", Arc::new(storage)));
        let mut guests: Vec<_> = (0..2 * MOST).map(|_| served.guest("disk")).collect();
        for (turn, guest) in guests.iter_mut().enumerate() {
            let byte = u8::try_from(turn).unwrap() + 1;
            guest.write(0, &[byte; 100]);
        }
        for guest in &mut guests {
            assert_eq!(guest.read(0, 100), [u8::try_from(2 * MOST).unwrap(); 100]);
        }
        assert_eq!(threads(), expected);
        served.server.stop();
        wait::until("the threads' end", wait::LIMIT, || (threads() == 0).then_some(())).unwrap();
    }
}
