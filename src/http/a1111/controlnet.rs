//! The routes of AUTOMATIC1111's extension for ControlNets.
//!
//! Reference: sd-webui-controlnet 1.1.455 `scripts/api.py`, `scripts/global_state.py`.

use std::path::PathBuf;

use axum::Json;
use axum::extract::State;
use schemars::JsonSchema;
use sd_models::{AssetDir, AssetFile, CANNY, Preprocessor, THRESHOLD};
use serde::Deserialize;
use serde_json::{Map, Value, json};
use tokio::time::Instant;

use super::lists::current_model;
use super::units::{ADAPTER_MODULES, RESOLUTION, thresholds, within};
use super::unread;
use crate::http::admission::Admitted;
use crate::http::deadline::Timeout;
use crate::http::drawing::base64;
use crate::http::error::Result;
use crate::http::state::AppState;
use crate::image::{self, ControlMap, Format};
use crate::request::{ImageFile, Resolution, ValidationError, processed};

/// The version of the extension's API.
const VERSION: u32 = 3;

/// The kinds of control that clients ask for, the names of nets that belong to each, and its
/// preprocessors beside none, the usual one first.
const TYPES: [(&str, &[&str], &[&str]); 15] = [
    ("Canny", &["canny"], &["canny", "invert"]),
    ("Depth", &["depth"], &[]),
    ("Inpaint", &["inpaint"], &[]),
    ("InstructP2P", &["instructp2p", "ip2p"], &[]),
    ("Lineart", &["lineart"], &["invert"]),
    ("MLSD", &["mlsd"], &["invert"]),
    ("NormalMap", &["normalmap", "normal"], &[]),
    ("OpenPose", &["openpose", "densepose"], &[]),
    ("QRCode", &["qrcode", "qr_code", "brightness"], &["threshold"]),
    ("Recolor", &["recolor"], &[]),
    ("Scribble", &["scribble", "sketch"], &["invert", "threshold"]),
    ("Segmentation", &["segmentation", "seg"], &[]),
    ("Shuffle", &["shuffle"], &[]),
    ("SoftEdge", &["softedge", "hed"], &[]),
    ("Tile", &["tile", "blur"], &[]),
];

/// A request for what a preprocessor makes of pictures.
#[derive(Debug, Deserialize, JsonSchema)]
pub(crate) struct Detect {
    /// Preprocessor. Default: none.
    controlnet_module: Option<String>,
    /// The pictures, in base64 or as data URLs.
    #[schemars(required)]
    controlnet_input_images: Option<Vec<ImageFile>>,
    /// Length of the shorter side at which it works. Default: 512.
    controlnet_processor_res: Option<f64>,
    /// Its first threshold. Default: its own.
    controlnet_threshold_a: Option<f64>,
    /// Its second threshold. Default: its own.
    controlnet_threshold_b: Option<f64>,
}

/// `GET /controlnet/version`.
pub(crate) async fn version() -> Json<Value> {
    Json(json!({ "version": VERSION }))
}

/// `GET /controlnet/settings`.
pub(crate) async fn settings(State(state): State<AppState>) -> Json<Value> {
    Json(json!({ "control_net_unit_count": state.settings.limits.max_controlnets }))
}

/// `GET /controlnet/module_list`.
pub(crate) async fn module_list() -> Json<Value> {
    let detail = |name: &str| {
        let resolution = slider("Resolution", RESOLUTION, 8.0);
        let sliders = match name {
            "canny" => vec![
                resolution,
                slider("Low Threshold", (CANNY.0, [1.0, 255.0]), 1.0),
                slider("High Threshold", (CANNY.1, [1.0, 255.0]), 1.0),
            ],
            "threshold" => {
                vec![resolution, slider("Binarization Threshold", (THRESHOLD, [0.0, 255.0]), 0.01)]
            }
            _ => Vec::new(),
        };
        json!({ "model_free": false, "sliders": sliders })
    };
    let names = modules();
    let details: Map<String, Value> =
        names.iter().map(|name| ((*name).to_owned(), detail(name))).collect();
    Json(json!({ "module_list": names, "module_detail": details }))
}

/// The preprocessors, and those of IP-Adapters.
fn modules() -> Vec<&'static str> {
    Preprocessor::names().chain(ADAPTER_MODULES).collect()
}

fn slider(name: &str, (value, [min, max]): (f64, [f64; 2]), step: f64) -> Value {
    json!({ "name": name, "value": value, "min": min, "max": max, "step": step })
}

/// `GET /controlnet/model_list`: the nets and IP-Adapters, those that are files with hashes as there.
pub(crate) async fn model_list(State(state): State<AppState>) -> Result<Json<Value>> {
    let Listed { nets, adapters } = names(&state).await?;
    let all = [nets, adapters].concat();
    Ok(Json(json!({ "model_list": all })))
}

/// `GET /controlnet/control_types`.
pub(crate) async fn control_types(State(state): State<AppState>) -> Result<Json<Value>> {
    let Listed { nets, adapters } = names(&state).await?;
    let none = || std::iter::once("None".to_owned());
    let all: Vec<_> = none().chain(nets.iter().cloned()).chain(adapters.iter().cloned()).collect();
    let mut types = Map::new();
    types.insert(
        "All".into(),
        json!({
            "module_list": modules(), "model_list": all, "default_option": "none",
            "default_model": "None",
        }),
    );
    let modules: Vec<_> = std::iter::once("none").chain(ADAPTER_MODULES).collect();
    types.insert(
        "IP-Adapter".into(),
        json!({
            "module_list": modules, "default_option": ADAPTER_MODULES[0],
            "default_model": adapters.first().cloned().unwrap_or_else(|| "None".into()),
            "model_list": none().chain(adapters).collect::<Vec<_>>(),
        }),
    );
    for (kind, parts, modules) in TYPES {
        let belongs = |name: &&String| {
            let name = name.to_lowercase();
            parts.iter().any(|part| name.contains(part))
        };
        let own: Vec<_> = nets.iter().filter(belongs).cloned().collect();
        let is_newest = |name: &&String| name.split('[').next().unwrap_or(name).contains("11");
        let default = own.iter().find(is_newest).or(own.first()).cloned();
        let modules: Vec<_> = std::iter::once("none").chain(modules.iter().copied()).collect();
        types.insert(
            kind.into(),
            json!({
                "default_option": modules.get(1).unwrap_or(&"none"),
                "default_model": default.unwrap_or_else(|| "None".into()),
                "module_list": modules,
                "model_list": none().chain(own).collect::<Vec<_>>(),
            }),
        );
    }
    Ok(Json(json!({ "control_types": types })))
}

/// The names of nets and IP-Adapters with their hashes.
struct Listed {
    nets: Vec<String>,
    adapters: Vec<String>,
}

async fn names(state: &AppState) -> Result<Listed> {
    let model = current_model(state)?;
    let add_ons = model.map_or_else(|| state.models.add_ons(), |model| model.add_ons.clone());
    let most = state.settings.request_timeout;
    let deadline = Timeout::within(most, "--request-timeout-ms", most).after(Instant::now());
    let hashes = state.hashes.clone();
    let list = move || {
        let hash = |name: &str, path: PathBuf| {
            // Of a directory that of its weights.
            let path = match path.is_dir() {
                true => path.join("diffusion_pytorch_model.safetensors"),
                false => path,
            };
            AssetFile::new(name, path).ok().and_then(|file| hashes.part(&file))
        };
        let named = |(name, path): (String, Option<PathBuf>)| match path
            .and_then(|path| hash(&name, path))
        {
            Some(hash) => format!("{name} [{hash}]"),
            None => name,
        };
        let all = |files: &AssetDir| files.names().into_iter().map(named).collect();
        Ok(Listed { nets: all(&add_ons.controlnets), adapters: all(&add_ons.ip_adapters) })
    };
    state.reader.look_up(deadline, (), list).await
}

/// `POST /controlnet/detect`: what a preprocessor makes of pictures.
pub(crate) async fn detect(
    State(state): State<AppState>,
    mut admitted: Admitted,
) -> Result<Json<Value>> {
    let mut fields = admitted.json(&state).await?;
    let limits = state.settings.limits;
    let read: Detect = fields.read(&limits)?;
    // How the extension computes.
    fields.drop_if("low_vram", |_| true);
    let mut warnings = unread::warnings(&fields, None, true);
    drop(fields);
    let mut files = read.controlnet_input_images.unwrap_or_default();
    const IMAGES: &str = "controlnet_input_images";
    if files.is_empty() {
        return Err(ValidationError::range(IMAGES, "has no image").into());
    }
    if files.len() > limits.max_images {
        let (count, most) = (files.len(), limits.max_images);
        let reason = format!("has {count} entries; at most {most} are allowed");
        return Err(ValidationError::range(IMAGES, reason).into());
    }
    let refuse = |reason: String| ValidationError::range("controlnet_module", reason);
    let module = read.controlnet_module.unwrap_or_else(|| "none".into());
    let named: Preprocessor = module.parse().map_err(refuse)?;
    let given = [
        ("controlnet_threshold_a", read.controlnet_threshold_a),
        ("controlnet_threshold_b", read.controlnet_threshold_b),
    ];
    let preprocessor = match (named, thresholds(named, given, "", &mut warnings)) {
        (Preprocessor::Canny { .. }, (Some(low), Some(high))) => Preprocessor::Canny { low, high },
        (Preprocessor::Threshold { .. }, (Some(above), _)) => Preprocessor::Threshold { above },
        (other, _) => other,
    };
    const SIDE: &str = "controlnet_processor_res";
    let side = within(SIDE, read.controlnet_processor_res, RESOLUTION, &mut warnings);
    let (shorter, most) = (side as usize, limits.most_of_a_map());
    let (reader, slot) = (state.reader.clone(), admitted.slot);
    let deadline = slot.deadline;
    let work = move || {
        let mut maps = Vec::new();
        for (k, file) in files.iter_mut().enumerate() {
            let name = format!("{IMAGES}[{k}]");
            let refuse = |reason: String| ValidationError::range(&name, reason);
            let decoded = file.weigh(limits.max_input_pixels);
            let resolution = Some(Resolution::Shorter(shorter));
            let made = file
                .dimensions(limits.max_input_pixels)
                .map_or(0, |own| processed(own, preprocessor, resolution, &limits));
            let _weighed = reader.weigh(deadline, decoded.saturating_add(made))?;
            let picture = image::on_white(file.decoded(&name, &limits)?);
            // Those that work in the picture's own size, too: the reply holds what they make.
            if matches!(preprocessor, Preprocessor::None | Preprocessor::Invert) {
                image::check_own_size(&picture, preprocessor, most).map_err(refuse)?;
            }
            let map = ControlMap::new(&picture, preprocessor, shorter, most);
            let map = image::rgb(&map.map_err(refuse)?.whole().into());
            let map = image::encode(&map, Format::Png, None, "");
            maps.push(map.map_err(|error| refuse(format!("cannot be written: {error}")))?);
        }
        Ok(base64(&maps))
    };
    let images = state.reader.run(deadline, slot, work).await?;
    let mut reply = json!({ "info": "Success", "images": images });
    if !warnings.is_empty() {
        reply["warnings"] = warnings.into();
    }
    Ok(Json(reply))
}
