//! The VAE of a model. In f16 some published VAEs overflow, for every image or for some of them: what
//! is not finite is computed once more in f32, by networks of which nothing is in memory before.

use std::sync::OnceLock;

use candle_core::{DType, Device, Tensor};

use super::preview::octaves;
use crate::error::{Error, Result};
use crate::files::Weights;
use crate::layers::activation_dtype;
use crate::networks::{Decoder, Encoder, Tiled, VaeConfig, tiles};
use crate::ops::on_host;
use crate::picture::Size;

/// How the files of the VAE are opened again, if they are still those that were loaded.
pub(super) type Reopen = Box<dyn Fn() -> Result<Weights> + Send + Sync>;

/// Side of the latents that a decoder is tried on.
const TRIED_SIDE: usize = 8;

/// Encoder and decoder.
pub(super) struct Vae {
    /// Always loaded, also for text-to-image alone: it is a thirtieth of the model, and what is
    /// wrong with it should show at load rather than at the first request that needs it.
    encoder: Encoder,
    decoder: Decoder,
    /// The type in which the decoder computes.
    pub(super) decoder_dtype: DType,
    /// Those in f32, where these are in f16.
    wide: Option<WideVae>,
}

/// Encoder and decoder in f32, each loaded when it is first needed.
struct WideVae {
    config: VaeConfig,
    device: Device,
    open: Reopen,
    encoder: OnceLock<Encoder>,
    decoder: OnceLock<Decoder>,
}

impl WideVae {
    fn encoder(&self) -> Result<&Encoder> {
        get(&self.encoder, || {
            Encoder::load(self.config.clone(), &(self.open)()?, &self.device, DType::F32)
        })
    }

    fn decoder(&self) -> Result<&Decoder> {
        get(&self.decoder, || {
            Decoder::load(self.config.clone(), &(self.open)()?, &self.device, DType::F32)
        })
    }
}

fn get<T>(cell: &OnceLock<T>, load: impl FnOnce() -> Result<T>) -> Result<&T> {
    if let Some(network) = cell.get() {
        return Ok(network);
    }
    let network = load()?;
    Ok(cell.get_or_init(|| network))
}

impl Vae {
    /// Builds both from the weights, which `open` opens again. If the decoder overflows in f16 on a
    /// corner of the latents that previews are fitted to, it is the one in f32 from now on, and a warning says so:
    /// which of the two draws an image may not depend on the images before it.
    pub(super) fn load(
        config: VaeConfig,
        weights: &Weights,
        device: &Device,
        dtype: DType,
        open: Reopen,
    ) -> Result<(Self, Option<String>)> {
        let encoder = Encoder::load(config.clone(), weights, device, dtype)?;
        let decoder = Decoder::load(config.clone(), weights, device, dtype)?;
        let decoder_dtype = activation_dtype(device, dtype);
        let device = device.clone();
        let (encoder_cell, decoder_cell) = (OnceLock::new(), OnceLock::new());
        let wide = (decoder_dtype == DType::F16).then_some(WideVae {
            config,
            device,
            open,
            encoder: encoder_cell,
            decoder: decoder_cell,
        });
        Self { encoder, decoder, decoder_dtype, wide }.tried()
    }

    fn tried(mut self) -> Result<(Self, Option<String>)> {
        let Some(wide) = &mut self.wide else { return Ok((self, None)) };
        let latents = octaves(wide.config.latent_channels)?;
        let corner = latents.narrow(2, 0, TRIED_SIDE)?.narrow(3, 0, TRIED_SIDE)?.contiguous()?;
        let latents = wide.config.unscaled(&corner.to_device(&wide.device)?)?;
        if is_finite(&self.decoder.forward(&latents)?)? {
            return Ok((self, None));
        }
        wide.decoder()?;
        if let Some(decoder) = wide.decoder.take() {
            (self.decoder, self.decoder_dtype) = (decoder, DType::F32);
        }
        Ok((self, Some("the VAE's decoder overflows in f16: it computes in f32".into())))
    }

    /// The widest type that an image may be decoded in: f32 where the decoder is in f16, which may
    /// overflow.
    pub(super) fn widest_dtype(&self) -> DType {
        if self.wide.is_some() { DType::F32 } else { self.decoder_dtype }
    }

    pub(super) fn config(&self) -> &VaeConfig {
        self.decoder.config()
    }

    /// Images (B, H, W, 3) in -1..1 -> mean and log variance of the latents, each (B, C, h, w) f32
    /// and not yet multiplied by the scaling factor.
    pub(super) fn encode(&self, pixels: &Tensor) -> Result<(Tensor, Tensor)> {
        self.config().distribution(&self.moments(pixels)?)
    }

    /// Images (B, H, W, 3) in -1..1 -> what [`VaeConfig::distribution`] takes: (B, h, w, 2 C) f32.
    pub(super) fn moments(&self, pixels: &Tensor) -> Result<Tensor> {
        let encode = |encoder: &Encoder| -> Result<(Tensor, bool)> {
            let moments = encoder.moments(pixels)?;
            let finite = is_finite(&moments)?;
            Ok((moments, finite))
        };
        let mut encoded = encode(&self.encoder)?;
        if let (false, Some(wide)) = (encoded.1, &self.wide) {
            encoded = encode(wide.encoder()?)?;
        }
        match encoded {
            (moments, true) => Ok(moments),
            _ => Err(Error::NotFinite("the latents of the input image")),
        }
    }

    /// Number of tiles of an image in this size; 0 if it is computed as a whole.
    pub(super) fn tiles(&self, size: Size) -> usize {
        let scale = self.config().scale();
        let plane = [size.height() / scale, size.width() / scale];
        self.config().tile().map_or(0, |tile| tiles(plane, tile))
    }

    /// The work of a tile, in pixels times rows times UNet calls.
    pub(super) fn tile_work(&self) -> usize {
        self.config().sample_size.saturating_pow(2)
    }

    /// An image (1, H, W, 3) in tiles for [`Self::moments`], if it is larger than one.
    pub(super) fn tiles_to_encode(&self, pixels: &Tensor) -> Result<Option<Tiled>> {
        let Some(tile) = self.config().tile() else { return Ok(None) };
        let channels = 2 * self.config().latent_channels;
        Tiled::encode(pixels, (tile, self.config().scale()), channels)
    }

    /// Latents (1, C, h, w) in tiles for [`Self::decode`], if they are larger than one.
    pub(super) fn tiles_to_decode(&self, latents: &Tensor) -> Result<Option<Tiled>> {
        let Some(tile) = self.config().tile() else { return Ok(None) };
        Tiled::decode(latents, tile, self.config().scale())
    }

    /// Latents (1, C, h, w), divided by the scaling factor -> the image (1, H, W, 3) on the CPU.
    pub(super) fn decode(&self, latents: &Tensor) -> Result<Tensor> {
        if !is_finite(latents)? {
            return Err(Error::NotFinite("the latents"));
        }
        let decode = |decoder: &Decoder| -> Result<(Tensor, bool)> {
            let image = on_host(&decoder.forward(latents)?)?;
            let finite = is_finite(&image)?;
            Ok((image, finite))
        };
        let mut decoded = decode(&self.decoder)?;
        if let (false, Some(wide), true) = (decoded.1, &self.wide, self.decoder_dtype == DType::F16)
        {
            decoded = decode(wide.decoder()?)?;
        }
        match decoded {
            (image, true) => Ok(image),
            _ => Err(Error::NotFinite("the image")),
        }
    }
}

fn is_finite(x: &Tensor) -> Result<bool> {
    let values = on_host(x)?.flatten_all()?.to_vec1::<f32>()?;
    Ok(values.iter().all(|value| value.is_finite()))
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;
    use crate::files::Source;

    /// The built-in VAE with other tensors, in place of one in f16, and how often its files were
    /// opened again.
    fn narrow(change: impl Fn(&mut HashMap<String, Tensor>)) -> (Vae, Arc<AtomicUsize>) {
        let (cpu, folder) = (&Device::Cpu, tempfile::tempdir().unwrap());
        let path = folder.path().join("a.safetensors");
        let file = "demo/vae/diffusion_pytorch_model.safetensors";
        let file = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join(file);
        let mut tensors = candle_core::safetensors::load(file, cpu).unwrap();
        change(&mut tensors);
        candle_core::safetensors::save(&tensors, &path).unwrap();
        let weights = Weights::whole(&path).unwrap();
        let opened = Arc::new(AtomicUsize::new(0));
        let counter = Arc::clone(&opened);
        let open = move || {
            counter.fetch_add(1, Ordering::Relaxed);
            Source::Demo.weights("vae", "diffusion_pytorch_model", false)
        };
        let config = VaeConfig::read(&Source::Demo).unwrap();
        let vae = Vae {
            encoder: Encoder::load(config.clone(), &weights, cpu, DType::F32).unwrap(),
            decoder: Decoder::load(config.clone(), &weights, cpu, DType::F32).unwrap(),
            decoder_dtype: DType::F16,
            wide: Some(WideVae {
                config,
                device: cpu.clone(),
                open: Box::new(open),
                encoder: OnceLock::new(),
                decoder: OnceLock::new(),
            }),
        };
        (vae, opened)
    }

    /// Weights so large that the norms behind them overflow.
    fn overflow(tensors: &mut HashMap<String, Tensor>, name: &str) {
        let tensor = tensors.get_mut(name).unwrap();
        *tensor = (tensor.to_dtype(DType::F32).unwrap() * 1e38).unwrap();
    }

    fn floats(x: &Tensor) -> Vec<f32> {
        x.flatten_all().unwrap().to_vec1().unwrap()
    }

    fn zeros(vae: &Vae) -> Tensor {
        let shape = (1, vae.config().latent_channels, 2, 2);
        Tensor::zeros(shape, DType::F32, &Device::Cpu).unwrap()
    }

    #[test]
    fn an_image_that_overflows_is_decoded_once_more() {
        let (sound, opened) = narrow(|_| ());
        let latents = zeros(&sound);
        let image = sound.decode(&latents).unwrap();
        let error = sound.decode(&(&latents + f64::NAN).unwrap()).unwrap_err().to_string();
        assert!(error.contains("the latents: NaN"), "{error}");
        assert_eq!(opened.load(Ordering::Relaxed), 0, "f32 would not help");

        let (narrow, opened) = narrow(|tensors| overflow(tensors, "decoder.conv_in.bias"));
        for _ in 0..2 {
            assert_eq!(floats(&narrow.decode(&latents).unwrap()), floats(&image));
        }
        assert_eq!(opened.load(Ordering::Relaxed), 1, "the files are read once");
    }

    #[test]
    fn a_decoder_that_always_overflows_is_in_f32_from_the_load() {
        let (sound, opened) = narrow(|_| ());
        let latents = zeros(&sound);
        let image = sound.decode(&latents).unwrap();
        let (sound, warning) = sound.tried().unwrap();
        assert_eq!((sound.decoder_dtype, warning), (DType::F16, None));
        assert_eq!(opened.load(Ordering::Relaxed), 0);

        let (narrow, opened) = narrow(|tensors| overflow(tensors, "decoder.conv_in.bias"));
        let (vae, warning) = narrow.tried().unwrap();
        assert_eq!(vae.decoder_dtype, DType::F32);
        assert!(warning.unwrap().contains("f32"));
        assert_eq!(floats(&vae.decode(&latents).unwrap()), floats(&image));
        assert_eq!(opened.load(Ordering::Relaxed), 1);
    }

    #[test]
    fn an_input_image_that_overflows_is_encoded_once_more() {
        let pixels = Tensor::zeros((1, 16, 16, 3), DType::F32, &Device::Cpu).unwrap();
        let (sound, opened) = narrow(|_| ());
        let (mean, logvar) = sound.encode(&pixels).unwrap();
        assert_eq!(opened.load(Ordering::Relaxed), 0);
        let (narrow, opened) = narrow(|tensors| overflow(tensors, "encoder.conv_in.bias"));
        for _ in 0..2 {
            let again = narrow.encode(&pixels).unwrap();
            assert_eq!((floats(&again.0), floats(&again.1)), (floats(&mean), floats(&logvar)));
        }
        assert_eq!(opened.load(Ordering::Relaxed), 1, "the files are read once");
        assert!(narrow.encode(&(pixels + f64::NAN).unwrap()).is_err());
    }
}
