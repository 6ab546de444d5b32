//! The hires pass of AUTOMATIC1111's API.

use schemars::JsonSchema;
use sd_models::{ModelInfo, SamplerName, SigmaSchedule};
use serde::Deserialize;
use serde_json::{Value, json};

use super::nothing::{is_noop, is_off};
use super::sampler::SamplerFields;
use crate::request::{
    DrawRequest, Fields, Limits, MAX_GUIDANCE, MAX_SIDE, Object, ValidationError,
};

/// Fields of the hires pass that must be as in the base pass, the value that means it, and the
/// field of the base pass.
const MUST_MATCH_BASE_PASS: [(&str, &str, &str); 2] = [
    ("hr_checkpoint_name", "Use same checkpoint", "sd_model_checkpoint"),
    ("hr_additional_modules", "Use same choices", ""),
];

/// Fields of the hires pass, and the value that means those of the base pass.
const SAME: [(&str, &str); 5] = [
    ("hr_prompt", ""),
    ("hr_negative_prompt", ""),
    ("hr_sampler_name", "use same sampler"),
    ("hr_scheduler", "use same scheduler"),
    ("hr_cfg", ""),
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
    /// Upscaler: one of `/sdapi/v1/latent-upscale-modes` or of `/sdapi/v1/upscalers`.
    hr_upscaler: Option<String>,
    /// Denoising strength of the hires pass. Default: 0.75.
    #[schemars(extend("minimum" = 0, "maximum" = 1))]
    denoising_strength: Option<f64>,
    /// Prompt of the hires pass. Default: as in the base pass.
    hr_prompt: Option<String>,
    /// Negative prompt of the hires pass. Default: as in the base pass.
    hr_negative_prompt: Option<String>,
    /// Sampler of the hires pass. Default: as in the base pass.
    #[schemars(extend("maxLength" = 64))]
    hr_sampler_name: Option<String>,
    /// Schedule of the hires pass. Default: as in the base pass.
    #[schemars(extend("maxLength" = 64))]
    hr_scheduler: Option<String>,
    /// Guidance scale of the hires pass, in Forge's API. Default: as in the base pass.
    #[schemars(extend("minimum" = 0, "maximum" = MAX_GUIDANCE))]
    hr_cfg: Option<f64>,
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
        for (name, same) in SAME {
            fields.drop_if(name, |value| match value {
                Value::String(text) => {
                    let is = |known: &str| text.trim().eq_ignore_ascii_case(known);
                    is_off(value) || is(same) || name == "hr_sampler_name" && is("automatic")
                }
                value => is_off(value),
            });
        }
        for name in ["firstphase_width", "firstphase_height"] {
            if let Some((name, value)) = fields.take(&[name])?
                && !is_noop(&value)
            {
                let reason = "is not supported: width and height are those of the first pass";
                return Err(ValidationError::range(&name, reason));
            }
        }
        fields.read(limits)
    }

    /// Adds the hires pass to a request with these fields of its sampler. As there, it is omitted
    /// where nothing would be upscaled.
    pub(crate) fn add_to(
        self,
        draw: &mut DrawRequest,
        sampler: &SamplerFields,
        model: &ModelInfo,
    ) -> Result<(), ValidationError> {
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
        if [wide, high] != target {
            let ([x, y], multiple) = (target, model.multiple);
            draw.warnings.push(format!(
                "{name} asks for {x}x{y}, no multiples of {multiple}: the hires pass is of {wide}x{high}"
            ));
        }
        if (wide, high) == (width, height) {
            return Ok(());
        }
        self.add_sampler(draw, sampler)?;
        draw.names.insert("hires_width", name);
        draw.names.insert("hires_height", name);
        (draw.hires_width, draw.hires_height) = (Some(wide), Some(high));
        draw.hires_strength = Some(self.denoising_strength.unwrap_or(DEFAULT_STRENGTH));
        draw.hires_steps = self.hr_second_pass_steps.filter(|steps| *steps > 0);
        draw.hires_counts_taken = true;
        draw.hires_upscaler = self.hr_upscaler.filter(|name| !name.is_empty());
        draw.hires_prompt = self.hr_prompt;
        draw.hires_negative_prompt = self.hr_negative_prompt;
        draw.hires_guidance_scale = self.hr_cfg;
        Ok(())
    }

    /// Adds the sampler and its schedule, if the fields name any. As there, a sampler is on the
    /// schedule of the base pass, unless that is automatic, and DDIM and PLMS on their own.
    fn add_sampler(
        &self,
        draw: &mut DrawRequest,
        base: &SamplerFields,
    ) -> Result<(), ValidationError> {
        if self.hr_sampler_name.is_none() && self.hr_scheduler.is_none() {
            return Ok(());
        }
        let mut own = SamplerFields {
            sampler: self.hr_sampler_name.clone().or(base.sampler.clone()),
            scheduler: self.hr_scheduler.clone().or(base.scheduler.clone()),
        };
        if let (None, Some(scheduler), Some(sampler)) =
            (&self.hr_scheduler, &base.scheduler, &own.sampler)
            && let (Ok(named), Ok(schedule)) =
                (sampler.parse::<SamplerName>(), scheduler.parse::<SigmaSchedule>())
            && named.sampler.check(schedule).is_err()
        {
            draw.warnings.push(format!(
                "scheduler {scheduler} has no effect on the hires pass: {sampler} has none"
            ));
            own.scheduler = None;
        }
        let (scheduler, schedule) = own.names(["hr_sampler_name", "hr_scheduler"])?;
        // An automatic schedule of the model's own sampler is the model's.
        let schedule = schedule.or_else(|| base.scheduler.is_some().then(|| "model".into()));
        (draw.hires_scheduler, draw.hires_schedule) = (scheduler, schedule);
        Ok(())
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

    fn read(body: &Value) -> Result<HiresPass, String> {
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
        HiresPass::read(&mut fields, &base, &limits).map_err(|error| error.to_string())
    }

    #[test]
    fn what_asks_for_the_base_pass_s_values_asks_for_nothing() {
        for body in [
            json!({ "hr_prompt": "", "hr_negative_prompt": " ", "hr_cfg": 0, "hr_sampler_name": null }),
            json!({ "hr_sampler_name": "Use same sampler", "hr_scheduler": "use same scheduler" }),
            json!({ "hr_sampler_name": "Automatic", "hr_scheduler": "None" }),
            json!({ "hr_prompt": [""], "hr_cfg": "None", "hr_additional_modules": ["Use same choices"] }),
            json!({ "hr_checkpoint_name": "Use same checkpoint", "hr_scheduler": "" }),
        ] {
            let pass = read(&body).expect("read");
            let texts = [&pass.hr_prompt, &pass.hr_negative_prompt];
            let names = [&pass.hr_sampler_name, &pass.hr_scheduler];
            assert!(texts.into_iter().chain(names).all(Option::is_none), "{body}");
            assert_eq!(pass.hr_cfg, None, "{body}");
        }
        let reason = "hr_checkpoint_name must be the same as in the base pass";
        assert_eq!(read(&json!({ "hr_checkpoint_name": "other" })).err().as_deref(), Some(reason));
    }

    #[test]
    fn a_sampler_takes_the_schedule_of_the_base_pass_unless_that_is_automatic() {
        let of = |body: Value, sampler: Option<&str>, scheduler: Option<&str>| {
            let base = SamplerFields {
                sampler: sampler.map(str::to_owned),
                scheduler: scheduler.map(str::to_owned),
            };
            let mut draw = DrawRequest::default();
            let added = read(&body).expect("read").add_sampler(&mut draw, &base);
            added.map_err(|error| error.to_string())?;
            Ok::<_, String>((draw.hires_scheduler, draw.hires_schedule, draw.warnings.len()))
        };
        let names = |sampler: Option<&str>, schedule: &str, warnings| {
            Ok((sampler.map(str::to_owned), Some(schedule.to_owned()), warnings))
        };
        let own = |name: &str| json!({ "hr_sampler_name": name });
        assert_eq!(of(json!({}), Some("Euler"), Some("Karras")), Ok((None, None, 0)));
        assert_eq!(
            of(own("Euler a"), Some("LMS"), Some("Karras")),
            names(Some("euler_a"), "karras", 0)
        );
        assert_eq!(of(own("DPM++ 2M"), Some("LMS"), None), names(Some("dpmpp_2m"), "karras", 0));
        assert_eq!(of(own("DDIM"), Some("LMS"), Some("karras")), names(Some("ddim"), "model", 1));
        let scheduler = json!({ "hr_scheduler": "Exponential" });
        assert_eq!(of(scheduler.clone(), Some("LMS"), None), names(Some("lms"), "exponential", 0));
        assert_eq!(of(scheduler, None, None), names(None, "exponential", 0));
        let automatic = json!({ "hr_scheduler": "Automatic" });
        assert_eq!(of(automatic, None, Some("Karras")), names(None, "model", 0));
        assert!(
            of(own("Ueler"), None, None).is_err_and(|error| error.starts_with("hr_sampler_name"))
        );
    }
}
