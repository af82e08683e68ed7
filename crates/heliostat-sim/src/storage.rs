//! [`SimStorage`]: a storage whose every request takes its time, ends out of order, and may fail, hang, be torn
//! or be lost at a crash.
//!
//! What a request does to the bytes happens at moments drawn when it starts, whether or not anybody still
//! waits for it: dropping its future does not stop it, as a kernel may not either. Two that overlap and are in flight at
//! once therefore land in either order, piece by piece.

mod cuts;

pub(crate) use self::cuts::Cut;

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use heliostat_block::buffer::Buffer;
use heliostat_block::convert::{u64_from, usize_from};
use heliostat_block::range::ByteRange;
use heliostat_block::storage::{
    Durability, Extent, ExtentStatus, IoFuture, Storage, Traits, ZeroEffort, ZeroSpace,
};

use crate::answer::{Answer, Shared, finish};
use crate::faults::{EIO, ENOSPC, Kind, Plan, Profile, error};
use crate::medium::{Content, Medium};
use crate::random::Random;
use crate::world::World;

/// A simulated storage.
pub(crate) struct SimStorage {
    name: &'static str,
    profile: Profile,
    world: Arc<World>,
    /// What is due later holds it too.
    state: Arc<Mutex<State>>,
}

/// What only a storage that holds an image does.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Quirks {
    /// The request with this number, counted from now on, fails once with this error.
    pub(crate) fails: Option<(u64, i32)>,
    /// It cannot be made longer than this.
    pub(crate) size_max: Option<u64>,
    /// Its requests may be dropped; they are carried out all the same.
    pub(crate) may_be_dropped: bool,
    /// A flush that fails has lost nothing.
    pub(crate) keeps_after_flush: bool,
    /// Requests are torn between sectors only, also where there are no blocks: what an image's tables count on.
    pub(crate) keeps_sectors: bool,
}

struct State {
    medium: Medium,
    quirks: Quirks,
    random: Random,
    in_flight: u64,
    errors: u64,
    requests: u64,
    /// How many of them lanes made.
    on_lanes: u64,
    flush_failures: u64,
    forgets: bool,
    /// The host could not write some of its cache back by itself; the next flush to end is told.
    writeback_failed: bool,
    /// Draws what the host does with a hint.
    hints: Random,
    /// Guests' data is here.
    is_guests: bool,
    /// How often it was cut off from its medium.
    losses: u64,
    /// Another medium may come in the place of this one.
    may_become_other: bool,
    /// What was durable when it was last cut off.
    older: Option<Vec<u8>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl SimStorage {
    pub(crate) fn new(
        name: &'static str,
        bytes: Vec<u8>,
        profile: Profile,
        world: Arc<World>,
        random: Random,
    ) -> Arc<Self> {
        let forgets = profile.forgets;
        let medium = Medium::new(bytes);
        let state = State {
            medium,
            quirks: Quirks::default(),
            hints: random.clone().fork(),
            writeback_failed: false,
            random,
            in_flight: 0,
            errors: 0,
            requests: 0,
            on_lanes: 0,
            flush_failures: 0,
            forgets,
            is_guests: false,
            losses: 0,
            may_become_other: false,
            older: None,
        };
        Arc::new(Self { name, profile, world, state: Arc::new(Mutex::new(state)) })
    }

    pub(crate) fn profile(&self) -> &Profile {
        &self.profile
    }

    /// From now on it behaves so. [`Quirks::fails`] counts from the next request.
    pub(crate) fn set_quirks(&self, quirks: Quirks) {
        let mut state = lock(&self.state);
        let requests = state.requests;
        state.quirks =
            Quirks { fails: quirks.fails.map(|(after, errno)| (requests + after, errno)), ..quirks };
    }

    /// Whether the fault that it was given is still to come.
    pub(crate) fn has_fault_left(&self) -> bool {
        lock(&self.state).quirks.fails.is_some()
    }

    /// Requests that have begun and not ended.
    pub(crate) fn in_flight(&self) -> u64 {
        lock(&self.state).in_flight
    }

    /// Errors that it has given so far.
    pub(crate) fn errors(&self) -> u64 {
        lock(&self.state).errors
    }

    /// Requests that have begun so far.
    pub(crate) fn requests(&self) -> u64 {
        lock(&self.state).requests
    }

    /// Requests of lanes that have begun so far.
    pub(crate) fn requests_of_lanes(&self) -> u64 {
        lock(&self.state).on_lanes
    }

    /// Flushes that have failed so far.
    pub(crate) fn flush_failures(&self) -> u64 {
        lock(&self.state).flush_failures
    }

    /// What is read now, everywhere.
    pub(crate) fn visible(&self) -> Vec<u8> {
        lock(&self.state).medium.visible().to_vec()
    }

    /// What is durable now. What a failed flush has lost is gone from reads, too, after this.
    pub(crate) fn durable(&self) -> Vec<u8> {
        let mut state = lock(&self.state);
        let State { medium, random, .. } = &mut *state;
        medium.forget(1000, random);
        medium.durable().to_vec()
    }

    /// Holds `image` from now on, durably. Nothing may be in flight.
    pub(crate) fn hold(&self, image: Vec<u8>) {
        lock(&self.state).medium = Medium::new(image);
    }

    /// From now on reads show what was written, whatever a flush says: guests' data is here.
    pub(crate) fn forgets_no_more(&self) {
        let mut state = lock(&self.state);
        state.forgets = false;
        state.is_guests = true;
    }

    /// The same again: no guest reads here any more.
    pub(crate) fn may_forget(&self) {
        let mut state = lock(&self.state);
        state.forgets = self.profile.forgets;
        state.is_guests = false;
    }

    /// What a crash at this moment would leave.
    pub(crate) fn crash(&self) -> Vec<u8> {
        let mut state = lock(&self.state);
        let mut random = state.random.fork();
        state.medium.crash(&mut random)
    }

    fn begin(&self, kind: Kind, range: ByteRange) -> Plan {
        self.check(kind, range);
        let now = self.world.time();
        let on_lane = self.world.is_on_lane();
        let mut state = lock(&self.state);
        let mut plan = self.profile.plan(kind, range, now, &mut state.random);
        if let Some((_, errno)) = state.quirks.fails.filter(|(number, _)| *number == state.requests) {
            plan.error = Some(errno);
            state.quirks.fails = None;
        }
        if state.quirks.keeps_sectors {
            let snap = |at: u64| if at == range.end() { at } else { range.offset().max(at & !511) };
            for (_, piece) in &mut plan.pieces {
                *piece = ByteRange::from_bounds(snap(piece.offset()), snap(piece.end()));
            }
        }
        state.in_flight += 1;
        state.requests += 1;
        state.on_lanes += u64::from(on_lane);
        drop(state);
        self.world.trace(|| {
            let took = (plan.end - now).as_secs_f64() * 1e3;
            let lane = if on_lane { " on a lane" } else { "" };
            format!("{} {kind:?} {range} begins{lane}, {took:.3} ms, error {:?}", self.name, plan.error)
        });
        plan
    }

    /// The node promises aligned requests that lie inside.
    fn check(&self, kind: Kind, range: ByteRange) {
        let (unit, size) = (u64::from(self.profile.block_size), self.size());
        let aligned =
            range.offset().is_multiple_of(unit) && (range.end().is_multiple_of(unit) || range.end() == size);
        if range.end() > size || (!aligned && !matches!(kind, Kind::Flush | Kind::Extents)) {
            self.world.fail(format!("{}: {kind:?} {range} is not aligned to {unit}, or outside", self.name));
        }
    }

    /// What `begin` begins: at once, if it draws that; else when it is first polled, as with a ring.
    fn answer<'a, T: Unpin + 'a>(&self, begin: impl FnOnce(bool) -> Answer<T> + 'a) -> IoFuture<'a, T> {
        if !lock(&self.state).random.chance(self.profile.inline) {
            return IoFuture::pending(async move { begin(false).await });
        }
        Self::answer_now(begin)
    }

    fn answer_now<'a, T: Unpin + 'a>(begin: impl FnOnce(bool) -> Answer<T> + 'a) -> IoFuture<'a, T> {
        IoFuture::ready(begin(true).now())
    }

    /// Lets what a plan says happen in its time, or at once; the answer is what `last` says at the end.
    fn carry_out<T: Send + 'static>(
        &self,
        (kind, range, inline): (Kind, ByteRange, bool),
        piece: impl Fn(&mut State, ByteRange) + Send + Sync + 'static,
        last: impl FnOnce(&mut State, bool) -> T + Send + 'static,
    ) -> Answer<T> {
        let plan = self.begin(kind, range);
        let slot = Shared::default();
        let piece = Arc::new(piece);
        let now = self.world.time();
        for (at, range) in plan.pieces {
            let (piece, state) = (Arc::clone(&piece), Arc::clone(&self.state));
            let land = move || piece(&mut lock(&state), range);
            if inline { land() } else { self.world.at(at, land) }
        }
        let end = {
            let (state, slot, world, name) =
                (Arc::clone(&self.state), Arc::clone(&slot), Arc::clone(&self.world), self.name);
            move || {
                world.trace(|| format!("{name} {kind:?} {range} ends"));
                let mut state = lock(&state);
                state.in_flight -= 1;
                let untold = kind == Kind::Flush && std::mem::take(&mut state.writeback_failed);
                let failure = plan.error.or(untold.then_some(EIO));
                state.errors += u64::from(failure.is_some());
                let answer = last(&mut state, failure.is_none());
                drop(state);
                finish(&slot, failure.map_or(Ok(answer), |errno| Err(error(errno))));
            }
        };
        if inline {
            end()
        } else {
            self.world.at(plan.end.max(now + Duration::from_nanos(1)), end)
        }
        let may_be_dropped = lock(&self.state).quirks.may_be_dropped;
        Answer { slot, world: Arc::clone(&self.world), ended: may_be_dropped }
    }

    fn put(&self, what: (Kind, ByteRange, bool), content: Content, durability: Durability) -> Answer<()> {
        let range = what.1;
        let start = range.offset();
        let durable = durability == Durability::Fua || !self.profile.cached;
        let writeback = self.profile.writeback;
        self.carry_out(
            what,
            move |state, piece| {
                state.medium.land(piece, start, &content);
                let State { medium, random, .. } = state;
                medium.write_back(writeback, random);
            },
            move |state, good| {
                if good && durable {
                    state.medium.persist(range);
                }
            },
        )
    }

    fn zeroed_status(&self, space: ZeroSpace) -> ExtentStatus {
        match space {
            ZeroSpace::Keep => ExtentStatus::Zero,
            ZeroSpace::MayUnmap if lock(&self.state).random.chance(500) => ExtentStatus::Zero,
            ZeroSpace::MayUnmap => ExtentStatus::Hole,
        }
    }
}

impl Storage for SimStorage {
    fn traits(&self) -> Traits {
        Traits {
            block_size: self.profile.block_size,
            preferred_size: 4096,
            read_only: false,
            can_discard: self.profile.can_discard,
            can_zero_fast: self.profile.can_zero_fast,
            can_resize: true,
            remote: false,
        }
    }

    fn size(&self) -> u64 {
        lock(&self.state).medium.size()
    }

    fn set_size(&self, size: u64) -> IoFuture<'_, ()> {
        let may_be_dropped = {
            let mut state = lock(&self.state);
            let is_growth = size > state.medium.size();
            if is_growth && state.quirks.size_max.is_some_and(|most| size > most) {
                state.errors += 1;
                return IoFuture::ready(Err(error(ENOSPC)));
            }
            state.quirks.may_be_dropped
        };
        let begin = move |inline| {
            let nowhere = ByteRange::from_bounds(0, 0);
            self.carry_out(
                (Kind::Resize, nowhere, inline),
                |_, _| (),
                move |state, good| {
                    if good {
                        state.medium.set_size(size);
                    }
                },
            )
        };
        // Changes of the length take turns, also when one is dropped.
        if may_be_dropped { Self::answer_now(begin) } else { self.answer(begin) }
    }

    fn allocated_size(&self) -> Option<u64> {
        Some(lock(&self.state).medium.allocated())
    }

    fn read(&self, offset: u64, buffer: Buffer) -> IoFuture<'_, Buffer> {
        let range = ByteRange::from_bounds(offset, offset + u64_from(buffer.len()));
        let begin = move |inline| {
            let landing = Arc::new(Mutex::new(buffer));
            let filling = Arc::clone(&landing);
            self.carry_out(
                (Kind::Read, range, inline),
                move |state, piece| {
                    if state.forgets {
                        let State { medium, random, .. } = state;
                        medium.forget(300, random);
                    }
                    let from = usize_from(piece.offset() - range.offset());
                    let mut buffer = lock(&filling);
                    state.medium.read(piece, &mut buffer[from..from + usize_from(piece.len())]);
                },
                move |_, _| std::mem::replace(&mut *lock(&landing), Buffer::zeroed(0)),
            )
        };
        self.answer(begin)
    }

    fn write(&self, offset: u64, data: Bytes, durability: Durability) -> IoFuture<'_, ()> {
        let range = ByteRange::from_bounds(offset, offset + u64_from(data.len()));
        let begin = move |inline| self.put((Kind::Write, range, inline), Content::Data(data), durability);
        self.answer(begin)
    }

    fn write_zeroes(
        &self,
        range: ByteRange,
        space: ZeroSpace,
        effort: ZeroEffort,
        durability: Durability,
    ) -> IoFuture<'_, ()> {
        if effort == ZeroEffort::FastOnly && lock(&self.state).random.chance(200) {
            return IoFuture::ready(Err(io::ErrorKind::Unsupported.into()));
        }
        let begin = move |inline| {
            let content = Content::Zeroes(self.zeroed_status(space));
            self.put((Kind::Zero, range, inline), content, durability)
        };
        self.answer(begin)
    }

    fn discard(&self, range: ByteRange) -> IoFuture<'_, ()> {
        if !self.profile.can_discard {
            return IoFuture::ready(Ok(()));
        }
        let begin = move |inline| {
            // What is discarded reads as zeroes, or as before, each piece for itself.
            self.carry_out(
                (Kind::Discard, range, inline),
                move |state, piece| {
                    if state.random.chance(700) {
                        let content = Content::Zeroes(ExtentStatus::Hole);
                        state.medium.land(piece, range.offset(), &content);
                    }
                },
                |_, _| (),
            )
        };
        self.answer(begin)
    }

    fn flush(&self) -> IoFuture<'_, ()> {
        let begin = move |inline| {
            let nowhere = ByteRange::from_bounds(0, 0);
            let start = lock(&self.state).medium.flush_begins();
            self.carry_out(
                (Kind::Flush, nowhere, inline),
                |_, _| (),
                move |state, good| {
                    state.flush_failures += u64::from(!good);
                    let keeps = state.quirks.keeps_after_flush;
                    let State { medium, random, .. } = state;
                    match good {
                        true => medium.flush_succeeds(start, random),
                        false if keeps => {}
                        false => medium.flush_fails(random),
                    }
                },
            )
        };
        self.answer(begin)
    }

    fn losses(&self) -> u64 {
        lock(&self.state).losses
    }

    fn extents(&self, range: ByteRange) -> IoFuture<'_, Vec<Extent>> {
        let knows = self.profile.knows_holes;
        let begin = move |inline| {
            let count = lock(&self.state).random.between(1, 6);
            let seen: Arc<Mutex<Vec<Extent>>> = Arc::default();
            let seeing = Arc::clone(&seen);
            // Looks once, at the moment at which the first piece of a read would be read.
            self.carry_out(
                (Kind::Extents, range, inline),
                move |state, _| {
                    let mut seen = lock(&seeing);
                    if seen.is_empty() {
                        *seen = state.medium.extents(range, count);
                    }
                },
                move |_, _| match knows {
                    true => std::mem::take(&mut *lock(&seen)),
                    false => vec![Extent { range, status: ExtentStatus::Data }],
                },
            )
        };
        self.answer(begin)
    }

    /// Writes back some time later. That may fail, of which nobody hears before the next flush.
    fn start_writeback(&self, range: ByteRange) {
        let (at, fails) = {
            let mut state = lock(&self.state);
            let now = self.world.time();
            let at = now + state.hints.time(self.profile.delay_max);
            let fails = state.hints.chance(self.profile.writeback_errors);
            (at, fails && at < self.profile.faults_until)
        };
        let (state, world, name) = (Arc::clone(&self.state), Arc::clone(&self.world), self.name);
        self.world.at(at, move || {
            world.trace(|| format!("{name} writes back {range}, fails: {fails}"));
            let mut state = lock(&state);
            if fails {
                state.writeback_failed |= state.medium.lose(range);
            } else {
                state.medium.persist_cached(range);
            }
        });
    }
}
