//! Reads JSON of clients: repeated keys are kept, and the number of values is bounded, since each
//! takes far more memory than its two bytes of text.

use std::cell::Cell;
use std::fmt;

use serde::de::{DeserializeSeed, Deserializer, Error as _, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Number, Value};

use super::error::ValidationError;

/// Maximum number of values in a request: those of objects and lists, and these themselves.
const MAX_VALUES: usize = 1 << 16;

/// Maximum number of fields of a request, known or not.
pub(crate) const MAX_FIELDS: usize = 256;

/// A JSON object.
pub(crate) type Object = Map<String, Value>;

/// Reads a value; none if the text is not JSON or has too many values.
pub(super) fn value(text: &str) -> Option<Value> {
    let left = Cell::new(MAX_VALUES + 1);
    let mut reader = serde_json::Deserializer::from_str(text);
    let value = Bounded(&left).deserialize(&mut reader).ok()?;
    reader.end().ok().map(|()| value)
}

/// Reads an object of any number of members, the last of each name.
pub(crate) fn object(text: &str) -> Result<Object, ValidationError> {
    Ok(read(text, usize::MAX)?.into_iter().collect())
}

/// Reads the fields of a request, in order and with repetitions.
pub(super) fn fields(text: &str) -> Result<Vec<(String, Value)>, ValidationError> {
    read(text, MAX_FIELDS)
}

fn read(text: &str, max_members: usize) -> Result<Vec<(String, Value)>, ValidationError> {
    // serde_json would quote a string that stands there, and so what a user typed.
    if !text.trim_ascii_start().starts_with('{') {
        return Err(ValidationError::body("the body is not a JSON object"));
    }
    let left = Cell::new(MAX_VALUES + 1);
    let mut reader = serde_json::Deserializer::from_str(text);
    let members = reader.deserialize_map(Members { left: &left, max: max_members });
    let broken = |error| ValidationError::body(format!("the body is not a JSON object: {error}"));
    let members = members.map_err(|error| match left.get() {
        0 => ValidationError::body(format!("the body has more than {MAX_VALUES} values")),
        _ => broken(error),
    })?;
    match reader.end() {
        Ok(()) => Ok(members),
        // SageMaker's MultiRecord strategy joins records so.
        Err(error) if begins_object(text, &error) => Err(ValidationError::body(
            "the body holds several JSON objects: send them as application/jsonlines, one on each \
             line",
        )),
        Err(error) => Err(broken(error)),
    }
}

/// Whether an object begins at the place of an error.
fn begins_object(text: &str, error: &serde_json::Error) -> bool {
    let line = text.split('\n').nth(error.line().saturating_sub(1)).unwrap_or_default();
    line.as_bytes().get(error.column().saturating_sub(1)) == Some(&b'{')
}

/// The members of the object that a request is.
struct Members<'a> {
    left: &'a Cell<usize>,
    max: usize,
}

impl<'de> Visitor<'de> for Members<'_> {
    type Value = Vec<(String, Value)>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut members = Vec::new();
        while let Some(name) = map.next_key()? {
            if members.len() == self.max {
                return Err(A::Error::custom(format!("more than {} fields", self.max)));
            }
            members.push((name, map.next_value_seed(Bounded(self.left))?));
        }
        Ok(members)
    }
}

/// A value, while so many values are left.
#[derive(Clone, Copy)]
struct Bounded<'a>(&'a Cell<usize>);

impl<'de> DeserializeSeed<'de> for Bounded<'_> {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, reader: D) -> Result<Value, D::Error> {
        self.0.set(self.0.get().saturating_sub(1));
        if self.0.get() == 0 {
            return Err(D::Error::custom("too many values"));
        }
        reader.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Bounded<'_> {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_f64<E>(self, value: f64) -> Result<Value, E> {
        Ok(Number::from_f64(value).map_or(Value::Null, Value::Number))
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_string<E>(self, value: String) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Value, A::Error> {
        let mut values = Vec::new();
        while let Some(value) = list.next_element_seed(self)? {
            values.push(value);
        }
        Ok(Value::Array(values))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Value, A::Error> {
        let mut members = Map::new();
        while let Some(name) = map.next_key()? {
            members.insert(name, map.next_value_seed(self)?);
        }
        Ok(Value::Object(members))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_those_of_serde_json() {
        for text in [
            r#"{"a":[1,-2,2.5,1e300,18446744073709551616,null,true,{"b":"\u00e9"}],"c":"x"}"#,
            "[]",
            "\"\\n\"",
            "{}",
            "7",
        ] {
            let expected: Value = serde_json::from_str(text).expect("JSON");
            assert_eq!(value(text), Some(expected), "{text}");
        }
        for text in ["", "[1,", "[1]]", "{\"a\"}", "NaN", "1 2"] {
            assert_eq!(value(text), None, "{text}");
        }
        let twice = fields(r#"{"a":1,"a":[2]}"#).expect("an object");
        assert_eq!(twice.iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>(), ["a", "a"]);
    }

    #[test]
    fn several_objects_are_told_of() {
        let message = |text| fields(text).expect_err("an error").to_string();
        for text in ["{}\n{}", "{\"a\":1} {\"b\":2}", "{}{}", "{}\r\n\r\n  {}\n"] {
            assert!(message(text).contains("application/jsonlines"), "{text}");
        }
        for text in ["{}]", "{} 1", "{\"a\":{}", "{}\n[{}]"] {
            assert!(message(text).starts_with("the body is not a JSON object"), "{text}");
        }
    }

    #[test]
    fn values_are_counted_wherever_they_are() {
        let list = |item: &str, count: usize| format!("[{}]", vec![item; count].join(","));
        let object = |count: usize| {
            let members: Vec<_> = (0..count).map(|k| format!(r#""{k}":0"#)).collect();
            format!("{{{}}}", members.join(","))
        };
        let table = [
            (list("0", MAX_VALUES - 1), true),
            (list("0", MAX_VALUES), false),
            (list("[]", MAX_VALUES), false),
            (list("\"\"", MAX_VALUES), false),
            (list(&list("null", 255), 256), false),
            (object(MAX_VALUES), false),
        ];
        for (text, fits) in table {
            assert_eq!(value(&text).is_some(), fits, "{}", &text[..20]);
            let body = format!(r#"{{"x":{text}}}"#);
            let message = fields(&body).err().map(|error| error.to_string());
            let expected = "the body has more than 65536 values".to_owned();
            assert_eq!(message, (!fits).then_some(expected), "{}", &text[..20]);
        }
    }
}
