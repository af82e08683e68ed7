//! Sizes, rates and times as people type and read them.
//!
//! Powers of 1024 throughout, as in `qemu-img` and `dd`. Programs get exact numbers; nothing here is for them.

use std::time::Duration;

const UNITS: [&str; 7] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];

/// Reads a size: a number, perhaps with a fraction, and perhaps K, M, G, T, P (or KiB, MB, …), each 1024 times
/// the one before.
///
/// # Errors
/// A sentence for the person who typed it.
pub fn parse_size(text: &str) -> Result<u64, String> {
    let text = text.trim();
    let digits_end = text.find(|c: char| !(c.is_ascii_digit() || c == '.')).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits_end);
    let shift = match unit.trim().to_ascii_lowercase().as_str() {
        "" | "b" => 0,
        "k" | "kb" | "kib" => 10,
        "m" | "mb" | "mib" => 20,
        "g" | "gb" | "gib" => 30,
        "t" | "tb" | "tib" => 40,
        "p" | "pb" | "pib" => 50,
        _ => return Err(format!("\"{unit}\" is no unit; use K, M, G, T or P, as in 64M")),
    };
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    let not_a_number = || format!("\"{text}\" is no size; write it as 512, 64K or 1.5G");
    if whole.is_empty()
        || fraction.len() > FRACTION_DIGITS_MAX
        || (fraction.is_empty() && number.contains('.'))
    {
        return Err(not_a_number());
    }
    let scaled = |digits: &str| -> Result<u128, String> {
        let value: u64 = digits.parse().map_err(|_| not_a_number())?;
        Ok(u128::from(value) << shift)
    };
    let mut bytes = scaled(whole)?;
    if !fraction.is_empty() {
        let divisor = 10_u128.pow(u32::try_from(fraction.len()).map_err(|_| not_a_number())?);
        bytes += scaled(fraction)? / divisor;
    }
    u64::try_from(bytes).map_err(|_| format!("{text} is more than any disk can have"))
}

/// Enough for any fraction that makes a difference, few enough that nothing overflows.
const FRACTION_DIGITS_MAX: usize = 9;

/// A size for people: three digits that count, `1.50 GiB`.
#[must_use]
pub fn size(bytes: u64) -> String {
    let mut unit = 0;
    let mut divisor = 1_u64;
    while unit + 1 < UNITS.len() && bytes / divisor >= 1024 {
        divisor <<= 10;
        unit += 1;
    }
    // Rounding must not make 1024 of a unit.
    if unit + 1 < UNITS.len() && hundredths(bytes, divisor) / 100 >= 1024 {
        divisor <<= 10;
        unit += 1;
    }
    let exact = bytes.is_multiple_of(divisor);
    let hundredths = hundredths(bytes, divisor);
    let (whole, rest) = (hundredths / 100, hundredths % 100);
    let name = UNITS[unit];
    match whole {
        _ if exact => format!("{} {name}", bytes / divisor),
        0..10 => format!("{whole}.{rest:02} {name}"),
        10..100 => format!("{whole}.{} {name}", rest / 10),
        _ => format!("{whole} {name}"),
    }
}

fn hundredths(bytes: u64, divisor: u64) -> u128 {
    u128::from(bytes) * 100 / u128::from(divisor)
}

/// A rate for people.
#[must_use]
pub fn rate(bytes_per_second: u64) -> String {
    format!("{}/s", size(bytes_per_second))
}

/// A short time for people: `0.14 ms`, `23 ms`, `1.20 s`.
#[must_use]
pub fn latency(time: Duration) -> String {
    let us = time.as_micros();
    match us {
        0..10_000 => format!("{}.{:02} ms", us / 1000, us % 1000 / 10),
        10_000..100_000 => format!("{}.{} ms", us / 1000, us % 1000 / 100),
        100_000..1_000_000 => format!("{} ms", us / 1000),
        _ => format!("{}.{:02} s", us / 1_000_000, us % 1_000_000 / 10_000),
    }
}

/// How long something took, or will take, for people: `4 s`, `3 min 20 s`, `2 h 5 min`.
#[must_use]
pub fn span(seconds: u64) -> String {
    match seconds {
        0..60 => format!("{seconds} s"),
        60..3600 => format!("{} min {} s", seconds / 60, seconds % 60),
        3600..86_400 => format!("{} h {} min", seconds / 3600, seconds % 3600 / 60),
        _ => format!("{} d {} h", seconds / 86_400, seconds % 86_400 / 3600),
    }
}

/// A count for people: `24,118`.
#[must_use]
pub fn count(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::with_capacity(digits.len() + digits.len() / 3);
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_as_people_write_them() {
        let table: [(&str, u64); 10] = [
            ("0", 0),
            ("512", 512),
            ("1k", 1 << 10),
            ("64K", 64 << 10),
            ("1.5G", 3 << 29),
            ("2 TiB", 2 << 40),
            ("7MB", 7 << 20),
            ("10b", 10),
            ("18446744073709551615", u64::MAX),
            ("0.5k", 512),
        ];
        for (text, bytes) in table {
            assert_eq!(parse_size(text), Ok(bytes), "{text}");
        }
    }

    #[test]
    fn what_is_no_size_is_refused_with_a_sentence() {
        for text in [
            "",
            "K",
            "-1",
            "1x",
            "1..2",
            "1.",
            ".5",
            "16E",
            "99999999999T",
            "1e3",
            "0x10",
            "18446744073709551616",
        ] {
            let error = parse_size(text).unwrap_err();
            assert!(error.len() > 20, "{text}: {error}");
        }
    }

    #[test]
    fn sizes_have_three_digits_that_count() {
        let table: [(u64, &str); 9] = [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1 KiB"),
            (1536, "1.50 KiB"),
            (10 << 20, "10 MiB"),
            ((10 << 20) + 512 * 1024, "10.5 MiB"),
            ((1 << 30) - 1, "1023 MiB"),
            (300 << 30, "300 GiB"),
            (u64::MAX, "15.9 EiB"),
        ];
        for (bytes, text) in table {
            assert_eq!(size(bytes), text);
        }
    }

    #[test]
    fn times_and_counts_are_short() {
        assert_eq!(latency(Duration::from_micros(142)), "0.14 ms");
        assert_eq!(latency(Duration::from_micros(23_456)), "23.4 ms");
        assert_eq!(latency(Duration::from_millis(456)), "456 ms");
        assert_eq!(latency(Duration::from_millis(1204)), "1.20 s");
        assert_eq!(span(59), "59 s");
        assert_eq!(span(3725), "1 h 2 min");
        assert_eq!(span(90_000), "1 d 1 h");
        assert_eq!(count(0), "0");
        assert_eq!(count(999), "999");
        assert_eq!(count(24_118), "24,118");
        assert_eq!(count(1_000_000), "1,000,000");
    }
}
