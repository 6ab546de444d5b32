//! The fields of a request as they came over the wire, and how each kind of value is read.

use std::fmt;
use std::ops::RangeInclusive;
use std::sync::{Arc, Mutex, PoisonError};

use base64::Engine as _;
use base64::alphabet::STANDARD;
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};
use serde::de::{Deserializer, MapAccess, Visitor};
use serde_json::{Value, json};

use super::error::ValidationError;

/// Fields of one request, known or not.
const MAX_FIELDS: usize = 256;

/// Clients differ in whether they pad.
const BASE64: GeneralPurpose = GeneralPurpose::new(
    &STANDARD,
    GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent),
);

/// The fields of a request as they came, in order and with repetitions.
#[derive(Debug, Clone, Default)]
pub struct Fields {
    values: Vec<Field>,
    /// Whether values carry their type (JSON) or are all text (a form).
    pub(super) typed: bool,
    /// Notes what is asked of the fields, when that is what is wanted.
    record: Option<Arc<Mutex<Vec<Described>>>>,
}

/// A field as it is read: its name, its other names, and the JSON schema of its values.
#[derive(Debug, Clone)]
pub(crate) struct Described {
    pub(crate) names: Vec<&'static str>,
    pub(crate) schema: Value,
}

#[derive(Debug, Clone)]
struct Field {
    /// The native name.
    key: String,
    /// The client's name for it, in which errors speak.
    spelt: String,
    value: Value,
}

impl Field {
    fn new((key, value): (String, Value)) -> Self {
        Self { spelt: key.clone(), key, value }
    }
}

impl Fields {
    /// A bare prompt.
    pub fn prompt(prompt: impl Into<String>) -> Self {
        let prompt = Field::new(("prompt".into(), Value::String(prompt.into())));
        Self { values: vec![prompt], typed: true, record: None }
    }

    /// The fields of a form. An empty one was left blank, except that a prompt may be empty.
    pub fn form(pairs: impl IntoIterator<Item = (String, String)>) -> Self {
        let filled = |(name, value): &(String, String)| !value.is_empty() || name == "prompt";
        let values = pairs.into_iter().filter(filled);
        let values = values.map(|(name, value)| Field::new((name, Value::String(value))));
        Self { values: values.collect(), typed: false, record: None }
    }

    /// A JSON object.
    pub fn json(text: &str) -> Result<Self, ValidationError> {
        // serde_json would quote a string that stands there, and so what a user typed.
        if !text.trim_ascii_start().starts_with('{') {
            return Err(ValidationError::body("the body is not a JSON object"));
        }
        let mut reader = serde_json::Deserializer::from_str(text);
        let values = reader.deserialize_map(Pairs).and_then(|values| {
            reader.end()?;
            Ok(values)
        });
        match values {
            Ok(values) => Ok(Self {
                values: values.into_iter().map(Field::new).collect(),
                typed: true,
                record: None,
            }),
            Err(error) => {
                Err(ValidationError::body(format!("the body is not a JSON object: {error}")))
            }
        }
    }

    /// What `read` asks of the fields: so a description cannot say anything else than the code.
    pub(crate) fn described(read: impl FnOnce(Self)) -> Vec<Described> {
        let record = Arc::default();
        let mut fields = Self::prompt("");
        fields.record = Some(Arc::clone(&record));
        read(fields);
        record.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(super) fn note(&self, names: &[&'static str], schema: impl FnOnce() -> Value) {
        if let Some(record) = &self.record {
            let described = Described { names: names.into(), schema: schema() };
            record.lock().unwrap_or_else(PoisonError::into_inner).push(described);
        }
    }

    /// Whether there is a field of this name.
    pub(crate) fn has(&self, name: &str) -> bool {
        self.values.iter().any(|field| field.key == name)
    }

    /// Whether the field of this name is a list.
    pub(crate) fn is_list(&self, name: &str) -> bool {
        self.values.iter().any(|field| field.key == name && field.value.is_array())
    }

    /// The client's name for a native field.
    pub(super) fn spelt(&self, name: &str) -> String {
        let field = self.values.iter().find(|field| field.key == name);
        field.map_or(name, |field| &field.spelt).to_owned()
    }

    /// The whole number of this name, if it is one.
    pub(crate) fn peek(&self, name: &str) -> Option<u64> {
        self.values.iter().find(|field| field.key == name)?.value.as_u64()
    }

    /// How many there are.
    pub(crate) fn len(&self) -> usize {
        self.values.len()
    }

    /// Understands a field of another dialect as a native one.
    pub(crate) fn rename(&mut self, theirs: &str, native: &str) {
        for field in self.values.iter_mut().filter(|field| field.key == theirs) {
            native.clone_into(&mut field.key);
        }
    }

    /// Adds a native field that the client spelt otherwise.
    pub(crate) fn add(&mut self, native: &str, spelt: &str, value: impl Into<Value>) {
        let (key, spelt, value) = (native.to_owned(), spelt.to_owned(), value.into());
        self.values.push(Field { key, spelt, value });
    }

    /// Takes a field out under the name that the client used. JSON's null means absent.
    pub(crate) fn take(
        &mut self,
        names: &[&str],
    ) -> Result<Option<(String, Value)>, ValidationError> {
        let mut taken = None;
        for name in names {
            for field in self.values.extract_if(.., |field| field.key == *name) {
                if taken.is_some() {
                    return Err(ValidationError::malformed(&field.spelt, "is given twice"));
                }
                taken = Some((field.spelt, field.value));
            }
        }
        Ok(taken.filter(|(_, value)| !value.is_null()))
    }

    /// A string of at most `max` bytes.
    pub(crate) fn text(
        &mut self,
        names: &[&'static str],
        max: usize,
    ) -> Result<Option<String>, ValidationError> {
        self.note(names, || json!({ "type": "string" }));
        match self.take(names)? {
            None => Ok(None),
            Some((name, Value::String(text))) if text.len() > max => {
                let bytes = text.len();
                Err(ValidationError::range(
                    &name,
                    format!("has {bytes} bytes; at most {max} are allowed"),
                ))
            }
            Some((_, Value::String(text))) => Ok(Some(text)),
            Some((name, other)) => Err(ValidationError::malformed(
                &name,
                format!("must be a string, not {}", kind(&other)),
            )),
        }
    }

    pub(crate) fn whole(
        &mut self,
        names: &[&'static str],
        range: RangeInclusive<u64>,
    ) -> Result<Option<u64>, ValidationError> {
        self.note(
            names,
            || json!({ "type": "integer", "minimum": range.start(), "maximum": range.end() }),
        );
        let Some((name, value)) = self.take(names)? else { return Ok(None) };
        let value = self.numeral(&name, value, "a whole number")?;
        let in_range = value.as_u64().filter(|whole| range.contains(whole));
        if value.as_f64().is_some_and(|value| value.fract() != 0.0) {
            return Err(ValidationError::malformed(
                &name,
                format!("must be a whole number, not {value}"),
            ));
        }
        in_range.map(Some).ok_or_else(|| {
            let (low, high) = range.into_inner();
            ValidationError::range(&name, format!("must be from {low} to {high}, not {value}"))
        })
    }

    pub(crate) fn number(
        &mut self,
        names: &[&'static str],
        range: RangeInclusive<f64>,
    ) -> Result<Option<f64>, ValidationError> {
        self.note(
            names,
            || json!({ "type": "number", "minimum": range.start(), "maximum": range.end() }),
        );
        let Some((name, value)) = self.take(names)? else { return Ok(None) };
        let value = self.numeral(&name, value, "a number")?;
        value.as_f64().filter(|number| range.contains(number)).map(Some).ok_or_else(|| {
            let (low, high) = range.into_inner();
            ValidationError::range(&name, format!("must be from {low} to {high}, not {value}"))
        })
    }

    /// A JSON number, or the text of one in a form.
    fn numeral(
        &self,
        name: &str,
        value: Value,
        wanted: &str,
    ) -> Result<serde_json::Number, ValidationError> {
        match value {
            Value::Number(number) => Ok(number),
            Value::String(text) if !self.typed => serde_json::from_str(text.trim()).map_err(|_| {
                ValidationError::malformed(name, format!("must be {wanted}, not {text:?}"))
            }),
            other => Err(ValidationError::malformed(
                name,
                format!("must be {wanted}, not {}", kind(&other)),
            )),
        }
    }

    pub(crate) fn flag(&mut self, names: &[&'static str]) -> Result<Option<bool>, ValidationError> {
        self.note(names, || json!({ "type": "boolean" }));
        match self.take(names)? {
            None => Ok(None),
            Some((_, Value::Bool(flag))) => Ok(Some(flag)),
            Some((name, Value::String(text))) if !self.typed => {
                let flag = text.trim().parse().map_err(|_| {
                    ValidationError::malformed(
                        &name,
                        format!("must be true or false, not {text:?}"),
                    )
                })?;
                Ok(Some(flag))
            }
            Some((name, other)) => {
                let found = kind(&other);
                Err(ValidationError::malformed(
                    &name,
                    format!("must be true or false, not {found}"),
                ))
            }
        }
    }

    pub(super) fn choice<T: std::str::FromStr<Err = String>>(
        &mut self,
        names: &[&'static str],
    ) -> Result<Option<T>, ValidationError> {
        self.note(names, || json!({ "type": "string" }));
        match self.take(names)? {
            None => Ok(None),
            Some((name, Value::String(text))) => text
                .parse()
                .map(Some)
                .map_err(|reason| ValidationError::range(&name, format!("is an {reason}"))),
            Some((name, other)) => Err(ValidationError::malformed(
                &name,
                format!("must be a string, not {}", kind(&other)),
            )),
        }
    }

    /// One of a few words.
    pub(crate) fn one_of(
        &mut self,
        names: &[&'static str],
        words: &[&'static str],
    ) -> Result<Option<&'static str>, ValidationError> {
        self.note(names, || json!({ "type": "string", "enum": words }));
        let Some((name, value)) = self.take(names)? else { return Ok(None) };
        words.iter().find(|word| value == **word).map(|word| Some(*word)).ok_or_else(|| {
            ValidationError::range(
                &name,
                format!("must be one of {}, not {value}", words.join(", ")),
            )
        })
    }

    /// What nobody took is a mistake that the client should hear of.
    pub(super) fn finish(self) -> Result<(), ValidationError> {
        match self.values.into_iter().next() {
            None => Ok(()),
            Some(Field { spelt, .. }) => {
                let name: String = spelt.chars().take(64).collect();
                let message = format!("unknown field {name:?}");
                Err(ValidationError::Malformed { param: Some(name), message })
            }
        }
    }
}

/// The type of a value, for people.
pub(crate) fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}

/// A picture's file out of base64, bare or as a data URL, in lines or in one.
pub(crate) fn file(name: &str, mut text: String) -> Result<Vec<u8>, ValidationError> {
    if let Some(comma) = text.starts_with("data:").then(|| text.find(',')).flatten() {
        text.drain(..=comma);
    }
    text.retain(|c| !c.is_ascii_whitespace());
    let broken = |error| ValidationError::malformed(name, format!("is not base64: {error}"));
    BASE64.decode(text).map_err(broken)
}

/// Reads a JSON object without losing repeated keys, as a map would.
struct Pairs;

impl<'de> Visitor<'de> for Pairs {
    type Value = Vec<(String, Value)>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut pairs = Vec::new();
        while let Some(pair) = map.next_entry()? {
            if pairs.len() == MAX_FIELDS {
                return Err(serde::de::Error::custom(format!("more than {MAX_FIELDS} fields")));
            }
            pairs.push(pair);
        }
        Ok(pairs)
    }
}
