//! `<lora:name:0.8>` and `<lyco:name:0.8>` tags in prompts of AUTOMATIC1111's syntax.
//!
//! Reference: stable-diffusion-webui 1.10 `modules/extra_networks.py`,
//! `extensions-builtin/Lora/extra_networks_lora.py`.

use std::borrow::Cow;

/// How the tags of LoRAs begin; the second is that of LyCORIS files.
pub(crate) const LORA_TAGS: [&str; 2] = ["<lora:", "<lyco:"];

/// A LoRA by name, and its scales.
#[derive(Debug, Clone, PartialEq)]
pub struct LoraUse {
    /// Its name.
    pub name: String,
    /// Its scale in the UNet.
    pub scale: f64,
    /// Its scale in the text encoder.
    pub text_encoder_scale: f64,
}

impl LoraUse {
    /// A LoRA with one scale everywhere.
    pub fn new(name: impl Into<String>, scale: f64) -> Self {
        Self { name: name.into(), scale, text_encoder_scale: scale }
    }
}

/// LoRAs by name.
pub type Loras = Vec<LoraUse>;

/// Removes the `<lora:name:scale>` tags of a prompt and returns their LoRAs. The error reads on
/// from the field's name.
pub(crate) fn without_loras(prompt: &str) -> std::result::Result<(Cow<'_, str>, Loras), String> {
    let (mut text, mut loras, mut rest) = (String::new(), Vec::new(), prompt);
    while let Some((before, kind, arguments, after)) = network(rest) {
        rest = after;
        text += before;
        let tag = || format!("<{kind}:{arguments}>");
        match kind {
            "lora" | "lyco" => {
                loras.push(lora(arguments).map_err(|reason| format!("has {:?}: {reason}", tag()))?);
            }
            "hypernet" => {
                return Err(format!("has {:?}: hypernetworks are not supported", tag()));
            }
            _ => text += &tag(),
        }
    }
    if rest.len() == prompt.len() {
        return Ok((Cow::Borrowed(prompt), loras));
    }
    Ok((Cow::Owned(text + rest), loras))
}

/// `name`, `name:scale`, `name:text-encoder-scale:unet-scale`, or `name:te=scale:unet=scale`.
fn lora(arguments: &str) -> std::result::Result<LoraUse, &'static str> {
    const FORM: &str = "expected a name and one number, as in <lora:name:0.8>, or those of the text \
                        encoder and of the UNet, as in <lora:name:0.8:0.5>";
    let number = |text: &str| text.trim().parse::<f64>().ok().filter(|scale| scale.is_finite());
    let mut arguments = arguments.split(':');
    let name = arguments.next().unwrap_or_default();
    let (mut positional, mut text, mut unet) = (Vec::new(), None, None);
    for argument in arguments {
        match argument.split_once('=').map(|(key, value)| (key.trim(), value)) {
            None => positional.push(number(argument).ok_or(FORM)?),
            Some(("te", value)) => text = Some(number(value).ok_or(FORM)?),
            Some(("unet", value)) => unet = Some(number(value).ok_or(FORM)?),
            Some(("dyn", _)) => return Err("a share of the rank (dyn) is not supported"),
            Some(_) => return Err(FORM),
        }
    }
    if positional.len() > 2 {
        return Err("a share of the rank (a third number) is not supported");
    }
    let text = text.or(positional.first().copied()).unwrap_or(1.0);
    let scale = unet.or(positional.get(1).copied()).unwrap_or(text);
    Ok(LoraUse { name: name.to_owned(), scale, text_encoder_scale: text })
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
        let lora = |name: &str, scale| LoraUse::new(name, scale);
        let both = |text_encoder_scale, scale| LoraUse { text_encoder_scale, ..lora("x", scale) };
        let table = [
            ("a < b: c", "a < b: c", vec![]),
            ("a <lora:x:0.8>cat", "a cat", vec![lora("x", 0.8)]),
            ("<lora:x><lyco:y z:-1>, b", ", b", vec![lora("x", 1.0), lora("y z", -1.0)]),
            ("a <b <lora:x:.5> <:c> <lora:>", "a <b  <:c> <lora:>", vec![lora("x", 0.5)]),
            ("<style:x> é<lora:ü>", "<style:x> é", vec![lora("ü", 1.0)]),
            ("<lora:x:0.8:0.5>", "", vec![both(0.8, 0.5)]),
            ("<lora:x:te=0:unet=0.5>", "", vec![both(0.0, 0.5)]),
            ("<lora:x:0.8:te=0.1>", "", vec![both(0.1, 0.1)]),
            ("<lora:x:0.8:unet=1>", "", vec![both(0.8, 1.0)]),
        ];
        for (prompt, text, loras) in table {
            assert_eq!(of(prompt), Ok((text.to_owned(), loras)), "{prompt:?}");
        }
        for prompt in [
            "<lora:x:much>",
            "<lora:x:1:0.5:4>",
            "<lora:x:1:dyn=4>",
            "<lora:x:1:lr=4>",
            "<lora:x:inf>",
            "a <hypernet:x:1>",
        ] {
            assert!(of(prompt).is_err_and(|reason| reason.contains("x")), "{prompt:?}");
        }
    }
}
