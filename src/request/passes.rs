//! The sizes and steps of the base pass and of the hires pass.

use sd_models::{Hires, ModelInfo, SamplerName, SamplerOptions, Size, Upscaler};

use super::draw::{DrawRequest, MAX_SIDE, MIN_SIDE};
use super::error::ValidationError;
use super::limits::Limits;

/// Denoising strength of the hires pass, as in AUTOMATIC1111.
const DEFAULT_HIRES_STRENGTH: f64 = 0.75;

impl DrawRequest {
    /// The hires pass of a base pass of this size, steps and sampler, in its proportions if only one
    /// side is given.
    pub(super) fn hires(
        &self,
        (base, steps, sampler): (Size, usize, SamplerName),
        limits: &Limits,
        model: &ModelInfo,
        warnings: &mut Vec<String>,
    ) -> Result<Option<Hires>, ValidationError> {
        let text = |text: &Option<String>| text.clone().filter(|text| !text.trim().is_empty());
        let scaled = |side: usize, by: usize, of: usize| {
            (side * by / of / model.multiple).max(1) * model.multiple
        };
        let (w, h) = (base.width(), base.height());
        let sides = match (self.hires_width, self.hires_height) {
            (Some(width), Some(height)) => [width, height],
            (Some(width), None) => [width, scaled(width, h, w)],
            (None, Some(height)) => [scaled(height, w, h), height],
            (None, None) => {
                let dependent = [
                    ("hires_steps", self.hires_steps.is_some()),
                    ("hires_strength", self.hires_strength.is_some()),
                    ("hires_upscaler", self.hires_upscaler.is_some()),
                    ("hires_prompt", text(&self.hires_prompt).is_some()),
                    ("hires_negative_prompt", text(&self.hires_negative_prompt).is_some()),
                    ("hires_guidance_scale", self.hires_guidance_scale.is_some()),
                    ("hires_scheduler", self.hires_scheduler.is_some()),
                    ("hires_schedule", self.hires_schedule.is_some()),
                ];
                return self.reject_without("hires_width", dependent);
            }
        };
        let upscaler = self.hires_upscaler.as_deref().map(Upscaler::from);
        let strength = self.hires_strength.unwrap_or(DEFAULT_HIRES_STRENGTH);
        let fields =
            [("hires_scheduler", &self.hires_scheduler), ("hires_schedule", &self.hires_schedule)];
        let own = self.sampler_of(fields, sampler)?;
        let most = limits.max_steps.min(model.most_steps(own.sampler));
        let options = SamplerOptions { eta: self.eta, s_noise: self.s_noise, churn: self.churn };
        Ok(Some(Hires {
            size: self.sides(["hires_width", "hires_height"], sides, limits)?,
            steps: match self.hires_steps {
                taken if self.hires_counts_taken => {
                    self.hires_schedule(taken.unwrap_or(steps), strength, most, warnings)?
                }
                Some(steps) => steps,
                None => self.raised(steps, ("hires_strength", strength), most, warnings)?,
            },
            strength,
            upscaler: upscaler.unwrap_or_default(),
            prompt: text(&self.hires_prompt).filter(|own| self.prompt.as_ref() != Some(own)),
            negative_prompt: text(&self.hires_negative_prompt)
                .filter(|own| self.negative_prompt.as_ref() != Some(own)),
            guidance_scale: self.hires_guidance_scale,
            sampler: (own != sampler).then_some((own, options)),
        }))
    }

    /// The steps of a hires pass of which the strength leaves those that are asked for, or as many
    /// as a schedule of at most `most` steps has, with a warning.
    fn hires_schedule(
        &self,
        taken: usize,
        strength: f64,
        most: usize,
        warnings: &mut Vec<String>,
    ) -> Result<usize, ValidationError> {
        let steps = (taken as f64 / strength).ceil() as usize;
        let left = (most as f64 * strength) as usize;
        if left == 0 {
            let reason =
                format!("of {strength} takes less than one of {most} steps, the most there can be");
            return Err(self.range("hires_strength", reason));
        }
        if steps > most {
            let field = self.names.of("hires_strength");
            warnings.push(format!(
                "the hires pass takes {left} of {taken} steps: at a {field} of {strength} a schedule \
                 of {most} steps, the most there can be, has no more"
            ));
        }
        Ok(steps.clamp(1, most))
    }

    /// So many steps that a strength leaves one, with a warning where these are more.
    pub(super) fn raised(
        &self,
        steps: usize,
        (field, strength): (&str, f64),
        most: usize,
        warnings: &mut Vec<String>,
    ) -> Result<usize, ValidationError> {
        let least = (1.0 / strength).ceil() as usize;
        if least > most {
            let reason =
                format!("of {strength} takes less than one of {most} steps, the most there can be");
            return Err(self.range(field, reason));
        }
        if least > steps {
            let field = self.names.of(field);
            warnings.push(format!(
                "{field} {strength} takes less than one of {steps} steps: there are {least}"
            ));
        }
        Ok(steps.max(least))
    }

    /// A size of these sides.
    pub(super) fn sides(
        &self,
        names: [&str; 2],
        [width, height]: [usize; 2],
        limits: &Limits,
    ) -> Result<Size, ValidationError> {
        for (name, side) in names.iter().zip([width, height]) {
            self.within(name, side, MIN_SIDE..=MAX_SIDE)?;
            if side % 8 != 0 {
                let reason = format!("must be a multiple of 8, not {side}");
                return Err(self.range(name, reason));
            }
        }
        let max = limits.max_pixels;
        let size = Size::new(width, height).filter(|size| size.pixels() <= max);
        size.ok_or_else(|| {
            let larger = if width >= height { names[0] } else { names[1] };
            let reason = format!("is too large: {width}x{height} exceeds {max} pixels");
            self.range(larger, reason)
        })
    }
}
