//! Durations and sizes as Flink's settings write them.

/// Reads a duration: `500ms`, `1 min`, `2h`, or a plain number of milliseconds.
///
/// # Errors
/// What is wrong with it.
pub fn parse_duration_ms(text: &str) -> Result<u64, String> {
    let (number, unit) = split(text)?;
    let per_unit_us: u64 = match unit.as_str() {
        "ns" | "nano" | "nanos" | "nanosecond" | "nanoseconds" => return Ok(number / 1_000_000),
        "us" | "\u{b5}s" | "\u{3bc}s" | "micro" | "micros" | "microsecond" | "microseconds" => 1,
        "" | "ms" | "milli" | "millis" | "millisecond" | "milliseconds" => 1_000,
        "s" | "sec" | "secs" | "second" | "seconds" => 1_000_000,
        "m" | "min" | "mins" | "minute" | "minutes" => 60_000_000,
        "h" | "hour" | "hours" => 3_600_000_000,
        "d" | "day" | "days" => 86_400_000_000,
        other => return Err(format!("\"{other}\" is no unit of time; use ms, s, min, h or d")),
    };
    let micros = number.checked_mul(per_unit_us).ok_or("it is too long")?;
    Ok(micros / 1_000)
}

/// Reads a size: `64MiB`, `64 mb`, `1g`, or a plain number of bytes. As in Flink's settings, `kb`,
/// `mb` and `gb` count in steps of 1024.
///
/// # Errors
/// What is wrong with it.
pub fn parse_bytes(text: &str) -> Result<u64, String> {
    let (number, unit) = split(text)?;
    let shift = match unit.as_str() {
        "" | "b" | "bytes" => 0,
        "k" | "kb" | "kib" | "kibibytes" => 10,
        "m" | "mb" | "mib" | "mebibytes" => 20,
        "g" | "gb" | "gib" | "gibibytes" => 30,
        "t" | "tb" | "tib" | "tebibytes" => 40,
        other => return Err(format!("\"{other}\" is no unit of size; use b, KiB, MiB or GiB")),
    };
    number.checked_mul(1 << shift).ok_or_else(|| "it is too large".to_owned())
}

fn split(text: &str) -> Result<(u64, String), String> {
    let text = text.trim();
    let end = text.find(|letter: char| !letter.is_ascii_digit()).unwrap_or(text.len());
    let number =
        text[..end].parse().map_err(|_| "it does not begin with a whole number".to_owned())?;
    Ok((number, text[end..].trim().to_lowercase()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_read_as_flink_reads_them() {
        for (text, ms) in [
            ("0", 0),
            ("250", 250),
            ("1s", 1_000),
            ("10 min", 600_000),
            ("2 H", 7_200_000),
            ("1d", 86_400_000),
            ("2500 \u{b5}s", 2),
            ("2500\u{3bc}s", 2),
            ("7000000 ns", 7),
            ("1 nanosecond", 0),
        ] {
            assert_eq!(parse_duration_ms(text), Ok(ms), "{text}");
        }
        for text in ["", "s", "-1s", "1.5s", "3 parsecs", "99999999999999 d"] {
            assert!(parse_duration_ms(text).is_err(), "{text}");
        }
    }

    #[test]
    fn sizes_are_read_as_flink_reads_them() {
        for (text, bytes) in [("7", 7), ("1 kb", 1024), ("64MiB", 64 << 20), ("2g", 2 << 30)] {
            assert_eq!(parse_bytes(text), Ok(bytes), "{text}");
        }
        for text in ["", "MiB", "1 byte per second", "99999999999 tb"] {
            assert!(parse_bytes(text).is_err(), "{text}");
        }
    }
}
