//! Stability AI's dialect, as spoken by their SDXL on SageMaker and on Bedrock: `text_prompts` with
//! weights in, `artifacts` out. What only their service has, such as `style_preset`, is refused
//! by its name, since it is nobody's field.

use sd_models::Spec;
use serde_json::{Value, json};

use super::body::BodyKind;
use super::render::{Dialect, ParsedRequest, RenderInput};
use crate::engine::GeneratedImage;
use crate::image::Format;
use crate::request::{Fields, ValidationError};

const STABILITY: Dialect = Dialect { format: Format::Png, render };

/// Their samplers that are here, under the names that they have here.
const SAMPLERS: [(&str, &str); 6] = [
    ("DDIM", "ddim"),
    ("DDPM", "ddpm"),
    ("K_DPMPP_2M", "dpmpp_2m"),
    ("K_EULER", "euler"),
    ("K_EULER_ANCESTRAL", "euler_a"),
    ("K_HEUN", "heun"),
];

/// Their fields as native ones.
pub(crate) fn parse(mut fields: Fields) -> Result<ParsedRequest, ValidationError> {
    let (_, prompts) = fields.take(&["text_prompts"])?.unwrap_or_default();
    let (prompt, negative) = prompts_of(&prompts)?;
    fields.add("prompt", "text_prompts", prompt);
    fields.add("negative_prompt", "text_prompts", negative);
    fields.rename("samples", "num_images_per_prompt");
    if let Some((name, sampler)) = fields.take(&["sampler"])? {
        let known = SAMPLERS.iter().find(|(theirs, _)| sampler == **theirs);
        let native = known.map_or(sampler.clone(), |(_, native)| (*native).into());
        fields.add("scheduler", &name, native);
    }
    // Zero is their word for any seed.
    if let Some((name, seed)) = fields.take(&["seed"])?.filter(|(_, seed)| *seed != 0) {
        fields.add("seed", &name, seed);
    }
    if let Some((name, preset)) = fields.take(&["clip_guidance_preset"])?
        && preset != "NONE"
    {
        return Err(ValidationError::range(&name, "can only be \"NONE\""));
    }
    Ok(ParsedRequest { requests: vec![fields], speech: BodyKind::Json, dialect: STABILITY })
}

/// The wanted and the unwanted, each in one prompt: the model takes no more.
fn prompts_of(prompts: &Value) -> Result<(String, String), ValidationError> {
    let name = "text_prompts";
    let Some(prompts) = prompts.as_array().filter(|prompts| !prompts.is_empty()) else {
        return Err(ValidationError::malformed(name, "must be a list of at least one prompt"));
    };
    let (mut wanted, mut unwanted) = (Vec::new(), Vec::new());
    for (k, prompt) in prompts.iter().enumerate() {
        let name = format!("{name}[{k}]");
        let Some(text) = prompt.get("text").and_then(Value::as_str) else {
            return Err(ValidationError::malformed(&name, "must have a text"));
        };
        match prompt.get("weight").map_or(Some(1.0), Value::as_f64) {
            Some(1.0) => wanted.push(text),
            Some(-1.0) => unwanted.push(text),
            _ => {
                let name = format!("{name}.weight");
                return Err(ValidationError::range(
                    &name,
                    "must be 1 or -1: other weights are not known",
                ));
            }
        }
    }
    Ok((wanted.join(", "), unwanted.join(", ")))
}

fn render(pictures: &RenderInput<'_>) -> String {
    let artifact = |(spec, drawn, data): (&Spec, &GeneratedImage, String)| {
        let reason = if drawn.nsfw == Some(true) { "CONTENT_FILTERED" } else { "SUCCESS" };
        json!({ "base64": data, "seed": spec.seed, "finishReason": reason })
    };
    let artifacts: Vec<Value> = pictures.each().map(artifact).collect();
    json!({ "result": "success", "artifacts": artifacts }).to_string()
}
