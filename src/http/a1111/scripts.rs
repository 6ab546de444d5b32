//! `alwayson_scripts`: the settings of AUTOMATIC1111's extensions. Clients that copy what its page
//! sends have them for every extension, switched off. ControlNet's is read ([`units`]), and the
//! refiner's, which its API passes over; of the others none is supported, and those that are off ask
//! for nothing.

use serde_json::Value;

use super::nothing::is_off;
use super::units::{self, ReadUnit};
use crate::request::{ControlNet, Fields, IpAdapterFields, Limits, ValidationError, brief};

/// The extension for ControlNets, in small letters.
const CONTROLNET: &str = "controlnet";

/// The script of the refiner, in small letters.
const REFINER: &str = "refiner";

/// Scripts that AUTOMATIC1111 itself runs for its page only: their values are fields of the API.
const ONLY_OF_THE_PAGE: [&str; 2] = ["seed", "sampler"];

/// Members of a script's settings that switch it on.
const SWITCHES: [&str; 6] =
    ["enabled", "enable", "is_enabled", "active", "ad_tab_enable", "ad_model"];

/// The units that scripts ask for.
#[derive(Debug, Default)]
pub(super) struct Units {
    pub(super) nets: Vec<ControlNet>,
    pub(super) adapters: Vec<IpAdapterFields>,
}

/// Takes the scripts out. Returns the units; an error names the first other script that is on.
pub(super) fn read(fields: &mut Fields, limits: &Limits) -> Result<Units, ValidationError> {
    let mut units = Units::default();
    let Some((field, value)) = fields.take(&["alwayson_scripts"])? else { return Ok(units) };
    let mut scripts = match value {
        Value::Object(scripts) => scripts,
        off if is_off(&off) => return Ok(units),
        _ => return Err(ValidationError::malformed(&field, "must be an object")),
    };
    let names = scripts.keys().filter(|name| name.trim().eq_ignore_ascii_case(CONTROLNET));
    let names: Vec<_> = names.cloned().collect();
    for name in names {
        let settings = scripts.remove(&name).unwrap_or_default();
        units.read(&format!("{field}.{}", brief(&name)), settings, limits)?;
    }
    for (name, settings) in scripts.iter().filter(|(name, settings)| !is_idle(name, settings)) {
        if name.trim().eq_ignore_ascii_case(REFINER) {
            add_refiner(fields, &format!("{field}.{}", brief(name)), settings)?;
        }
    }
    scripts.retain(|name, _| !name.trim().eq_ignore_ascii_case(REFINER));
    let on = |(name, settings): &(&String, &Value)| {
        let name = name.trim().to_ascii_lowercase();
        !ONLY_OF_THE_PAGE.contains(&name.as_str()) && !is_idle(&name, settings)
    };
    match scripts.iter().find(on) {
        None => Ok(units),
        Some((name, _)) => {
            let reason = format!("asks for the script {:?}, which is not supported", brief(name));
            Err(ValidationError::range(&field, reason))
        }
    }
}

/// Makes the settings of the refiner's script the fields of the API: `{"args": [true, TITLE, SHARE]}`,
/// or the arguments alone.
fn add_refiner(fields: &mut Fields, name: &str, settings: &Value) -> Result<(), ValidationError> {
    let args = settings.get("args").unwrap_or(settings);
    let (title, share) = match args.as_array().map(Vec::as_slice) {
        Some([_, title @ Value::String(_), share, ..]) => (title, share),
        _ => {
            let reason = "must have args of true, a checkpoint and a share of the steps";
            return Err(ValidationError::malformed(name, reason));
        }
    };
    if is_off(title) {
        return Ok(());
    }
    fields.drop_if("refiner_checkpoint", is_off);
    if let Some((other, _)) = fields.take(&["refiner_checkpoint"])? {
        let reason = format!("names a refiner, and so does {other}: one of them may");
        return Err(ValidationError::malformed(name, reason));
    }
    // The page sends its default share beside no checkpoint.
    fields.drop_if("refiner_switch_at", |_| true);
    for (field, value) in [("refiner_checkpoint", title), ("refiner_switch_at", share)] {
        fields.add(field, name.to_owned(), value.clone());
    }
    Ok(())
}

impl Units {
    /// Adds those of the extension's settings: `{"args": [...]}`, or the units alone.
    fn read(
        &mut self,
        name: &str,
        settings: Value,
        limits: &Limits,
    ) -> Result<(), ValidationError> {
        let (name, args) = match settings {
            Value::Object(mut members) if members.contains_key("args") => {
                (format!("{name}.args"), members.remove("args").unwrap_or_default())
            }
            args => (name.to_owned(), args),
        };
        let args = match args {
            Value::Array(args) => args,
            // By their places.
            Value::Object(args) if args.keys().any(|key| key.parse::<usize>().is_ok()) => {
                args.into_iter().map(|(_, unit)| unit).collect()
            }
            one => vec![one],
        };
        for (k, unit) in args.into_iter().enumerate() {
            let name = format!("{name}[{k}]");
            match unit {
                Value::Object(unit) => match units::read(&name, unit, limits)? {
                    Some(ReadUnit::Net(net)) => self.nets.push(*net),
                    Some(ReadUnit::Adapter(adapter)) => self.adapters.push(adapter),
                    None => {}
                },
                off if is_off(&off) => {}
                _ => return Err(ValidationError::malformed(&name, "must be a unit, an object")),
            }
        }
        Ok(())
    }
}

/// Whether a script with these settings does nothing: `{"args": [...]}`, or the arguments alone.
fn is_idle(name: &str, settings: &Value) -> bool {
    let args = match settings {
        Value::Object(members) => members.get("args").unwrap_or(settings),
        args => args,
    };
    match args {
        Value::Array(args) => {
            // The first argument of many scripts is the switch of all.
            let is_false = |value: &Value| match value {
                Value::String(text) => text.trim().eq_ignore_ascii_case("false"),
                value => *value == false,
            };
            args.first().is_some_and(is_false)
                || args.iter().all(|unit| is_off(unit) || is_off_unit(name, unit))
        }
        other => is_off(other) || is_off_unit(name, other),
    }
}

/// Whether a unit of a script, such as ControlNet's, is switched off: by one of the usual members, or
/// by one that is called like the script.
fn is_off_unit(name: &str, unit: &Value) -> bool {
    let is_switch = |member: &str| SWITCHES.contains(&member) || member.eq_ignore_ascii_case(name);
    let members = unit.as_object().into_iter().flatten();
    members.filter(|(member, _)| is_switch(member)).any(|(_, value)| is_off(value))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn checked(scripts: &Value) -> Result<usize, String> {
        read_fields(&json!({ "alwayson_scripts": scripts })).map(|(nets, _)| nets)
    }

    fn read_fields(body: &Value) -> Result<(usize, Fields), String> {
        let mut fields = Fields::json(&body.to_string()).expect("an object");
        let limits = crate::request::Limits {
            max_pixels: 1 << 20,
            max_steps: 50,
            max_images: 4,
            max_prompt_bytes: 100,
            max_input_pixels: 1 << 20,
            max_loras: 2,
            max_controlnets: 3,
        };
        let units = read(&mut fields, &limits).map_err(|error| error.to_string())?;
        Ok((units.nets.len() + units.adapters.len(), fields))
    }

    #[test]
    fn the_refiner_of_the_page_is_that_of_the_api() {
        let body = json!({
            "alwayson_scripts": { "Refiner": { "args": [true, "other [0123]", 0.7] } },
            "refiner_checkpoint": "", "refiner_switch_at": 0.8,
        });
        let (_, fields) = read_fields(&body).expect("read");
        assert_eq!(fields.get("refiner_checkpoint"), Some(&json!("other [0123]")));
        assert_eq!(fields.get("refiner_switch_at"), Some(&json!(0.7)));
        let off = json!({ "alwayson_scripts": { "refiner": { "args": [true, "None", 0.8] } } });
        assert_eq!(read_fields(&off).expect("read").1.get("refiner_checkpoint"), None);
    }

    #[test]
    fn controlnets_are_found_in_all_forms() {
        let unit = json!({ "enabled": true, "model": "edges" });
        for scripts in [
            json!({ "controlnet": { "args": [unit] } }),
            json!({ "ControlNet": [unit] }),
            json!({ "CONTROLNET": { "args": unit } }),
            json!({ "ControlNet": unit, "Refiner": { "args": [false] } }),
            json!({ "controlnet": { "args": [unit, { "enabled": false }, false, null] } }),
        ] {
            assert_eq!(checked(&scripts), Ok(1), "{scripts}");
        }
        let error = checked(&json!({ "controlnet": { "args": ["edges"] } }));
        let expected = "alwayson_scripts.controlnet.args[0] must be a unit, an object";
        assert_eq!(error, Err(expected.into()));
    }

    #[test]
    fn scripts_that_are_off_ask_for_nothing() {
        for scripts in [
            json!(null),
            json!({}),
            json!([]),
            json!(""),
            json!({ "controlnet": { "args": [{ "enabled": false, "model": "None", "weight": 1.0 }] } }),
            json!({ "ControlNet": { "args": [] }, "Comments": {}, "Extra options": null }),
            json!({ "Refiner": { "args": [false, "", 0.8] }, "Hypertile": { "args": ["False", 1] } }),
            json!({ "Seed": { "args": [-1, false, -1, 0, 0, 0] }, "Sampler": { "args": [20, "LMS", "Karras"] } }),
            json!({ "ADetailer": { "args": [false, false, { "ad_model": "face_yolov8n.pt" }] } }),
            json!({ "ADetailer": { "args": [{ "ad_model": "None", "ad_confidence": 0.3 }] } }),
            json!({ "ControlNet": [{ "enabled": "false" }, { "enabled": 0 }] }),
            json!({ "AnimateDiff": { "args": [{ "enable": false, "model": "mm" }] } }),
            json!({ "Soft inpainting": { "args": [{ "Soft inpainting": false, "Schedule bias": 1 }] } }),
        ] {
            assert_eq!(checked(&scripts), Ok(0), "{scripts}");
        }
    }

    #[test]
    fn a_script_that_is_on_is_named() {
        for scripts in [
            json!({ "Hypertile": { "args": [true, "other", 0.8] } }),
            json!({ "Comments": {}, "Hypertile": { "args": [{ "enabled": true }] } }),
            json!({ "Hypertile": { "args": [{ "module": "canny" }] } }),
            json!({ "Hypertile": { "args": [0.5, 2] } }),
            json!({ "Hypertile": { "args": ["", true, "0"] } }),
            json!({ "Hypertile": "on" }),
        ] {
            let message =
                "alwayson_scripts asks for the script \"Hypertile\", which is not supported";
            assert_eq!(checked(&scripts), Err(message.into()), "{scripts}");
        }
        let error = checked(&json!({ "Refiner": { "args": [0.5, 2] } })).expect_err("refused");
        assert!(error.starts_with("alwayson_scripts.Refiner must have args of true"), "{error}");
        assert_eq!(checked(&json!("on")), Err("alwayson_scripts must be an object".into()));
    }
}
