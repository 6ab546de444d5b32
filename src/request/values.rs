//! Checks a value of a request against the schema of its field: type and bounds. One reader for all
//! APIs: clients write numbers and switches as text (`"7"`, `"False"`), whole numbers as `7.0` and
//! switches as 1 and 0; what they mean is clear, so it is taken. Null and blank fields have been
//! removed before.

use serde_json::{Number, Value};

use super::error::{ValidationError, brief};
use super::json;
use super::limits::Limits;

/// The JSON types of schemas and their names in error messages.
const TYPES: [(&str, &str); 6] = [
    ("string", "a string"),
    ("integer", "a whole number"),
    ("number", "a number"),
    ("boolean", "true or false"),
    ("array", "a list"),
    ("object", "an object"),
];

/// Maximum length of a text that may be meant as a number or a switch, in bytes.
const MAX_WORD_BYTES: usize = 64;

/// A field, by the client's name of it.
#[derive(Clone, Copy)]
pub(super) struct FieldSchema<'a> {
    pub(super) name: &'a str,
    pub(super) schema: &'a Value,
    pub(super) limits: &'a Limits,
}

impl FieldSchema<'_> {
    /// Checks a value. In a form, lists and objects are text, too.
    pub(super) fn check(&self, value: Value, is_form: bool) -> Result<Value, ValidationError> {
        let value = match value {
            // A blank member of an object, as a blank field.
            Value::String(text)
                if text.trim().is_empty() && !self.allows("string") && self.allows("null") =>
            {
                Value::Null
            }
            Value::String(text) if !self.allows("string") => self.written(&text, is_form)?,
            Value::Number(number) if !self.allows("number") => self.whole(number),
            value => value,
        };
        let fits = match &value {
            Value::Null => self.allows("null"),
            Value::Bool(_) => self.allows("boolean"),
            Value::Number(number) => {
                self.allows("number") || self.allows("integer") && whole(number)
            }
            Value::String(_) => self.allows("string"),
            Value::Array(_) => self.allows("array"),
            Value::Object(_) => self.allows("object"),
        };
        if !fits {
            return Err(self.wrong(&found(&value)));
        }
        self.bounds(&value).map_err(|reason| ValidationError::range(self.name, reason))?;
        let inside = |name: String, schema: &Value, value: Value| match schema {
            Value::Object(_) => FieldSchema { name: &name, schema, ..*self }.check(value, false),
            _ => Ok(value),
        };
        match value {
            Value::Array(list) => {
                let item = |k| format!("{}[{k}]", self.name);
                let items = list.into_iter().enumerate();
                items.map(|(k, value)| inside(item(k), &self.schema["items"], value)).collect()
            }
            Value::Object(object) => {
                self.members(&object)?;
                let member = |(key, value): (String, Value)| {
                    let schema = &self.schema["properties"][&key];
                    let value = inside(format!("{}.{key}", self.name), schema, value)?;
                    Ok((key, value))
                };
                object.into_iter().map(member).collect::<Result<_, _>>().map(Value::Object)
            }
            value => Ok(value),
        }
    }

    /// The value that a text stands for.
    fn written(&self, text: &str, is_form: bool) -> Result<Value, ValidationError> {
        let trimmed = text.trim();
        let word = trimmed.to_ascii_lowercase();
        let is_any = |words: &[&str]| words.contains(&word.as_str());
        let value = match self.allows("boolean") {
            true if is_any(&["true", "t", "yes", "y", "on"]) => Some(true.into()),
            true if is_any(&["false", "f", "no", "n", "off"]) => Some(false.into()),
            _ => json::value(trimmed),
        };
        match value {
            Some(Value::Number(number)) if !self.allows("number") => Ok(self.whole(number)),
            Some(value @ (Value::Number(_) | Value::Bool(_))) => Ok(value),
            Some(value @ (Value::Array(_) | Value::Object(_))) if is_form => Ok(value),
            // A long text is no number: it is of no use in the message.
            _ if is_form || text.len() <= MAX_WORD_BYTES => {
                Err(self.wrong(&format!("{:?}", brief(text))))
            }
            _ => Err(self.wrong("a string")),
        }
    }

    /// A number where the schema has whole numbers or switches: 7.0 is 7, 1 is true.
    fn whole(&self, number: Number) -> Value {
        /// From here on, not every whole number is a double.
        const EXACT: f64 = (1_u64 << 53) as f64;
        let value = number.as_f64().filter(|value| value.fract() == 0.0 && value.abs() < EXACT);
        match value {
            Some(value) if self.allows("boolean") && [0.0, 1.0].contains(&value) => {
                (value == 1.0).into()
            }
            Some(value) if number.is_f64() => (value as i64).into(),
            _ => number.into(),
        }
    }

    /// Whether the schema has this type, or none.
    fn allows(&self, name: &str) -> bool {
        match &self.schema["type"] {
            Value::Null => true,
            Value::Array(types) => types.iter().any(|allowed| allowed == name),
            allowed => allowed == name,
        }
    }

    fn wrong(&self, found: &str) -> ValidationError {
        let titles = TYPES.iter().filter(|(name, _)| self.allows(name)).map(|(_, title)| *title);
        let expected = titles.collect::<Vec<_>>().join(" or ");
        ValidationError::malformed(self.name, format!("must be {expected}, not {found}"))
    }

    fn bounds(&self, value: &Value) -> Result<(), String> {
        let bound = |key| self.limits.bound(&self.schema[key]);
        let at_most = |key, unit, length: &dyn Fn() -> usize| match bound(key).as_u64() {
            Some(max) if length() as u64 > max => {
                Err(format!("has {} {unit}; at most {max} are allowed", length()))
            }
            _ => Ok(()),
        };
        match value {
            Value::Number(number) => {
                let (low, high) = (bound("minimum"), bound("maximum"));
                let double = number.as_f64();
                // A whole number beyond 64 bits is read as a double.
                let fits = self.allows("number") || !number.is_f64();
                let fits = fits && (low.is_null() || double >= low.as_f64());
                if fits && (high.is_null() || double <= high.as_f64()) {
                    return Ok(());
                }
                // Whole ones without a fraction, however they are spelt.
                let told = |number: &Value| match number.as_f64() {
                    Some(double) if number.is_f64() => double.to_string(),
                    _ => number.to_string(),
                };
                let number = told(value);
                Err(match high {
                    Value::Null => format!("must be at least {}, not {number}", told(&low)),
                    high => format!("must be from {} to {}, not {number}", told(&low), told(&high)),
                })
            }
            Value::String(text) => at_most("maxLength", "characters", &|| text.chars().count()),
            Value::Array(list) => at_most("maxItems", "entries", &|| list.len()),
            _ => Ok(()),
        }?;
        match self.schema["enum"].as_array() {
            Some(words) if !words.contains(value) => {
                let words: Vec<&str> = words.iter().filter_map(Value::as_str).collect();
                Err(format!("must be one of {}, not {value}", words.join(", ")))
            }
            _ => Ok(()),
        }
    }

    /// Checks that an object has what is required and, where the schema says so, nothing unknown.
    fn members(&self, object: &serde_json::Map<String, Value>) -> Result<(), ValidationError> {
        for name in self.schema["required"].as_array().into_iter().flatten() {
            if name.as_str().is_some_and(|name| object.get(name).is_none_or(Value::is_null)) {
                return Err(ValidationError::malformed(self.name, format!("must have {name}")));
            }
        }
        let unknown = |name: &&String| self.schema["properties"].get(*name).is_none();
        match object.keys().find(unknown).filter(|_| self.schema["additionalProperties"] == false) {
            Some(name) => Err(ValidationError::malformed(self.name, format!("has no {name:?}"))),
            None => Ok(()),
        }
    }
}

fn whole(number: &Number) -> bool {
    number.as_f64().is_some_and(|number| number.fract() == 0.0)
}

/// A value in error messages.
pub(crate) fn found(value: &Value) -> String {
    match value {
        Value::String(_) => "a string".into(),
        Value::Array(_) => "a list".into(),
        Value::Object(_) => "an object".into(),
        plain => plain.to_string(),
    }
}
