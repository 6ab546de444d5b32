//! JSON files of which every key must be read, ignored by name, or rejected.

use std::collections::HashSet;
use std::fmt;

use serde::de::{DeserializeOwned, IgnoredAny, MapAccess, Visitor};
use serde::{Deserialize, Deserializer};
use serde_json::{Map, Value, json};

use super::source::Source;
use crate::error::{Error, Result};

/// Maximum of what a network counts: more than any has, and sums and products of it fit.
const MAX_COUNT: usize = 1_000_000;

/// A JSON object from which keys are taken one by one.
pub struct Keys {
    file: String,
    map: Map<String, Value>,
}

impl Keys {
    /// Reads a file of the model.
    pub fn read(source: &Source, file: &str) -> Result<Self> {
        let text = source.require(file)?;
        let map = object(file, &text)?;
        if let Ok(Pairs(Some(key))) = serde_json::from_slice(&text) {
            return Err(Error::config(file, format!("{key}: is given twice")));
        }
        Ok(Self { file: file.into(), map })
    }

    pub(crate) fn new(file: impl Into<String>, value: Value) -> Result<Self> {
        match value {
            Value::Object(map) => Ok(Self { file: file.into(), map }),
            _ => Err(Error::config(file, "not a JSON object")),
        }
    }

    /// The keys of a nested object; none if it is absent or null.
    pub(crate) fn nested(&mut self, key: &str) -> Result<Self> {
        let file = format!("{}: {key}", self.file);
        Self::new(file, Value::Object(self.take(key, Map::new())?))
    }

    /// Replaces keys by those of another object.
    pub(crate) fn overlay(&mut self, other: Self) {
        self.map.extend(other.map);
    }

    /// The value of a key; `default` if it is absent or null.
    pub fn take<T: DeserializeOwned>(&mut self, key: &str, default: T) -> Result<T> {
        match self.map.remove(key) {
            None | Some(Value::Null) => Ok(default),
            Some(value) => serde_json::from_value(value.clone())
                .map_err(|_| self.invalid(key, format!("{value} must be {}", kinds::<T>()))),
        }
    }

    /// The count of a key, from `least` to a million; `default` if it is absent or null.
    pub(crate) fn count(&mut self, key: &str, least: usize, default: usize) -> Result<usize> {
        let count = self.take(key, default)?;
        if (least..=MAX_COUNT).contains(&count) {
            return Ok(count);
        }
        Err(self.invalid(key, format!("{count} must be {least} to {MAX_COUNT}")))
    }

    /// Whether a key is there and not null.
    pub(crate) fn has(&self, key: &str) -> bool {
        self.map.get(key).is_some_and(|value| !value.is_null())
    }

    /// Whether a key is there and null.
    pub(crate) fn is_null(&self, key: &str) -> bool {
        self.map.get(key).is_some_and(Value::is_null)
    }

    /// The length of the list of a key, which stays.
    pub(crate) fn length(&self, key: &str) -> Option<usize> {
        self.map.get(key).and_then(Value::as_array).map(Vec::len)
    }

    /// The text of a key, which stays.
    pub(crate) fn text(&self, key: &str) -> Option<&str> {
        self.map.get(key).and_then(Value::as_str)
    }

    /// Rejects a key unless it is absent, null or one of the `accepted` values.
    pub fn only(&mut self, key: &str, accepted: &[Value]) -> Result<()> {
        match self.map.remove(key) {
            None | Some(Value::Null) => Ok(()),
            Some(value) if accepted.contains(&value) => Ok(()),
            Some(value) => {
                let wanted: Vec<_> = accepted.iter().map(Value::to_string).collect();
                let wanted = if wanted.is_empty() { "null".into() } else { wanted.join(" or ") };
                Err(Error::config(
                    &self.file,
                    format!("{key}: {value} is not supported; it must be {wanted}"),
                ))
            }
        }
    }

    /// Drops keys that have no influence on inference.
    pub fn drop_idle(&mut self, keys: &[&str]) {
        self.map.retain(|key, _| !key.starts_with('_') && !keys.contains(&key.as_str()));
    }

    /// Rejects remaining keys, unless they are null or false.
    pub fn finish(self) -> Result<()> {
        let idle = |value: &Value| value.is_null() || *value == Value::Bool(false);
        match self.map.iter().find(|(_, value)| !idle(value)) {
            None => Ok(()),
            Some((key, value)) => {
                Err(Error::config(&self.file, format!("unknown key {key} (= {value})")))
            }
        }
    }

    pub(crate) fn invalid(&self, key: &str, reason: impl std::fmt::Display) -> Error {
        Error::config(&self.file, format!("{key}: {reason}"))
    }
}

/// The object of a file that is in JSON.
pub(crate) fn object(file: &str, text: &[u8]) -> Result<Map<String, Value>> {
    let value = serde_json::from_slice(text).map_err(|e| Error::config(file, not_json(&e)))?;
    match value {
        Value::Object(map) => Ok(map),
        _ => Err(Error::config(file, "not a JSON object")),
    }
}

/// Where a text ceases to be JSON.
pub(crate) fn not_json(error: &serde_json::Error) -> String {
    format!("not JSON, from line {}, column {} on", error.line(), error.column())
}

/// What a key can be, in words: the kinds of values that are read as a `T`.
fn kinds<T: DeserializeOwned>() -> String {
    let is = |value: Value| serde_json::from_value::<T>(value).is_ok();
    let kinds = [
        (is(json!(0.5)), "a number"),
        (is(json!(1)) && !is(json!(0.5)), "a whole number"),
        (is(json!(true)), "true or false"),
        (is(json!("")), "a text"),
        (is(json!([0.5])), "a list of numbers"),
        (is(json!([1])) && !is(json!([0.5])), "a list of whole numbers"),
        (is(json!([""])), "a list of texts"),
        (is(json!([0.5, 0.5, 0.5])) && !is(json!([0.5])), "a list of three numbers"),
        (is(json!(["", ""])) && !is(json!([""])), "a list of two texts"),
        (is(json!({})), "an object"),
    ];
    let kinds: Vec<_> = kinds.iter().filter(|(is, _)| *is).map(|(_, words)| *words).collect();
    kinds.join(" or ")
}

/// The first key of an object that is given twice.
struct Pairs(Option<String>);

impl<'de> Deserialize<'de> for Pairs {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        struct Object;

        impl<'de> Visitor<'de> for Object {
            type Value = Pairs;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(
                self,
                mut map: A,
            ) -> std::result::Result<Pairs, A::Error> {
                let (mut keys, mut twice) = (HashSet::new(), None);
                while let Some((key, IgnoredAny)) = map.next_entry::<String, _>()? {
                    if keys.contains(&key) {
                        twice = twice.or(Some(key));
                    } else {
                        keys.insert(key);
                    }
                }
                Ok(Pairs(twice))
            }
        }

        deserializer.deserialize_map(Object)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keys(value: &Value) -> Keys {
        Keys { file: "unet/config.json".into(), map: value.as_object().unwrap().clone() }
    }

    #[test]
    fn unsupported_values_are_refused_by_name() {
        let mut k = keys(&json!({"act_fn": "mish", "x": 1, "_name": "a", "y": null}));
        let error = k.only("act_fn", &[json!("silu")]).unwrap_err().to_string();
        assert_eq!(
            error,
            "unet/config.json: act_fn: \"mish\" is not supported; it must be \"silu\""
        );
        k.drop_idle(&[]);
        assert_eq!(k.finish().unwrap_err().to_string(), "unet/config.json: unknown key x (= 1)");
    }

    #[test]
    fn what_is_no_object_is_told_by_its_place() {
        let told = |text: &str| object("a.json", text.as_bytes()).unwrap_err().to_string();
        assert_eq!(told("{\n\"a\": }"), "a.json: not JSON, from line 2, column 6 on");
        assert_eq!(told("[]"), "a.json: not a JSON object");
    }

    #[test]
    fn values_of_another_kind_are_refused_in_words() {
        let mut k = keys(&json!({"n": "x", "b": 1, "t": [2], "l": [1, -1], "m": [1, 2]}));
        let told = |error: Error| error.to_string().replace("unet/config.json: ", "");
        assert_eq!(told(k.take("n", 1_usize).unwrap_err()), "n: \"x\" must be a whole number");
        assert_eq!(told(k.take("b", false).unwrap_err()), "b: 1 must be true or false");
        assert_eq!(told(k.take("t", String::new()).unwrap_err()), "t: [2] must be a text");
        let list = k.take("l", vec![1_usize]).unwrap_err();
        assert_eq!(told(list), "l: [1,-1] must be a list of whole numbers");
        let mean = k.take("m", [0_f64; 3]).unwrap_err();
        assert_eq!(told(mean), "m: [1,2] must be a list of three numbers");
    }
}
