//! What only Stable Diffusion XL takes of a request: texts of its second text encoder, and sizes.

use crate::picture::Size;

/// What only Stable Diffusion XL takes of a request; the default asks for nothing.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct XlOptions {
    /// Prompt of the second text encoder; blank: the prompt. A hires pass with a prompt of its own
    /// has that for both.
    pub prompt_2: String,
    /// Negative prompt of the second text encoder; blank: the negative prompt.
    pub negative_prompt_2: String,
    /// Whether an empty negative prompt is encoded where the model has zeros for an absent one.
    pub encodes_empty: bool,
    /// Height and width in pixels of the picture that the image is to look as if made from;
    /// default: those of the image.
    pub original_size: Option<[usize; 2]>,
    /// Top and left in pixels of the part of it that the image is to look as if it were.
    pub crop: [usize; 2],
    /// Height and width in pixels of the image for which the model is to take it; default: those of
    /// the image.
    pub target_size: Option<[usize; 2]>,
}

impl XlOptions {
    /// The sizes that the UNet is conditioned on, for an image of this size.
    pub(super) fn sizes(&self, size: Size) -> [f64; 6] {
        let own = [size.height(), size.width()];
        let [height, width] = self.original_size.unwrap_or(own);
        let [top, left] = self.crop;
        let [target_height, target_width] = self.target_size.unwrap_or(own);
        [height, width, top, left, target_height, target_width].map(|pixels| pixels as f64)
    }

    /// The prompt of the second text encoder, if it is another than `prompt`.
    pub(super) fn second<'a>(of_request: &'a str, prompt: &str) -> Option<&'a str> {
        let asks = !of_request.trim().is_empty() && of_request != prompt;
        asks.then_some(of_request)
    }

    /// Warnings for what has no effect on an image of another model.
    pub(super) fn without_effect(
        &self,
        prompts: [&str; 2],
    ) -> impl Iterator<Item = String> + use<> {
        let [prompt, negative_prompt] = prompts;
        let second = "the model has one text encoder";
        let sizes = "the model is not conditioned on sizes";
        let asked = [
            ("prompt_2", Self::second(&self.prompt_2, prompt).is_some(), second),
            (
                "negative_prompt_2",
                Self::second(&self.negative_prompt_2, negative_prompt).is_some(),
                second,
            ),
            ("original_size", self.original_size.is_some(), sizes),
            ("crop", self.crop != [0, 0], sizes),
            ("target_size", self.target_size.is_some(), sizes),
        ];
        let asked = asked.into_iter().filter(|(_, is_set, _)| *is_set);
        asked.map(|(field, _, why)| format!("{field} has no effect: {why}"))
    }
}
