//! [`Throttle`]: lets requests wait so that the limits of a group are kept (`throttle` in QMP).
//!
//! Reads, writes, zeroes and discards count; flushes do not, and neither does asking how a range is laid out. While
//! somebody waits for a node above to be quiet nothing waits here, so that a drain takes as long as the disk and not
//! as long as the limit. Knows no clock; the group does.

use std::sync::{Arc, PoisonError, RwLock};

use bytes::Bytes;

use crate::buffer::Buffer;
use crate::convert::u64_from;
use crate::graph::Spot;
use crate::node_storage::NodeStorage;
use crate::range::ByteRange;
use crate::storage::{Durability, Extent, IoFuture, Storage, Traits, ZeroEffort, ZeroSpace};
use crate::throttle::{Direction, Hurry, ThrottleGroup};

/// Lets requests wait so that limits are kept.
pub struct Throttle {
    below: NodeStorage,
    /// Changed while nothing is in flight; held to look, never across I/O.
    membership: RwLock<Membership>,
}

/// Whose limits they are, and as which of its members.
#[derive(Clone)]
struct Membership {
    group: Arc<ThrottleGroup>,
    member: u64,
}

impl Membership {
    fn of(group: Arc<ThrottleGroup>) -> Self {
        Self { member: group.join(), group }
    }
}

impl Throttle {
    /// Makes one over whatever node is at `child`, as a member of `group`.
    #[must_use]
    pub fn new(child: Arc<Spot>, group: Arc<ThrottleGroup>) -> Self {
        let membership = RwLock::new(Membership::of(group));
        Self { below: NodeStorage::of_layer(child), membership }
    }

    pub(super) const fn below(&self) -> &NodeStorage {
        &self.below
    }

    /// Lets requests wait for the limits of `group` from now on. The caller sees to it that none is in flight.
    pub fn change_group(&self, group: Arc<ThrottleGroup>) {
        let joined = Membership::of(group);
        let mut membership = self.membership.write().unwrap_or_else(PoisonError::into_inner);
        let left = std::mem::replace(&mut *membership, joined);
        drop(membership);
        left.group.leave(left.member);
    }

    fn membership(&self) -> Membership {
        self.membership.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    async fn admit(&self, direction: Direction, bytes: u64) {
        let Membership { group, member } = self.membership();
        group.admit(member, direction, bytes).await;
    }
}

impl Drop for Throttle {
    fn drop(&mut self) {
        let Membership { group, member } = self.membership();
        group.leave(member);
    }
}

impl Storage for Throttle {
    fn traits(&self) -> Traits {
        self.below.traits()
    }

    fn size(&self) -> u64 {
        self.below.size()
    }

    fn set_size(&self, size: u64) -> IoFuture<'_, ()> {
        self.below.set_size(size)
    }

    fn expect_writes(&self, end: u64) -> IoFuture<'_, ()> {
        self.below.expect_writes(end)
    }

    fn allocated_size(&self) -> Option<u64> {
        self.below.allocated_size()
    }

    fn read(&self, offset: u64, buffer: Buffer) -> IoFuture<'_, Buffer> {
        IoFuture::pending(async move {
            self.admit(Direction::Read, u64_from(buffer.len())).await;
            self.below.read(offset, buffer).await
        })
    }

    fn write(&self, offset: u64, data: Bytes, durability: Durability) -> IoFuture<'_, ()> {
        IoFuture::pending(async move {
            self.admit(Direction::Write, u64_from(data.len())).await;
            self.below.write(offset, data, durability).await
        })
    }

    fn write_zeroes(
        &self,
        range: ByteRange,
        space: ZeroSpace,
        effort: ZeroEffort,
        durability: Durability,
    ) -> IoFuture<'_, ()> {
        IoFuture::pending(async move {
            self.admit(Direction::Write, range.len()).await;
            self.below.write_zeroes(range, space, effort, durability).await
        })
    }

    fn discard(&self, range: ByteRange) -> IoFuture<'_, ()> {
        IoFuture::pending(async move {
            self.admit(Direction::Write, range.len()).await;
            self.below.discard(range).await
        })
    }

    fn flush(&self) -> IoFuture<'_, ()> {
        self.below.flush()
    }

    fn extents(&self, range: ByteRange) -> IoFuture<'_, Vec<Extent>> {
        self.below.extents(range)
    }

    fn losses(&self) -> u64 {
        self.below.losses()
    }

    fn start_writeback(&self, range: ByteRange) {
        self.below.start_writeback(range);
    }

    fn hurry(&self, hurry: &mut Hurry) {
        let Membership { group, member } = self.membership();
        hurry.add(&group, member);
        self.below.hurry(hurry);
    }

    fn give_up(&self) {
        self.below.give_up();
    }

    fn out_of_reach(&self) -> Option<String> {
        self.below.out_of_reach()
    }
}
