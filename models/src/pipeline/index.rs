//! `model_index.json`: the class of the pipeline, and what matters here of its parts.

use serde_json::json;

use crate::error::{Error, Result};
use crate::files::{Keys, Source};

/// The file.
pub(super) struct PipelineIndex {
    /// diffusers' class of the pipeline.
    class: String,
    /// Whether the pipeline has a safety checker.
    pub(super) has_checker: bool,
    /// diffusers' class of the scheduler.
    pub(super) scheduler: Option<String>,
    /// Whether an absent negative prompt is zeros, and not the encoding of an empty one.
    pub(super) zeros_for_absent: bool,
    /// Whether there is a first text encoder: not in the refiner of Stable Diffusion XL.
    pub(super) has_first: bool,
    /// Whether the UNet is to take a score in the place of the target's size.
    pub(super) requires_score: bool,
}

/// How the classes of Stable Diffusion XL begin.
const XL: &str = "StableDiffusionXL";

/// A library and a class of it; null, or a pair of nulls, where the pipeline has no such part.
type Part = [Option<String>; 2];

impl PipelineIndex {
    /// Reads the file. Rejects pipelines that are not Stable Diffusion 1.x, 2.x or XL.
    pub(super) fn read(source: &Source) -> Result<Self> {
        let mut keys = Keys::read(source, "model_index.json")?;
        let class = keys.text("_class_name").unwrap_or("StableDiffusionPipeline").to_owned();
        // The networks of these pipelines are the same.
        let classes = [
            "StableDiffusionPipeline",
            "StableDiffusionImg2ImgPipeline",
            "StableDiffusionInpaintPipeline",
            "LatentConsistencyModelPipeline",
            "LatentConsistencyModelImg2ImgPipeline",
            "StableDiffusionXLPipeline",
            "StableDiffusionXLImg2ImgPipeline",
            "StableDiffusionXLInpaintPipeline",
        ];
        keys.only("_class_name", &classes.map(|class| json!(class)))?;
        let is_xl = class.starts_with(XL);
        let names_first = keys.has("text_encoder");
        let zeros_for_absent = keys.take("force_zeros_for_empty_prompt", true)? && is_xl;
        let mut part = |name| keys.take::<Part>(name, [None, None]).map(|[_, class]| class);
        let (checker, scheduler) = (part("safety_checker")?, part("scheduler")?);
        let has_first = !is_xl || !names_first || part("text_encoder")?.is_some();
        let has_checker = match checker.as_deref() {
            None => false,
            Some("StableDiffusionSafetyChecker") => true,
            Some(other) => {
                let reason = format!("safety_checker: the class {other} is not supported");
                return Err(Error::config("model_index.json", reason));
            }
        };
        let requires_score = keys.take("requires_aesthetics_score", false)? && is_xl;
        Ok(Self { class, has_checker, scheduler, zeros_for_absent, has_first, requires_score })
    }

    /// Whether it is of Stable Diffusion XL: with two text encoders, and a UNet that takes pooled
    /// prompts and sizes.
    pub(super) fn is_xl(&self) -> bool {
        self.class.starts_with(XL)
    }

    /// Whether the pipeline sets `steps_offset` to 1, whatever the scheduler's file says.
    pub(super) fn sets_steps_offset(&self) -> bool {
        self.class.starts_with("StableDiffusion") && !self.is_xl()
    }

    /// Whether the pipeline sets `clip_sample` to false, whatever the scheduler's file says.
    pub(super) fn clears_clip_sample(&self) -> bool {
        self.sets_steps_offset() && !self.class.contains("Inpaint")
    }

    /// Whether the pipeline gives the strength of image-to-image to the scheduler.
    pub(super) fn gives_strength_to_scheduler(&self) -> bool {
        self.class.starts_with("LatentConsistencyModel")
    }

    /// Whether the pipeline sets `skip_prk_steps` to true, whatever the scheduler's file says.
    pub(super) fn sets_skip_prk_steps(&self) -> bool {
        self.class.contains("Inpaint") && !self.is_xl()
    }
}

/// What a model has beside the networks that all have.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PipelineParts {
    /// A safety checker.
    pub safety_checker: bool,
    /// A first text encoder, which only the refiner of Stable Diffusion XL has not.
    pub text_encoder: bool,
    /// A second text encoder: it is of Stable Diffusion XL.
    pub second_text_encoder: bool,
}

/// Rejects a `model_index.json` of a pipeline that is not Stable Diffusion 1.x, 2.x or XL. Returns
/// what the pipeline has.
pub fn check_pipeline(source: &Source) -> Result<PipelineParts> {
    let index = PipelineIndex::read(source)?;
    let (safety_checker, second_text_encoder) = (index.has_checker, index.is_xl());
    Ok(PipelineParts { safety_checker, text_encoder: index.has_first, second_text_encoder })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_demo_model_has_no_safety_checker() {
        let index = PipelineIndex::read(&Source::Demo).expect("a pipeline");
        assert!(!index.has_checker && index.sets_steps_offset() && index.clears_clip_sample());
        assert_eq!(index.scheduler.as_deref(), Some("PNDMScheduler"));
    }
}
