//! Parsers of option values.

use std::time::Duration;

/// A whole number of at least `MIN`.
pub(crate) fn min<const MIN: usize>(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(number) if number >= MIN => Ok(number),
        _ => Err(format!("must be a whole number of at least {MIN}")),
    }
}

/// A number of bytes, at least one.
pub(crate) fn bytes(text: &str) -> Result<u64, String> {
    min::<1>(text).map(|bytes| bytes as u64)
}

/// A time of at least `MIN` milliseconds.
pub(crate) fn millis<const MIN: usize>(text: &str) -> Result<Duration, String> {
    min::<MIN>(text).map(|millis| Duration::from_millis(millis as u64))
}
