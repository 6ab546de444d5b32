//! Prompts joined by `AND`, each with a weight: `a cat :1.2 AND a dog :0.7`. Without `AND`, a prompt
//! can still end in a weight, and is weighed by it.
//!
//! Reference: stable-diffusion-webui 1.10 `modules/prompt_parser.py` `get_multicond_prompt_list`;
//! Liu et al. 2022, "Compositional Visual Generation with Composable Diffusion Models".

use super::words::{is_space, whole_words};

/// Maximum number of prompts that are joined; each is a batch row of every evaluation.
pub const MAX_PARTS: usize = 16;

/// The word that joins prompts.
pub(super) const AND: &str = "AND";

/// A part of a prompt.
#[derive(Debug, Clone, PartialEq)]
pub struct Part {
    /// Its text, which may have edits.
    pub text: String,
    /// Its share of the guidance.
    pub weight: f64,
}

/// The parts of a prompt, at least one. Equal parts are one, with the sum of their weights.
pub fn parts(prompt: &str) -> Vec<Part> {
    let mut parts: Vec<Part> = Vec::new();
    let mut begun = 0;
    let mut add = |text: &str| {
        let (text, weight) = weighed(text);
        match parts.iter_mut().find(|part| part.text == text) {
            Some(part) => part.weight += weight,
            None => parts.push(Part { text: text.to_owned(), weight }),
        }
    };
    for at in whole_words(prompt, AND) {
        add(&prompt[begun..at]);
        begun = at + AND.len();
    }
    add(&prompt[begun..]);
    parts
}

/// A text without the weight at its end.
fn weighed(text: &str) -> (&str, f64) {
    let text = text.trim_end_matches(is_space);
    let weight = text.rsplit_once(':').and_then(|(before, number)| {
        let number = number.trim_start_matches(is_space);
        let digits = number.strip_prefix(['+', '-']).unwrap_or(number);
        let is_number = digits.chars().all(|c| c == '.' || c.is_ascii_digit());
        Some((before.trim_end_matches(is_space), number.parse().ok().filter(|_| is_number)?))
    });
    weight.unwrap_or((text, 1.0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_parts_are_one() {
        let part = |text: &str, weight| Part { text: text.into(), weight };
        let of = |prompt| parts(prompt);
        assert_eq!(of("a AND b:2 AND a"), [part("a", 1.0), part(" b", 2.0), part(" a", 1.0)]);
        assert_eq!(
            of("a:0.5 AND b AND\ta :1\nAND b"),
            [part("a", 0.5), part(" b", 2.0), part("\ta", 1.0),]
        );
    }
}
