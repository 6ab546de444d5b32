//! The field `infotext`: generation parameters as text, which are those of the request where it has no
//! fields of its own.
//!
//! Reference: stable-diffusion-webui 1.10 `modules/api/api.py` `apply_infotext`.

use serde_json::Value;

use super::nothing::is_off;
use crate::image;
use crate::request::{Fields, ValidationError, brief, found};

/// Parameters and their fields.
const FIELDS: [(&str, &str); 31] = [
    ("Prompt", "prompt"),
    ("Negative prompt", "negative_prompt"),
    ("Steps", "steps"),
    ("Sampler", "sampler_name"),
    ("Schedule type", "scheduler"),
    ("CFG scale", "cfg_scale"),
    ("Seed", "seed"),
    ("Size-1", "width"),
    ("Size-2", "height"),
    ("Denoising strength", "denoising_strength"),
    ("Variation seed", "subseed"),
    ("Variation seed strength", "subseed_strength"),
    ("Clip skip", "clip_skip"),
    ("ENSD", "eta_noise_seed_delta"),
    ("Eta", "eta"),
    ("Eta DDIM", "eta"),
    ("Sigma noise", "s_noise"),
    ("Tiling", "tiling"),
    ("Face restoration", "restore_faces"),
    ("Refiner", "refiner_checkpoint"),
    ("Refiner switch at", "refiner_switch_at"),
    ("Hires upscale", "hr_scale"),
    ("Hires resize-1", "hr_resize_x"),
    ("Hires resize-2", "hr_resize_y"),
    ("Hires steps", "hr_second_pass_steps"),
    ("Hires upscaler", "hr_upscaler"),
    ("Hires sampler", "hr_sampler_name"),
    ("Hires schedule type", "hr_scheduler"),
    ("Hires prompt", "hr_prompt"),
    ("Hires negative prompt", "hr_negative_prompt"),
    ("Hires CFG Scale", "hr_cfg"),
];

/// Words and their numbers.
type Words = &'static [(&'static str, &'static str)];

/// Those of a mask, whose values are words.
const OF_MASK: [(&str, &str, Words); 5] = [
    ("Mask blur", "mask_blur", &[]),
    ("Masked area padding", "inpaint_full_res_padding", &[]),
    (
        "Mask mode",
        "inpainting_mask_invert",
        &[("Inpaint not masked", "1"), ("Inpaint masked", "0")],
    ),
    ("Inpaint area", "inpaint_full_res", &[("Only masked", "1"), ("Whole picture", "0")]),
    (
        "Masked content",
        "inpainting_fill",
        &[("fill", "0"), ("original", "1"), ("latent noise", "2"), ("latent nothing", "3")],
    ),
];

/// Parameters that say what an image was made by, and no more.
const SILENT: [&str; 8] =
    ["Size", "Hires resize", "Model", "Model hash", "VAE", "VAE hash", "Lora hashes", "Version"];

/// Takes the infotext out, and adds the fields that the request does not have. Returns warnings of what
/// has no effect.
pub(super) fn apply(fields: &mut Fields, is_img2img: bool) -> Result<Vec<String>, ValidationError> {
    let Some((name, value)) = fields.take(&["infotext"])? else { return Ok(Vec::new()) };
    if is_off(&value) {
        return Ok(Vec::new());
    }
    let Value::String(text) = value else {
        let reason = format!("must be a string, not {}", found(&value));
        return Err(ValidationError::malformed(&name, reason));
    };
    let (mut warnings, parameters) = (Vec::new(), image::parse(&text));
    let is_hires = |(parameter, _): &(String, _)| {
        ["Hires upscale", "Hires resize", "Hires upscaler"].contains(&parameter.as_str())
    };
    if !is_img2img && fields.get("enable_hr").is_none() && parameters.iter().any(is_hires) {
        fields.add("enable_hr", name.clone(), true.into());
    }
    for (parameter, value) in parameters {
        // Noise is that of the CPU.
        if SILENT.contains(&parameter.as_str()) || (parameter == "RNG" && value == "CPU") {
            continue;
        }
        let known = FIELDS.iter().find(|(known, _)| *known == parameter);
        let of_mask = OF_MASK.iter().find(|(known, ..)| *known == parameter && is_img2img);
        let (field, value) = match (known, of_mask) {
            (Some((_, field)), _) => (field, value),
            (None, Some((_, field, words))) => {
                let word = words.iter().find(|(word, _)| *word == value);
                (field, word.map_or(value, |(_, number)| (*number).to_owned()))
            }
            (None, None) => {
                warnings
                    .push(format!("{name} has {:?}, which has no effect here", brief(&parameter)));
                continue;
            }
        };
        if fields.get(field).is_none() {
            fields.add(field, format!("{name}: {parameter}"), value.into());
        }
    }
    Ok(warnings)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn applied(body: &Value, is_img2img: bool) -> (Vec<String>, Value) {
        let mut fields = Fields::json(&body.to_string()).expect("an object");
        let warnings = apply(&mut fields, is_img2img).expect("read");
        (warnings, fields.object().into())
    }

    #[test]
    fn what_the_request_has_counts() {
        let text = "a cat\nNegative prompt: dogs\nSteps: 20, Sampler: DPM++ 2M Karras, Seed: 7, \
                    Size: 64x96, Model: other, Hires resize: 128x192, Mask blur: 3, Note: x";
        let (warnings, fields) = applied(&json!({ "infotext": text, "steps": 5 }), false);
        let wanted = json!({
            "steps": 5, "prompt": "a cat", "negative_prompt": "dogs", "seed": "7",
            "sampler_name": "DPM++ 2M Karras", "width": "64", "height": "96", "enable_hr": true,
            "hr_resize_x": "128", "hr_resize_y": "192",
        });
        assert_eq!(fields, wanted);
        let names = ["Mask blur", "Note"];
        let said = names.map(|name| format!("infotext has {name:?}, which has no effect here"));
        assert_eq!(warnings, said);
        let text = "Steps: 20, Mask blur: 3, Mask mode: Inpaint not masked, Masked content: fill, \
                    Inpaint area: Whole picture";
        let (warnings, fields) = applied(&json!({ "infotext": text }), true);
        let wanted = json!({
            "prompt": "", "negative_prompt": "", "steps": "20", "mask_blur": "3",
            "inpainting_mask_invert": "1", "inpainting_fill": "0", "inpaint_full_res": "0",
        });
        assert_eq!((warnings, fields), (vec![], wanted));
        assert_eq!(applied(&json!({ "infotext": " " }), false), (vec![], json!({})));
        let mut number = Fields::json(r#"{"infotext":5}"#).expect("an object");
        let error = apply(&mut number, false).expect_err("refused").to_string();
        assert_eq!(error, "infotext must be a string, not 5");
    }

    #[test]
    fn what_it_says_of_no_field_is_told() {
        let text = "Steps: 20, Sampler: Euler, Refiner: xl, Refiner switch at: 0.5, RNG: NV, \
                    ControlNet 0: \"Module: canny, Model: canny, Weight: 1\"";
        let (warnings, fields) = applied(&json!({ "infotext": text }), false);
        let wanted = (&json!("xl"), &json!("0.5"));
        assert_eq!((&fields["refiner_checkpoint"], &fields["refiner_switch_at"]), wanted);
        let said = ["RNG", "ControlNet 0"];
        let said = said.map(|name| format!("infotext has {name:?}, which has no effect here"));
        assert_eq!(warnings, said);
        let (warnings, _) = applied(&json!({ "infotext": text.replace("NV", "CPU") }), false);
        assert_eq!(warnings, said[1..]);
    }
}
