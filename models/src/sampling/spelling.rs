//! How names of samplers and schedules are compared.

/// A name without case, and with one space for spaces, underscores and hyphens.
pub(super) fn spelt(name: &str) -> String {
    let words = name.split(|c: char| c.is_whitespace() || c == '_' || c == '-');
    let words = words.filter(|word| !word.is_empty()).map(str::to_lowercase);
    words.collect::<Vec<_>>().join(" ")
}
