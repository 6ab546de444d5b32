//! The upscalers that requests can name, read on a thread that may block.

use candle_core::{DType, Device};

use super::enlarge::LoadedUpscaler;
use super::options::AddOns;
use super::upscaler::PictureUpscaler;
use crate::error::{Error, Result};
use crate::files::AssetCache;
use crate::networks::UpscalerNetwork;

/// The upscalers that requests can name, with an LRU cache. Usable from any thread.
pub(crate) struct UpscalerCache {
    cache: AssetCache<UpscalerNetwork>,
    device: Device,
    dtype: DType,
}

impl UpscalerCache {
    pub(crate) fn new(add_ons: &AddOns, device: &Device, dtype: DType) -> Self {
        let cache = AssetCache::new(add_ons.upscalers.clone(), add_ons.max_upscaler_bytes);
        Self { cache, device: device.clone(), dtype }
    }

    /// An upscaler, whose file is read if it has one and is not cached. Blocks.
    pub(crate) fn get(
        &self,
        field: &'static str,
        upscaler: &PictureUpscaler,
    ) -> Result<LoadedUpscaler> {
        Ok(match upscaler {
            PictureUpscaler::None => LoadedUpscaler::None,
            PictureUpscaler::Lanczos => LoadedUpscaler::Lanczos,
            PictureUpscaler::Nearest => LoadedUpscaler::Nearest,
            PictureUpscaler::File(name) => {
                let network = self.cache.get(field, name, |file| {
                    let network = UpscalerNetwork::read(&file.path, &self.device, self.dtype)?;
                    let (bytes, most) = (network.bytes(), self.cache.max_bytes());
                    if bytes > most {
                        let reason = format!(
                            "takes {bytes} bytes; at most {most} are allowed (--max-upscaler-bytes)"
                        );
                        return Err(Error::config(name.to_string(), reason));
                    }
                    Ok((network, bytes))
                })?;
                LoadedUpscaler::Network(network)
            }
        })
    }
}
