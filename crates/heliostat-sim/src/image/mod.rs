//! Runs one qcow2 image against simulated storage: the driver that serves real images, with every delay, error,
//! order of events and crash drawn from one number.
//!
//! An image made byte by byte has one or more lives. In each it is opened, guests use it at once and on the same
//! bytes, and it is closed or the power fails; the next life begins with what is left. What lies on the medium is
//! judged by a reader that shares no code with the driver: sound but for leaks, everything there that was flushed.

mod bench;
mod bitmaps;
mod build;
mod each;
mod format;
mod guest;
mod judge;
mod life;
mod record;
mod shape;

use std::sync::Arc;
use std::time::Duration;

use heliostat_block::convert::u64_from;
use heliostat_block::range::ByteRange;

pub use each::{drop_each, fail_each};
pub use record::Seen;

use crate::Trace;
use crate::faults::Profile;
use crate::random::{Random, mix};
use crate::storage::Quirks;
use build::build;
use format::{Files, Image};
use guest::Workload;
use life::Life;
use record::Backing;
use shape::{DataFile, Shape};

/// Makes the seeds of images others than those of mirrors.
const IMAGES: u64 = 0x0071_c077;

/// Carries out what `seed` stands for. A panic in the core is a failure like any other.
///
/// # Errors
/// What went wrong first, in words.
pub fn run(seed: u64, trace: Trace) -> Result<Seen, String> {
    crate::caught(|| lives(mix(seed ^ IMAGES), trace == Trace::On, &mut None))
}

/// The images that crashes leave in the run of `seed`, each with how many clusters it has lost as [`run`] sees it.
///
/// # Errors
/// What went wrong first, in words.
pub fn crash_images(seed: u64) -> Result<Vec<(Vec<u8>, u64)>, String> {
    crate::caught(|| {
        let mut kept = Some(Vec::new());
        lives(mix(seed ^ IMAGES), false, &mut kept)?;
        Ok(kept.unwrap_or_default())
    })
}

/// Images that were judged, and how many clusters each had lost; `None` where nobody wants them.
type Kept = Option<Vec<(Vec<u8>, u64)>>;

/// The scale of things in one run.
struct Settings {
    delay_max: Duration,
    step_cost: Duration,
    faulty: bool,
    drops: bool,
}

fn lives(seed: u64, tracing: bool, kept: &mut Kept) -> Result<Seen, String> {
    let mut random = Random::new(seed);
    let drops = random.chance(200);
    let mut settings = Settings {
        delay_max: Duration::from_micros(random.pick(&[50, 500, 5_000])),
        step_cost: Duration::from_nanos(random.pick(&[0, 0, 1_000, 20_000])),
        faulty: random.chance(400),
        drops,
    };
    let shape = Shape::draw(&mut random);
    // A cluster has one place there: what a dropped request may still write around its own bytes lands on others'.
    // Nobody drops requests but a process that ends; in the image itself the driver keeps even these apart.
    settings.drops &= shape.data_file.is_none();
    let may_have_backing = shape.data_file != Some(DataFile::Raw);
    let has_backing = random.chance(400) && may_have_backing;
    let backing = has_backing.then(|| backing(shape.size, &mut random)).transpose()?;
    let mut files = build(&shape, &mut random);
    let mut seen = Seen::default();
    for number in 0..random.pick(&[1, 1, 2, 4]) {
        let life = draw(&settings, &shape, files, backing.clone(), tracing, &mut random);
        let ended = life.live(&mut random, kept).map_err(|wrong| format!("life {number}: {wrong}"))?;
        seen.add(&ended.seen);
        files = ended.files;
    }
    Ok(seen)
}

fn backing(size: u64, random: &mut Random) -> Result<Backing, String> {
    let size = (size * random.pick(&[250, 1000, 1000, 1500]) / 1000) & !511;
    if random.chance(500) {
        let shape = Shape { size: size.max(512), filled: 500, ..Shape::draw(random).below() };
        let files = build(&shape, random);
        let content = Arc::new(Image::new(&files)?.content(&[])?);
        return Ok(Backing { bytes: Arc::new(files.image), is_image: true, content });
    }
    let content: Arc<Vec<u8>> = Arc::new((0..size / 8).flat_map(|_| random.next().to_le_bytes()).collect());
    Ok(Backing { bytes: Arc::clone(&content), is_image: false, content })
}

fn draw(
    settings: &Settings,
    shape: &Shape,
    files: Files,
    backing: Option<Backing>,
    tracing: bool,
    random: &mut Random,
) -> Life {
    let len = u64_from(files.image.len());
    let has_little_room = settings.faulty && random.chance(200);
    let room =
        if has_little_room { random.below(shape.size + (64 << 10)) } else { 2 * shape.size + (256 << 10) };
    // Mostly not as far as the driver would like: so much memory takes its time.
    let size_max = if random.chance(50) { None } else { Some((len + room).next_multiple_of(4096)) };
    let delay_max = settings.delay_max;
    let life_max = delay_max * random.pick(&[50, 500, 2000]);
    // It is repaired first, and that is what is looked at: often enough to see each of its steps on its way.
    let looks_at_repair = shape.dirty && random.chance(500);
    let looks_at_repair = looks_at_repair && Image::new(&files).is_ok_and(|image| image.dirty);
    let can_resize = shape.version > 2 || !shape.snapshot;
    Life {
        files,
        backing,
        profile: profile(settings, random),
        quirks: Quirks {
            fails: None,
            size_max,
            may_be_dropped: settings.drops,
            keeps_sectors: true,
            keeps_after_flush: random.chance(500),
        },
        cache: if random.chance(700) { Some(0) } else { None },
        workload: workload(settings, shape, random),
        guests: random.pick(&[1, 3, 6, 10]),
        resizes: if can_resize { random.pick(&[0, 0, 1, 3, 8]) } else { 0 },
        resize_gap: delay_max * random.pick(&[1, 20, 100]),
        cut_at: random.chance(600).then(|| random.time(life_max)),
        looks: if looks_at_repair { 200 } else { random.pick(&[0, 5, 10]) },
        looks_at_repair,
        look_gap: if looks_at_repair { delay_max / 4 } else { delay_max * random.pick(&[5, 50]) },
        step_cost: settings.step_cost,
        tracing,
    }
}

fn profile(settings: &Settings, random: &mut Random) -> Profile {
    let mut some = |of: &[u64]| if settings.faulty { random.pick(of) } else { 0 };
    let (read_errors, write_errors, flush_errors) =
        (some(&[0, 0, 10, 50]), some(&[0, 10, 50, 200]), some(&[0, 0, 100, 300]));
    Profile {
        block_size: if settings.drops { 1 } else { random.pick(&[1, 1, 512, 4096]) },
        inline: random.pick(&[0, 0, 0, 300, 950]),
        delay_max: settings.delay_max,
        pieces_max: random.pick(&[1, 2, 4]),
        hangs: 0,
        hang_max: Duration::ZERO,
        read_errors,
        write_errors,
        flush_errors,
        extents_errors: 0,
        faults_until: settings.delay_max * random.pick(&[50, 300, 1000]),
        knows_holes: true,
        can_discard: random.chance(800),
        can_zero_fast: random.chance(800),
        cached: random.chance(900),
        writeback: random.pick(&[0, 50, 500]),
        writeback_errors: 0,
        // Here the guests' data is; what a failed flush has lost shows after a crash.
        forgets: false,
    }
}

fn workload(settings: &Settings, shape: &Shape, random: &mut Random) -> Workload {
    let cluster = 1_u64 << shape.cluster_bits;
    if random.chance(if shape.extended { 400 } else { 100 }) {
        return crowd(shape, random);
    }
    let len_max =
        random.pick(&[512, 4096, cluster, 3 * cluster, 20 * cluster]).min(shape.size).min(256 << 10);
    let hot_len = random.pick(&[512, 4096, 2 * cluster, shape.size]).min(shape.size);
    let hot = random.below(shape.size - hot_len + 1);
    Workload {
        requests: random.pick(&[5, 20, 60, 100]),
        think: settings.delay_max * random.pick(&[0, 0, 1, 5]),
        len_max,
        unit: if settings.drops || shape.extended { 1 } else { random.pick(&[1, 512, 512, 4096]) },
        hot: ByteRange::from_bounds(hot, hot + hot_len),
        hot_share: random.pick(&[0, 300, 700, 950]),
        shares: [
            random.pick(&[50, 200]),
            random.pick(&[0, 20, 100]),
            random.pick(&[0, 30]),
            random.pick(&[0, 100, 250]),
            random.pick(&[0, 100, 250]),
        ],
        fua: random.pick(&[0, 50, 300]),
        drops: if settings.drops { random.pick(&[10, 100]) } else { 0 },
    }
}

/// Everybody wants the same two neighbouring units of allocation, which are mapped and unmapped all the time.
fn crowd(shape: &Shape, random: &mut Random) -> Workload {
    let cluster = 1_u64 << shape.cluster_bits;
    let unit = if shape.extended { cluster / 32 } else { cluster };
    let hot = random.below(shape.size) / unit * unit;
    Workload {
        requests: random.pick(&[30, 80]),
        think: Duration::ZERO,
        len_max: (2 * unit).min(shape.size),
        unit: 1,
        hot: ByteRange::from_bounds(hot, (hot + 2 * unit).min(shape.size)),
        hot_share: 980,
        shares: [200, random.pick(&[0, 50]), 0, random.pick(&[0, 100]), random.pick(&[100, 250])],
        fua: random.pick(&[0, 50]),
        drops: 0,
    }
}
