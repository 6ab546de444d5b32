//! Syntax of prompts that is drawn as words: in AUTOMATIC1111's syntax what does not fit its
//! grammar, in a plain prompt all of it, and in both what only other programs read, such as
//! wildcards. Only for warnings: a false alarm changes no image.

use super::editing::first_text;
use super::parts::{AND, parts};
use super::syntax::{MAX_WEIGHT, is_number, is_overweight};
use super::tags::without_loras;
use super::words::whole_words;

/// How a prompt is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PromptRole {
    /// As text.
    Plain,
    /// In AUTOMATIC1111's syntax.
    A1111,
    /// In AUTOMATIC1111's syntax, as a negative prompt, which `AND` does not join, and whose tags
    /// name no LoRAs.
    A1111Negative,
    /// In AUTOMATIC1111's syntax, for the second text encoder alone: only its weights are read.
    A1111Second,
}

/// What a prompt has that is drawn as words; the sentence reads on from the field's name.
pub fn unread(prompt: &str, role: PromptRole) -> Option<String> {
    let says = |what: &str, hint| format!("has {what:?}, which was drawn as words: {hint}");
    let weights = |text: &str| {
        let found = weighed(text, false).or_else(|| unbalanced(text));
        let weight = || is_overweight(text).then(|| format!("{OVERWEIGHT} {MAX_WEIGHT}"));
        found.map(|what| says(what, LOOSE)).or_else(weight)
    };
    let loose = |part: &str| {
        let text = first_text(part);
        edited(&text).map(|what| says(what, LOOSE)).or_else(|| weights(&text))
    };
    let foreign = |text: &str| foreign(text).map(|what| says(what, FOREIGN));
    match role {
        PromptRole::Plain => {
            let known =
                tagged(prompt).filter(|tag| TAGS.iter().any(|known| tag.starts_with(known)));
            let found = known.or_else(|| weighed(prompt, true));
            let found = found.or_else(|| edited(prompt)).or_else(|| joined(prompt));
            let tag = || tagged(prompt).map(|tag| says(tag, UNKNOWN));
            found.map(|what| says(what, HINT)).or_else(tag).or_else(|| foreign(prompt))
        }
        PromptRole::A1111 => {
            // A tag that names no LoRA rightly is refused.
            let (text, _) = without_loras(prompt).ok()?;
            let parts = parts(&text);
            let tail = |part: &str| loose_tail(part).map(|what| says(what, LOOSE));
            let found =
                parts.iter().find_map(|part| loose(&part.text).or_else(|| tail(&part.text)));
            let tag = || tagged(&text).map(|tag| says(tag, UNKNOWN));
            found.or_else(tag).or_else(|| foreign(&text))
        }
        PromptRole::A1111Negative => {
            let joined = || whole_words(prompt, AND).next().map(|_| says(AND, JOINED));
            let tag = || tagged(prompt).map(|tag| says(tag, POSITIVE));
            tag().or_else(|| loose(prompt)).or_else(joined).or_else(|| foreign(prompt))
        }
        PromptRole::A1111Second => {
            let and = || whole_words(prompt, AND).next().map(|_| AND);
            let found = tagged(prompt).or_else(|| edited(prompt)).or_else(and);
            let found = found.map(|what| says(what, SECOND));
            found.or_else(|| weights(prompt)).or_else(|| foreign(prompt))
        }
    }
}

/// The tags that AUTOMATIC1111 has.
const TAGS: [&str; 3] = ["<lora:", "<lyco:", "<hypernet:"];

const HINT: &str = "that is AUTOMATIC1111's syntax, request prompt_syntax a1111";
const LOOSE: &str = "its brackets, bars, colons and numbers do not fit AUTOMATIC1111's grammar";
const JOINED: &str = "as in AUTOMATIC1111, negative prompts are not joined";
const SECOND: &str = "of the second text encoder's own prompts only weights are read";
const UNKNOWN: &str = "the tags that are read are <lora:name:1> and <lyco:name:1>";
const POSITIVE: &str = "tags are read in prompts, not in negative prompts";
const FOREIGN: &str = "that syntax of other programs is not read here";
const OVERWEIGHT: &str = "has a weight that is out of bounds; words are weighed by at most";

/// Prompt editing (`[a:b:0.5]`) or alternation (`[a|b]`), or what was meant to be.
fn edited(prompt: &str) -> Option<&str> {
    let mut rest = prompt;
    while let Some((before, after)) = rest.split_once('[') {
        rest = after;
        let (Some((inside, _)), false) = (after.split_once(']'), before.ends_with('\\')) else {
            continue;
        };
        let is_edit = inside.rsplit_once(':').is_some_and(|(_, step)| is_meant(step));
        if is_edit || inside.contains('|') || colons(inside) >= 2 {
            return Some(&prompt[prompt.len() - after.len() - 1..][..inside.len() + 2]);
        }
    }
    None
}

/// The colons outside of round brackets.
fn colons(text: &str) -> usize {
    let (mut depth, mut colons) = (0_usize, 0);
    for c in text.chars() {
        match c {
            '(' => depth += 1,
            ')' => depth = depth.saturating_sub(1),
            ':' if depth == 0 => colons += 1,
            _ => {}
        }
    }
    colons
}

/// Whether a text is a number, or was meant to be: `0.5`, `0,5`, `50%`, `1.2.3`, `nan`.
fn is_meant(text: &str) -> bool {
    let text = text.trim();
    let of_number = |c: char| c.is_ascii_digit() || ".,+-eE%".contains(c);
    text.parse::<f64>().is_ok()
        || text.contains(|c: char| c.is_ascii_digit()) && text.chars().all(of_number)
}

/// `AND` in a prompt that is not written in capitals as a whole.
fn joined(prompt: &str) -> Option<&str> {
    let at = whole_words(prompt, AND).next().filter(|_| prompt.contains(char::is_lowercase))?;
    Some(&prompt[at..at + AND.len()])
}

/// A weight of emphasis, from its colon to the bracket; of those that are read only with `all`.
fn weighed(prompt: &str, all: bool) -> Option<&str> {
    let (mut begun, mut depth) = (0, 0_usize);
    for (end, _) in prompt.match_indices(')') {
        let inside = &prompt[begun..end];
        let from = begun;
        begun = end + 1;
        depth += inside.matches('(').count();
        if depth == 0 {
            continue;
        }
        depth -= 1;
        let Some((before, weight)) = inside.rsplit_once(':') else { continue };
        // "(a:1.2:1.3)" has two, of which the second is read.
        let twice = before.rsplit_once(':').is_some_and(|(_, first)| is_meant(first));
        if is_meant(weight) && (all || twice || !is_number(weight.trim())) {
            let begin = inside.rfind('(').unwrap_or(before.len());
            return Some(&prompt[from + begin..=end]);
        }
    }
    None
}

/// A weight, an edit or an alternation whose bracket is not closed, as AUTOMATIC1111 reads those to
/// the end of the prompt, with the numbers and bars as words; or a weight whose bracket is not open.
fn unbalanced(prompt: &str) -> Option<&str> {
    let (mut round, mut square) = (Vec::new(), Vec::new());
    let mut chars = prompt.char_indices();
    while let Some((at, c)) = chars.next() {
        match c {
            '\\' => drop(chars.next()),
            '(' => round.push(at),
            '[' => square.push(at),
            ']' => drop(square.pop()),
            ')' if round.pop().is_none() => {
                let colon = prompt[..at].rfind(':');
                if let Some(colon) = colon.filter(|colon| is_meant(&prompt[colon + 1..at])) {
                    return Some(&prompt[colon..=at]);
                }
            }
            _ => {}
        }
    }
    round.into_iter().chain(square).find_map(|at| {
        let inside = &prompt[at..];
        let mut colons = inside.match_indices(':').map(|(colon, _)| colon + 1);
        let number = colons.find_map(|from| {
            let rest = &inside[from..];
            let length = rest.find([',', ')', ']', '|', '\n', ' ']).unwrap_or(rest.len());
            // What another bracket closes is read.
            let is_read = rest[length..].starts_with(')');
            (!is_read && is_meant(&rest[..length])).then_some(from + length)
        });
        let bar = || inside.find('|').filter(|_| inside.starts_with('[')).map(|_| inside.len());
        number.or_else(bar).map(|end| &inside[..end])
    })
}

/// What was meant to be the weight of a whole prompt.
fn loose_tail(part: &str) -> Option<&str> {
    let colon = part.rfind(':').filter(|colon| is_meant(&part[colon + 1..]))?;
    Some(part[colon..].trim_end())
}

/// A tag: `<word:...>`, or in whatever spelling one that AUTOMATIC1111 has.
fn tagged(prompt: &str) -> Option<&str> {
    for (begin, bracket) in prompt.match_indices(['<', '&']) {
        let tag = &prompt[begin..];
        let (opening, closing) = match bracket {
            "&" if tag.starts_with("&lt;") => ("&lt;", "&gt;"),
            "&" => continue,
            _ => ("<", ">"),
        };
        let inside = &tag[opening.len()..];
        let trimmed = inside.trim_start();
        let length = trimmed.find(|c: char| !c.is_alphanumeric() && c != '_');
        let (word, rest) = trimmed.split_at(length.unwrap_or(trimmed.len()));
        if !rest.trim_start().starts_with(':') || !word.contains(char::is_alphabetic) {
            continue;
        }
        let close = rest.find(closing).filter(|close| !rest[..*close].contains('<'));
        let is_known =
            TAGS.iter().any(|known| known[1..known.len() - 1].eq_ignore_ascii_case(word));
        let is_tag = close.is_some() && trimmed.len() == inside.len() && rest.starts_with(':');
        if is_known || is_tag {
            let end = close.map_or(1, |close| close + closing.len());
            return Some(&tag[..tag.len() - rest.len() + end]);
        }
    }
    None
}

/// Embeddings, wildcards and choices, and joining words, as other programs have them.
fn foreign(prompt: &str) -> Option<&str> {
    let of_word = |c: char| c.is_alphanumeric() || c == '_';
    let word_at = |at: usize, length: usize| {
        let rest = &prompt[at + length..];
        let end = rest.find(|c: char| !of_word(c)).unwrap_or(rest.len());
        let is_begin = !prompt[..at].ends_with(of_word);
        (is_begin && end > 0).then(|| &prompt[at..at + length + end])
    };
    let first = |text| prompt.match_indices(text).find_map(|(at, found)| word_at(at, found.len()));
    let wildcard = || {
        let word = |text: &&str| text.starts_with("__") && text.ends_with("__") && text.len() > 4;
        prompt.split(|c: char| !of_word(c) && !"/-*".contains(c)).find(word)
    };
    let choice = || {
        prompt.match_indices('{').find_map(|(at, _)| {
            let inside = &prompt[at..=at + prompt[at..].find(['}', '\n'])?];
            (inside.ends_with('}') && inside.contains('|')).then_some(inside)
        })
    };
    first("embedding:").or_else(|| first("AND_")).or_else(wildcard).or_else(choice)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_drawn_as_words_is_quoted() {
        use PromptRole::{A1111, A1111Negative, Plain};
        for (prompt, role, quoted) in [
            ("a | [red:blue:0.5] house", A1111, "[red:blue:0.5]"),
            ("[cat:dog:5] [a:b:c:5]", A1111, "[a:b:c:5]"),
            ("a AND [a|(b|c)]", A1111, "[a|(b|c)]"),
            ("a cat AND a dog :1.2", A1111Negative, "AND"),
            ("[a:b|c:5]", A1111Negative, "[a:b|c:5]"),
            ("a house <lora:sepia:1> at night", Plain, "<lora:sepia:1>"),
            ("<hypernet:x:1>", Plain, "<hypernet:x:1>"),
            ("a (red:1.3) house", Plain, "(red:1.3)"),
            ("a [red:blue:0.5] house", Plain, "[red:blue:0.5]"),
            ("a [red|blue] house", Plain, "[red|blue]"),
            ("a red AND blue house", Plain, "AND"),
            ("<lora:é", Plain, "<lora:"),
            ("a [red:blue:50%]", A1111, "[red:blue:50%]"),
            ("[cat:dog:half]", A1111, "[cat:dog:half]"),
            ("[a:b:0,5]", A1111, "[a:b:0,5]"),
            ("[a:b:]", Plain, "[a:b:]"),
            ("[a:1.2.3]", A1111Negative, "[a:1.2.3]"),
            ("b (a:1,5)", A1111, "(a:1,5)"),
            ("(a:1.2:1.3)", A1111, "(a:1.2:1.3)"),
            ("((a:1.2.3) b)", A1111Negative, "(a:1.2.3)"),
            ("(a (b):--1)", A1111, ":--1)"),
            ("(a:nan)", Plain, "(a:nan)"),
            ("a :1.2.3 AND b", A1111, ":1.2.3"),
            ("a <lora:nope:1>", A1111Negative, "<lora:nope:1>"),
            ("a <wildcard:x> b", A1111, "<wildcard:x>"),
            ("a <embedding:x> b", Plain, "<embedding:x>"),
            ("<LORA:x:1>", A1111, "<LORA:x:1>"),
            ("< lora:x:1>", Plain, "< lora:x:1>"),
            ("<lora:>", A1111, "<lora:>"),
            ("<lora:x", A1111, "<lora:"),
            ("&lt;lora:x:1&gt; b", A1111, "&lt;lora:x:1&gt;"),
            ("an embedding:foo b", A1111, "embedding:foo"),
            ("a __color/any__ hat", Plain, "__color/any__"),
            ("a {red|blue} hat", Plain, "{red|blue}"),
            ("a cat AND_SALT a dog", A1111, "AND_SALT"),
            ("a cat AND_PERP a dog", A1111Negative, "AND_PERP"),
        ] {
            let reason = unread(prompt, role).expect("a reason");
            assert!(reason.starts_with(&format!("has {quoted:?}, which")), "{reason}");
        }
        for prompt in [
            "a [red] house",
            "(a:1.2) and [b",
            "\\[a:b:1]",
            "SAND",
            "[a: b]",
            "é[ü",
            "a [red:blue:0.5] house",
            "[cat:5]",
            "a [cat|dog]",
            "[(a:1.2) (b:1.3)]",
            "a < b: c, 5:30 pm :) {} {a} snake__case R&D",
            "a photo, 16:9",
            "<a:lora:1",
        ] {
            assert_eq!(unread(prompt, A1111), None, "{prompt}");
            assert_eq!(unread(prompt, A1111Negative), None, "{prompt}");
        }
        let nines = format!("(a:{})", "9".repeat(50));
        let reason = unread(&nines, A1111).expect("a reason");
        assert!(reason.ends_with("at most 10000"), "{reason}");
        assert_eq!(unread("a <lora:x:1> <lyco:y>", A1111), None);
        assert_eq!(unread("a cat AND a [dog|fox] :1.2", A1111), None);
        for prompt in ["a (red) house", "[A:B] AND C", "(a: b)", "a < b", "((é"] {
            assert_eq!(unread(prompt, Plain), None, "{prompt}");
        }
    }

    #[test]
    fn brackets_without_their_partner_are_quoted_where_they_have_a_number() {
        use PromptRole::{A1111, A1111Negative};
        for (prompt, role, quoted) in [
            ("b, (a:1.2 c", A1111, "(a:1.2"),
            ("b, (a:1.2", A1111Negative, "(a:1.2"),
            ("b, ((a:1.2) c:3", A1111Negative, "((a:1.2) c:3"),
            ("(a:1.2, b", A1111, "(a:1.2"),
            ("(a:1.2] b", A1111, "(a:1.2"),
            ("a:1.2) b", A1111, ":1.2)"),
            ("\\(a:1.2)", A1111Negative, ":1.2)"),
            ("a [red:blue:0.5", A1111Negative, "[red:blue:0.5"),
            ("a [cat|dog", A1111, "[cat|dog"),
        ] {
            let reason = unread(prompt, role).expect("a reason");
            assert!(reason.starts_with(&format!("has {quoted:?}, which")), "{reason}");
        }
        for prompt in ["((a:1.2) b", "a (b: c, :( d", "\\(a:1.2\\)"] {
            assert_eq!(unread(prompt, A1111), None, "{prompt}");
        }
    }

    #[test]
    fn only_weights_are_read_of_the_second_encoders_prompts() {
        for (prompt, quoted) in [
            ("a <lora:sepia:1> house", "<lora:sepia:1>"),
            ("a [red:blue:0.5] house", "[red:blue:0.5]"),
            ("a [cat|dog] house", "[cat|dog]"),
            ("A RED AND BLUE HOUSE", "AND"),
        ] {
            let reason = unread(prompt, PromptRole::A1111Second).expect("a reason");
            assert!(reason.starts_with(&format!("has {quoted:?}, which")), "{reason}");
        }
        assert_eq!(unread("a (red:1.2) [house] in SAND", PromptRole::A1111Second), None);
        for (prompt, part) in [
            ("a (red:1,2)", "\"(red:1,2)\", which was drawn as words: its brackets"),
            ("a (red:1.2", "\"(red:1.2\", which was drawn as words: its brackets"),
            ("(a:99999)", "has a weight that is out of bounds"),
            ("a __hat__", "\"__hat__\", which was drawn as words: that syntax of other programs"),
        ] {
            let reason = unread(prompt, PromptRole::A1111Second).expect("a reason");
            assert!(reason.contains(part), "{reason}");
        }
    }
}
