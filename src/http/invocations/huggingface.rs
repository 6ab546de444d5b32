//! Hugging Face's dialect: `inputs` with `parameters`, as the inference toolkit of their SageMaker
//! containers and `InferenceClient.text_to_image` speak it, answered with a bare JSON string of
//! base64; and the older one of their SageMaker examples, with the parameters beside `inputs`
//! and `generated_images` in the answer.

use serde_json::{Value, json};

use super::body::BodyKind;
use super::render::{Dialect, ParsedRequest, RenderInput};
use crate::image::Format;
use crate::request::{Fields, ValidationError, kind};

const TOOLKIT: Dialect = Dialect { format: Format::Png, render: toolkit };
const EXAMPLES: Dialect = Dialect { format: Format::Jpeg, render: examples };

/// Their fields as native ones.
pub(crate) fn parse(mut fields: Fields) -> Result<ParsedRequest, ValidationError> {
    fields.rename("inputs", "prompt");
    // How to wait and what to cache: advice to a service that is not this one.
    fields.take(&["options"])?;
    let nested = fields.take(&["parameters"])?;
    let dialect = if nested.is_some() || fields.len() == 1 { TOOLKIT } else { EXAMPLES };
    if let Some((name, parameters)) = nested {
        let Value::Object(parameters) = parameters else {
            let found = kind(&parameters);
            return Err(ValidationError::malformed(
                &name,
                format!("must be an object, not {found}"),
            ));
        };
        for (key, value) in parameters {
            match value {
                Value::Object(size) if key == "target_size" => {
                    for (side, value) in size {
                        fields.add(&side, &format!("{name}.{key}.{side}"), value);
                    }
                }
                value => fields.add(&key, &format!("{name}.{key}"), value),
            }
        }
    }
    Ok(ParsedRequest { requests: vec![fields], speech: BodyKind::Json, dialect })
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
