//! Hugging Face's two formats. The inference toolkit of their SageMaker containers and
//! `InferenceClient.text_to_image` send `inputs` with `parameters` and receive a bare JSON string of
//! base64. Their older SageMaker examples have the parameters beside `inputs` and receive
//! `generated_images`.

use schemars::JsonSchema;
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::render::{Dialect, RenderInput};
use crate::image::Format;
use crate::request::{DrawRequest, Fields, Limits, ValidationError};

const TOOLKIT: Dialect = Dialect { format: Format::Png, render: toolkit };
const EXAMPLES: Dialect = Dialect { format: Format::Jpeg, render: examples };

/// The fields that only these formats have.
#[derive(Deserialize, JsonSchema)]
struct Envelope {
    /// Native fields.
    parameters: Option<Map<String, Value>>,
    /// Accepted and ignored: how to wait and what to cache.
    #[serde(rename = "options")]
    _options: Option<Value>,
}

/// Reads a request in one of these formats.
pub(crate) fn parse(
    mut fields: Fields,
    limits: &Limits,
) -> Result<(DrawRequest, Dialect), ValidationError> {
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
    Ok((DrawRequest::read(fields, limits)?, dialect))
}

/// A string, or a list of them where the toolkit would drop all but the first.
fn toolkit(input: &RenderInput<'_>) -> String {
    match &input.base64()[..] {
        [one] => json!(one),
        images => json!(images),
    }
    .to_string()
}

fn examples(input: &RenderInput<'_>) -> String {
    json!({ "generated_images": input.base64() }).to_string()
}
