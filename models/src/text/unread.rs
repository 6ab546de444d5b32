//! Syntax of AUTOMATIC1111 in a prompt that is drawn as words: in its own syntax what does not fit
//! the grammar, and in a plain prompt all of it. Only for warnings: a false alarm changes no image.

use super::editing::first_text;
use super::parts::{AND, parts};
use super::words::whole_words;

/// How a prompt is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PromptRole {
    /// As text.
    Plain,
    /// In AUTOMATIC1111's syntax.
    A1111,
    /// In AUTOMATIC1111's syntax, as a negative prompt, which `AND` does not join.
    A1111Negative,
    /// In AUTOMATIC1111's syntax, for the second text encoder alone: only its weights are read.
    A1111Second,
}

/// What a prompt has that is drawn as words; the sentence reads on from the field's name.
pub fn unread(prompt: &str, role: PromptRole) -> Option<String> {
    let says = |what: &str, hint| format!("has {what:?}, which was drawn as words: {hint}");
    let loose = |part: &str| edited(&first_text(part)).map(|what| says(what, LOOSE));
    match role {
        PromptRole::Plain => {
            let found = tagged(prompt).or_else(|| weighed(prompt)).or_else(|| edited(prompt));
            found.or_else(|| joined(prompt)).map(|what| says(what, HINT))
        }
        PromptRole::A1111 => parts(prompt).iter().find_map(|part| loose(&part.text)),
        PromptRole::A1111Negative => {
            let joined = || whole_words(prompt, AND).next().map(|_| says(AND, JOINED));
            loose(prompt).or_else(joined)
        }
        PromptRole::A1111Second => {
            let and = || whole_words(prompt, AND).next().map(|_| AND);
            let found = tagged(prompt).or_else(|| edited(prompt)).or_else(and);
            found.map(|what| says(what, SECOND))
        }
    }
}

const HINT: &str = "that is AUTOMATIC1111's syntax, request prompt_syntax a1111";
const LOOSE: &str = "the brackets, colons and bars around it do not fit AUTOMATIC1111's grammar";
const JOINED: &str = "as in AUTOMATIC1111, negative prompts are not joined";
const SECOND: &str = "of the second text encoder's own prompts only weights are read";

/// Prompt editing (`[a:b:0.5]`) or alternation (`[a|b]`).
fn edited(prompt: &str) -> Option<&str> {
    let mut rest = prompt;
    while let Some((before, after)) = rest.split_once('[') {
        rest = after;
        let (Some((inside, _)), false) = (after.split_once(']'), before.ends_with('\\')) else {
            continue;
        };
        let is_step = |text: &str| text.trim().parse::<f64>().is_ok();
        let is_edit = inside.rsplit_once(':').is_some_and(|(_, step)| is_step(step));
        if is_edit || inside.contains('|') {
            return Some(&prompt[prompt.len() - after.len() - 1..][..inside.len() + 2]);
        }
    }
    None
}

/// `AND` in a prompt that is not written in capitals as a whole.
fn joined(prompt: &str) -> Option<&str> {
    let at = whole_words(prompt, AND).next().filter(|_| prompt.contains(char::is_lowercase))?;
    Some(&prompt[at..at + AND.len()])
}

/// A tag.
fn tagged(prompt: &str) -> Option<&str> {
    for tag in ["<lora:", "<lyco:", "<hypernet:"] {
        if let Some(at) = prompt.find(tag) {
            let length = prompt[at..].find('>').map_or(tag.len(), |end| end + 1);
            return Some(&prompt[at..at + length]);
        }
    }
    None
}

/// A weight in a plain prompt.
fn weighed(prompt: &str) -> Option<&str> {
    let mut rest = prompt;
    while let Some((_, after)) = rest.split_once('(') {
        rest = after;
        let Some((inside, _)) = after.split_once(')') else { break };
        let weight = inside.rsplit_once(':').map(|(_, weight)| weight.trim().parse::<f64>());
        if matches!(weight, Some(Ok(_))) {
            let begin = prompt.len() - after.len() - 1;
            return Some(&prompt[begin..][..inside.len() + 2]);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_drawn_as_words_is_quoted() {
        use PromptRole::{A1111, A1111Negative, A1111Second, Plain};
        for (prompt, role, quoted) in [
            ("a | [red:blue:0.5] house", A1111, "[red:blue:0.5]"),
            ("[cat:dog:5] [a:b:c:5]", A1111, "[a:b:c:5]"),
            ("a AND [a|(b|c)]", A1111, "[a|(b|c)]"),
            ("a cat AND a dog :1.2", A1111Negative, "AND"),
            ("[a:b|c:5]", A1111Negative, "[a:b|c:5]"),
            ("a <lora:sepia:1> house", A1111Second, "<lora:sepia:1>"),
            ("a [red:blue:0.5] house", A1111Second, "[red:blue:0.5]"),
            ("a [cat|dog] house", A1111Second, "[cat|dog]"),
            ("A RED AND BLUE HOUSE", A1111Second, "AND"),
            ("a house <lora:sepia:1> at night", Plain, "<lora:sepia:1>"),
            ("<hypernet:x:1>", Plain, "<hypernet:x:1>"),
            ("a (red:1.3) house", Plain, "(red:1.3)"),
            ("a [red:blue:0.5] house", Plain, "[red:blue:0.5]"),
            ("a [red|blue] house", Plain, "[red|blue]"),
            ("a red AND blue house", Plain, "AND"),
            ("<lora:é", Plain, "<lora:"),
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
        ] {
            assert_eq!(unread(prompt, A1111), None, "{prompt}");
            assert_eq!(unread(prompt, A1111Negative), None, "{prompt}");
        }
        assert_eq!(unread("a cat AND a [dog|fox] :1.2", A1111), None);
        assert_eq!(unread("a (red:1.2) [house] in SAND", A1111Second), None);
        for prompt in ["a (red) house", "[A:B] AND C", "(a: b)", "a < b", "((é"] {
            assert_eq!(unread(prompt, Plain), None, "{prompt}");
        }
    }
}
