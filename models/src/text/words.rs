//! Words and white space of a prompt, as Python's regular expressions have them.

/// Whether Python's `\s` matches a character.
pub(super) fn is_space(c: char) -> bool {
    c.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&c)
}

/// Where a word stands in a text with no letter, digit or underscore beside it: `\bword\b`.
pub(super) fn whole_words<'a>(text: &'a str, word: &'a str) -> impl Iterator<Item = usize> + 'a {
    let of_word = |c: char| c.is_alphanumeric() || c == '_';
    text.match_indices(word).map(|(at, _)| at).filter(move |at| {
        !text[..*at].ends_with(of_word) && !text[at + word.len()..].starts_with(of_word)
    })
}
