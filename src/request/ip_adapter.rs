//! The IP-Adapters of a request: their fields.

use std::borrow::Cow;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use sd_models::{BlockScale, ControlPasses, IpScale, MAX_IP_SCALE, UNetPart};
use serde::Deserialize;
use serde_json::Value;

use super::error::{ValidationError, brief};
use super::images::ImageFile;

/// Maximum number of adapters of an image, and of pictures of an adapter.
pub(super) const MAX_IP_ADAPTERS: usize = 4;
const MAX_PICTURES: usize = 8;

/// Parts of the UNet, by diffusers' names.
const PARTS: [(&str, UNetPart); 3] =
    [("down", UNetPart::Down), ("mid", UNetPart::Middle), ("up", UNetPart::Up)];

/// One, or a list of at most `MOST`.
#[derive(Debug, Clone, Deserialize)]
#[serde(untagged)]
pub(crate) enum OneOrMany<T, const MOST: usize> {
    /// Alone.
    One(T),
    /// In a list.
    Many(Vec<T>),
}

impl<T, const MOST: usize> OneOrMany<T, MOST> {
    /// All.
    pub(crate) fn all(&self) -> &[T] {
        match self {
            Self::One(one) => std::slice::from_ref(one),
            Self::Many(many) => many,
        }
    }

    /// All, to change.
    pub(crate) fn all_mut(&mut self) -> &mut [T] {
        match self {
            Self::One(one) => std::slice::from_mut(one),
            Self::Many(many) => many,
        }
    }
}

impl<T: JsonSchema, const MOST: usize> JsonSchema for OneOrMany<T, MOST> {
    fn schema_name() -> Cow<'static, str> {
        format!("OneOrMany{}", T::schema_name()).into()
    }

    fn inline_schema() -> bool {
        true
    }

    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        let one = T::json_schema(generator);
        let mut schema = one.clone();
        let kind = one.get("type").cloned().unwrap_or_default();
        schema.insert("type".into(), vec![kind, "array".into()].into());
        schema.insert("items".into(), one.to_value());
        schema.insert("maxItems".into(), MOST.into());
        schema
    }
}

/// An IP-Adapter of a request: a picture as a prompt.
#[derive(Debug, Clone, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct IpAdapterFields {
    /// Name of the adapter: of its file without the extension.
    #[schemars(required)]
    pub(crate) model: Option<String>,
    /// Picture that the images are to look like, in base64 or as a data URL, or a list of them. Its
    /// middle square is seen.
    #[schemars(required)]
    pub(crate) image: Option<OneOrMany<ImageFile, MAX_PICTURES>>,
    /// Factor of what the adapter adds. Default: 1. Or diffusers' dictionary of the parts of the UNet
    /// in which it adds something: {"down": {"block_2": [0, 1]}, "up": {"block_0": [0, 1, 0]}}.
    pub(crate) scale: Option<Scale>,
    /// Share of the steps before which the adapter adds nothing. Default: 0.
    #[schemars(extend("minimum" = 0, "maximum" = 1))]
    pub(crate) start: Option<f64>,
    /// Share of the steps after which the adapter adds nothing. Default: 1.
    #[schemars(extend("minimum" = 0, "maximum" = 1))]
    pub(crate) end: Option<f64>,
    /// What is special about a unit of AUTOMATIC1111's extension.
    #[serde(skip)]
    pub(crate) unit: Option<IpUnit>,
    /// Pixels of what the adapter sees, along one side, once its file is found.
    #[serde(skip)]
    pub(crate) side: Option<usize>,
}

/// A unit of AUTOMATIC1111's extension with an IP-Adapter.
#[derive(Debug, Clone)]
pub(crate) struct IpUnit {
    /// Where it stands in the body.
    pub(crate) name: String,
    pub(crate) passes: ControlPasses,
    /// What of it has no effect.
    pub(crate) warnings: Vec<String>,
}

/// A number, or numbers by parts of the UNet.
#[derive(Debug, Clone, Deserialize)]
pub(crate) struct Scale(Value);

impl From<f64> for Scale {
    fn from(scale: f64) -> Self {
        Self(scale.into())
    }
}

impl JsonSchema for Scale {
    fn schema_name() -> Cow<'static, str> {
        "Scale".into()
    }

    fn inline_schema() -> bool {
        true
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "type": ["number", "object"], "minimum": -MAX_IP_SCALE, "maximum": MAX_IP_SCALE,
        })
    }
}

impl Scale {
    /// One for each transformer of the UNet, as the advanced weights of a unit.
    pub(crate) fn each(scales: &[f64]) -> Self {
        Self(scales.into())
    }

    /// What it stands for, in the field `name`.
    pub(super) fn read(&self, name: &str) -> Result<IpScale, ValidationError> {
        let parts = match &self.0 {
            Value::Object(parts) => parts,
            each @ Value::Array(_) => return Ok(IpScale::Transformers(numbers(name, each)?)),
            number => return Ok(number.as_f64().unwrap_or(1.0).into()),
        };
        let mut blocks = Vec::new();
        for (key, value) in parts {
            let name = format!("{name}.{}", brief(key));
            let Some((_, part)) = PARTS.iter().find(|(known, _)| known == key) else {
                return Err(ValidationError::range(&name, "is unknown; known are down, mid, up"));
            };
            let part = *part;
            let Value::Object(own) = value else {
                blocks.push(BlockScale { part, block: None, scales: numbers(&name, value)? });
                continue;
            };
            for (key, value) in own {
                let name = format!("{name}.{}", brief(key));
                let block = key.strip_prefix("block_").and_then(|number| number.parse().ok());
                if block.is_none() || part == UNetPart::Middle {
                    let reason = "is no block: those of down and up are block_0, block_1, ...";
                    return Err(ValidationError::range(&name, reason));
                }
                blocks.push(BlockScale { part, block, scales: numbers(&name, value)? });
            }
        }
        Ok(IpScale::Blocks(blocks))
    }
}

/// A number, or a list of them.
fn numbers(name: &str, value: &Value) -> Result<Vec<f64>, ValidationError> {
    let one = std::slice::from_ref(value);
    let list = value.as_array().map_or(one, |list| list);
    let numbers: Option<Vec<_>> = list.iter().map(Value::as_f64).collect();
    let numbers = numbers.filter(|numbers| !numbers.is_empty());
    numbers.ok_or_else(|| ValidationError::malformed(name, "must be a number or a list of numbers"))
}
