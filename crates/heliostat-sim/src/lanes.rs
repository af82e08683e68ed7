//! [`LaneTasks`]: lanes as tasks of the simulated executor, where the daemon has threads.
//!
//! Begun with the first mirror, ended when there will be none any more; what a lane carries then is still
//! carried out. A lane that never ends is a deadlock, which the executor reports.

use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use heliostat_block::job::lanes::Lanes;

use crate::world::{Executor, World};

/// Lanes and how many; no task before they are asked for.
pub(crate) struct LaneTasks {
    count: u64,
    /// How long after the first mirror they close, whoever still runs.
    closes_after: Option<Duration>,
    lanes: Option<Arc<Lanes>>,
}

impl LaneTasks {
    pub(crate) const fn new(count: u64, closes_after: Option<Duration>) -> Self {
        Self { count, closes_after, lanes: None }
    }

    /// The lanes.
    pub(crate) fn lanes(&mut self, world: &Arc<World>, executor: &Executor) -> Arc<Lanes> {
        let (count, closes_after) = (self.count, self.closes_after);
        let lanes = self.lanes.get_or_insert_with(|| {
            let lanes = Arc::<Lanes>::default();
            for number in 0..count {
                executor.spawn_beside(format!("lane{number}"), run(Arc::clone(world), Arc::clone(&lanes)));
            }
            if let Some(after) = closes_after {
                let lanes = Arc::clone(&lanes);
                world.at(world.time() + after, move || lanes.close());
            }
            lanes
        });
        Arc::clone(lanes)
    }

    /// Lets the tasks end. Called when no mirror runs any more.
    pub(crate) fn end(&self) {
        if let Some(lanes) = &self.lanes {
            lanes.close();
        }
    }
}

/// A lane, which tells the world when it runs.
async fn run(world: Arc<World>, lanes: Arc<Lanes>) {
    let mut lane = pin!(lanes.run());
    std::future::poll_fn(|cx| {
        world.set_on_lane(true);
        let ended = lane.as_mut().poll(cx);
        world.set_on_lane(false);
        ended
    })
    .await;
}
