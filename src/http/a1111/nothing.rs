//! Values that ask for nothing. Clients send most fields with one.

use serde_json::Value;

/// Whether the value of a switch, or of a field that is not supported, asks for nothing. Clients
/// send numbers and booleans as text, too.
pub(super) fn is_off(value: &Value) -> bool {
    // Whatever is longer is something, such as an image file.
    const LONGEST: usize = 64;
    let text = match value {
        Value::String(text) if text.trim().len() > LONGEST => return false,
        Value::String(text) => text,
        Value::Array(values) => return values.iter().all(is_off),
        other => return is_noop(other),
    };
    let text = text.trim().to_ascii_lowercase();
    let is_zero = || text.parse::<f64>().is_ok_and(|number| number <= 0.0);
    ["", "none", "null", "false", "off", "no"].contains(&&*text) || is_zero()
}

/// Whether a value has no effect.
pub(super) fn is_noop(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Bool(is_set) => !is_set,
        Value::Number(number) => number.as_f64().is_some_and(|number| number <= 0.0),
        Value::String(text) => ["", "None"].contains(&text.as_str()),
        Value::Array(values) => values.is_empty(),
        Value::Object(values) => values.is_empty(),
    }
}
