//! [`LaneThreads`]: the threads that carry out mirrors' copies while no guest wants the other cores.
//!
//! Made with the first mirror, ended with the daemon. See [`heliostat_block::job::lanes`].

use std::sync::{Arc, Mutex, PoisonError};
use std::thread::available_parallelism;

use heliostat_block::job::lanes::Lanes;
use heliostat_host::runtime::{Thread, give_way};

/// More threads than this only fight over the memory bus: each copies some gigabytes a second.
const LANES_MAX: usize = 3;

/// Lanes and their threads; none until they are asked for.
#[derive(Default)]
pub(super) struct LaneThreads {
    /// Held while threads are started or ended.
    started: Mutex<Option<Started>>,
}

struct Started {
    lanes: Arc<Lanes>,
    threads: Vec<Thread<()>>,
}

impl LaneThreads {
    /// The lanes. One thread for each core but the mirror's own; a thread that cannot be had is done without.
    pub(super) fn lanes(&self) -> Arc<Lanes> {
        let mut started = self.started.lock().unwrap_or_else(PoisonError::into_inner);
        let started = started.get_or_insert_with(|| {
            let lanes = Arc::<Lanes>::default();
            let cores = available_parallelism().map_or(1, std::num::NonZero::get);
            let threads = (1..cores.min(LANES_MAX + 1)).filter_map(|number| {
                let body = Arc::clone(&lanes);
                Thread::spawn(&format!("lane-{number}"), move || {
                    give_way();
                    body.run()
                })
                .ok()
            });
            let threads = threads.collect();
            Started { lanes, threads }
        });
        Arc::clone(&started.lanes)
    }

    /// Ends the threads when what they carry has ended. Called when no mirror runs any more.
    pub(super) fn end(&self) {
        let started = self.started.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(Started { lanes, threads }) = started {
            lanes.close();
            threads.into_iter().for_each(Thread::join);
        }
    }
}
