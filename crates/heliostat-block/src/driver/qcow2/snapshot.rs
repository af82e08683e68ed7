//! [`Snapshot`]: an internal snapshot, as the snapshot table names it.
//!
//! Pure. Follows the qcow2 specification, section "Snapshots". Snapshots are kept and listed, not made.

use super::error::FormatError;
use super::header::Table;
use super::layout::Layout;
use crate::convert::usize_from;

/// QEMU's limits.
const TABLE_SIZE_MAX: usize = 64 << 20;
const EXTRA_SIZE_MAX: usize = 1024;
const L1_ENTRIES_MAX: u32 = (32 << 20) / 8;

/// The fixed part of an entry.
const FIXED_LEN: usize = 40;

/// An internal snapshot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// Its id.
    pub id: Vec<u8>,
    /// Its name.
    pub name: Vec<u8>,
    /// Its L1 table; `len` counts entries.
    pub l1: Table,
    /// When it was taken, in seconds since the Epoch.
    pub seconds: u32,
    /// The part of the second, in nanoseconds.
    pub nanoseconds: u32,
    /// How long the guest had been running, in nanoseconds.
    pub guest_nanoseconds: u64,
    /// Bytes of saved state of the machine.
    pub vm_state_size: u64,
    /// Its virtual size; the image's where it does not say.
    pub disk_size: Option<u64>,
    /// The count of instructions, where it was recorded.
    pub icount: Option<u64>,
}

/// Why the table cannot be read on: there is less of it than it says, so far.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Incomplete;

/// Reads one entry at the start of `bytes`. Returns it with its length.
///
/// # Errors
/// [`Incomplete`] when `bytes` ends inside.
pub fn decode_entry(bytes: &[u8]) -> Result<(Snapshot, usize), Incomplete> {
    let get = |at: usize, len: usize| bytes.get(at..at + len).ok_or(Incomplete);
    let number = |at: usize, len: usize| {
        get(at, len).map(|bytes| bytes.iter().fold(0_u64, |number, byte| number << 8 | u64::from(*byte)))
    };
    let short = |at: usize| number(at, 4).map(|number| u32::try_from(number).unwrap_or(u32::MAX));
    let (id_len, name_len) = (usize_from(number(12, 2)?), usize_from(number(14, 2)?));
    let extra_len = usize_from(number(36, 4)?);
    let extra = |at: usize| if extra_len >= at + 8 { number(FIXED_LEN + at, 8).map(Some) } else { Ok(None) };
    let end = FIXED_LEN.saturating_add(extra_len).saturating_add(id_len + name_len);
    get(0, end)?;
    let snapshot = Snapshot {
        id: get(FIXED_LEN + extra_len, id_len)?.to_vec(),
        name: get(FIXED_LEN + extra_len + id_len, name_len)?.to_vec(),
        l1: Table { offset: number(0, 8)?, len: short(8)? },
        seconds: short(16)?,
        nanoseconds: short(20)?,
        guest_nanoseconds: number(24, 8)?,
        vm_state_size: extra(0)?.unwrap_or(number(32, 4)?),
        disk_size: extra(8)?,
        icount: extra(16)?.filter(|count| *count != u64::MAX),
    };
    Ok((snapshot, end.next_multiple_of(8)))
}

/// Reads `count` entries from `bytes`, which starts where the table does and may go on behind it. Returns them with
/// the table's length; `None` when `bytes` ends inside and more has to be read.
///
/// # Errors
/// [`FormatError::Header`] when the table is beyond the limits, or an L1 table is where none can be.
pub fn decode_table(
    bytes: &[u8],
    count: u32,
    layout: Layout,
) -> Result<Option<(Vec<Snapshot>, usize)>, FormatError> {
    let mut snapshots = Vec::new();
    let mut at = 0;
    for _ in 0..count {
        let rest = bytes.get(at..).unwrap_or_default();
        if rest.get(36..40).is_some_and(|len| len > &usize_be(EXTRA_SIZE_MAX)[..]) {
            return Err(FormatError::header("Too much extra metadata in snapshot table entry"));
        }
        let Ok((snapshot, len)) = decode_entry(rest) else {
            return if bytes.len() >= TABLE_SIZE_MAX {
                Err(FormatError::header("Snapshot table is too large"))
            } else {
                Ok(None)
            };
        };
        if snapshot.l1.len > L1_ENTRIES_MAX {
            return Err(FormatError::header("Snapshot L1 table too large"));
        }
        let is_far = snapshot.l1.offset >> 56 != 0;
        if layout.in_cluster(snapshot.l1.offset) != 0 || is_far {
            return Err(FormatError::header("Snapshot L1 table offset invalid"));
        }
        snapshots.push(snapshot);
        at += len;
    }
    if at > TABLE_SIZE_MAX {
        return Err(FormatError::header("Snapshot table is too large"));
    }
    Ok(Some((snapshots, at)))
}

fn usize_be(value: usize) -> [u8; 4] {
    u32::try_from(value).unwrap_or(u32::MAX).to_be_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    const LAYOUT: Layout = Layout { cluster_bits: 16, refcount_order: 4, extended_l2: false, version: 3 };

    fn entry(extra: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::new();
        bytes.extend_from_slice(&0x5_0000_u64.to_be_bytes());
        bytes.extend_from_slice(&7_u32.to_be_bytes());
        bytes.extend_from_slice(&[0, 1, 0, 4]);
        bytes.extend_from_slice(&[0; 20]);
        bytes.extend_from_slice(&u32::try_from(extra.len()).unwrap().to_be_bytes());
        bytes.extend_from_slice(extra);
        bytes.extend_from_slice(b"1name");
        bytes.resize(bytes.len().next_multiple_of(8), 0);
        bytes
    }

    #[test]
    fn entries_with_and_without_extra_data_are_read() {
        let mut table = entry(&[]);
        table.extend(entry(&[[0; 8], 9_u64.to_be_bytes()].concat()));
        let (snapshots, len) = decode_table(&table, 2, LAYOUT).unwrap().unwrap();
        assert_eq!(len, table.len());
        assert_eq!(snapshots[0].name, b"name");
        assert_eq!(snapshots[0].l1, Table { offset: 0x5_0000, len: 7 });
        assert_eq!((snapshots[0].disk_size, snapshots[1].disk_size), (None, Some(9)));
    }

    #[test]
    fn a_table_that_goes_on_asks_for_more_and_one_beyond_the_limits_is_refused() {
        let table = entry(&[]);
        assert_eq!(decode_table(&table[..44], 1, LAYOUT).unwrap(), None);
        assert_eq!(decode_table(&table, 2, LAYOUT).unwrap(), None);
        let large = entry(&[0; 2048]);
        assert!(decode_table(&large, 1, LAYOUT).is_err());
        let mut unaligned = table;
        unaligned[6] = 2;
        assert!(decode_table(&unaligned, 1, LAYOUT).is_err());
    }
}
