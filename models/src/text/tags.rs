//! `<lora:name:0.8>` and `<lyco:name:0.8>` tags in prompts of AUTOMATIC1111's syntax.
//!
//! Reference: stable-diffusion-webui 1.10 `modules/extra_networks.py`.

use std::borrow::Cow;

/// How the tags of LoRAs begin; the second is that of LyCORIS files.
pub(crate) const LORA_TAGS: [&str; 2] = ["<lora:", "<lyco:"];

/// LoRAs by name, with their scales.
pub type Loras = Vec<(String, f64)>;

/// Removes the `<lora:name:scale>` tags of a prompt and returns their LoRAs. The error reads on
/// from the field's name.
pub(crate) fn without_loras(prompt: &str) -> std::result::Result<(Cow<'_, str>, Loras), String> {
    let (mut text, mut loras, mut rest) = (String::new(), Vec::new(), prompt);
    while let Some((before, kind, arguments, after)) = network(rest) {
        rest = after;
        text += before;
        let tag = || format!("<{kind}:{arguments}>");
        let refuse = |reason: &str| Err(format!("has {:?}: {reason}", tag()));
        match kind {
            "lora" | "lyco" => {}
            "hypernet" => return refuse("hypernetworks are not supported"),
            _ => {
                text += &tag();
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

/// The first `<word:arguments>` of a text: the text before it, its two parts, and the text after.
fn network(text: &str) -> Option<(&str, &str, &str, &str)> {
    text.match_indices('<').find_map(|(at, _)| {
        let (inside, after) = text[at + 1..].split_once('>')?;
        let (kind, arguments) = inside.split_once(':')?;
        let word = !kind.is_empty() && kind.chars().all(|c| c.is_alphanumeric() || c == '_');
        (word && !arguments.is_empty()).then_some((&text[..at], kind, arguments, after))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

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
}
