//! The `info` of a response: the generation parameters of its images.

use std::time::SystemTime;

use sd_models::Spec;
use serde_json::{Map, Value, json};

use super::timestamp::timestamp;
use crate::engine::GeneratedImage;
use crate::http::drawing::{Drawing, warnings};
use crate::image;

/// How the images of a request were asked for.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Batches {
    /// Number of images of a batch.
    pub(crate) size: usize,
    /// Number of batches.
    pub(crate) count: usize,
    /// When the request arrived.
    pub(crate) began: SystemTime,
}

/// The generation parameters of all images, as AUTOMATIC1111 returns them.
pub(crate) fn info(drawing: &Drawing, images: &[GeneratedImage], batches: Batches) -> Value {
    let (specs, model) = (&drawing.specs, &drawing.model.name);
    let Some(first) = specs.first() else { return Value::Null };
    let loras = images.first().map_or_else(String::new, |image| drawing.loras(image));
    let all = |of: fn(&Spec) -> Value| specs.iter().map(of).collect::<Vec<_>>();
    let infotexts: Vec<_> = specs.iter().map(|spec| drawing.infotext(spec, &loras)).collect();
    let warnings = match images {
        // Interrupted.
        [] => drawing.warnings.iter().map(String::as_str).collect(),
        images => warnings(images),
    };
    let nsfw: Option<Vec<bool>> = images.iter().map(|image| image.nsfw).collect();
    let (model_hash, vae) = (drawing.model_hash(), drawing.vae_hash());
    let mut parameters = image::extra_parameters(first);
    let refiner_hash = drawing.refiner_hash(first);
    parameters.extend(image::refiner_parameters(first, refiner_hash.as_deref()));
    parameters.extend(drawing.parameters.iter().cloned());
    let hashes = (!loras.is_empty()).then_some((image::LORA_HASHES, loras));
    let parameters: Map<String, Value> = parameters
        .into_iter()
        .chain(hashes)
        .map(|(name, value)| (name.to_owned(), value))
        .chain(image::control_parameters(first, &drawing.control_maps.origins))
        .map(|(name, value)| (name, value.into()))
        .collect();
    json!({
        "prompt": first.prompt,
        "all_prompts": all(|spec| spec.prompt.as_str().into()),
        "negative_prompt": first.negative_prompt,
        "all_negative_prompts": all(|spec| spec.negative_prompt.as_str().into()),
        "seed": first.seed,
        "all_seeds": all(|spec| spec.seed.into()),
        "subseed": subseed(first),
        "all_subseeds": all(subseed),
        "subseed_strength": first.variation.map_or(0.0, |variation| variation.strength),
        "width": first.size.width(),
        "height": first.size.height(),
        "sampler_name": first.sampler_name().title(),
        "cfg_scale": first.guidance_scale,
        "steps": first.steps,
        "batch_size": batches.size,
        "restore_faces": false,
        "face_restoration_model": null,
        "sd_model_name": model,
        "sd_model_hash": model_hash.as_deref().map(image::short_hash),
        "sd_vae_name": vae.as_ref().map(|(name, _)| name),
        "sd_vae_hash": vae.as_ref().map(|(_, hash)| image::short_hash(hash)),
        "seed_resize_from_w": -1,
        "seed_resize_from_h": -1,
        "denoising_strength": first.strength(),
        "extra_generation_params": parameters,
        "index_of_first_image": 0,
        "infotexts": infotexts,
        "styles": [],
        "job_timestamp": timestamp(batches.began),
        "clip_skip": first.clip_skip + 1,
        "is_using_inpainting_conditioning": false,
        "version": concat!("sd-server ", env!("CARGO_PKG_VERSION")),
        "warnings": warnings,
        "all_nsfw": nsfw,
    })
}

/// The seed of an image's variation; 0 if it has none.
fn subseed(spec: &Spec) -> Value {
    spec.variation.map_or(0, |variation| variation.seed).into()
}
