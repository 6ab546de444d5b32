//! Parsers of option values.

use std::time::Duration;

/// A whole number of at least `MIN`.
pub(crate) fn min<const MIN: usize>(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(number) if number >= MIN => Ok(number),
        _ => Err(format!("must be a whole number of at least {MIN}")),
    }
}

/// A time of at least `MIN` milliseconds.
pub(crate) fn millis<const MIN: usize>(text: &str) -> Result<Duration, String> {
    min::<MIN>(text).map(|millis| Duration::from_millis(millis as u64))
}
