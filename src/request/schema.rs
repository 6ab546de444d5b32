//! JSON schemas of request types. The schema that `/openapi.json` publishes is the one that
//! requests are checked against, so the document and the checks cannot differ.
//!
//! Two keywords are our own: `x-aliases`, the other names of a field, and a bound that names one of
//! the operator's [`Limits`].

use std::any::TypeId;
use std::collections::HashMap;
use std::sync::{Arc, LazyLock, Mutex, PoisonError};

use schemars::JsonSchema;
use schemars::generate::SchemaSettings;
use serde_json::{Map, Value};

use super::limits::Limits;

/// The schemas of a type's fields by their names.
type Properties = Arc<Map<String, Value>>;

/// The schemas of the fields of `T`, which refer to no other schema. They are made once.
pub(super) fn properties<T: JsonSchema + 'static>() -> Properties {
    static MADE: LazyLock<Mutex<HashMap<TypeId, Properties>>> = LazyLock::new(Mutex::default);
    let make = || {
        let settings = SchemaSettings::draft07().with(|schema| schema.inline_subschemas = true);
        let mut schema = settings.into_generator().into_root_schema_for::<T>();
        match schema.remove("properties") {
            Some(Value::Object(properties)) => Arc::new(properties),
            _ => Arc::default(),
        }
    };
    let mut made = MADE.lock().unwrap_or_else(PoisonError::into_inner);
    Arc::clone(made.entry(TypeId::of::<T>()).or_insert_with(make))
}

/// The other names of a field.
pub(super) fn aliases(field: &Value) -> Vec<&str> {
    let aliases = field.get("x-aliases").and_then(Value::as_array);
    aliases.into_iter().flatten().filter_map(Value::as_str).collect()
}

/// Makes the schemas in a document plain ones: aliases become fields, limits become numbers.
pub(crate) fn publish(document: &mut Value, limits: &Limits) {
    match document {
        Value::Array(values) => values.iter_mut().for_each(|value| publish(value, limits)),
        Value::Object(object) => {
            for key in ["minimum", "maximum", "maxItems"] {
                if let Some(bound) = object.get_mut(key) {
                    *bound = limits.bound(bound);
                }
            }
            if let Some(Value::Object(properties)) = object.get_mut("properties") {
                expand_aliases(properties);
            }
            object.values_mut().for_each(|value| publish(value, limits));
        }
        _ => {}
    }
}

fn expand_aliases(properties: &mut Map<String, Value>) {
    let mut found = Map::new();
    for (name, field) in properties.iter_mut().filter(|(_, field)| !aliases(field).is_empty()) {
        let mut alias = field.clone();
        alias["description"] = format!("Alias of {name}.").into();
        alias.as_object_mut().map(|alias| alias.remove("x-aliases"));
        found.extend(aliases(field).into_iter().map(|name| (name.to_owned(), alias.clone())));
        field.as_object_mut().map(|field| field.remove("x-aliases"));
    }
    properties.extend(found);
}
