//! Parsers of option values.

use std::time::Duration;

/// Multiples of a byte. As in coreutils, `K` is 1024 and `KB` is 1000.
const MULTIPLES: [(&str, u32); 4] = [("K", 1), ("M", 2), ("G", 3), ("T", 4)];

/// A whole number of at least `MIN`.
pub(crate) fn min<const MIN: usize>(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(number) if number >= MIN => Ok(number),
        _ => Err(format!("must be a whole number of at least {MIN}")),
    }
}

/// A number of bytes, at least `MIN`: `1048576`, `1M`, `1MiB` or, for a million, `1MB`.
pub(crate) fn size<const MIN: usize>(text: &str) -> Result<usize, String> {
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let multiple = |(letter, power): &(&str, u32)| {
        let base: usize = match unit.trim_start().to_ascii_uppercase().strip_prefix(letter)? {
            "" | "IB" => 1024,
            "B" => 1000,
            _ => return None,
        };
        base.checked_pow(*power)
    };
    let multiple = if unit.is_empty() { Some(1) } else { MULTIPLES.iter().find_map(multiple) };
    let bytes = number.parse::<usize>().ok().zip(multiple).and_then(|(n, by)| n.checked_mul(by));
    bytes.filter(|bytes| *bytes >= MIN).ok_or_else(|| {
        format!("must be a number of bytes of at least {MIN}, such as 1048576, 1M or 2GiB")
    })
}

/// A number of bytes, at least one.
pub(crate) fn bytes(text: &str) -> Result<u64, String> {
    size::<1>(text).map(|bytes| bytes as u64)
}

/// A time of at least `MIN` milliseconds.
pub(crate) fn millis<const MIN: usize>(text: &str) -> Result<Duration, String> {
    min::<MIN>(text).map(|millis| Duration::from_millis(millis as u64))
}

/// A switch, as environment variables spell it.
pub(crate) fn switch(text: &str) -> Result<bool, String> {
    match text.to_ascii_lowercase().as_str() {
        "true" | "1" | "yes" | "on" => Ok(true),
        "false" | "0" | "no" | "off" => Ok(false),
        _ => Err("must be true or false".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_may_have_a_unit() {
        for (text, bytes) in
            [("7", 7), ("1k", 1024), ("2M", 2 << 20), ("3 GiB", 3 << 30), ("4MB", 4_000_000)]
        {
            assert_eq!(size::<1>(text), Ok(bytes), "{text}");
        }
        for text in ["", "0", "G", "1.5G", "-1", "1X", "1GG", "1B", "99999999T", "0x10"] {
            assert!(size::<1>(text).is_err(), "{text}");
        }
    }
}
