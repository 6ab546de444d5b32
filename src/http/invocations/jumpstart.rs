//! The format of SageMaker JumpStart's Stable Diffusion. A prompt as `application/x-text` gets
//! nested arrays of RGB values. JSON has native fields, and the prompt may be a list.
//! `Accept: application/json;jpeg` selects files in base64.
//!
//! JSON without that `Accept` is a native request and gets the native response.

use axum::http::HeaderMap;
use axum::http::header::ACCEPT;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::body::{JUMPSTART_TEXT, essence};
use super::render::{Dialect, RenderInput};
use crate::engine::GeneratedImage;
use crate::image::Format;
use crate::request::{DrawRequest, Fields, Limits, ValidationError};

/// The values of `Accept` that select files.
const FILES: [(&str, Format); 2] =
    [("application/json;jpeg", Format::Jpeg), ("application/json;png", Format::Png)];

/// The format of the response, if the request is in this format.
pub(crate) fn detect(headers: &HeaderMap) -> Option<Dialect> {
    let accept = headers.get(ACCEPT).map(|value| String::from_utf8_lossy(value.as_bytes()));
    let accept = accept.unwrap_or_default().to_ascii_lowercase().replace(' ', "");
    let files = FILES.iter().find(|(media, _)| accept == *media).map(|(_, format)| *format);
    let text = essence(headers).is_some_and(|essence| essence == JUMPSTART_TEXT);
    let render: fn(&RenderInput<'_>) -> String = match (text, files.is_some()) {
        (true, true) => |input| render(input, "generated_image", &input.base64()),
        (true, false) => |input| render(input, "generated_image", &pixels_of(input)),
        (false, true) => |input| render(input, "generated_images", &input.base64()),
        (false, false) => return None,
    };
    Some(Dialect { format: files.unwrap_or(Format::Jpeg), render })
}

/// The field `prompt` as a list.
#[derive(Deserialize, JsonSchema)]
struct Prompts {
    #[schemars(extend("maxItems" = Limits::IMAGES))]
    prompt: Vec<String>,
}

/// The field `negative_prompt` as a list, as long as `prompt`.
#[derive(Deserialize, JsonSchema)]
struct NegativePrompts {
    negative_prompt: Vec<Option<String>>,
}

/// Reads a request for each prompt. Negative prompts come in pairs with them or one for all.
pub(crate) fn parse(
    mut fields: Fields,
    limits: &Limits,
) -> Result<Vec<DrawRequest>, ValidationError> {
    if !fields.get("prompt").is_some_and(Value::is_array) {
        return Ok(vec![DrawRequest::read(fields, limits)?]);
    }
    let Prompts { prompt: prompts } = fields.read(limits)?;
    if prompts.is_empty() {
        return Err(ValidationError::malformed("prompt", "must not be an empty list"));
    }
    let mut negatives = Vec::new();
    if fields.get("negative_prompt").is_some_and(Value::is_array) {
        negatives = fields.read::<NegativePrompts>(limits)?.negative_prompt;
        if negatives.len() != prompts.len() {
            let reason = format!("must have as many entries as prompt, which is {}", prompts.len());
            return Err(ValidationError::malformed("negative_prompt", reason));
        }
    }
    let all = DrawRequest::read(fields, limits)?;
    let request = |(k, prompt): (usize, String)| {
        let mut request = DrawRequest { prompt: Some(prompt), ..all.clone() };
        request.names.insert("prompt", format!("prompt[{k}]"));
        if let Some(negative) = negatives.get(k) {
            request.negative_prompt.clone_from(negative);
            request.names.insert("negative_prompt", format!("negative_prompt[{k}]"));
        }
        request
    };
    Ok(prompts.into_iter().enumerate().map(request).collect())
}

/// The JSON: one image under `generated_image`, or all in a list.
fn render<T: Serialize>(input: &RenderInput<'_>, name: &str, images: &[T]) -> String {
    let images = match images {
        [image] if name == "generated_image" => serde_json::to_string(image),
        images => serde_json::to_string(images),
    };
    let mut prompts: Vec<&str> = input.specs.iter().map(|spec| spec.prompt.as_str()).collect();
    prompts.dedup();
    let prompt = match prompts[..] {
        [one] => Value::from(one),
        _ => Value::from(prompts),
    };
    // Lists of numbers and strings can always be written.
    format!(r#"{{"{name}":{},"prompt":{prompt}}}"#, images.unwrap_or_default())
}

/// Each image as rows of pixels of red, green and blue.
fn pixels_of<'a>(input: &RenderInput<'a>) -> Vec<Vec<Vec<&'a [u8]>>> {
    let rows = |image: &'a GeneratedImage| {
        let rows = image.rgb.data.chunks(3 * image.rgb.width);
        rows.map(|row| row.chunks(3).collect()).collect()
    };
    input.images.iter().map(rows).collect()
}
