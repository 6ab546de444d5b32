//! The hires pass of AUTOMATIC1111's API.

use schemars::JsonSchema;
use sd_models::ModelInfo;
use serde::Deserialize;
use serde_json::{Value, json};

use super::nothing::is_noop;
use crate::request::{DrawRequest, Fields, Limits, MAX_SIDE, Object, ValidationError};

/// Fields of the hires pass that must be as in the base pass, the value that means it, and the
/// field of the base pass.
const MUST_MATCH_BASE_PASS: [(&str, &str, &str); 7] = [
    ("hr_prompt", "", "prompt"),
    ("hr_negative_prompt", "", "negative_prompt"),
    ("hr_checkpoint_name", "Use same checkpoint", "sd_model_checkpoint"),
    ("hr_sampler_name", "Use same sampler", "sampler_name"),
    ("hr_scheduler", "Use same scheduler", "scheduler"),
    ("hr_cfg", "", "cfg_scale"),
    ("hr_additional_modules", "Use same choices", ""),
];

/// Default denoising strength.
const DEFAULT_STRENGTH: f64 = 0.75;

/// The fields of the hires pass.
#[derive(Debug, Deserialize, JsonSchema)]
pub(crate) struct HiresPass {
    /// Scale of the sides. Default: 2.
    #[schemars(extend("minimum" = 0.1, "maximum" = 16))]
    hr_scale: Option<f64>,
    /// Width in pixels, instead of `hr_scale`.
    #[schemars(extend("minimum" = 0, "maximum" = MAX_SIDE))]
    hr_resize_x: Option<usize>,
    /// Height in pixels, instead of `hr_scale`.
    #[schemars(extend("minimum" = 0, "maximum" = MAX_SIDE))]
    hr_resize_y: Option<usize>,
    /// Number of steps that are taken. Default, and at 0: as in the base pass.
    #[schemars(extend("minimum" = 0, "maximum" = Limits::STEPS))]
    hr_second_pass_steps: Option<usize>,
    /// Upscaler of the latents: Latent, Latent (nearest), and others of its family.
    hr_upscaler: Option<String>,
    /// Denoising strength of the hires pass. Default: 0.75.
    #[schemars(extend("minimum" = 0, "maximum" = 1))]
    denoising_strength: Option<f64>,
}

impl HiresPass {
    /// Takes the fields of the hires pass out, given all fields of the request.
    pub(crate) fn read(
        fields: &mut Fields,
        base: &Object,
        limits: &Limits,
    ) -> Result<Self, ValidationError> {
        for (name, same, field) in MUST_MATCH_BASE_PASS {
            if let Some((name, value)) = fields.take(&[name])?
                && !is_noop(&value)
                && value != same
                && value != json!([same])
                && !is_same(&value, base.get(field))
            {
                return Err(ValidationError::range(&name, "must be the same as in the base pass"));
            }
        }
        fields.read(limits)
    }

    /// Adds the hires pass to a request. As there, it is omitted where nothing would be upscaled.
    pub(crate) fn add_to(self, draw: &mut DrawRequest, model: &ModelInfo) {
        let base = model.defaults.size;
        let width = draw.width.unwrap_or(base.width());
        let height = draw.height.unwrap_or(base.height());
        let (x, y) = (self.hr_resize_x.unwrap_or(0), self.hr_resize_y.unwrap_or(0));
        let (name, target) = match (x, y) {
            (0, 0) => {
                let scale = self.hr_scale.unwrap_or(2.0);
                ("hr_scale", [width, height].map(|side| (side as f64 * scale) as usize))
            }
            (x, 0) => ("hr_resize_x", [x, x * height / width]),
            (0, y) => ("hr_resize_y", [y * width / height, y]),
            (x, y) => ("hr_resize_x", [x, y]),
        };
        // Latents have whole pixels.
        let [wide, high] = target.map(|side| (side / model.multiple).max(1) * model.multiple);
        if (wide, high) == (width, height) {
            return;
        }
        draw.names.insert("hires_width", name);
        draw.names.insert("hires_height", name);
        (draw.hires_width, draw.hires_height) = (Some(wide), Some(high));
        draw.hires_strength = Some(self.denoising_strength.unwrap_or(DEFAULT_STRENGTH));
        draw.hires_steps = self.hr_second_pass_steps.filter(|steps| *steps > 0);
        draw.hires_counts_taken = true;
        draw.hires_upscaler = self.hr_upscaler.filter(|name| !name.is_empty());
    }
}

/// Whether a value of the hires pass is that of the base pass, if it has one.
fn is_same(value: &Value, base: Option<&Value>) -> bool {
    let text = |value: &Value| match value {
        Value::String(text) => text.trim().to_lowercase(),
        value => value.to_string(),
    };
    let value = text(value);
    let Some(base) = base.map(text).filter(|base| !base.is_empty()) else {
        return value == "automatic";
    };
    let number = |text: &str| text.parse::<f64>().ok();
    value == base || number(&value).is_some() && number(&value) == number(&base)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_base_pass_has_is_the_same_in_the_hires_pass() {
        let read = |body: Value| {
            let mut fields = Fields::json(&body.to_string()).expect("an object");
            let base = fields.object();
            let limits = Limits {
                max_pixels: 1 << 20,
                max_steps: 50,
                max_images: 4,
                max_prompt_bytes: 100,
                max_input_pixels: 1 << 20,
                max_loras: 2,
                max_controlnets: 2,
            };
            HiresPass::read(&mut fields, &base, &limits)
                .map(|_| ())
                .map_err(|error| error.to_string())
        };
        for body in [
            json!({ "prompt": "a", "hr_prompt": "a", "hr_negative_prompt": "" }),
            json!({ "sampler_name": "Euler a", "hr_sampler_name": "euler a", "hr_scheduler": "Automatic" }),
            json!({ "cfg_scale": 7, "hr_cfg": "7.0", "scheduler": "Karras", "hr_scheduler": "karras" }),
            json!({ "hr_sampler_name": "Use same sampler", "hr_additional_modules": ["Use same choices"] }),
        ] {
            assert_eq!(read(body.clone()), Ok(()), "{body}");
        }
        for (name, value) in [("hr_prompt", "b"), ("hr_sampler_name", "DDIM"), ("hr_cfg", "8")] {
            let body = json!({ "prompt": "a", "cfg_scale": 7, name: value });
            let reason = format!("{name} must be the same as in the base pass");
            assert_eq!(read(body), Err(reason));
        }
    }
}
