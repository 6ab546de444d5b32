//! The operator's limits on one request. A bound in a schema may name a limit in place of a number.

use sd_models::{Defaults, MAX_STEPS, ModelInfo};
use serde_json::Value;

use crate::options::{min, size};

/// Maximum values of one request, set by the operator.
#[derive(Debug, Clone, Copy, clap::Args)]
#[command(next_help_heading = "Limits")]
pub struct Limits {
    /// Maximum width x height of an image; memory and time grow with it. Default on a GPU: 1572864,
    /// which is 1536x1024
    #[arg(long, env = "SD_MAX_PIXELS", default_value = "1048576", value_parser = min::<64>)]
    pub max_pixels: usize,
    /// Maximum number of sampler steps of an image
    #[arg(long, env = "SD_MAX_STEPS", default_value = "150", value_parser = steps)]
    pub max_steps: usize,
    /// Maximum number of images per request. Default on a GPU: 10
    #[arg(long, env = "SD_MAX_IMAGES", default_value = "8", value_parser = min::<1>)]
    pub max_images: usize,
    /// Maximum length of a prompt, in bytes. The model reads 77 tokens of it, or eight times as
    /// many with the a1111 syntax
    #[arg(long, env = "SD_MAX_PROMPT_BYTES", default_value = "16384", value_parser = size::<1>)]
    pub max_prompt_bytes: usize,
    /// Maximum width x height of an input image or mask, which is decoded before it is resized
    #[arg(long, env = "SD_MAX_INPUT_PIXELS", default_value = "33554432", value_parser = min::<64>)]
    pub max_input_pixels: usize,
    /// Maximum number of LoRAs per image; each costs time
    #[arg(long, env = "SD_MAX_LORAS", default_value = "8", value_parser = min::<0>)]
    pub max_loras: usize,
    /// Maximum number of ControlNets per image; each costs half as much time as a step
    #[arg(long, env = "SD_MAX_CONTROLNETS", default_value = "3", value_parser = min::<0>)]
    pub max_controlnets: usize,
}

/// No sampler takes more than [`MAX_STEPS`].
fn steps(text: &str) -> Result<usize, String> {
    Ok(min::<1>(text)?.min(MAX_STEPS))
}

impl Limits {
    /// Maximum number of sampler steps, as a bound in a schema.
    pub(crate) const STEPS: &str = "max_steps";
    /// Maximum number of images, as a bound in a schema.
    pub(crate) const IMAGES: &str = "max_images";
    /// Maximum number of LoRAs, as a bound in a schema.
    pub(crate) const LORAS: &str = "max_loras";
    /// Maximum number of ControlNets, as a bound in a schema.
    pub(crate) const CONTROLNETS: &str = "max_controlnets";

    /// Maximum number of pixels of a picture while a preprocessor of AUTOMATIC1111's extension works:
    /// it has a resolution of its own.
    pub(crate) fn most_of_a_map(&self) -> usize {
        self.max_pixels.saturating_mul(8)
    }

    /// Checks what the owner of a model has chosen as its defaults. The error is a sentence.
    pub fn check_defaults(&self, model: &ModelInfo) -> Result<(), String> {
        const FILE: &str = "sd-server.json";
        let Defaults { steps, size, chosen, .. } = model.defaults;
        let (most, pixels) = (self.max_steps, self.max_pixels);
        if chosen.steps && steps > most {
            return Err(format!("{FILE}: steps: {steps} are more than --max-steps {most}"));
        }
        if chosen.size && size.pixels() > pixels {
            let reason = format!("{size} are more pixels than --max-pixels {pixels}");
            return Err(format!("{FILE}: width and height: {reason}"));
        }
        Ok(())
    }

    /// The maximum number of pixels, and of images, where they are not set: OpenAI's, which a GPU
    /// generates in seconds.
    pub(crate) fn raise(&mut self, [pixels, images]: [bool; 2]) {
        if pixels {
            self.max_pixels = 1536 * 1024;
        }
        if images {
            self.max_images = 10;
        }
    }

    /// The number that a bound of a schema stands for.
    pub(super) fn bound(&self, bound: &Value) -> Value {
        match bound.as_str() {
            Some(Self::STEPS) => self.max_steps.into(),
            Some(Self::IMAGES) => self.max_images.into(),
            Some(Self::LORAS) => self.max_loras.into(),
            Some(Self::CONTROLNETS) => self.max_controlnets.into(),
            _ => bound.clone(),
        }
    }
}

/// Those of the tests of fields.
#[cfg(test)]
pub(super) const LIMITS: Limits = Limits {
    max_pixels: 1 << 20,
    max_steps: 50,
    max_images: 4,
    max_prompt_bytes: 100,
    max_input_pixels: 1 << 20,
    max_loras: 2,
    max_controlnets: 2,
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_set_is_not_raised() {
        let limits = Limits {
            max_pixels: 1 << 20,
            max_steps: 150,
            max_images: 8,
            max_prompt_bytes: 1,
            max_input_pixels: 1,
            max_loras: 1,
            max_controlnets: 1,
        };
        for (open, raised) in [
            ([true, true], (1_572_864, 10)),
            ([false, true], (1 << 20, 10)),
            ([true, false], (1_572_864, 8)),
        ] {
            let mut limits = limits;
            limits.raise(open);
            assert_eq!((limits.max_pixels, limits.max_images), raised);
        }
    }
}
