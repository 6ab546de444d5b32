//! The dialect of SageMaker JumpStart's Stable Diffusion. A prompt as `application/x-text` gets
//! nested arrays of RGB values. JSON has native fields, and the prompt may be a list.
//! `Accept: application/json;jpeg` selects files in base64.
//!
//! JSON without that `Accept` is a native request and gets the native response.

use axum::http::HeaderMap;
use axum::http::header::ACCEPT;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::body::{BodyKind, JUMPSTART_TEXT, essence};
use super::render::{Dialect, ParsedRequest, RenderInput};
use crate::engine::GeneratedImage;
use crate::image::Format;
use crate::request::{DrawRequest, Fields, Limits, ValidationError};

/// What asks for files.
const FILES: [(&str, Format); 2] =
    [("application/json;jpeg", Format::Jpeg), ("application/json;png", Format::Png)];

/// The dialect in which a request expects its answer, if it is this one.
pub(crate) fn detect(headers: &HeaderMap) -> Option<Dialect> {
    let accept = headers.get(ACCEPT).map(|value| String::from_utf8_lossy(value.as_bytes()));
    let accept = accept.unwrap_or_default().to_ascii_lowercase().replace(' ', "");
    let files = FILES.iter().find(|(media, _)| accept == *media).map(|(_, format)| *format);
    let text = essence(headers).is_some_and(|essence| essence == JUMPSTART_TEXT);
    let render: fn(&RenderInput<'_>) -> String = match (text, files.is_some()) {
        (true, true) => |pictures| render(pictures, "generated_image", &files_of(pictures)),
        (true, false) => |pictures| render(pictures, "generated_image", &pixels_of(pictures)),
        (false, true) => |pictures| render(pictures, "generated_images", &files_of(pictures)),
        (false, false) => return None,
    };
    Some(Dialect { format: files.unwrap_or(Format::Jpeg), render })
}

/// Several prompts.
#[derive(Deserialize, JsonSchema)]
struct Prompts {
    #[schemars(extend("maxItems" = Limits::IMAGES))]
    prompt: Vec<String>,
}

/// As many negative prompts.
#[derive(Deserialize, JsonSchema)]
struct NegativePrompts {
    negative_prompt: Vec<Option<String>>,
}

/// Reads a request for each prompt. Negative prompts come in pairs with them or one for all.
pub(crate) fn parse(
    mut fields: Fields,
    dialect: Dialect,
    limits: &Limits,
) -> Result<ParsedRequest, ValidationError> {
    let parsed = |requests| Ok(ParsedRequest { requests, kind: BodyKind::Json, dialect });
    if !fields.is_list("prompt") {
        return parsed(vec![DrawRequest::read(fields, limits)?]);
    }
    let Prompts { prompt: prompts } = fields.read(limits)?;
    if prompts.is_empty() {
        return Err(ValidationError::malformed("prompt", "must not be an empty list"));
    }
    let mut negatives = Vec::new();
    if fields.is_list("negative_prompt") {
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
    parsed(prompts.into_iter().enumerate().map(request).collect())
}

/// One picture, or all, under a name that says which.
fn render<T: Serialize>(pictures: &RenderInput<'_>, name: &str, images: &[T]) -> String {
    let images = match images {
        [image] if name == "generated_image" => serde_json::to_string(image),
        images => serde_json::to_string(images),
    };
    let mut prompts: Vec<&str> = pictures.specs.iter().map(|spec| spec.prompt.as_str()).collect();
    prompts.dedup();
    let prompt = match prompts[..] {
        [one] => Value::from(one),
        _ => Value::from(prompts),
    };
    // Lists of numbers and strings can always be written.
    format!(r#"{{"{name}":{},"prompt":{prompt}}}"#, images.unwrap_or_default())
}

fn files_of(pictures: &RenderInput<'_>) -> Vec<String> {
    pictures.base64().collect()
}

/// Each picture as rows of pixels of red, green and blue.
fn pixels_of<'a>(pictures: &RenderInput<'a>) -> Vec<Vec<Vec<&'a [u8]>>> {
    let rows = |drawn: &'a GeneratedImage| {
        let rows = drawn.rgb.data.chunks(3 * drawn.rgb.width);
        rows.map(|row| row.chunks(3).collect()).collect()
    };
    pictures.drawn.iter().map(rows).collect()
}
