//! Properties of the parsers of requests: they never panic, what they accept is what was sent, and
//! what is beyond a bound is refused by the name of its field.

use proptest::collection::vec;
use proptest::prelude::*;
use sd_models::Spec;
use sd_server::request::{DrawRequest, Fields, ValidationError};
use serde_json::{Map, Number, Value, json};

use crate::fake::{Fake, HTTP};

fn read(fields: Fields) -> Result<Vec<Spec>, ValidationError> {
    let (fake, _) = Fake::new();
    DrawRequest::read(fields, &HTTP.limits)?.specs(&HTTP.limits, &fake.info, 0)
}

fn of_json(body: &Value) -> Result<Vec<Spec>, ValidationError> {
    read(Fields::json(&body.to_string())?)
}

/// Whether the error is about the field.
fn names(error: &ValidationError, field: &str) -> bool {
    match error {
        ValidationError::Malformed { param, .. } => param.as_deref() == Some(field),
        ValidationError::Unknown { param } | ValidationError::OutOfRange { param, .. } => {
            param == field
        }
    }
}

/// Any JSON, a few levels deep.
fn any_json() -> impl Strategy<Value = Value> {
    let number = prop_oneof![
        any::<i64>().prop_map(Number::from),
        any::<u64>().prop_map(Number::from),
        any::<f64>().prop_filter_map("finite", Number::from_f64),
    ];
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::Bool),
        number.prop_map(Value::Number),
        ".{0,12}".prop_map(Value::String),
    ];
    leaf.prop_recursive(3, 24, 6, |inner| {
        prop_oneof![
            vec(inner.clone(), 0..6).prop_map(Value::Array),
            vec((".{0,6}", inner), 0..6).prop_map(|pairs| pairs.into_iter().collect()),
        ]
    })
}

/// Names that requests have, and others.
fn any_name() -> impl Strategy<Value = String> {
    let known = [
        "prompt",
        "negative_prompt",
        "width",
        "height",
        "steps",
        "num_inference_steps",
        "seed",
        "cfg_scale",
        "guidance_scale",
        "n",
        "scheduler",
        "output_format",
        "image",
        "mask",
        "strength",
        "loras",
        "hires_width",
        "hires_steps",
        "prompt_syntax",
        "stream",
        "preview",
    ];
    prop_oneof![4 => prop::sample::select(known.to_vec()).prop_map(str::to_owned), 1 => ".{0,8}"]
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(300) })]

    #[test]
    fn a_valid_request_is_read_as_it_was_sent(
        prompt in "\\PC{0,100}",
        negative in "\\PC{0,100}",
        (width, height) in (1..16_usize, 1..16_usize),
        steps in 1..=150_usize,
        guidance in 0.0..100.0_f64,
        seed in any::<u64>(),
        count in 1..=8_usize,
        as_form in any::<bool>(),
    ) {
        let body = json!({
            "prompt": prompt, "negative_prompt": negative, "width": 8 * width, "height": 8 * height,
            "steps": steps, "cfg_scale": guidance, "seed": seed, "n": count,
        });
        let specs = if as_form {
            let text = |value: &Value| value.as_str().map_or(value.to_string(), str::to_owned);
            let fields = body.as_object().expect("an object");
            let pairs = fields.iter().map(|(name, value)| (name.clone(), text(value)));
            Fields::form(pairs).and_then(read)
        } else {
            of_json(&body)
        };
        let specs = specs.expect("a valid request");
        prop_assert_eq!(specs.len(), count);
        for (k, spec) in specs.iter().enumerate() {
            prop_assert_eq!(&spec.prompt, &prompt);
            prop_assert_eq!(&spec.negative_prompt, &negative);
            prop_assert_eq!((spec.size.width(), spec.size.height()), (8 * width, 8 * height));
            prop_assert_eq!(spec.steps, steps);
            // serde_json reads a number to within one unit in its last place.
            prop_assert!((spec.guidance_scale - guidance).abs() <= guidance * f64::EPSILON);
            prop_assert_eq!(spec.seed, seed.wrapping_add(k as u64));
        }
    }

    #[test]
    fn what_is_beyond_a_bound_is_refused_by_name(
        (field, least, most) in prop::sample::select(vec![
            ("steps", 1, 150), ("n", 1, 8), ("width", 8, 65_536), ("seed", 0, i64::MAX),
        ]),
        value in any::<i64>(),
    ) {
        let refused = of_json(&json!({ "prompt": "a", field: value })).err();
        if !(least..=most).contains(&value) {
            prop_assert!(refused.is_some_and(|error| names(&error, field)), "{field} {value}");
        } else if field != "width" {
            prop_assert!(refused.is_none(), "{field} {value}: {refused:?}");
        }
    }

    #[test]
    fn any_fields_are_read_or_refused_in_a_short_sentence(
        pairs in vec((any_name(), any_json()), 0..8),
    ) {
        let body: Value = pairs.iter().cloned().collect::<Map<_, _>>().into();
        let text = |value: &Value| value.as_str().map_or(value.to_string(), str::to_owned);
        let form = Fields::form(pairs.iter().map(|(name, value)| (name.clone(), text(value))));
        for error in [of_json(&body).err(), form.and_then(read).err()].into_iter().flatten() {
            let message = error.to_string();
            prop_assert!(!message.is_empty() && message.len() <= 1000, "{message}");
        }
    }

    #[test]
    fn any_text_is_a_json_object_or_refused(text in "\\PC{0,60}", cut in any::<prop::sample::Index>()) {
        let whole = json!({ "prompt": text, "seed": 7 }).to_string();
        let boundaries: Vec<usize> = whole.char_indices().map(|(at, _)| at).collect();
        let part = &whole[..boundaries[cut.index(boundaries.len())]];
        prop_assert!(Fields::json(part).is_err(), "a part of an object is none: {part}");
        prop_assert!(Fields::json(&whole).is_ok());
        let object: Result<Map<String, Value>, _> = serde_json::from_str(&text);
        prop_assert_eq!(Fields::json(&text).is_ok(), object.is_ok());
    }
}
