//! What is printed of a request that has ended: its length, its time, and what a second would have brought.

use std::fmt::Write;
use std::time::Duration;

use heliostat_block::convert::u64_from;

/// A request that has ended well.
pub(super) struct Done {
    /// What it did, in the past tense.
    pub(super) past: &'static str,
    pub(super) offset: u64,
    pub(super) len: u64,
    pub(super) took: Duration,
}

/// Appends the lines of one request.
pub(super) fn report(text: &mut String, done: &Done, compact: bool) {
    let Done { past, offset, len, took } = done;
    let seconds = took.as_secs_f64().max(1e-9);
    let (bytes_a_second, a_second) = (of(*len) / seconds, 1.0 / seconds);
    // Writing to a text cannot fail.
    let _ = if compact {
        writeln!(text, "{len},1,{},{bytes_a_second:.3},{a_second:.3}", clock(*took))
    } else {
        let time = if took.as_secs() < 60 { short(*took) } else { clock(*took) };
        let (size, rate) = (size(*len), scaled(bytes_a_second));
        let operations = format!("1 ops; {time} ({rate}/sec and {a_second:.4} ops/sec)");
        writeln!(text, "{past} {len}/{len} bytes at offset {offset}\n{size}, {operations}")
    };
}

/// Appends sixteen bytes a line, as numbers and as text.
pub(super) fn dump(text: &mut String, offset: u64, bytes: &[u8]) {
    for (index, line) in bytes.chunks(16).enumerate() {
        let numbers: String = line.iter().map(|byte| format!("{byte:02x} ")).collect();
        let characters: String = line
            .iter()
            .map(|byte| if byte.is_ascii_alphanumeric() { char::from(*byte) } else { '.' })
            .collect();
        let _ = writeln!(text, "{:08x}:  {numbers} {characters}", offset + u64_from(index * 16));
    }
}

/// A number of bytes in the largest unit of which there is one.
pub(super) fn size(bytes: u64) -> String {
    scaled(of(bytes))
}

fn scaled(value: f64) -> String {
    let units = [("EiB", 60), ("PiB", 50), ("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10)];
    let found = units.iter().map(|(unit, bits)| (unit, of(1 << bits))).find(|(_, one)| value >= *one);
    let Some((unit, one)) = found else {
        let digits = format!("{value:.6}");
        return format!("{} bytes", digits.strip_suffix(".000000").unwrap_or(&digits));
    };
    let digits = format!("{:.3}", value / one);
    format!("{} {unit}", digits.strip_suffix(".000").unwrap_or(&digits))
}

/// As a floating-point number; exact as far as one can be.
fn of(bytes: u64) -> f64 {
    let (high, low) = (bytes >> 32, bytes & u64::from(u32::MAX));
    let part = |part: u64| f64::from(u32::try_from(part).unwrap_or(u32::MAX));
    part(high) * 4_294_967_296.0 + part(low)
}

fn short(took: Duration) -> String {
    format!("{:02}.{:02} sec", took.as_secs(), took.subsec_millis() / 10)
}

fn clock(took: Duration) -> String {
    let seconds = took.as_secs();
    let (hours, minutes) = (seconds / 3600, seconds / 60 % 60);
    format!("{hours}:{minutes:02}:{:02}.{:02}", seconds % 60, took.subsec_millis() / 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_reads_as_qemu_ios() {
        let took = Duration::from_millis(10);
        let mut text = String::new();
        report(&mut text, &Done { past: "wrote", offset: 512, len: 65_536, took }, false);
        assert_eq!(
            text,
            "wrote 65536/65536 bytes at offset 512\n64 KiB, 1 ops; 00.01 sec (6.250 MiB/sec and 100.0000 \
             ops/sec)\n"
        );
        text.clear();
        report(&mut text, &Done { past: "read", offset: 0, len: 2, took }, true);
        assert_eq!(text, "2,1,0:00:00.01,200.000,100.000\n");
    }

    #[test]
    fn sizes_are_in_the_largest_unit() {
        let table =
            [(0, "0 bytes"), (5, "5 bytes"), (1536, "1.500 KiB"), (1 << 20, "1 MiB"), (3 << 40, "3 TiB")];
        for (bytes, expected) in table {
            assert_eq!(size(bytes), expected);
        }
    }

    #[test]
    fn a_dump_has_sixteen_bytes_a_line() {
        let mut text = String::new();
        dump(&mut text, 16, &[7; 17]);
        let seven = "07 ".repeat(16);
        assert_eq!(text, format!("00000010:  {seven} {}\n00000020:  07  .\n", ".".repeat(16)));
    }
}
