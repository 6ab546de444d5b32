//! Stability AI's format, that of their SDXL on SageMaker and on Bedrock: `text_prompts` with
//! weights in requests, `artifacts` in responses. Fields that only their service has, such as
//! `style_preset`, are rejected by name.

use schemars::JsonSchema;
use sd_models::Spec;
use serde::Deserialize;
use serde_json::{Value, json};

use super::render::{Dialect, RenderInput};
use crate::engine::GeneratedImage;
use crate::image::Format;
use crate::request::{DrawRequest, Fields, Limits, ValidationError};

/// The format of responses.
pub(crate) const STABILITY: Dialect = Dialect { format: Format::Png, render };

/// The fields that only this format has.
#[derive(Deserialize, JsonSchema)]
struct StabilityOptions {
    text_prompts: Option<Vec<TextPrompt>>,
    #[schemars(extend("enum" = ["NONE", null]))]
    #[serde(rename = "clip_guidance_preset")]
    _clip_guidance_preset: Option<String>,
}

#[derive(Deserialize, JsonSchema)]
struct TextPrompt {
    text: String,
    /// 1 for a prompt, -1 for a negative prompt. Default: 1.
    weight: Option<f64>,
}

/// Reads a request in this format.
pub(crate) fn parse(mut fields: Fields, limits: &Limits) -> Result<DrawRequest, ValidationError> {
    let options: StabilityOptions = fields.read(limits)?;
    fields.rename("samples", "num_images_per_prompt");
    let mut request = DrawRequest::read(fields, limits)?;
    let (prompt, negative_prompt) = prompts(&options.text_prompts.unwrap_or_default())?;
    for (name, field, text) in [
        ("prompt", &mut request.prompt, prompt),
        ("negative_prompt", &mut request.negative_prompt, negative_prompt),
    ] {
        if field.replace(text).is_some() {
            return Err(ValidationError::malformed(name, "is given beside text_prompts"));
        }
        request.names.insert(name, "text_prompts");
    }
    // Zero means random.
    request.seed = request.seed.filter(|seed| *seed != 0);
    Ok(request)
}

/// The prompt and the negative prompt, each joined into one: the model takes no more.
fn prompts(prompts: &[TextPrompt]) -> Result<(String, String), ValidationError> {
    if prompts.is_empty() {
        return Err(ValidationError::malformed("text_prompts", "must hold at least one prompt"));
    }
    let (mut positive, mut negative) = (Vec::new(), Vec::new());
    for (k, TextPrompt { text, weight }) in prompts.iter().enumerate() {
        match weight.unwrap_or(1.0) {
            1.0 => positive.push(text.as_str()),
            -1.0 => negative.push(text.as_str()),
            _ => {
                let name = format!("text_prompts[{k}].weight");
                let reason = "must be 1 or -1: other weights are not supported";
                return Err(ValidationError::range(&name, reason));
            }
        }
    }
    Ok((positive.join(", "), negative.join(", ")))
}

fn render(input: &RenderInput<'_>) -> String {
    let artifact = |(spec, image, data): (&Spec, &GeneratedImage, String)| {
        let reason = if image.nsfw == Some(true) { "CONTENT_FILTERED" } else { "SUCCESS" };
        json!({ "base64": data, "seed": spec.seed, "finishReason": reason })
    };
    let artifacts: Vec<Value> = input.each().map(artifact).collect();
    json!({ "result": "success", "artifacts": artifacts }).to_string()
}
