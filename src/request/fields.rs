//! The fields of a request as they were sent: in order, with repetitions, each with the client's
//! name. [`Fields::read`] takes the fields of a typed struct out; the fields that remain at the end
//! are unknown. Errors use the client's names.

use std::collections::HashMap;

use schemars::JsonSchema;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use super::error::ValidationError;
use super::json::{self, MAX_FIELDS, Object};
use super::limits::Limits;
use super::schema;
use super::values::FieldSchema;

/// Memory for the fields of [`Fields::object`], in bytes.
const MAX_REPEATED_BYTES: usize = 1 << 16;

/// The client's names of fields, where they differ from ours.
#[derive(Debug, Clone, Default)]
pub(crate) struct Names(HashMap<String, String>);

impl Names {
    /// Our name and the client's.
    pub(crate) fn insert(&mut self, name: &str, theirs: impl Into<String>) {
        self.0.insert(name.into(), theirs.into());
    }

    /// The client's name of a field.
    pub(crate) fn of<'a>(&'a self, name: &'a str) -> &'a str {
        self.0.get(name).map_or(name, String::as_str)
    }

    /// A sentence that may begin with our name of a field, with the client's name of it.
    pub(crate) fn told(&self, sentence: &str) -> String {
        let (name, rest) = sentence.split_at(sentence.find([' ', ':']).unwrap_or(0));
        format!("{}{rest}", self.of(name))
    }
}

impl<const N: usize> From<[(&str, &str); N]> for Names {
    fn from(names: [(&str, &str); N]) -> Self {
        Self(names.into_iter().map(|(ours, theirs)| (ours.into(), theirs.into())).collect())
    }
}

/// The fields of a request.
#[derive(Debug, Clone, Default)]
pub struct Fields {
    fields: Vec<Field>,
    /// Whether all values are text.
    is_form: bool,
    names: Names,
}

#[derive(Debug, Clone)]
struct Field {
    name: String,
    /// The client's name.
    spelt: String,
    value: Value,
}

impl Fields {
    fn new(pairs: impl IntoIterator<Item = (String, Value)>, is_form: bool) -> Self {
        let field = |(name, value): (String, Value)| Field { spelt: name.clone(), name, value };
        Self { fields: pairs.into_iter().map(field).collect(), is_form, names: Names::default() }
    }

    /// A bare prompt.
    pub fn prompt(prompt: impl Into<String>) -> Self {
        Self::new([("prompt".to_owned(), Value::String(prompt.into()))], false)
    }

    /// The fields of a form. Empty fields are omitted, except the prompt.
    pub fn form(
        pairs: impl IntoIterator<Item = (String, String)>,
    ) -> Result<Self, ValidationError> {
        let mut pairs = pairs.into_iter();
        let fields: Vec<_> = pairs.by_ref().take(MAX_FIELDS).collect();
        if pairs.next().is_some() {
            let message = format!("the form has more than {MAX_FIELDS} fields");
            return Err(ValidationError::body(message));
        }
        let filled = |(name, value): &(String, String)| !value.is_empty() || name == "prompt";
        let fields = fields.into_iter().filter(filled);
        Ok(Self::new(fields.map(|(name, value)| (name, Value::String(value))), true))
    }

    /// The fields of a JSON object.
    pub fn json(text: &str) -> Result<Self, ValidationError> {
        Ok(Self::new(json::fields(text)?, false))
    }

    /// The fields as a JSON object, for a response that repeats them, without those for which
    /// `MAX_REPEATED_BYTES` leave no room: they are held until the response, when the body is not.
    pub(crate) fn object(&self) -> Object {
        let mut left = MAX_REPEATED_BYTES;
        let has_room = |field: &&Field| {
            let rest = left.checked_sub(field.name.len() + size(&field.value));
            left = rest.unwrap_or(left);
            rest.is_some()
        };
        let small = self.fields.iter().filter(has_room);
        small.map(|field| (field.name.clone(), field.value.clone())).collect()
    }

    /// The value of the field of this name.
    pub(crate) fn get(&self, name: &str) -> Option<&Value> {
        self.fields.iter().find(|field| field.name == name).map(|field| &field.value)
    }

    /// The fields that were not read, by the client's names.
    pub(crate) fn rest(&self) -> impl Iterator<Item = (&str, &Value)> {
        self.fields.iter().map(|field| (field.spelt.as_str(), &field.value))
    }

    /// The number of fields.
    pub(crate) fn len(&self) -> usize {
        self.fields.len()
    }

    /// Gives a field of another API our name.
    pub(crate) fn rename(&mut self, theirs: &str, name: &str) {
        for field in self.fields.iter_mut().filter(|field| field.name == theirs) {
            name.clone_into(&mut field.name);
        }
    }

    /// Adds a field with the client's name of it.
    pub(crate) fn add(&mut self, name: &str, spelt: String, value: Value) {
        self.fields.push(Field { name: name.into(), spelt, value });
    }

    /// Drops a field whose value means the same as none.
    pub(crate) fn drop_if(&mut self, name: &str, means_none: impl Fn(&Value) -> bool) {
        self.fields.retain(|field| field.name != name || !means_none(&field.value));
    }

    /// Takes a field out by any of its names, with the client's name of it. Null means none.
    pub(crate) fn take(
        &mut self,
        names: &[&str],
    ) -> Result<Option<(String, Value)>, ValidationError> {
        let mut taken = None;
        for name in names {
            for field in self.fields.extract_if(.., |field| field.name == *name) {
                if taken.is_some() {
                    return Err(ValidationError::malformed(&field.spelt, "is given twice"));
                }
                taken = Some((field.spelt, field.value));
            }
        }
        Ok(taken.filter(|(_, value)| !value.is_null()))
    }

    /// Takes the fields of `T` out, checked against its schema.
    pub(crate) fn read<T: JsonSchema + DeserializeOwned + 'static>(
        &mut self,
        limits: &Limits,
    ) -> Result<T, ValidationError> {
        let mut object = Map::new();
        for (name, schema) in schema::properties::<T>().iter() {
            let names = [vec![name.as_str()], schema::aliases(schema)].concat();
            let Some((spelt, value)) = self.take(&names)? else { continue };
            let is_blank = value.as_str().is_some_and(|text| text.trim().is_empty());
            // A field that a client leaves blank is not given. Prompts may be empty, and an image that
            // is was not read by the client.
            let is_prompt = ["prompt", "negative_prompt"].contains(&name.as_str());
            if is_blank && !is_prompt && schema["contentEncoding"].is_null() {
                continue;
            }
            let field = FieldSchema { name: &spelt, schema, limits };
            let value = field.check(value, self.is_form)?;
            if spelt != *name {
                self.names.insert(name, spelt);
            }
            object.insert(name.clone(), value);
        }
        serde_json::from_value(Value::Object(object))
            .map_err(|error| ValidationError::body(format!("the fields cannot be read: {error}")))
    }

    /// The client's names of all fields that were read, and of those that remain.
    pub(crate) fn into_names(self) -> (Names, Vec<String>) {
        (self.names, self.fields.into_iter().map(|field| field.spelt).collect())
    }
}

/// Memory that a value takes, in bytes, roughly.
fn size(value: &Value) -> usize {
    let inside = match value {
        Value::Null | Value::Bool(_) | Value::Number(_) => 0,
        Value::String(text) => text.len(),
        Value::Array(list) => list.iter().map(size).sum(),
        Value::Object(object) => {
            object.iter().map(|(key, value)| size_of::<String>() + key.len() + size(value)).sum()
        }
    };
    size_of::<Value>() + inside
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::draw::DrawRequest;
    use super::super::limits::LIMITS;
    use super::*;

    fn error(read: Result<DrawRequest, ValidationError>) -> String {
        read.expect_err("an error").to_string()
    }

    #[test]
    fn json_is_checked_against_the_schema() {
        let read = |fields: &str| {
            let body = format!(r#"{{"prompt":"a"{fields}}}"#);
            DrawRequest::read(Fields::json(&body).expect("an object"), &LIMITS)
        };
        let request = read(r#","steps":7,"sampler":"euler","width":null"#).expect("a request");
        assert_eq!((request.num_inference_steps, request.width), (Some(7), None));
        assert_eq!(request.names.of("num_inference_steps"), "steps");
        for (fields, steps, stream) in [
            (r#","steps":7.0,"stream":1"#, 7, true),
            (r#","steps":"7","stream":"False""#, 7, false),
            (r#","steps":" 7.0 ","stream":"on","seed":"","sampler":" ""#, 7, true),
            (r#","steps":7,"stream":"YES","seed":-1"#, 7, true),
        ] {
            let request = read(fields).expect("a request");
            let found = (request.num_inference_steps, request.stream, request.scheduler);
            assert_eq!(found, (Some(steps), Some(stream), None), "{fields}");
        }
        let table = [
            (r#","steps":"seven""#, r#"steps must be a whole number, not "seven""#),
            (r#","steps":2.5"#, "steps must be a whole number, not 2.5"),
            (r#","num_inference_steps":51"#, "num_inference_steps must be from 1 to 50, not 51"),
            (r#","steps":-1"#, "steps must be from 1 to 50, not -1"),
            (r#","steps":"-1.0""#, "steps must be from 1 to 50, not -1"),
            (r#","steps":7,"num_inference_steps":8"#, "steps is given twice"),
            (r#","seed":18446744073709551616"#, "seed must be from -1 to"),
            (r#","seed":-2"#, "seed must be from -1 to"),
            (r#","cfg_scale":"one""#, r#"cfg_scale must be a number, not "one""#),
            (r#","cfg_scale":[1]"#, "cfg_scale must be a number, not a list"),
            (r#","strength":1.1"#, "strength must be from 0 to 1, not 1.1"),
            (r#","stream":2"#, "stream must be true or false, not 2"),
            (r#","stream":"maybe""#, r#"stream must be true or false, not "maybe""#),
            (r#","loras":"[]""#, r#"loras must be a list, not "[]""#),
            (r#","image":5"#, "image must be a string, not 5"),
            (r#","loras":[{},{},{}]"#, "loras has 3 entries; at most 2 are allowed"),
            (r#","loras":[{"name":"a"},{"nam":"b"}]"#, r#"loras[1] must have "name""#),
            (r#","loras":[{"name":"a","scal":1}]"#, r#"loras[0] has no "scal""#),
            (r#","loras":[{"name":"a","scale":101}]"#, "loras[0].scale must be from -100 to 100"),
            (r#","stepz":null"#, r#"unknown field "stepz""#),
        ];
        for (fields, message) in table {
            assert!(error(read(fields)).starts_with(message), "{}", error(read(fields)));
        }
    }

    #[test]
    fn no_more_is_repeated_than_has_room() {
        let member = |k: usize, value: &str| format!(r#""{k}":{value}"#);
        let body = |value: &str, count: usize| {
            let members: Vec<_> = (0..count).map(|k| member(k, value)).collect();
            format!("{{{}}}", members.join(","))
        };
        let text = format!("{:?}", "a".repeat(1 << 10));
        for (body, fewest, most) in [
            (body("7", 200), 200, 200),
            (body(&text, 100), 50, 64),
            (body(&format!("[{}0]", "[],".repeat(100)), 100), 10, 20),
            (body(&format!("{:?}", "a".repeat(1 << 16)), 1), 0, 0),
        ] {
            let count = Fields::json(&body).expect("an object").object().len();
            assert!((fewest..=most).contains(&count), "{count} of {}", &body[..20]);
        }
    }

    #[test]
    fn a_form_is_text_that_stands_for_other_types() {
        let read = |name: &str, value: &str| {
            let pairs = [("prompt", ""), (name, value)].map(|(n, v)| (n.to_owned(), v.to_owned()));
            DrawRequest::read(Fields::form(pairs)?, &LIMITS)
        };
        assert_eq!(read("steps", " 7 ").expect("read").num_inference_steps, Some(7));
        assert_eq!(read("steps", "").expect("read").num_inference_steps, None);
        assert_eq!(read("stream", "true").expect("read").stream, Some(true));
        assert_eq!(
            read("negative_prompt", "7").expect("read").negative_prompt.as_deref(),
            Some("7")
        );
        let loras = read("loras", r#"[{"name":"a","scale":0.5}]"#).expect("read").loras;
        assert_eq!(loras.expect("a list").len(), 1);
        let table =
            [("steps", "twenty"), ("guidance_scale", "NaN"), ("stream", "2"), ("loras", "a")];
        for (name, value) in table {
            assert!(error(read(name, value)).starts_with(&format!("{name} must be ")), "{name}");
        }
    }

    #[test]
    fn the_published_schema_has_the_limits_and_all_names() {
        let mut schema = json!({ "properties": *schema::properties::<DrawRequest>() });
        schema::publish(&mut schema, &LIMITS);
        let fields = &schema["properties"];
        for name in ["num_inference_steps", "steps"] {
            assert_eq!(
                (&fields[name]["minimum"], &fields[name]["maximum"]),
                (&1.into(), &50.into())
            );
            assert_eq!(fields[name].get("x-aliases"), None);
        }
        assert_eq!(fields["steps"]["description"], "Alias of num_inference_steps.");
        assert_eq!(fields["loras"]["maxItems"], 2);
        assert_eq!(fields["image"]["type"], json!(["string", "null"]));
        assert_eq!(fields["prompt"]["type"], "string");
        assert!(fields.get("names").is_none());
    }
}
