//! [`run`], [`repair_dirty`]: puts an image right.
//!
//! In an order that leaves no worse image wherever it stops: first the image says that its counts may be wrong, then
//! entries that lead nowhere go, then the counts are brought up to what is used, in place where they can be trusted
//! and anew behind the end of the file where not, then flags that depend on counts; each step durable before the
//! next. An image that says that its counts may be wrong has them repaired by whoever opens it.

use std::pin::pin;

use futures_util::StreamExt;

use super::super::entry::{COPIED, OFFSET_MASK, RawEntry};
use super::super::error::FormatError;
use super::super::file::ImageFile;
use super::super::header::{Header, incompatible};
use super::super::open::INCOMPATIBLE_WORD;
use super::super::state::{read_numbers, write_numbers};
use super::ahead;
use super::counts::Block;
use super::walk::{Examination, Named, entries, examine, named};
use super::{CheckOptions, CheckReport, Finding, FindingKind, Repair, mend};
use crate::convert::{u64_from, usize_from};
use crate::planted::{Bug, is_planted};

/// Where the header says where the refcount table is, and how long.
const REFCOUNT_TABLE_FIELDS: u64 = 48;
/// QEMU's limit for a refcount table.
const REFCOUNT_TABLE_SIZE_MAX: u64 = 8 << 20;

/// Rounds of a repair. The second finds something only where the file was shorter than its tables; the third never.
const ROUNDS_MAX: usize = 3;

/// Checks and repairs as `options` ask.
pub(super) async fn run(file: &ImageFile, options: &CheckOptions<'_>) -> Result<CheckReport, FormatError> {
    let mut notes = mend::Notes::new(options.findings_max);
    let mut first = examine(file, options).await;
    let mut fixed_before = 0;
    // Twice at most: the snapshot table and the bitmaps may both be beyond reading.
    while options.repair == Repair::All && first.is_err() && fixed_before < 2 {
        if !mend::names(file, &mut notes).await? {
            break;
        }
        fixed_before += 1;
        first = examine(file, options).await;
    }
    let mut examination = first?;
    let found = examination.report.clone();
    let features = examination.header.incompatible;
    let mut keeps_leaks = false;
    if has_no_l1_table(&examination) {
        let mut report = examination.report;
        let text = "nothing is put right: the active L1 table is not where the header says, and without it everything \
                    would be given up";
        report.note_first(FindingKind::Corruption, text);
        return Ok(report);
    }
    if examination.header.bitmaps.is_some()
        && super::names::bitmaps(file, &examination.header).await?.is_none()
    {
        notes.push(|| "the persistent bitmaps are given up: they are out of date".to_owned());
        mend::drop_bitmaps(file, Header::read_to_check(file).await?).await?;
    }
    if !found.is_clean() {
        match options.repair {
            Repair::All => {
                all(file, &mut examination, options, &mut notes).await?;
            }
            // Where tables contradict each other, what looks unused may be what a broken entry meant.
            _ if found.structural > 0 || found.check_errors > 0 => {
                keeps_leaks = found.leaks > 0;
            }
            _ => {
                leaks(file, &examination).await?;
                examination = examine(file, options).await?;
                // Flags can only be judged by counts that are right.
                if !has_low_counts(file, &examination).await? {
                    copied_flags(file, &examination).await?;
                }
            }
        }
        examination = examine(file, options).await?;
    }
    if keeps_leaks {
        let text = "nothing is given back: tables contradict each other, so what looks unused may be needed";
        examination.report.note_first(FindingKind::Leak, text);
    }
    let is_good = examination.report.corruptions == 0 && examination.report.check_errors == 0;
    let bits = incompatible::DIRTY | incompatible::CORRUPT;
    mark(file, &examination.header, if is_good { features & !bits } else { features }).await?;
    file.flush().await?;
    Ok(conclude(examination.report, found, notes, fixed_before))
}

/// Puts right all that can be.
async fn all(
    file: &ImageFile,
    examination: &mut Examination,
    options: &CheckOptions<'_>,
    notes: &mut mend::Notes,
) -> Result<(), FormatError> {
    let features = examination.header.incompatible | incompatible::DIRTY;
    mark(file, &examination.header, features).await?;
    if examination.report.structural > 0 {
        mend::tables(file, examination, notes).await?;
        *examination = examine(file, options).await?;
    }
    // New counts make the file longer, and what was beyond its end may be inside then.
    for _ in 0..ROUNDS_MAX {
        all_counts(file, examination, options).await?;
        copied_flags(file, examination).await?;
        *examination = examine(file, options).await?;
        if examination.report.is_clean() {
            break;
        }
    }
    Ok(())
}

/// Repairs the reference counts of an image that was not closed. Its tables must be sound: they are not touched, but
/// for COPIED flags. The image no longer says that it is dirty when this returns.
///
/// # Errors
/// [`FormatError::Invalid`] when more than counts is wrong, or they stand where something else does; nothing has been
/// written then. Those of the file.
///
/// # Cancel safety
/// As a crash: the image is still dirty.
pub async fn repair_dirty(file: &ImageFile) -> Result<CheckReport, FormatError> {
    let options = CheckOptions::default();
    let mut examination = examine(file, &options).await?;
    let found = examination.report.clone();
    // Blocks that cannot be used are made anew: what they must hold is known from the tables.
    if !examination.tables_are_sound || has_shared_counts(&examination) {
        return Err(FormatError::Invalid(
            "the image was not closed and its tables contradict each other; heliostat check --repair all tells more"
                .into(),
        ));
    }
    if !found.is_clean() {
        all_counts(file, &mut examination, &options).await?;
        copied_flags(file, &examination).await?;
        examination = examine(file, &options).await?;
    }
    if examination.report.corruptions > 0 || examination.report.check_errors > 0 {
        return Err(FormatError::Invalid(
            "the image was not closed and its counts cannot be repaired".into(),
        ));
    }
    let features = examination.header.incompatible & !incompatible::DIRTY;
    mark(file, &examination.header, features).await?;
    file.flush().await?;
    Ok(conclude(examination.report, found, mend::Notes::new(0), 0))
}

/// Says whether something else stands where counts do: an L1 entry that leads to the refcount table, say. What it
/// should lead to looks unused then, and would be given away.
fn has_shared_counts(examination: &Examination) -> bool {
    let clusters = old_counts(examination);
    let mut counted = clusters.chunk_by(|one, other| one == other);
    counted.any(|same| examination.references.uses(same[0]) > u64_from(same.len()))
}

/// Says whether the active L1 table is where none can be.
fn has_no_l1_table(examination: &Examination) -> bool {
    let Examination { header, references, .. } = examination;
    let range = header.l1_range();
    let layout = header.layout;
    // A table that is longer than the disk needs, and reaches into what is in use, has a wrong length.
    let needed = range.offset() + layout.l1_entries_for(header.size) * 8;
    let mut beyond = needed.div_ceil(layout.cluster_size())..range.end().div_ceil(layout.cluster_size());
    let is_lost = references.is_outside(range.offset(), range.len())
        || range.offset() < layout.cluster_size()
        || range.offset() == header.refcount_table.offset
        || beyond.any(|cluster| references.uses(cluster) > 1);
    is_lost && !range.is_empty()
}

/// What is left, what has been put right, and what that has cost.
fn conclude(mut left: CheckReport, found: CheckReport, notes: mend::Notes, fixed_before: u64) -> CheckReport {
    left.corruptions_fixed = (found.corruptions + fixed_before).saturating_sub(left.corruptions);
    left.leaks_fixed = found.leaks.saturating_sub(left.leaks);
    let still = std::mem::take(&mut left.findings);
    left.findings_left_out += notes.left_out;
    for text in notes.texts {
        left.repaired(|| text);
    }
    for finding in found.findings {
        if !still.contains(&finding) {
            left.repaired(|| finding.text);
        }
    }
    for Finding { kind, text } in still {
        left.note(kind, || text);
    }
    left.findings_left_out = left.findings_left_out.max(found.findings_left_out);
    left
}

/// Writes the incompatible features, where the version has them and they differ.
async fn mark(file: &ImageFile, header: &Header, features: u64) -> Result<(), FormatError> {
    let now = Header::read_to_check(file).await?.incompatible;
    if header.layout.version < 3 || now == features {
        return Ok(());
    }
    // What has been done so far is done before the image says so.
    settle(file).await?;
    file.write(INCOMPATIBLE_WORD, features.to_be_bytes().to_vec().into()).await?;
    Ok(file.flush().await?)
}

/// Makes durable what the next step counts on.
async fn settle(file: &ImageFile) -> Result<(), FormatError> {
    if !is_planted(Bug::CleanBeforeCounts) {
        file.flush().await?;
    }
    Ok(())
}

/// Lowers counts that are too high, where the counts can be trusted.
async fn leaks(file: &ImageFile, examination: &Examination) -> Result<(), FormatError> {
    if examination.refcounts.is_sound {
        each_block(file, examination, |counted, used| counted.min(used)).await?;
    }
    Ok(file.flush().await?)
}

/// Makes every count what it must be. Afterwards the references of `examination` are what the image counts.
async fn all_counts(
    file: &ImageFile,
    examination: &mut Examination,
    options: &CheckOptions<'_>,
) -> Result<(), FormatError> {
    if examination.refcounts.is_sound && !has_uncounted(examination) {
        each_block(file, examination, |_, used| used).await?;
        return settle(file).await;
    }
    rebuild(file, examination).await?;
    *examination = examine(file, options).await?;
    Ok(())
}

/// Says whether a cluster is in use for whose count there is no place.
fn has_uncounted(examination: &Examination) -> bool {
    let layout = examination.header.layout;
    let mut last = None;
    examination.references.used_from(0).any(|(cluster, _)| {
        let index = layout.refcount_table_index(cluster);
        let is_new = last.replace(index) != Some(index);
        is_new && !matches!(examination.refcounts.block(index), Block::At(_))
    })
}

async fn has_low_counts(file: &ImageFile, examination: &Examination) -> Result<bool, FormatError> {
    let layout = examination.header.layout;
    if !examination.refcounts.is_sound || has_uncounted(examination) {
        return Ok(true);
    }
    let wanted = blocks(examination).map(|(index, block)| (Some(block), index));
    let mut stream = pin!(ahead::clusters(file, layout, wanted));
    while let Some(next) = stream.next().await {
        let (Some(bytes), index) = next? else { continue };
        let first = index * layout.refcount_block_entries();
        for entry in 0..layout.refcount_block_entries() {
            if layout.refcount(&bytes, entry) < examination.references.get(first + entry) {
                return Ok(true);
            }
        }
    }
    Ok(false)
}

/// The blocks that count clusters of the file: number and place.
fn blocks(examination: &Examination) -> impl Iterator<Item = (u64, u64)> {
    let per_block = examination.header.layout.refcount_block_entries();
    let known = u64_from(examination.refcounts.entries.len());
    let count = examination.references.clusters().div_ceil(per_block).min(known);
    (0..count).filter_map(|index| match examination.refcounts.block(index) {
        Block::At(offset) => Some((index, offset)),
        _ => None,
    })
}

/// Changes each count in place to what `change` makes of it and of how often the cluster is used.
async fn each_block(
    file: &ImageFile,
    examination: &Examination,
    change: impl Fn(u64, u64) -> u64,
) -> Result<(), FormatError> {
    let layout = examination.header.layout;
    let wanted = blocks(examination).map(|(index, offset)| (Some(offset), (index, offset)));
    let mut stream = pin!(ahead::clusters(file, layout, wanted));
    while let Some(next) = stream.next().await {
        let (Some(mut bytes), (index, offset)) = next? else { continue };
        let first = index * layout.refcount_block_entries();
        let mut is_changed = false;
        // What is counted beyond the file's end is nobody's concern.
        let count = layout.refcount_block_entries().min(examination.references.clusters() - first);
        for entry in 0..count {
            let counted = layout.refcount(&bytes, entry);
            let wanted = change(counted, examination.references.get(first + entry));
            if wanted != counted {
                layout.set_refcount(&mut bytes, entry, wanted);
                is_changed = true;
            }
        }
        if is_changed {
            file.write(offset, bytes.freeze()).await?;
        }
    }
    Ok(())
}

/// Where new reference counts go: the table, and then the blocks, which have these numbers.
struct NewCounts {
    start: u64,
    table_clusters: u64,
    indexes: Vec<u64>,
}

impl NewCounts {
    /// Plans for clusters that are used, and for the new counts themselves from `start` on.
    fn plan(examination: &Examination, used: &[u64], start: u64) -> Option<Self> {
        let layout = examination.header.layout;
        let mut plan = Self { start, table_clusters: 1, indexes: used.to_vec() };
        loop {
            let first = layout.cluster_index(start);
            let last = first + plan.table_clusters + u64_from(plan.indexes.len()) - 1;
            let mut indexes = used.to_vec();
            indexes.extend(layout.refcount_table_index(first)..=layout.refcount_table_index(last));
            indexes.sort_unstable();
            indexes.dedup();
            let bytes = indexes.last().map_or(8, |last| (last + 1) * 8);
            if bytes > REFCOUNT_TABLE_SIZE_MAX {
                return None;
            }
            let table_clusters = layout.clusters_for(bytes);
            if (table_clusters, indexes.len()) == (plan.table_clusters, plan.indexes.len()) {
                plan.indexes = indexes;
                return Some(plan);
            }
            (plan.table_clusters, plan.indexes) = (table_clusters, indexes);
        }
    }
}

/// Writes all counts anew, behind everything, and then says in the header where they are. The old ones are free then.
async fn rebuild(file: &ImageFile, examination: &Examination) -> Result<(), FormatError> {
    let Examination { header, references, .. } = examination;
    let layout = header.layout;
    let old = old_counts(examination);
    let uses = |cluster: u64| {
        let own =
            u64_from(old.partition_point(|it| *it <= cluster) - old.partition_point(|it| *it < cluster));
        references.uses(cluster).saturating_sub(own).min(layout.refcount_max())
    };
    let mut used: Vec<u64> = Vec::new();
    for (cluster, _) in references.used_from(0).filter(|(cluster, _)| uses(*cluster) > 0) {
        let index = layout.refcount_table_index(cluster);
        if used.last() != Some(&index) {
            used.push(index);
        }
    }
    let behind = |cluster: u64| NewCounts::plan(examination, &used, cluster << layout.cluster_bits);
    // A file may be so long, and so empty at its end, that no table reaches there.
    let plan = behind(examination.free_from(file)).or_else(|| behind(references.end())).ok_or_else(|| {
        FormatError::Invalid("the image uses clusters that no refcount table can reach".into())
    })?;
    let first = layout.cluster_index(plan.start);
    let own = first..first + plan.table_clusters + u64_from(plan.indexes.len());
    let place = |number: usize| (first + plan.table_clusters + u64_from(number)) << layout.cluster_bits;
    if file.size() < own.end << layout.cluster_bits {
        file.set_size(own.end << layout.cluster_bits).await?;
    }
    let mut table = vec![0_u64; usize_from((plan.table_clusters << layout.cluster_bits) / 8)];
    for (number, index) in plan.indexes.iter().enumerate() {
        table[usize_from(*index)] = place(number);
        let mut block = vec![0; usize_from(layout.cluster_size())];
        for entry in 0..layout.refcount_block_entries() {
            let cluster = index * layout.refcount_block_entries() + entry;
            let count = if own.contains(&cluster) { 1 } else { uses(cluster) };
            if count > 0 {
                layout.set_refcount(&mut block, entry, count);
            }
        }
        file.write(place(number), block.into()).await?;
    }
    file.write(plan.start, write_numbers(table).into()).await?;
    file.flush().await?;
    let mut fields = plan.start.to_be_bytes().to_vec();
    fields.extend_from_slice(&u32::try_from(plan.table_clusters).unwrap_or(0).to_be_bytes());
    file.write(REFCOUNT_TABLE_FIELDS, fields.into()).await?;
    Ok(file.flush().await?)
}

/// The clusters that the old counts take, each as often as it was counted for them, in order.
fn old_counts(examination: &Examination) -> Vec<u64> {
    let Examination { header, references, refcounts, .. } = examination;
    let layout = header.layout;
    let table = header.refcount_table_range();
    let mut clusters: Vec<u64> = Vec::new();
    if !references.is_outside(table.offset(), table.len()) {
        clusters.extend(layout.cluster_index(table.offset())..layout.cluster_index(table.end()));
    }
    let blocks = refcounts.entries.iter().filter(|entry| **entry != 0 && layout.in_cluster(**entry) == 0);
    let blocks = blocks.map(|entry| layout.cluster_index(*entry));
    clusters.extend(blocks.filter(|cluster| *cluster < references.clusters()));
    clusters.sort_unstable();
    clusters
}

/// Sets each COPIED flag that should be, and clears the others. The counts in the image are those of `examination`.
async fn copied_flags(file: &ImageFile, examination: &Examination) -> Result<(), FormatError> {
    let Examination { header, references, l2_tables, .. } = examination;
    let layout = header.layout;
    let is_single = |offset: u64| references.get(layout.cluster_index(offset)) == 1;
    let with_flag = |word: u64, is_set: bool| if is_set { word | COPIED } else { word & !COPIED };
    let range = header.l1_range();
    if references.is_outside(range.offset(), range.len()) {
        return Ok(());
    }
    let old = read_numbers(&file.read(range).await?);
    let new: Vec<u64> = old
        .iter()
        .map(|entry| match entry & OFFSET_MASK {
            0 => *entry,
            offset => with_flag(*entry, is_single(offset)),
        })
        .collect();
    write_changes(file, range.offset(), &old, &new).await?;
    let active = l2_tables.iter().filter(|(at, uses)| uses.active > 0 && layout.in_cluster(**at) == 0);
    let wanted = active.map(|(offset, _)| (Some(*offset), *offset));
    let mut stream = pin!(ahead::clusters(file, layout, wanted));
    while let Some(next) = stream.next().await {
        let (Some(old), offset) = next? else { continue };
        let old = read_numbers(&old);
        let external = header.has_external_data();
        let new = entries(&old, layout).flat_map(|entry| {
            let descriptor = match named(entry, layout, external) {
                Named::Data(_) | Named::Place(_) if external => entry.descriptor | COPIED,
                Named::Data(at) | Named::Place(at) => with_flag(entry.descriptor, is_single(at)),
                _ => entry.descriptor,
            };
            let RawEntry { subclusters, .. } = entry;
            std::iter::once(descriptor).chain(layout.extended_l2.then_some(subclusters))
        });
        write_changes(file, offset, &old, &new.collect::<Vec<u64>>()).await?;
    }
    settle(file).await
}

/// Writes a table anew if it has changed.
async fn write_changes(file: &ImageFile, offset: u64, old: &[u64], new: &[u64]) -> Result<(), FormatError> {
    if old != new {
        file.write(offset, write_numbers(new.iter().copied()).into()).await?;
    }
    Ok(())
}
