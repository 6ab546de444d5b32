//! Prompt editing in AUTOMATIC1111's syntax: `[from:to:when]`, `[to:when]`, `[from::when]` and
//! `[one|another]`. A prompt becomes the texts that it stands for, each with the evaluations of the
//! UNet for which it holds. Emphasis stays in the texts: [`super::syntax`] reads it.
//!
//! Reference: stable-diffusion-webui 1.10 `modules/prompt_parser.py`,
//! `get_learned_conditioning_prompt_schedules`, whose grammar is
//!
//! ```text
//! start:      (prompt | one of "[]():")*
//! prompt:     (emphasized | scheduled | alternate | text)*
//! emphasized: "(" prompt ")"  |  "(" prompt ":" prompt ")"  |  "[" prompt "]"
//! scheduled:  "[" [prompt ":"] prompt ":" number "]"
//! alternate:  "[" prompt ("|" [prompt])+ "]"
//! ```
//!
//! Brackets that fit no rule are text, and so are those around them; a bar outside of an
//! alternation, or a backslash without a character behind it, makes the whole prompt text. Where
//! loose brackets touch an edit, as in `[a:b:3](`, the reference's parser takes it for either, by
//! chance (it depends on Python's hashes of strings): here it is an edit.

use std::borrow::Cow;

use super::words::is_space;

/// Maximum number of different texts that a prompt stands for; each has its keys and values in
/// memory while an image is generated.
pub const MAX_TEXTS: usize = 64;

/// The evaluations that the numbers of a prompt count.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Counted {
    /// Evaluations of the pass: a prompt's `0.5` is half of them.
    pub evaluations: usize,
    /// In a hires pass, the evaluations of the base pass. The pass goes on counting from there:
    /// shares are those above 1.
    pub before: Option<usize>,
}

/// The texts that a prompt stands for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Schedule {
    /// Each text once, at least one.
    pub texts: Vec<String>,
    /// The last evaluation, counted from 0, and the text that holds up to it; in their order. The
    /// last text holds to the end.
    pub spans: Vec<(usize, usize)>,
}

/// A prompt of more than [`MAX_TEXTS`] texts.
#[derive(Debug, PartialEq, Eq)]
pub struct TooManyTexts;

impl Schedule {
    /// The schedule of a prompt without edits.
    pub fn plain(prompt: &str) -> Self {
        Self { texts: vec![prompt.to_owned()], spans: vec![(usize::MAX, 0)] }
    }

    /// The schedule of a prompt.
    ///
    /// # Errors
    /// If the prompt stands for too many texts.
    pub fn new(prompt: &str, counted: Counted) -> Result<Self, TooManyTexts> {
        let Some(edits) = Edits::parse(prompt).filter(Edits::change) else {
            return Ok(Self::plain(prompt));
        };
        let mut schedule = Self { texts: Vec::new(), spans: Vec::new() };
        for until in edits.boundaries(counted) {
            let text = edits.at(until, counted);
            let known = schedule.texts.iter().position(|known| *known == text);
            let index = known.unwrap_or(schedule.texts.len());
            if known.is_none() {
                if schedule.texts.len() == MAX_TEXTS {
                    return Err(TooManyTexts);
                }
                schedule.texts.push(text);
            }
            match schedule.spans.last_mut() {
                Some(last) if last.1 == index => last.0 = until,
                _ => schedule.spans.push((until, index)),
            }
        }
        Ok(schedule)
    }

    /// The index of the text of an evaluation, counted from 0.
    pub fn at(&self, evaluation: usize) -> usize {
        let span = self.spans.iter().find(|(until, _)| evaluation <= *until);
        span.or(self.spans.last()).map_or(0, |(_, index)| *index)
    }
}

/// At most so many texts does a prompt stand for in a run of so many evaluations.
pub(crate) fn most_texts(prompt: &str, evaluations: usize) -> usize {
    // This is asked for at every step.
    if !prompt.contains('[') {
        return 1;
    }
    let edits = Edits::parse(prompt).filter(Edits::change);
    edits.map_or(1, |edits| edits.most_texts()).min(evaluations).clamp(1, MAX_TEXTS)
}

/// The first text that a prompt stands for.
pub(super) fn first_text(prompt: &str) -> Cow<'_, str> {
    let edits = Edits::parse(prompt).filter(Edits::change);
    edits.map_or(Cow::Borrowed(prompt), |edits| {
        Cow::Owned(edits.at(1, Counted { evaluations: 1, before: None }))
    })
}

/// A parsed prompt: pieces in their order. What is inside of a choice stands behind it.
struct Edits<'a>(Vec<Piece<'a>>);

/// Pieces by index.
type Range = std::ops::Range<usize>;

enum Piece<'a> {
    Text(&'a str),
    /// `before` up to an evaluation, then `after`; the prompt goes on at `end`.
    Scheduled {
        before: Range,
        after: Range,
        when: When,
        end: usize,
    },
    /// One after the other; the prompt goes on at `end`.
    Alternate {
        options: Vec<Range>,
        end: usize,
    },
}

/// The number of an edit.
#[derive(Clone, Copy)]
struct When {
    value: f64,
    /// With a point it is a share of the evaluations.
    is_share: bool,
}

/// A bracket that is not closed yet.
struct Open {
    bracket: char,
    /// Index of its piece.
    at: usize,
    /// The colons and bars directly inside, with the index of their piece and their place in the
    /// prompt.
    separators: Vec<(char, usize, usize)>,
    /// Whether nothing inside is loose.
    whole: bool,
}

impl<'a> Edits<'a> {
    /// None where the prompt is text as a whole.
    fn parse(prompt: &'a str) -> Option<Self> {
        let (mut pieces, mut open): (Vec<Piece<'_>>, Vec<Open>) = (Vec::new(), Vec::new());
        let mut at = 0;
        while let Some(first) = prompt[at..].chars().next() {
            let mut length = first.len_utf8();
            match first {
                '\\' => {
                    let escaped = prompt[at + 1..].chars().next().filter(|c| *c != '\n')?;
                    length += escaped.len_utf8();
                }
                '[' | '(' => {
                    let separators = Vec::new();
                    open.push(Open { bracket: first, at: pieces.len(), separators, whole: true });
                }
                ':' | '|' => match open.last_mut() {
                    Some(inside) => inside.separators.push((first, pieces.len(), at)),
                    None if first == '|' => return None,
                    None => {}
                },
                ']' | ')' => close(&prompt[..at], first, &mut pieces, &mut open)?,
                _ => {
                    let special = ['\\', '[', ']', '(', ')', ':', '|'];
                    length = prompt[at..].find(special).unwrap_or(prompt.len() - at);
                }
            }
            pieces.push(Piece::Text(&prompt[at..at + length]));
            at += length;
        }
        open.iter().all(|open| !open.has_bar()).then_some(Self(pieces))
    }

    /// Whether there is anything but text.
    fn change(&self) -> bool {
        self.0.iter().any(|piece| !matches!(piece, Piece::Text(_)))
    }

    /// The evaluations, counted from 1, after which the text may be another, and the last.
    fn boundaries(&self, counted: Counted) -> Vec<usize> {
        let last = counted.evaluations;
        if self.0.iter().any(|piece| matches!(piece, Piece::Alternate { .. })) {
            return (1..=last).collect();
        }
        let whens = self.0.iter().filter_map(|piece| match piece {
            Piece::Scheduled { when, .. } => Some(when.evaluation(counted)),
            _ => None,
        });
        let mut all: Vec<_> = whens.filter(|when| *when >= 1).chain([last]).collect();
        all.sort_unstable();
        all.dedup();
        all
    }

    /// The text at an evaluation, counted from 1.
    fn at(&self, evaluation: usize, counted: Counted) -> String {
        let mut text = String::new();
        let whole: Range = 0..self.0.len();
        let mut left = Vec::from([whole]);
        while let Some(mut range) = left.pop() {
            let Some(piece) = range.next() else { continue };
            match &self.0[piece] {
                Piece::Text(piece) => {
                    text += piece;
                    left.push(range);
                }
                Piece::Scheduled { before, after, when, end } => {
                    let is_before = evaluation <= when.evaluation(counted);
                    left.push(*end..range.end);
                    left.push(if is_before { before } else { after }.clone());
                }
                Piece::Alternate { options, end } => {
                    left.push(*end..range.end);
                    left.push(options[(evaluation - 1) % options.len()].clone());
                }
            }
        }
        text
    }

    /// Between two edits the text depends on nothing but the turn of the alternations.
    fn most_texts(&self) -> usize {
        let (mut edits, mut turns) = (1_usize, 1_usize);
        for piece in &self.0 {
            match piece {
                Piece::Text(_) => {}
                Piece::Scheduled { .. } => edits += 1,
                Piece::Alternate { options, .. } if turns <= MAX_TEXTS => {
                    turns *= options.len() / greatest_common_divisor(turns, options.len());
                }
                Piece::Alternate { .. } => {}
            }
        }
        edits.saturating_mul(turns)
    }
}

impl When {
    /// Reads a number, which may have white space around it.
    fn read(text: &str) -> Option<Self> {
        let text = text.trim_matches(is_space);
        let is_number = text.chars().all(|c| c.is_ascii_digit() || "+-.eE".contains(c));
        let value = is_number.then(|| text.parse().ok()).flatten()?;
        Some(Self { value, is_share: text.contains('.') })
    }

    /// The last evaluation before the edit, counted from 1.
    fn evaluation(self, Counted { evaluations, before }: Counted) -> usize {
        let value = match (self.is_share, before) {
            (true, None) => self.value * evaluations as f64,
            (true, Some(_)) => (self.value - 1.0) * evaluations as f64,
            (false, before) => self.value - before.unwrap_or(0) as f64,
        };
        (value as usize).min(evaluations)
    }
}

impl Open {
    fn has_bar(&self) -> bool {
        self.separators.iter().any(|(separator, ..)| *separator == '|')
    }
}

/// Closes a bracket behind `before`, and with it what it begins. None if a bar is left over.
fn close(
    before: &str,
    bracket: char,
    pieces: &mut [Piece<'_>],
    open: &mut Vec<Open>,
) -> Option<()> {
    let opening = if bracket == ')' { '(' } else { '[' };
    let Some(inside) = open.pop_if(|open| open.bracket == opening) else {
        // Whatever is open cannot be closed any more.
        return open.drain(..).all(|open| !open.has_bar()).then_some(());
    };
    let end = pieces.len();
    let marks = inside.separators.iter().map(|(_, piece, _)| *piece);
    let marks: Vec<_> = [inside.at].into_iter().chain(marks).chain([end]).collect();
    let parts: Vec<Range> = marks.windows(2).map(|pair| pair[0] + 1..pair[1]).collect();
    let separators: Vec<_> = inside.separators.iter().map(|(separator, ..)| *separator).collect();
    let number = || When::read(&before[inside.separators.last()?.2 + 1..]);
    let end = end + 1;
    let piece = match (opening, &separators[..]) {
        _ if !inside.whole => None,
        (_, []) | ('(', [':']) => return Some(()),
        ('[', [':']) => number().map(|when| Piece::Scheduled {
            before: 0..0,
            after: parts[0].clone(),
            when,
            end,
        }),
        ('[', [':', ':']) => number().map(|when| {
            let [before, after] = [0, 1].map(|part| parts[part].clone());
            Piece::Scheduled { before, after, when, end }
        }),
        ('[', bars) if bars.iter().all(|bar| *bar == '|') => {
            Some(Piece::Alternate { options: parts, end })
        }
        _ => None,
    };
    match piece {
        Some(piece) => pieces[inside.at] = piece,
        None if inside.has_bar() => return None,
        None => {
            if let Some(around) = open.last_mut() {
                around.whole = false;
            }
        }
    }
    Some(())
}

fn greatest_common_divisor(a: usize, b: usize) -> usize {
    if b == 0 { a } else { greatest_common_divisor(b, a % b) }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn schedule(prompt: &str, evaluations: usize, before: Option<usize>) -> Schedule {
        Schedule::new(prompt, Counted { evaluations, before }).expect("few texts")
    }

    #[test]
    fn a_prompt_of_too_many_texts_is_refused() {
        let options = |n: usize| (0..n).map(|k| format!("x{k}")).collect::<Vec<_>>().join("|");
        let counted = Counted { evaluations: 200, before: None };
        let most = format!("[{}]", options(MAX_TEXTS));
        assert_eq!(Schedule::new(&most, counted).map(|s| s.texts.len()), Ok(MAX_TEXTS));
        for prompt in
            [format!("[{}]", options(MAX_TEXTS + 1)), format!("[{}] [{}]", options(9), options(8))]
        {
            assert_eq!(Schedule::new(&prompt, counted), Err(TooManyTexts));
            let few = Counted { evaluations: 20, before: None };
            assert_eq!(Schedule::new(&prompt, few).map(|s| s.texts.len()), Ok(20), "one each");
        }
    }

    #[test]
    fn brackets_without_end_take_no_stack() {
        for (unit, close) in [("[", "]"), ("(", ")"), ("[a|", "]"), ("[a:", ":3]"), ("[a:b:c", "]")]
        {
            let deep = unit.repeat(50_000) + &close.repeat(50_000);
            let schedule = schedule(&deep, 4, None);
            assert!(!schedule.texts.is_empty());
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig {
            failure_persistence: None,
            ..ProptestConfig::with_cases(500)
        })]

        #[test]
        fn no_more_texts_than_estimated(
            prompt in r"(\[a:b:[0-9.]{1,3}\]|\[[a-e]\|[f-h]?\]|\[x\|[yz]\|\]|[a ()\[\]:|]){0,8}",
            evaluations in 1..40_usize,
            before in proptest::option::of(1..40_usize),
        ) {
            let most = most_texts(&prompt, evaluations);
            match Schedule::new(&prompt, Counted { evaluations, before }) {
                Ok(schedule) => {
                    prop_assert!(schedule.texts.len() <= most, "{schedule:?} {most}");
                    prop_assert_eq!(schedule.spans.last().is_some(), true);
                    for evaluation in 0..=evaluations {
                        prop_assert!(schedule.at(evaluation) < schedule.texts.len());
                    }
                }
                Err(TooManyTexts) => prop_assert_eq!(most, MAX_TEXTS),
            }
        }
    }
}
