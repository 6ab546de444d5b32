//! The fields of OpenAI's Images API, beside which the native fields may stand, and what they
//! become here.

use schemars::{JsonSchema, Schema};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::request::{DrawRequest, Fields, Limits, ValidationError, brief};

/// Fields that change nothing here, with a warning unless they are `auto`.
const NO_EFFECT: [&str; 4] = ["style", "background", "input_fidelity", "moderation"];

/// Fields that say who asks. They change nothing anywhere.
const USER: [&str; 2] = ["user", "safety_identifier"];

/// Maximum number of unknown fields in warnings.
const MAX_UNKNOWN: usize = 16;

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
    /// The quality by which the images are counted in `usage`. It changes nothing else here, of
    /// which the response warns.
    #[schemars(extend("maxLength" = 256))]
    pub(crate) quality: Option<String>,
    /// Quality of JPEG and WebP in percent. WebP is lossless at 100, its default; that of JPEG is 92.
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
#[expect(dead_code, reason = "only its schema is used")]
pub(crate) struct Generation {
    #[serde(flatten)]
    options: OpenAiOptions,
    #[serde(flatten)]
    draw: DrawRequest,
}

/// The fields of an edit, whose images are files of a form.
#[derive(JsonSchema)]
#[schemars(transform = add_files)]
#[expect(dead_code, reason = "only its schema is used")]
pub(crate) struct Edit {
    #[serde(flatten)]
    generation: Generation,
}

/// The fields of a variation, whose image is a file of a form.
#[derive(JsonSchema)]
#[schemars(transform = add_image)]
#[expect(dead_code, reason = "only its schema is used")]
pub(crate) struct Variation {
    #[serde(flatten)]
    generation: Generation,
}

fn add_ignored(schema: &mut Schema) {
    let properties = &mut schema.ensure_object()["properties"];
    for (names, description) in [
        (&NO_EFFECT[..], "Has no effect, of which the response warns."),
        (&USER[..], "Accepted and ignored."),
    ] {
        for name in names {
            properties[name] =
                json!({ "type": ["string", "null"], "maxLength": 256, "description": description });
        }
    }
}

fn add_files(schema: &mut Schema) {
    add_image(schema);
    let mask = "Mask: transparent areas are inpainted. Default: those of the input image.";
    schema.ensure_object()["properties"]["mask"] = file(mask);
    schema.insert("required".into(), json!(["prompt", "image"]));
}

fn add_image(schema: &mut Schema) {
    schema.ensure_object()["properties"]["image"] = file("Input image.");
    schema.insert("required".into(), json!(["image"]));
}

fn file(description: &str) -> Value {
    json!({ "type": "string", "format": "binary", "description": description })
}

/// Reads a request: OpenAI's own fields, and all of it in native fields.
pub(crate) fn read(
    mut fields: Fields,
    limits: &Limits,
) -> Result<(OpenAiOptions, DrawRequest), ValidationError> {
    let means = |name: &&str| match fields.get(name) {
        None | Some(Value::Null | Value::Bool(false)) => false,
        Some(Value::String(value)) => match value.trim() {
            "" | "auto" => false,
            value => !(*name == "background" && value == "opaque"),
        },
        Some(_) => true,
    };
    let asked = ["quality", "preview"].into_iter().chain(NO_EFFECT).filter(means);
    let mut warnings: Vec<_> = asked.map(no_effect).collect();
    fields.drop_if("preview", |_| true);
    let options: OpenAiOptions = fields.read(limits)?;
    let (mut draw, unknown) = DrawRequest::read_known(fields, limits)?;
    let more = unknown.len().saturating_sub(MAX_UNKNOWN);
    let unknown = unknown.iter().take(MAX_UNKNOWN);
    warnings.extend(unknown.map(|name| format!("{} is unknown and was ignored", brief(name))));
    if more > 0 {
        warnings.push(format!("{more} more fields are unknown and were ignored"));
    }
    draw.warnings = warnings;
    if let Some(size) =
        options.size.as_deref().filter(|size| !size.trim().eq_ignore_ascii_case("auto"))
    {
        if draw.width.is_some() || draw.height.is_some() {
            return Err(ValidationError::malformed("size", "is given beside width or height"));
        }
        // As people write it, too.
        let sides = size.split_once(['x', 'X', '*', '×']);
        let sides = sides.and_then(|(w, h)| Some((w.trim().parse().ok()?, h.trim().parse().ok()?)));
        let (width, height) = sides.ok_or_else(|| {
            let reason = format!("must be auto or like 512x512, not {size:?}");
            ValidationError::malformed("size", reason)
        })?;
        (draw.width, draw.height) = (Some(width), Some(height));
        draw.names.insert("width", "size");
        draw.names.insert("height", "size");
    }
    if options.partial_images > Some(0) && draw.stream != Some(true) {
        draw.warnings.push("partial_images has no effect without stream".into());
    }
    Ok((options, draw))
}

fn no_effect(name: &str) -> String {
    match name {
        "background" => "background has no effect: images are opaque".into(),
        "preview" => "preview has no effect: partial_images is the number of partial images".into(),
        name => format!("{name} has no effect"),
    }
}
