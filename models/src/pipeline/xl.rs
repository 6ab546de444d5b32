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
    /// the image. Not of a refiner.
    pub target_size: Option<[usize; 2]>,
    /// How beautiful a refiner is to take the image for, which most people find from 0 to 10;
    /// default: 6.
    pub aesthetic_score: Option<f64>,
    /// The same of the negative prompt's row; default: 2.5.
    pub negative_aesthetic_score: Option<f64>,
}

/// Numbers of the sizes that a UNet is conditioned on, and of a refiner's with its score.
pub(super) const SIZES: usize = 6;
pub(super) const SCORED: usize = 5;

/// Of the prompt's row and of the negative prompt's, as in diffusers and AUTOMATIC1111.
const SCORES: [f64; 2] = [6.0, 2.5];

/// The row of a prompt that sizes are of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum SizesOf {
    Prompt,
    Negative,
}

impl XlOptions {
    /// The sizes that the UNet is conditioned on, for an image of this size; with a score in the
    /// place of the target's, if it is a refiner's.
    pub(super) fn sizes(&self, size: Size, is_scored: bool, of: SizesOf) -> Vec<f64> {
        let own = [size.height(), size.width()];
        let [height, width] = self.original_size.unwrap_or(own);
        // diffusers gives the other row of a refiner a crop of its own, which is none.
        let is_cropped = !is_scored || of == SizesOf::Prompt;
        let [top, left] = if is_cropped { self.crop } else { [0, 0] };
        let mut sizes: Vec<_> = [height, width, top, left].map(|pixels| pixels as f64).into();
        let [score, negative] = SCORES;
        match of {
            SizesOf::Prompt if is_scored => sizes.push(self.aesthetic_score.unwrap_or(score)),
            SizesOf::Negative if is_scored => {
                sizes.push(self.negative_aesthetic_score.unwrap_or(negative));
            }
            _ => sizes.extend(self.target_size.unwrap_or(own).map(|pixels| pixels as f64)),
        }
        sizes
    }

    /// The prompt of the second text encoder, if it is another than `prompt`.
    pub(super) fn second<'a>(of_request: &'a str, prompt: &str) -> Option<&'a str> {
        let asks = !of_request.trim().is_empty() && of_request != prompt;
        asks.then_some(of_request)
    }

    /// Warnings for what has no effect on an image of models that take no more than this.
    pub(super) fn without_effect(
        &self,
        prompts: [&str; 2],
        taken: Taken,
    ) -> impl Iterator<Item = String> + use<> {
        let [prompt, negative_prompt] = prompts;
        let second = (taken.second_prompt, "the model has one text encoder");
        let sizes = (taken.sizes, "the model is not conditioned on sizes");
        let target = match taken.sizes && !taken.target_size {
            true => (false, "the model takes a score in its place"),
            false => sizes,
        };
        let score = (taken.score, "the model takes no score");
        let negative_prompt = Self::second(&self.negative_prompt_2, negative_prompt);
        let asked = [
            ("prompt_2", Self::second(&self.prompt_2, prompt).is_some(), second),
            ("negative_prompt_2", negative_prompt.is_some(), second),
            ("original_size", self.original_size.is_some(), sizes),
            ("crop", self.crop != [0, 0], sizes),
            ("target_size", self.target_size.is_some(), target),
            ("aesthetic_score", self.aesthetic_score.is_some(), score),
            ("negative_aesthetic_score", self.negative_aesthetic_score.is_some(), score),
        ];
        let idle = asked.into_iter().filter(|(_, is_set, (is_taken, _))| *is_set && !is_taken);
        idle.map(|(field, _, (_, why))| format!("{field} has no effect: {why}"))
    }
}

/// What of them the models of an image take.
#[derive(Debug, Clone, Copy)]
pub(super) struct Taken {
    pub(super) second_prompt: bool,
    pub(super) sizes: bool,
    pub(super) target_size: bool,
    pub(super) score: bool,
}

impl Taken {
    /// What one of two models takes.
    pub(super) fn or(self, other: Self) -> Self {
        Self {
            second_prompt: self.second_prompt || other.second_prompt,
            sizes: self.sizes || other.sizes,
            target_size: self.target_size || other.target_size,
            score: self.score || other.score,
        }
    }
}
