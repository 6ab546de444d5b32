//! Prompts as people write them for AUTOMATIC1111: emphasis, escapes, `BREAK`, more than one
//! window, `<lora:name:0.8>`. Not the plain prompts of diffusers, which [`crate::tokenizer`] cuts at one window.
//!
//! Reference: stable-diffusion-webui 1.10 `modules/prompt_parser.py` `parse_prompt_attention`,
//! `modules/sd_hijack_clip.py`, `modules/sd_emphasis.py` and `modules/extra_networks.py`, with its
//! defaults. Prompts that
//! change from step to step (`[a:b:0.5]`, `[a|b]`, `AND`) are not understood: they are words.

use std::borrow::Cow;

use candle_core::{DType, Tensor};

use crate::adapted::Mix;
use crate::error::Result;
use crate::spec::Loras;
use crate::text_encoder::ClipTextModel;
use crate::tokenizer::ClipTokenizer;

/// What a pair of round brackets multiplies, and a pair of square ones divides.
const EMPHASIS: f64 = 1.1;
/// The word that begins a new window.
const BREAK: &str = "BREAK";
/// A window that would end within a phrase ends at the comma before it, if that is so near.
const NEAR: usize = 20;
/// Attention is paid to each window at each step: more than these are cut off.
const MAX_WINDOWS: usize = 8;
/// Beyond this a weight leaves nothing of the rest, and much further no number.
const MAX_WEIGHT: f64 = 1e4;

/// A window of tokens and how much each counts.
#[derive(Debug, Clone, PartialEq)]
pub struct Window {
    /// Begin, words, end, padding.
    pub ids: Vec<u32>,
    /// A weight for each token.
    pub weights: Vec<f32>,
}

/// The windows of a prompt, at least one, and how many windows were cut off.
pub fn windows(prompt: &str, tokenizer: &ClipTokenizer) -> Result<(Vec<Window>, usize)> {
    let room = tokenizer.window() - 2;
    let mut windows = Vec::new();
    // Tokens and weights of the window that is being filled.
    let mut open: Vec<(u32, f64)> = Vec::new();
    let mut comma = None;
    for part in parse(prompt) {
        let Part::Text { text, weight } = part else {
            windows.push(std::mem::take(&mut open));
            comma = None;
            continue;
        };
        for ids in tokenizer.words(&text)? {
            if ids.len() == 1 && Some(ids[0]) == tokenizer.comma() {
                comma = Some(open.len());
            } else if open.len() == room && comma.is_some_and(|place| room - place <= NEAR) {
                let rest = open.split_off(comma.map_or(room, |place| place + 1));
                windows.push(std::mem::replace(&mut open, rest));
                comma = None;
            }
            if open.len() + ids.len() > room {
                windows.push(std::mem::take(&mut open));
                comma = None;
            }
            open.extend(ids.into_iter().map(|id| (id, weight)));
        }
    }
    if !open.is_empty() || windows.is_empty() {
        windows.push(open);
    }
    let cut = windows.len().saturating_sub(MAX_WINDOWS);
    windows.truncate(MAX_WINDOWS);
    let close = |words: Vec<(u32, f64)>| {
        let (ids, weights): (Vec<u32>, Vec<f64>) = words.into_iter().unzip();
        let mut all = vec![1.0];
        let bounded = |weight: f64| weight.clamp(-MAX_WEIGHT, MAX_WEIGHT) as f32;
        all.extend(weights.into_iter().map(bounded));
        all.resize(tokenizer.window(), 1.0);
        Window { ids: tokenizer.close(&ids), weights: all }
    };
    Ok((windows.into_iter().map(close).collect(), cut))
}

/// About as many windows as a prompt can fill, from its length alone.
pub(crate) fn most_windows(prompt: &str) -> usize {
    // A token of text is rarely less than three bytes; a break ends a window early.
    const BYTES: usize = 3 * 75;
    let breaks = prompt.matches("BREAK").count();
    (prompt.len().div_ceil(BYTES) + breaks).clamp(1, MAX_WINDOWS)
}

/// Windows -> the context (1, windows x tokens, D) f32: the hidden states times their weights, with
/// the mean of each window brought back to what it was.
pub fn encode(windows: Vec<Window>, encoder: &ClipTextModel, mix: &Mix) -> Result<Tensor> {
    let (ids, weights): (Vec<_>, Vec<_>) = windows.into_iter().map(|w| (w.ids, w.weights)).unzip();
    let states = encoder.forward(&ids, mix)?; // (windows, tokens, D)
    let (count, length, width) = states.dims3()?;
    let weights = weights.concat();
    let states = if weights.iter().all(|weight| *weight == 1.0) {
        states
    } else {
        let weights = Tensor::from_vec(weights, (count, length, 1), states.device())?;
        let scaled = states.broadcast_mul(&weights)?;
        let mean = |x: &Tensor| x.flatten_from(1)?.to_dtype(DType::F64)?.mean_keepdim(1);
        let factor = (mean(&states)? / mean(&scaled)?)?.to_dtype(DType::F32)?;
        scaled.broadcast_mul(&factor.reshape((count, 1, 1))?)?
    };
    Ok(states.reshape((1, count * length, width))?)
}

/// A prompt without its `<lora:name:scale>`, and these. The error is what comes after the field's
/// name.
pub fn without_loras(prompt: &str) -> std::result::Result<(Cow<'_, str>, Loras), String> {
    let (mut text, mut loras, mut rest) = (String::new(), Vec::new(), prompt);
    while let Some((before, kind, arguments, after)) = network(rest) {
        rest = after;
        text += before;
        let refuse = |reason: &str| Err(format!("<{kind}:{arguments}>: {reason}"));
        match kind {
            "lora" | "lyco" => {}
            "hypernet" => return refuse("hypernetworks are not supported"),
            _ => {
                text += &format!("<{kind}:{arguments}>");
                continue;
            }
        }
        let mut arguments = arguments.split(':');
        let name = arguments.next().unwrap_or_default();
        let scale = arguments.next().map(|scale| scale.trim().parse::<f64>().ok());
        match scale.unwrap_or(Some(1.0)).filter(|scale| scale.is_finite()) {
            Some(scale) if arguments.next().is_none() => loras.push((name.to_owned(), scale)),
            _ => return refuse("expected a name and one number, as in <lora:name:0.8>"),
        }
    }
    if rest.len() == prompt.len() {
        return Ok((Cow::Borrowed(prompt), loras));
    }
    Ok((Cow::Owned(text + rest), loras))
}

/// The first `<word:arguments>` of a text: what is before it, its two parts, and what is after.
fn network(text: &str) -> Option<(&str, &str, &str, &str)> {
    text.match_indices('<').find_map(|(at, _)| {
        let (inside, after) = text[at + 1..].split_once('>')?;
        let (kind, arguments) = inside.split_once(':')?;
        let word = !kind.is_empty() && kind.chars().all(|c| c.is_alphanumeric() || c == '_');
        (word && !arguments.is_empty()).then_some((&text[..at], kind, arguments, after))
    })
}

/// A stretch of a prompt.
#[derive(Debug, Clone, PartialEq)]
enum Part {
    Text { text: String, weight: f64 },
    Break,
}

/// The stretches of a prompt with the product of the brackets around each.
fn parse(prompt: &str) -> Vec<Part> {
    let mut parts: Vec<Part> = Vec::new();
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
                for (i, piece) in pieces(text).into_iter().enumerate() {
                    if i > 0 {
                        parts.push(Part::Break);
                    }
                    parts.push(plain(piece));
                }
            }
        }
    }
    // Brackets that are never closed reach to the end.
    round.into_iter().for_each(|from| multiply(&mut parts[from..], EMPHASIS));
    square.into_iter().for_each(|from| multiply(&mut parts[from..], 1.0 / EMPHASIS));
    merged(parts)
}

fn plain(text: &str) -> Part {
    Part::Text { text: text.to_owned(), weight: 1.0 }
}

fn multiply(parts: &mut [Part], factor: f64) {
    for part in parts {
        if let Part::Text { weight, .. } = part {
            *weight *= factor;
        }
    }
}

/// Neighbours of one weight as one text: the tokenizer must see words whole.
fn merged(parts: Vec<Part>) -> Vec<Part> {
    let mut merged: Vec<Part> = Vec::new();
    for part in parts {
        match (merged.last_mut(), part) {
            (Some(Part::Text { text, weight }), Part::Text { text: next, weight: same })
                if *weight == same =>
            {
                text.push_str(&next);
            }
            (_, part) => merged.push(part),
        }
    }
    merged
}

/// What lies between the words `BREAK`, without the space around these.
fn pieces(text: &str) -> Vec<&str> {
    let word = |c: char| c.is_alphanumeric() || c == '_';
    let mut pieces = Vec::new();
    let mut begun = 0;
    for (at, found) in text.match_indices(BREAK) {
        let end = at + found.len();
        if text[..at].ends_with(word) || text[end..].starts_with(word) {
            continue;
        }
        let before = text.get(begun..at).unwrap_or_default();
        pieces.push(if begun == 0 { before.trim_end() } else { before.trim() });
        begun = end;
    }
    let last = &text[begun..];
    pieces.push(if begun == 0 { last } else { last.trim_start() });
    pieces
}

/// The next thing in a prompt.
struct Token<'a> {
    kind: Kind<'a>,
    text: &'a str,
    length: usize,
}

enum Kind<'a> {
    /// What follows a backslash.
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

/// The number of a `:1.3)` and the length of all of it.
fn weight(text: &str) -> Option<(f64, usize)> {
    let end = text.find(')')?;
    let number = text[1..end].trim();
    let digits = number.strip_prefix(['+', '-']).unwrap_or(number);
    let only_digits = digits.chars().all(|c| c == '.' || c.is_ascii_digit());
    Some((number.parse().ok().filter(|_| only_digits)?, end + 1))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn weighed(prompt: &str) -> Vec<(String, f64)> {
        let pair = |part| match part {
            Part::Text { text, weight } => (text, (weight * 1e4).round() / 1e4),
            Part::Break => (BREAK.into(), -1.0),
        };
        parse(prompt).into_iter().map(pair).collect()
    }

    #[test]
    fn loras_are_taken_out_of_a_prompt() {
        let of = |prompt| without_loras(prompt).map(|(text, loras)| (text.into_owned(), loras));
        let lora = |name: &str, scale| (name.to_owned(), scale);
        let table = [
            ("a < b: c", "a < b: c", vec![]),
            ("a <lora:x:0.8>cat", "a cat", vec![lora("x", 0.8)]),
            ("<lora:x><lyco:y z:-1>, b", ", b", vec![lora("x", 1.0), lora("y z", -1.0)]),
            ("a <b <lora:x:.5> <:c> <lora:>", "a <b  <:c> <lora:>", vec![lora("x", 0.5)]),
            ("<style:x> é<lora:ü>", "<style:x> é", vec![lora("ü", 1.0)]),
        ];
        for (prompt, text, loras) in table {
            assert_eq!(of(prompt), Ok((text.to_owned(), loras)), "{prompt:?}");
        }
        for prompt in ["<lora:x:much>", "<lora:x:1:0.5>", "<lora:x:inf>", "a <hypernet:x:1>"] {
            assert!(of(prompt).is_err_and(|reason| reason.contains("x")), "{prompt:?}");
        }
    }

    /// The examples in the docstring of `parse_prompt_attention`, and what they leave out.
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
}
