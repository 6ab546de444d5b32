//! The VAE's decoder in f32, for images on which that in f16 overflows: some published VAEs do for
//! every image. Nothing of it is in memory before the first of them.

use std::sync::OnceLock;

use candle_core::{DType, Device, Tensor};

use crate::error::{Error, Result};
use crate::files::Weights;
use crate::networks::{Decoder, VaeConfig};

/// How the files of the VAE are opened again, if they are still those that were loaded.
type Reopen = Box<dyn Fn() -> Result<Weights> + Send + Sync>;

/// A decoder that is loaded when it is first needed.
pub(super) struct WideDecoder {
    config: VaeConfig,
    device: Device,
    open: Reopen,
    decoder: OnceLock<Decoder>,
}

impl WideDecoder {
    pub(super) fn new(config: VaeConfig, device: &Device, open: Reopen) -> Self {
        Self { config, device: device.clone(), open, decoder: OnceLock::new() }
    }

    fn get(&self) -> Result<&Decoder> {
        if let Some(decoder) = self.decoder.get() {
            return Ok(decoder);
        }
        let decoder =
            Decoder::load(self.config.clone(), &(self.open)()?, &self.device, DType::F32)?;
        Ok(self.decoder.get_or_init(|| decoder))
    }
}

/// Latents (1, C, h, w), divided by the scaling factor -> the image (1, H, W, 3) on the CPU. If it is
/// not finite, it is decoded once more by `wide`.
pub(super) fn decode(
    decoder: &Decoder,
    wide: Option<&WideDecoder>,
    latents: &Tensor,
) -> Result<Tensor> {
    let draw = |decoder: &Decoder| -> Result<(Tensor, bool)> {
        let image = decoder.forward(latents)?.to_device(&Device::Cpu)?;
        let sound = image.flatten_all()?.to_vec1::<f32>()?.iter().all(|value| value.is_finite());
        Ok((image, sound))
    };
    let mut drawn = draw(decoder)?;
    if let (false, Some(wide)) = (drawn.1, wide) {
        drawn = draw(wide.get()?)?;
    }
    match drawn {
        (image, true) => Ok(image),
        _ => {
            let reason = "the image contains NaN or infinite numbers";
            Err(Error::Compute(candle_core::Error::Msg(reason.into())))
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;
    use crate::files::Source;

    #[test]
    fn an_image_that_is_not_finite_is_decoded_once_more() {
        let cpu = &Device::Cpu;
        let config = VaeConfig::read(&Source::Demo).unwrap();
        let open = || Source::Demo.weights("vae", "diffusion_pytorch_model", false);
        let load = |weights: &Weights| Decoder::load(config.clone(), weights, cpu, DType::F32);
        let decoder = load(&open().unwrap()).unwrap();
        let opened = Arc::new(AtomicUsize::new(0));
        let counter = Arc::clone(&opened);
        let counted = move || {
            counter.fetch_add(1, Ordering::Relaxed);
            open()
        };
        let wide = WideDecoder::new(config.clone(), cpu, Box::new(counted));
        let latents = Tensor::zeros((1, config.latent_channels, 2, 2), DType::F32, cpu).unwrap();
        let floats = |x: &Tensor| x.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let image = decode(&decoder, Some(&wide), &latents).unwrap();
        assert_eq!(opened.load(Ordering::Relaxed), 0, "nothing is read for a sound image");
        assert_eq!(floats(&wide.get().unwrap().forward(&latents).unwrap()), floats(&image));
        // The same decoder with weights so large that its norms overflow.
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.safetensors");
        let file = "demo/vae/diffusion_pytorch_model.safetensors";
        let file = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join(file);
        let mut tensors = candle_core::safetensors::load(file, cpu).unwrap();
        let first = tensors.get_mut("decoder.conv_in.bias").unwrap();
        *first = (first.to_dtype(DType::F32).unwrap() * 1e38).unwrap();
        candle_core::safetensors::save(&tensors, &path).unwrap();
        let narrow = load(&Weights::whole(&path).unwrap()).unwrap();
        assert!(decode(&narrow, None, &latents).is_err());
        assert_eq!(floats(&decode(&narrow, Some(&wide), &latents).unwrap()), floats(&image));

        let broken = (latents + f64::NAN).unwrap();
        let error = decode(&decoder, Some(&wide), &broken).unwrap_err().to_string();
        assert!(error.contains("NaN"), "{error}");
        assert_eq!(opened.load(Ordering::Relaxed), 1, "the files are read once");
    }
}
