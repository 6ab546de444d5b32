//! `alwayson_scripts.controlnet`: the units of AUTOMATIC1111's extension, as native ControlNets and
//! IP-Adapters.
//!
//! Reference: sd-webui-controlnet 1.1.455 `internal_controlnet/args.py`. As there, unknown fields
//! are ignored, and numbers of a preprocessor that are out of range mean its defaults; a warning says so.

use schemars::JsonSchema;
use sd_models::{ControlMode, ControlPasses, Extension, Preprocessor};
use serde::Deserialize;
use serde_json::Value;

use super::nothing::is_off;
use super::unread;
use crate::image::Fit;
use crate::request::{
    ControlNet, Fields, ImageFile, IpAdapterFields, IpUnit, Limits, Object, OneOrMany, Resolution,
    Scale, Unit, ValidationError, brief,
};

/// Default length of the shorter side at which a preprocessor works, and its bounds.
pub(super) const RESOLUTION: (f64, [f64; 2]) = (512.0, [64.0, 2048.0]);

/// What the names of preprocessors of IP-Adapters begin with, and those that are not of faces. They say
/// which image encoder is meant; here it is the one that fits.
const ADAPTER: &str = "ip-adapter";
pub(super) const ADAPTER_MODULES: [&str; 6] = [
    "ip-adapter-auto",
    "ip-adapter_clip_h",
    "ip-adapter_clip_g",
    "ip-adapter_clip_sd15",
    "ip-adapter_clip_sdxl",
    "ip-adapter_clip_sdxl_plus_vith",
];

/// Fields of a unit that would change the image.
const REJECTED: [(&str, &str); 5] = [
    ("effective_region_mask", "is not supported: a net steers the whole image"),
    ("ipadapter_input", "is not supported: it holds tensors; give the picture as image"),
    ("animatediff_batch", "is not supported"),
    ("batch_images", "is not supported: send a request for each image"),
    ("batch_image_files", "is not supported: send a request for each image"),
];

/// Fields that change no image: how the extension computes, what its page shows, and the kind of a
/// union, a net that is refused.
const SILENT: [&str; 6] = [
    "lowvram",
    "low_vram",
    "is_ui",
    "use_preview_as_input",
    "generated_image",
    "union_control_type",
];

/// The fields of a unit.
#[derive(Debug, Default, Deserialize, JsonSchema)]
struct UnitFields {
    /// Preprocessor: none, canny, invert or threshold. Default: none.
    module: Option<String>,
    /// Name of the net, with or without a hash in brackets.
    model: Option<String>,
    #[schemars(extend("minimum" = 0, "maximum" = 2))]
    weight: Option<f64>,
    processor_res: Option<f64>,
    threshold_a: Option<f64>,
    threshold_b: Option<f64>,
    #[schemars(extend("minimum" = 0, "maximum" = 1))]
    guidance_start: Option<f64>,
    #[schemars(extend("minimum" = 0, "maximum" = 1))]
    guidance_end: Option<f64>,
    pixel_perfect: Option<bool>,
    inpaint_crop_input_image: Option<bool>,
    save_detected_map: Option<bool>,
    hr_option: Option<String>,
    #[schemars(extend("maxItems" = 64))]
    advanced_weighting: Option<Vec<f64>>,
}

/// A unit: of a ControlNet or of an IP-Adapter.
#[derive(Debug)]
pub(super) enum ReadUnit {
    Net(Box<ControlNet>),
    Adapter(IpAdapterFields),
}

/// What units of both kinds have.
struct Common<'a> {
    name: &'a str,
    model: String,
    pictures: Pictures,
    window: (f64, f64),
    passes: ControlPasses,
    warnings: Vec<String>,
}

/// The unit of this name, if it is on.
pub(super) fn read(
    name: &str,
    unit: Object,
    limits: &Limits,
) -> Result<Option<ReadUnit>, ValidationError> {
    let mut fields = Fields::default();
    for (key, value) in unit {
        fields.add(&key, format!("{name}.{key}"), value);
    }
    for name in ["image", "input_image", "mask", "mask_image"] {
        fields.drop_if(name, is_off);
    }
    // Zeros are weights.
    let is_none = |value: &Value| is_off(value) && value.as_array().is_none_or(Vec::is_empty);
    fields.drop_if("advanced_weighting", is_none);
    for (theirs, ours) in [("guidance", "guidance_end"), ("input_image", "image")] {
        fields.rename(theirs, ours);
    }
    let switch = fields.take(&["enabled"])?;
    if switch.as_ref().is_some_and(|(_, switch)| is_off(switch)) {
        return Ok(None);
    }
    let pictures = pictures(&mut fields)?;
    // Without a switch, a unit that names nothing is off.
    if switch.is_none() && pictures.image.is_none() && fields.get("model").is_none_or(is_off) {
        return Ok(None);
    }
    check_unsupported(&mut fields)?;
    let fit = choice(&mut fields, "resize_mode", fit)?.unwrap_or(Fit::Crop);
    let mode = choice(&mut fields, "control_mode", str::parse::<ControlMode>)?.unwrap_or_default();
    let mut read: UnitFields = fields.read(limits)?;
    let of = |field: &str| format!("{name}.{field}");
    // Modules without a model, such as reference_only, are none that could be given one.
    let is_of_adapter = is_of_adapter(&read, name)?;
    if !is_of_adapter {
        preprocessor(read.module.as_deref(), name)?;
    }
    let model = read.model.take().filter(|model| !model.trim().eq_ignore_ascii_case("none"));
    let model = model.ok_or_else(|| {
        ValidationError::range(&of("model"), "must name a ControlNet: the unit is enabled")
    })?;
    SILENT.iter().for_each(|silent| fields.drop_if(silent, |_| true));
    let unknown = |reason: String| ValidationError::range(&of("hr_option"), reason);
    let passes = read.hr_option.as_deref().map(passes).transpose().map_err(unknown)?;
    let common = Common {
        name,
        model,
        pictures,
        window: window([read.guidance_start, read.guidance_end], name)?,
        passes: passes.unwrap_or_default(),
        warnings: unread::warnings(&fields, None, true),
    };
    if is_of_adapter {
        return adapter(common, read, mode).map(|unit| Some(ReadUnit::Adapter(unit)));
    }
    let net = net(common, read, (fit, mode))?;
    Ok(Some(ReadUnit::Net(Box::new(net))))
}

/// The ControlNet of a unit.
fn net(
    Common { name, model, pictures, window: (start, end), passes, mut warnings }: Common<'_>,
    read: UnitFields,
    (fit, mode): (Fit, ControlMode),
) -> Result<ControlNet, ValidationError> {
    let Pictures { image, mask } = pictures;
    let preprocessor = preprocessor(read.module.as_deref(), name)?;
    let (low, high) = thresholds(
        preprocessor,
        [("threshold_a", read.threshold_a), ("threshold_b", read.threshold_b)],
        name,
        &mut warnings,
    );
    let field = format!("{name}.processor_res");
    let side = within(&field, read.processor_res, RESOLUTION, &mut warnings) as usize;
    let is_perfect = read.pixel_perfect.unwrap_or(false);
    let resolution = if is_perfect { Resolution::PixelPerfect } else { Resolution::Shorter(side) };
    Ok(ControlNet {
        model: Some(model),
        image,
        scale: Some(read.weight.unwrap_or(1.0)),
        start: Some(start),
        end: Some(end),
        guess_mode: None,
        preprocessor: Some(preprocessor.name().to_owned()),
        low,
        high,
        unit: Some(Unit {
            name: name.to_owned(),
            fit,
            resolution,
            processor_res: side,
            mask,
            is_cropped: read.inpaint_crop_input_image.unwrap_or(true),
            is_returned: read.save_detected_map.unwrap_or(true),
            rule: Extension {
                mode,
                passes,
                // Lines of one pixel are too hard for the second pass.
                is_soft_in_hires: preprocessor.name() == "canny",
                layers: read.advanced_weighting,
            },
            warnings,
        }),
    })
}

/// Whether a unit is of an IP-Adapter, by its preprocessor.
fn is_of_adapter(read: &UnitFields, unit: &str) -> Result<bool, ValidationError> {
    let module = read.module.as_deref().unwrap_or_default().trim().to_ascii_lowercase();
    if !module.starts_with(ADAPTER) {
        return Ok(false);
    }
    if ADAPTER_MODULES.contains(&module.as_str()) {
        return Ok(true);
    }
    let known = ADAPTER_MODULES.join(", ");
    let module = brief(&module).into_owned();
    let reason = format!(
        "{module:?} is not supported: it needs a network for faces that is not part of the server; \
         known are {known}"
    );
    Err(ValidationError::range(&format!("{unit}.module"), reason))
}

/// The IP-Adapter of a unit. The image encoder is the one that fits the adapter.
fn adapter(
    Common { name, model, pictures, window: (start, end), passes, mut warnings }: Common<'_>,
    read: UnitFields,
    mode: ControlMode,
) -> Result<IpAdapterFields, ValidationError> {
    if pictures.mask.is_some() {
        let reason = "is not supported for IP-Adapters: the whole picture is seen";
        return Err(ValidationError::range(&format!("{name}.mask"), reason));
    }
    if mode != ControlMode::Balanced {
        warnings.push(format!("{name}.control_mode has no effect on IP-Adapters, as there"));
    }
    let scale = match read.advanced_weighting {
        Some(weights) => Scale::each(&weights),
        None => read.weight.unwrap_or(1.0).into(),
    };
    Ok(IpAdapterFields {
        model: Some(model),
        image: pictures.image.map(OneOrMany::One),
        scale: Some(scale),
        start: Some(start),
        end: Some(end),
        unit: Some(IpUnit { name: name.to_owned(), passes, warnings }),
        side: None,
    })
}

fn preprocessor(module: Option<&str>, unit: &str) -> Result<Preprocessor, ValidationError> {
    let refuse = |reason: String| ValidationError::range(&format!("{unit}.module"), reason);
    module.unwrap_or("none").parse().map_err(refuse)
}

/// The shares of the steps at which the unit begins and ends.
fn window(asked: [Option<f64>; 2], unit: &str) -> Result<(f64, f64), ValidationError> {
    let (start, end) = (asked[0].unwrap_or(0.0), asked[1].unwrap_or(1.0));
    if start > end {
        let reason = format!("of {start} must not be after guidance_end, {end}");
        return Err(ValidationError::range(&format!("{unit}.guidance_start"), reason));
    }
    Ok((start, end))
}

/// Rejects what would change the image and is not supported.
fn check_unsupported(fields: &mut Fields) -> Result<(), ValidationError> {
    for (field, reason) in REJECTED {
        if let Some((field, value)) = fields.take(&[field])?
            && !is_off(&value)
        {
            return Err(ValidationError::range(&field, reason));
        }
    }
    if let Some((field, value)) = fields.take(&["input_mode"])?
        && !is_off(&value)
        && !text(&value).trim_start_matches("InputMode.").eq_ignore_ascii_case("simple")
    {
        return Err(ValidationError::range(&field, "must be simple"));
    }
    Ok(())
}

/// The passes of a unit, by the extension's name of the option.
fn passes(name: &str) -> Result<ControlPasses, String> {
    match name.trim() {
        "" | "Both" | "HiResFixOption.BOTH" => Ok(ControlPasses::Both),
        "Low res only" | "HiResFixOption.LOW_RES_ONLY" => Ok(ControlPasses::Base),
        "High res only" | "HiResFixOption.HIGH_RES_ONLY" => Ok(ControlPasses::Hires),
        other => Err(format!("{other:?} is unknown; known are Both, Low res only, High res only")),
    }
}

/// The thresholds of a preprocessor, given by two fields of a unit or of a body.
pub(super) fn thresholds(
    preprocessor: Preprocessor,
    [a, b]: [(&str, Option<f64>); 2],
    unit: &str,
    warnings: &mut Vec<String>,
) -> (Option<f64>, Option<f64>) {
    let mut within = |(field, value): (&str, _), range| {
        let field = if unit.is_empty() { field.into() } else { format!("{unit}.{field}") };
        within(&field, value, range, warnings)
    };
    match preprocessor {
        Preprocessor::Canny { low, high } => {
            let bounds = [1.0, 255.0];
            // Whole numbers, as there.
            let [low, high] = [within(a, (low, bounds)), within(b, (high, bounds))];
            (Some(low.trunc()), Some(high.trunc()))
        }
        Preprocessor::Threshold { above } => (Some(within(a, (above, [0.0, 255.0]))), None),
        Preprocessor::None | Preprocessor::Invert => (None, None),
    }
}

/// A number, or the default where it is out of range, with a warning unless it is negative, which
/// means the default.
pub(super) fn within(
    field: &str,
    value: Option<f64>,
    (default, [low, high]): (f64, [f64; 2]),
    warnings: &mut Vec<String>,
) -> f64 {
    match value {
        Some(value) if (low..=high).contains(&value) => value,
        Some(value) if value >= 0.0 => {
            warnings.push(format!(
                "{field} of {value} is not from {low} to {high}: the default, {default}, was taken"
            ));
            default
        }
        _ => default,
    }
}

/// The control picture of a unit, and what was drawn over it.
#[derive(Default)]
struct Pictures {
    image: Option<ImageFile>,
    mask: Option<ImageFile>,
}

/// `image` is a picture, `{"image", "mask"}`, a pair of both or a list of one of these; `mask` and
/// `mask_image` are the same.
fn pictures(fields: &mut Fields) -> Result<Pictures, ValidationError> {
    let mask = fields.take(&["mask", "mask_image"])?;
    let mut found = match fields.take(&["image"])? {
        Some((name, value)) => picture(&name, value)?,
        None => Pictures::default(),
    };
    match mask {
        Some((name, _)) if found.image.is_none() => {
            Err(ValidationError::malformed(&name, "requires image"))
        }
        Some((name, _)) if found.mask.is_some() => {
            Err(ValidationError::malformed(&name, "is given twice"))
        }
        Some((name, value)) => {
            found.mask = Some(file(&name, value)?);
            Ok(found)
        }
        None => Ok(found),
    }
}

fn picture(name: &str, value: Value) -> Result<Pictures, ValidationError> {
    let optional = |value: Option<Value>| match value.filter(|value| !is_off(value)) {
        Some(value) => file(name, value).map(Some),
        None => Ok(None),
    };
    match value {
        Value::Object(mut members) => {
            let (image, mask) = (members.remove("image"), members.remove("mask"));
            Ok(Pictures { image: optional(image)?, mask: optional(mask)? })
        }
        Value::Array(list) => match <[Value; 1]>::try_from(list) {
            Ok([one]) => picture(name, one),
            Err(list) => match <[Value; 2]>::try_from(list) {
                Ok([image, mask]) if !image.is_object() => {
                    Ok(Pictures { image: optional(Some(image))?, mask: optional(Some(mask))? })
                }
                _ => Err(ValidationError::range(name, "must be one picture")),
            },
        },
        one => Ok(Pictures { image: Some(file(name, one)?), mask: None }),
    }
}

fn file(name: &str, value: Value) -> Result<ImageFile, ValidationError> {
    match value {
        Value::String(text) => Ok(text.into()),
        _ => Err(ValidationError::malformed(name, "must be an image file in base64")),
    }
}

/// How a control picture fills the size, by the extension's name, an older one, or its number.
fn fit(text: &str) -> Result<Fit, String> {
    let name = text.trim().trim_start_matches("ResizeMode.").to_ascii_lowercase();
    match name.as_str() {
        "just resize" | "resize" | "0" | "3" => Ok(Fit::Stretch),
        "crop and resize"
        | "inner_fit"
        | "inner fit (scale to fit)"
        | "scale to fit (inner fit)"
        | "1" => Ok(Fit::Crop),
        "resize and fill"
        | "outer_fit"
        | "outer fit (shrink to fit)"
        | "envelope (outer fit)"
        | "2" => Ok(Fit::Pad),
        _ => Err(format!(
            "{text:?} is unknown; known are Just Resize, Crop and Resize, Resize and Fill"
        )),
    }
}

/// A choice by name or number.
fn choice<T>(
    fields: &mut Fields,
    name: &str,
    parse: impl FnOnce(&str) -> Result<T, String>,
) -> Result<Option<T>, ValidationError> {
    let Some((name, value)) = fields.take(&[name])? else { return Ok(None) };
    let text = text(&value);
    if text.trim().is_empty() {
        return Ok(None);
    }
    parse(&text).map(Some).map_err(|reason| ValidationError::range(&name, reason))
}

/// A name, or a number as text.
fn text(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Number(number) => match number.as_f64().filter(|number| number.fract() == 0.0) {
            Some(number) => number.to_string(),
            None => number.to_string(),
        },
        other => crate::request::brief(&other.to_string()).into_owned(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn limits() -> Limits {
        Limits {
            max_pixels: 1 << 20,
            max_steps: 50,
            max_images: 4,
            max_prompt_bytes: 100,
            max_input_pixels: 1 << 20,
            max_loras: 2,
            max_controlnets: 3,
        }
    }

    fn unit(value: Value) -> Result<Option<ControlNet>, String> {
        match any(value)? {
            Some(ReadUnit::Net(net)) => Ok(Some(*net)),
            Some(ReadUnit::Adapter(_)) => panic!("a ControlNet"),
            None => Ok(None),
        }
    }

    fn any(value: Value) -> Result<Option<ReadUnit>, String> {
        let Value::Object(unit) = value else { panic!("an object") };
        read("unit", unit, &limits()).map_err(|error| error.to_string())
    }

    #[test]
    fn a_unit_of_an_adapter_is_told_by_its_preprocessor() {
        for module in ["ip-adapter-auto", "IP-Adapter_CLIP_SD15", "ip-adapter_clip_sdxl"] {
            let unit = any(json!({
                "module": module, "model": "ip-adapter_sd15", "image": "QUJD", "weight": 0.5,
                "guidance_start": 0.1, "hr_option": "Low res only", "control_mode": 1,
                "processor_res": 512, "threshold_a": 64,
            }));
            let Ok(Some(ReadUnit::Adapter(own))) = unit else { panic!("{module}: {unit:?}") };
            assert_eq!((own.start, own.end), (Some(0.1), Some(1.0)));
            let unit = own.unit.expect("a unit");
            assert_eq!(unit.passes, ControlPasses::Base);
            let warning = "unit.control_mode has no effect on IP-Adapters, as there";
            assert_eq!(unit.warnings, [warning]);
        }
        for (field, value) in [("module", json!("ip-adapter_face_id")), ("mask", json!("QUJD"))] {
            let mut body = json!({ "module": "ip-adapter-auto", "model": "x", "image": "QUJD" });
            body[field] = value;
            let error = any(body).expect_err(field);
            assert!(error.starts_with(&format!("unit.{field} ")), "{error}");
        }
    }

    #[test]
    fn a_unit_is_read_in_all_its_forms() {
        let net = unit(json!({
            "enabled": true, "module": "Canny", "model": "edges [0123abcd]", "weight": "0.5",
            "input_image": "QUJD", "resize_mode": 2, "lowvram": true, "processor_res": 64,
            "threshold_a": 50, "threshold_b": 999, "guidance_start": 0.1, "guidance": 0.9,
            "control_mode": 2, "pixel_perfect": false, "hr_option": "Low res only",
            "save_detected_map": false, "union_control_type": "Unknown", "other": 1,
        }));
        let net = net.expect("a unit").expect("it is on");
        assert_eq!(net.model.as_deref(), Some("edges [0123abcd]"));
        assert_eq!((net.scale, net.start, net.end), (Some(0.5), Some(0.1), Some(0.9)));
        assert_eq!((net.low, net.high), (Some(50.0), Some(200.0)), "999 is out of range");
        let unit_of = net.unit.expect("a unit");
        let warnings = [
            "unit.other has no effect here and was ignored",
            "unit.threshold_b of 999 is not from 1 to 255: the default, 200, was taken",
        ];
        assert_eq!(unit_of.warnings, warnings);
        assert_eq!(unit_of.fit, Fit::Pad);
        assert!(matches!(unit_of.resolution, Resolution::Shorter(64)) && !unit_of.is_returned);
        assert_eq!(unit_of.rule.mode, ControlMode::Control);
        assert_eq!(unit_of.rule.passes, ControlPasses::Base);
        for image in [
            json!("QUJD"),
            json!(["QUJD"]),
            json!({ "image": "QUJD" }),
            json!([{ "image": "QUJD", "mask": null }]),
            json!(["QUJD", null]),
        ] {
            let net = unit(json!({ "model": "edges", "image": image })).expect("a unit");
            assert!(net.expect("it is on").image.is_some(), "{image}");
        }
    }

    #[test]
    fn what_is_off_is_none_and_what_is_unknown_is_named() {
        for off in [
            json!({ "enabled": false }),
            json!({ "enabled": "False", "model": "x" }),
            json!({ "model": "None", "module": "none", "weight": 1 }),
        ] {
            assert!(unit(off).expect("read").is_none());
        }
        for (field, value) in [
            ("module", json!("openpose")),
            ("weight", json!(3)),
            ("resize_mode", json!("Tile")),
            ("control_mode", json!("Strong")),
            ("guidance_start", json!(1)),
            ("effective_region_mask", json!("QUJD")),
            ("input_mode", json!("batch")),
            ("image", json!(["a", "b", "c"])),
            ("mask", json!("QUJD")),
            ("hr_option", json!("Never")),
        ] {
            let mut body = json!({ "model": "edges", "guidance_end": 0.5 });
            body[field] = value;
            let error = unit(body).expect_err(field);
            assert!(error.starts_with(&format!("unit.{field} ")), "{error}");
        }
    }
}
