//! The fields of OpenAI's Images API, beside which the native fields may stand, and what they
//! become here.

use schemars::{JsonSchema, Schema};
use serde::Deserialize;
use serde_json::json;

use crate::request::{DrawRequest, Fields, Limits, ValidationError};

/// Fields that change nothing here.
const IGNORED: [&str; 6] =
    ["quality", "style", "moderation", "input_fidelity", "user", "safety_identifier"];

/// The fields that only OpenAI's API has.
#[derive(Debug, Deserialize, JsonSchema)]
#[schemars(transform = add_ignored)]
pub(crate) struct OpenAiOptions {
    /// Model. OpenAI's model names mean the model of this server.
    #[schemars(extend("maxLength" = 256))]
    pub(crate) model: Option<String>,
    /// Size as WIDTHxHEIGHT, or `auto` for the default of the model or input image.
    #[schemars(extend("maxLength" = 32))]
    size: Option<String>,
    /// JPEG quality in percent. PNG and WebP are lossless.
    #[schemars(extend("minimum" = 0, "maximum" = 100))]
    pub(crate) output_compression: Option<u8>,
    /// Whether the response holds the images or URLs, which expire.
    pub(crate) response_format: Option<ResponseFormat>,
    /// Number of partial images in a stream.
    #[schemars(extend("minimum" = 0, "maximum" = 3))]
    pub(crate) partial_images: Option<usize>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub(crate) enum ResponseFormat {
    B64Json,
    Url,
}

/// The fields of a generation.
#[derive(JsonSchema)]
#[schemars(extend("additionalProperties" = false))]
#[expect(dead_code, reason = "only its schema is used")]
pub(crate) struct Generation {
    #[serde(flatten)]
    options: OpenAiOptions,
    #[serde(flatten)]
    draw: DrawRequest,
}

/// The fields of an edit, whose images are files of a form.
#[derive(JsonSchema)]
#[schemars(transform = add_files, extend("additionalProperties" = false))]
#[expect(dead_code, reason = "only its schema is used")]
pub(crate) struct Edit {
    #[serde(flatten)]
    generation: Generation,
}

fn add_ignored(schema: &mut Schema) {
    let properties = &mut schema.ensure_object()["properties"];
    for name in IGNORED {
        let description = "Accepted and ignored.";
        properties[name] =
            json!({ "type": ["string", "null"], "maxLength": 256, "description": description });
    }
    let description = "Background of the images, which is always opaque.";
    properties["background"] = json!({ "type": ["string", "null"], "enum": ["auto", "opaque", null], "description": description });
}

fn add_files(schema: &mut Schema) {
    let mask = "Mask: transparent areas are inpainted. Default: those of the input image.";
    for (name, description) in [("image", "Input image."), ("mask", mask)] {
        schema.ensure_object()["properties"][name] =
            json!({ "type": "string", "format": "binary", "description": description });
    }
    schema.insert("required".into(), json!(["prompt", "image"]));
}

/// Reads a request: OpenAI's own fields, and all of it in native fields.
pub(crate) fn read(
    mut fields: Fields,
    limits: &Limits,
) -> Result<(OpenAiOptions, DrawRequest), ValidationError> {
    let options: OpenAiOptions = fields.read(limits)?;
    let mut draw = DrawRequest::read(fields, limits)?;
    if let Some(size) = options.size.as_deref().filter(|size| *size != "auto") {
        if draw.width.is_some() || draw.height.is_some() {
            return Err(ValidationError::malformed("size", "is given beside width or height"));
        }
        let sides = size.split_once('x');
        let sides =
            sides.and_then(|(width, height)| Some((width.parse().ok()?, height.parse().ok()?)));
        let (width, height) = sides.ok_or_else(|| {
            let reason = format!("must be auto or like 512x512, not {size:?}");
            ValidationError::malformed("size", reason)
        })?;
        (draw.width, draw.height) = (Some(width), Some(height));
        draw.names.insert("width", "size");
        draw.names.insert("height", "size");
    }
    if options.partial_images > Some(0) {
        draw.preview = Some(true);
    }
    Ok((options, draw))
}
