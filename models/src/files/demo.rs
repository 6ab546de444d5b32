//! The built-in models: the files of `models/demo/`, part of the binary, and their ControlNet. The
//! second is the first with its LCM-LoRA added, and the scheduler of this.

use candle_core::{DType, Device, Tensor, safetensors};

use crate::error::{Error, Result};

macro_rules! files {
    ($($name:literal),* $(,)?) => {
        &[$(($name, include_bytes!(concat!(env!("CARGO_MANIFEST_DIR"), "/demo/", $name)))),*]
    };
}

/// Every file by its name, in the Diffusers format.
const FILES: &[(&str, &[u8])] = files![
    "controlnets/canny/config.json",
    "controlnets/canny/diffusion_pytorch_model.safetensors",
    "lcm_scheduler.json",
    "loras/lcm.safetensors",
    "model_index.json",
    "scheduler/scheduler_config.json",
    "text_encoder/config.json",
    "text_encoder/model.safetensors",
    "tokenizer/merges.txt",
    "tokenizer/tokenizer_config.json",
    "tokenizer/vocab.json",
    "unet/config.json",
    "unet/diffusion_pytorch_model.safetensors",
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
];

const SCHEDULER: &str = "scheduler/scheduler_config.json";
const UNET: &str = "unet/diffusion_pytorch_model.safetensors";
const LORA: &str = "loras/lcm.safetensors";

/// The ControlNets, by the names of their folders in `controlnets/`.
pub(super) const CONTROLNETS: &[&str] = &["canny"];

/// The bytes of a file, if the model has it.
pub(super) fn file(name: &str) -> Option<&'static [u8]> {
    FILES.iter().find(|(known, _)| *known == name).map(|(_, bytes)| *bytes)
}

/// The same of the model for four steps, whose UNet is [`lcm_unet`].
pub(super) fn lcm_file(name: &str) -> Option<&'static [u8]> {
    file(if name == SCHEDULER { "lcm_scheduler.json" } else { name })
}

/// The UNet's file with the LCM-LoRA added.
pub(super) fn lcm_unet() -> Result<Vec<u8>> {
    let read = |name| safetensors::load_buffer(file(name).unwrap_or_default(), &Device::Cpu);
    let (mut tensors, lora) = (read(UNET)?, read(LORA)?);
    for (name, weight) in &mut tensors {
        let module = name.trim_end_matches(".weight");
        let part = |matrix: &str| lora.get(&format!("unet.{module}.{matrix}.weight"));
        if let (Some(down), Some(up)) = (part("lora_A"), part("lora_B")) {
            *weight = sum(weight, down, up)?;
        }
    }
    let bytes = ::safetensors::serialize(tensors, None);
    bytes.map_err(|error| Error::config(UNET, error.to_string()))
}

/// A weight (outputs, ...) plus the delta of a LoRA, (rank, ...) and (outputs, rank, ...). The scale
/// is 1.
fn sum(weight: &Tensor, down: &Tensor, up: &Tensor) -> Result<Tensor> {
    let wide = |x: &Tensor| x.to_dtype(DType::F32);
    let delta = wide(&up.flatten_from(1)?)?.matmul(&wide(&down.flatten_from(1)?)?)?;
    Ok((wide(weight)? + delta.reshape(weight.shape())?)?.to_dtype(weight.dtype())?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_adapted_weights_of_the_lcm_differ() {
        let read = |bytes: &[u8]| safetensors::load_buffer(bytes, &Device::Cpu).expect("tensors");
        let of = |name: &str| read(file(name).expect("a file"));
        let (plain, lora, lcm) = (of(UNET), of(LORA), read(&lcm_unet().expect("a file")));
        let values = |x: &Tensor| {
            x.to_dtype(DType::F32).and_then(|x| x.flatten_all()?.to_vec1::<f32>()).expect("numbers")
        };
        let changed = plain.iter().filter(|(name, weight)| values(weight) != values(&lcm[*name]));
        assert_eq!((plain.len(), 2 * changed.count()), (lcm.len(), lora.len()));
    }
}
