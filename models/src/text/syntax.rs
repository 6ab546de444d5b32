//! AUTOMATIC1111's prompt syntax: emphasis, escapes, `BREAK`, more than one chunk of tokens. Not
//! `<lora:...>` tags, which are in [`super::tags`], and not plain prompts, which
//! [`super::tokenizer`] truncates to one chunk.
//!
//! Reference: stable-diffusion-webui 1.10 `modules/prompt_parser.py` `parse_prompt_attention`,
//! `modules/sd_hijack_clip.py` and `modules/sd_emphasis.py`, with their defaults. Prompt editing
//! and `AND` are read before, in [`super::editing`] and [`super::parts`].

use super::tokenizer::ClipTokenizer;
use super::words::whole_words;
use crate::error::Result;

/// The factor of a pair of round brackets, and the divisor of a pair of square ones.
const EMPHASIS: f64 = 1.1;
/// The word that begins a new chunk.
const BREAK: &str = "BREAK";
/// A chunk that would end within a phrase ends at the last comma instead, if that is at most so
/// many tokens back (A1111's `comma_padding_backtrack`).
const NEAR: usize = 20;
/// Maximum number of chunks; every step attends to all of them, so a longer prompt is truncated.
const MAX_CHUNKS: usize = 8;
/// Maximum absolute weight: far below overflow, far above any use.
pub(super) const MAX_WEIGHT: f64 = 1e4;

/// A chunk of tokens (75 plus begin and end) and their weights.
#[derive(Debug, Clone, PartialEq)]
pub struct PromptChunk {
    /// Begin, words, end, padding.
    pub ids: Vec<u32>,
    /// One weight per token.
    pub weights: Vec<f32>,
}

/// The chunks of a prompt, at least one, and the number of truncated chunks.
pub fn chunks(prompt: &str, tokenizer: &ClipTokenizer) -> Result<(Vec<PromptChunk>, usize)> {
    let room = tokenizer.max_length() - 2;
    let mut chunks = Vec::new();
    // Tokens and weights of the chunk that is being filled.
    let mut open: Vec<(u32, f64)> = Vec::new();
    let mut comma = None;
    for part in parse(prompt) {
        let Span::Text { text, weight } = part else {
            chunks.push(std::mem::take(&mut open));
            comma = None;
            continue;
        };
        for ids in tokenizer.words(&text)? {
            if ids.len() == 1 && Some(ids[0]) == tokenizer.comma() {
                comma = Some(open.len());
            } else if open.len() == room && comma.is_some_and(|place| room - place <= NEAR) {
                let rest = open.split_off(comma.map_or(room, |place| place + 1));
                chunks.push(std::mem::replace(&mut open, rest));
                comma = None;
            }
            if open.len() + ids.len() > room {
                chunks.push(std::mem::take(&mut open));
                comma = None;
            }
            open.extend(ids.into_iter().map(|id| (id, weight)));
        }
    }
    if !open.is_empty() || chunks.is_empty() {
        chunks.push(open);
    }
    let cut = chunks.len().saturating_sub(MAX_CHUNKS);
    chunks.truncate(MAX_CHUNKS);
    let close = |words: Vec<(u32, f64)>| {
        let (ids, weights): (Vec<u32>, Vec<f64>) = words.into_iter().unzip();
        let mut all = vec![1.0];
        let bounded = |weight: f64| weight.clamp(-MAX_WEIGHT, MAX_WEIGHT) as f32;
        all.extend(weights.into_iter().map(bounded));
        all.resize(tokenizer.max_length(), 1.0);
        PromptChunk { ids: tokenizer.close(&ids), weights: all }
    };
    Ok((chunks.into_iter().map(close).collect(), cut))
}

/// An estimate of a prompt's number of chunks, from its length alone.
pub(crate) fn max_chunks(prompt: &str) -> usize {
    // A token of text is rarely less than three bytes; a break ends a chunk early.
    const BYTES: usize = 3 * 75;
    let breaks = prompt.matches("BREAK").count();
    (prompt.len().div_ceil(BYTES) + breaks).clamp(1, MAX_CHUNKS)
}

/// An attention span of a prompt.
#[derive(Debug, Clone, PartialEq)]
enum Span {
    Text { text: String, weight: f64 },
    Break,
}

/// The attention spans of a prompt; weights are the product of the brackets around them.
fn parse(prompt: &str) -> Vec<Span> {
    let mut parts: Vec<Span> = Vec::new();
    let (mut round, mut square) = (Vec::new(), Vec::new());
    let mut rest = prompt;
    while let Some(token) = Token::first(rest) {
        rest = &rest[token.length..];
        match token.kind {
            Kind::Escaped(text) => parts.push(plain(text)),
            Kind::Open => round.push(parts.len()),
            Kind::OpenSquare => square.push(parts.len()),
            Kind::Close(weight) if !round.is_empty() => {
                let from = round.pop().unwrap_or_default();
                multiply(&mut parts[from..], weight.unwrap_or(EMPHASIS));
            }
            Kind::CloseSquare if !square.is_empty() => {
                let from = square.pop().unwrap_or_default();
                multiply(&mut parts[from..], 1.0 / EMPHASIS);
            }
            Kind::Close(_) | Kind::CloseSquare | Kind::Text => {
                let text = token.text;
                for (i, piece) in split_breaks(text).into_iter().enumerate() {
                    if i > 0 {
                        parts.push(Span::Break);
                    }
                    parts.push(plain(piece));
                }
            }
        }
    }
    // Unclosed brackets extend to the end.
    round.into_iter().for_each(|from| multiply(&mut parts[from..], EMPHASIS));
    square.into_iter().for_each(|from| multiply(&mut parts[from..], 1.0 / EMPHASIS));
    merged(parts)
}

fn plain(text: &str) -> Span {
    Span::Text { text: text.to_owned(), weight: 1.0 }
}

fn multiply(parts: &mut [Span], factor: f64) {
    for part in parts {
        if let Span::Text { weight, .. } = part {
            *weight *= factor;
        }
    }
}

/// Merges neighbours of equal weight, so that the tokenizer sees whole words.
fn merged(parts: Vec<Span>) -> Vec<Span> {
    let mut merged: Vec<Span> = Vec::new();
    for part in parts {
        match (merged.last_mut(), part) {
            (Some(Span::Text { text, weight }), Span::Text { text: next, weight: same })
                if *weight == same =>
            {
                text.push_str(&next);
            }
            (_, part) => merged.push(part),
        }
    }
    merged
}

/// The text between the words `BREAK`, without the white space around them.
fn split_breaks(text: &str) -> Vec<&str> {
    let mut pieces = Vec::new();
    let mut begun = 0;
    for at in whole_words(text, BREAK) {
        let end = at + BREAK.len();
        let before = text.get(begun..at).unwrap_or_default();
        pieces.push(if begun == 0 { before.trim_end() } else { before.trim() });
        begun = end;
    }
    let last = &text[begun..];
    pieces.push(if begun == 0 { last } else { last.trim_start() });
    pieces
}

/// The next lexical token of a prompt.
struct Token<'a> {
    kind: Kind<'a>,
    text: &'a str,
    length: usize,
}

enum Kind<'a> {
    /// The character after a backslash.
    Escaped(&'a str),
    Open,
    OpenSquare,
    /// `)` or `:1.3)`
    Close(Option<f64>),
    CloseSquare,
    Text,
}

impl<'a> Token<'a> {
    /// The first token of a text; none when it is empty.
    fn first(text: &'a str) -> Option<Self> {
        let token = |kind, length| Some(Self { kind, text: &text[..length], length });
        let first = text.chars().next()?;
        match first {
            '\\' => {
                let escaped = text[1..].starts_with(['(', ')', '[', ']', '\\']);
                let length = if escaped { 2 } else { 1 };
                token(Kind::Escaped(&text[1..length]), length)
            }
            '(' => token(Kind::Open, 1),
            '[' => token(Kind::OpenSquare, 1),
            ')' => token(Kind::Close(None), 1),
            ']' => token(Kind::CloseSquare, 1),
            ':' => match weight(text) {
                Some((weight, length)) => token(Kind::Close(Some(weight)), length),
                None => token(Kind::Text, 1),
            },
            _ => {
                token(Kind::Text, text.find(['\\', '(', ')', '[', ']', ':']).unwrap_or(text.len()))
            }
        }
    }
}

/// Whether a prompt has words whose weight is out of bounds.
pub(super) fn is_overweight(prompt: &str) -> bool {
    let over = |span: &Span| match span {
        Span::Text { weight, .. } => weight.abs() > MAX_WEIGHT,
        Span::Break => false,
    };
    parse(prompt).iter().any(over)
}

/// Whether a text is a number of emphasis.
pub(super) fn is_number(text: &str) -> bool {
    let digits = text.strip_prefix(['+', '-']).unwrap_or(text);
    digits.chars().all(|c| c == '.' || c.is_ascii_digit()) && text.parse::<f64>().is_ok()
}

/// The weight of a `:1.3)`, and its length in bytes.
fn weight(text: &str) -> Option<(f64, usize)> {
    let end = text.find(')')?;
    let number = text[1..end].trim();
    Some((number.parse().ok().filter(|_| is_number(number))?, end + 1))
}

#[cfg(test)]
mod tests {
    use std::sync::LazyLock;

    use proptest::prelude::*;

    use super::*;
    use crate::files::Source;

    fn weighed(prompt: &str) -> Vec<(String, f64)> {
        let pair = |part| match part {
            Span::Text { text, weight } => (text, (weight * 1e4).round() / 1e4),
            Span::Break => (BREAK.into(), -1.0),
        };
        parse(prompt).into_iter().map(pair).collect()
    }

    /// The examples in the docstring of `parse_prompt_attention`, and cases beyond them.
    #[test]
    fn brackets_weigh_what_they_enclose() {
        let table: [(&str, &[(&str, f64)]); 15] = [
            ("normal text", &[("normal text", 1.0)]),
            ("an (important) word", &[("an ", 1.0), ("important", 1.1), (" word", 1.0)]),
            ("(unbalanced", &[("unbalanced", 1.1)]),
            (r"\(literal\]", &[("(literal]", 1.0)]),
            ("(unnecessary)(parens)", &[("unnecessaryparens", 1.1)]),
            (
                "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).",
                &[
                    ("a ", 1.0),
                    ("house", 1.573),
                    (" ", 1.1),
                    ("on", 1.0),
                    (" a ", 1.1),
                    ("hill", 0.55),
                    (", sun, ", 1.1),
                    ("sky", 1.4641),
                    (".", 1.1),
                ],
            ),
            ("", &[]),
            ("()", &[]),
            ("a:b) c]", &[("a:b) c]", 1.0)]),
            ("(a: -0.5 )b", &[("a", -0.5), ("b", 1.0)]),
            ("(a:1..2)", &[("a:1..2", 1.1)]),
            (r"a\", &[("a", 1.0)]),
            ("a BREAK b", &[("a", 1.0), (BREAK, -1.0), ("b", 1.0)]),
            ("(a BREAK b:2)", &[("a", 2.0), (BREAK, -1.0), ("b", 2.0)]),
            ("BREAKFAST aBREAK é", &[("BREAKFAST aBREAK é", 1.0)]),
        ];
        for (prompt, expected) in table {
            let expected: Vec<_> = expected.iter().map(|(t, w)| ((*t).to_owned(), *w)).collect();
            assert_eq!(weighed(prompt), expected, "{prompt:?}");
        }
    }

    /// The text as a literal: its brackets and backslashes are escaped.
    fn escaped(text: &str) -> String {
        let escape = |c: char| match c {
            '(' | ')' | '[' | ']' | '\\' => format!("\\{c}"),
            c => c.to_string(),
        };
        text.chars().map(escape).collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig {
            failure_persistence: None,
            ..ProptestConfig::with_cases(500)
        })]

        #[test]
        fn an_escaped_text_is_itself(text in "[a-zé \\\\()\\[\\]:.,0-9]{0,40}") {
            let expected: Vec<_> = (!text.is_empty()).then(|| (text.clone(), 1.0)).into_iter().collect();
            prop_assert_eq!(weighed(&escaped(&text)), expected);
        }

        #[test]
        fn emphasis_weighs_what_it_encloses(
            text in "[a-zé ,]{1,20}",
            outside in "[a-z ,]{1,20}",
            hundredths in 0..1000_u32,
        ) {
            let weight = f64::from(hundredths) / 100.0;
            let prompt = format!("{outside}({text}:{weight})");
            let mut expected = vec![(outside.clone(), 1.0), (text.clone(), weight)];
            if weight == 1.0 {
                expected = vec![(outside + &text, 1.0)];
            }
            prop_assert_eq!(weighed(&prompt), expected);
        }

        #[test]
        fn any_prompt_has_chunks_of_finite_weights(prompt in "[a-z()\\[\\]:.0-9\\\\ ,]{0,300}|.{0,80}") {
            static TOKENIZER: LazyLock<ClipTokenizer> =
                LazyLock::new(|| ClipTokenizer::load(&Source::Demo, 77).expect("a tokenizer"));
            let (chunks, _) = chunks(&prompt, &TOKENIZER).expect("tokens");
            prop_assert!((1..=MAX_CHUNKS).contains(&chunks.len()));
            for chunk in chunks {
                prop_assert_eq!((chunk.ids.len(), chunk.weights.len()), (77, 77));
                prop_assert!(chunk.weights.iter().all(|weight| weight.is_finite()));
            }
        }
    }
}
