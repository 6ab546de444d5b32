//! Syntax of AUTOMATIC1111 in a prompt that is drawn as words: what nothing here reads, and in a
//! plain prompt what only its own syntax would. Only for warnings: a false alarm changes no image.

/// What a prompt has that is drawn as words; the sentence reads on from the field's name.
pub fn unread(prompt: &str, is_a1111: bool) -> Option<String> {
    let found = if is_a1111 { edited(prompt).or_else(|| joined(prompt)) } else { tagged(prompt) };
    found.map(|(what, hint)| format!("has {what:?}, which was drawn as words: {hint}"))
}

type Found<'a> = (&'a str, &'static str);

/// Prompt editing (`[a:b:0.5]`) and alternation (`[a|b]`).
fn edited(prompt: &str) -> Option<Found<'_>> {
    let mut rest = prompt;
    while let Some((before, after)) = rest.split_once('[') {
        rest = after;
        let (Some((inside, _)), false) = (after.split_once(']'), before.ends_with('\\')) else {
            continue;
        };
        let is_step = |text: &str| text.trim().parse::<f64>().is_ok();
        let whole = &prompt[prompt.len() - after.len() - 1..][..inside.len() + 2];
        if inside.contains('|') {
            return Some((whole, "alternation is not supported"));
        }
        if inside.rsplit_once(':').is_some_and(|(_, step)| is_step(step)) {
            return Some((whole, "prompt editing is not supported"));
        }
    }
    None
}

/// Prompts joined by `AND`.
fn joined(prompt: &str) -> Option<Found<'_>> {
    let mut words = prompt.split_whitespace();
    words.any(|word| word == "AND").then_some(("AND", "composed prompts are not supported"))
}

/// Tags and weights in a plain prompt.
fn tagged(prompt: &str) -> Option<Found<'_>> {
    const HINT: &str = "that is AUTOMATIC1111's syntax, request prompt_syntax a1111";
    for tag in ["<lora:", "<lyco:", "<hypernet:"] {
        if let Some(at) = prompt.find(tag) {
            let length = prompt[at..].find('>').map_or(tag.len(), |end| end + 1);
            return Some((&prompt[at..at + length], HINT));
        }
    }
    let mut rest = prompt;
    while let Some((_, after)) = rest.split_once('(') {
        rest = after;
        let Some((inside, _)) = after.split_once(')') else { break };
        let weight = inside.rsplit_once(':').map(|(_, weight)| weight.trim().parse::<f64>());
        if matches!(weight, Some(Ok(_))) {
            let begin = prompt.len() - after.len() - 1;
            return Some((&prompt[begin..][..inside.len() + 2], HINT));
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_drawn_as_words_is_quoted() {
        for (prompt, is_a1111, quoted) in [
            ("a [red:blue:0.5] house", true, "[red:blue:0.5]"),
            ("[cat:5]", true, "[cat:5]"),
            ("a [cat|dog]", true, "[cat|dog]"),
            ("a cat AND a dog :1.2", true, "AND"),
            ("a house <lora:sepia:1> at night", false, "<lora:sepia:1>"),
            ("<hypernet:x:1>", false, "<hypernet:x:1>"),
            ("a (red:1.3) house", false, "(red:1.3)"),
            ("<lora:é", false, "<lora:"),
        ] {
            let reason = unread(prompt, is_a1111).expect("a reason");
            assert!(reason.starts_with(&format!("has {quoted:?}, which")), "{reason}");
        }
        for prompt in ["a [red] house", "(a:1.2) and [b", "\\[a:b:1]", "SAND", "[a: b]", "é[ü"] {
            assert_eq!(unread(prompt, true), None, "{prompt}");
        }
        for prompt in ["a (red) house", "[a:b:0.5] AND c", "(a: b)", "a < b", "((é"] {
            assert_eq!(unread(prompt, false), None, "{prompt}");
        }
    }
}
