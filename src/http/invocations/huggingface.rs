//! Hugging Face's dialect: `inputs` with `parameters`, as the inference toolkit of their SageMaker
//! containers and `InferenceClient.text_to_image` speak it, answered with a bare JSON string of
//! base64; and the older one of their SageMaker examples, with the parameters beside `inputs`
//! and `generated_images` in the answer.

use schemars::JsonSchema;
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::body::BodyKind;
use super::render::{Dialect, ParsedRequest, RenderInput};
use crate::image::Format;
use crate::request::{DrawRequest, Fields, Limits, ValidationError};

const TOOLKIT: Dialect = Dialect { format: Format::Png, render: toolkit };
const EXAMPLES: Dialect = Dialect { format: Format::Jpeg, render: examples };

/// The fields that only this dialect has.
#[derive(Deserialize, JsonSchema)]
struct Envelope {
    /// Native fields.
    parameters: Option<Map<String, Value>>,
    /// Accepted and ignored: how to wait and what to cache.
    #[serde(rename = "options")]
    _options: Option<Value>,
}

/// Reads a request in this dialect.
pub(crate) fn parse(mut fields: Fields, limits: &Limits) -> Result<ParsedRequest, ValidationError> {
    fields.rename("inputs", "prompt");
    let Envelope { parameters, .. } = fields.read(limits)?;
    let dialect = if parameters.is_some() || fields.len() == 1 { TOOLKIT } else { EXAMPLES };
    for (key, value) in parameters.into_iter().flatten() {
        match value {
            Value::Object(size) if key == "target_size" => {
                for (side, value) in size {
                    fields.add(&side, format!("parameters.{key}.{side}"), value);
                }
            }
            value => fields.add(&key, format!("parameters.{key}"), value),
        }
    }
    let request = DrawRequest::read(fields, limits)?;
    Ok(ParsedRequest { requests: vec![request], kind: BodyKind::Json, dialect })
}

/// A string, or a list of them where the toolkit would drop all but the first.
fn toolkit(pictures: &RenderInput<'_>) -> String {
    let mut images: Vec<Value> = pictures.base64().map(Value::from).collect();
    match &mut images[..] {
        [one] => one.take(),
        _ => Value::Array(images),
    }
    .to_string()
}

fn examples(pictures: &RenderInput<'_>) -> String {
    let images: Vec<String> = pictures.base64().collect();
    json!({ "generated_images": images }).to_string()
}
