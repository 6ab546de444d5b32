//! Random ids.

/// An id that cannot be guessed.
pub(crate) fn random() -> u128 {
    let half = || u128::from(getrandom::u64().unwrap_or_default());
    half() << 64 | half()
}
