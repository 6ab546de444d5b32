//! The files of a model as they were read: their digest, by which they are known again, and what is
//! odd about them.

use crate::error::{Error, Result};
use crate::files::{Fingerprint, Source, Weights};
use crate::layers::{Network, Reopen};

/// Of the files as they are loaded, which may be replaced afterwards.
#[derive(Default)]
pub(super) struct ReadFiles {
    pub(super) fingerprint: Fingerprint,
    pub(super) warnings: Vec<String>,
}

impl ReadFiles {
    /// Adds the files of a network that was built. Returns their own fingerprint.
    /// Fails if one was written to while it was read.
    pub(super) fn note(&mut self, weights: &Weights) -> Result<String> {
        weights.add_to(&mut self.fingerprint)?;
        for warning in weights.warnings() {
            // A single file is read once for each network.
            if !self.warnings.contains(&warning) {
                self.warnings.push(warning);
            }
        }
        fingerprint_of(weights)
    }
}

/// The fingerprint of the files of a network alone.
pub(super) fn fingerprint_of(weights: &Weights) -> Result<String> {
    let mut fingerprint = Fingerprint::default();
    weights.add_to(&mut fingerprint)?;
    Ok(fingerprint.finish())
}

/// Opens the files of text encoders and UNet again, which are in these sources and have these
/// fingerprints: the layers keep the weights only as they compute with them.
pub(super) fn reopen(
    sources: [&Source; 2],
    half: bool,
    text_prints: Vec<String>,
    unet_print: String,
) -> Reopen {
    let [text, unet] = sources.map(Clone::clone);
    let text_print = move |k: usize| text_prints.get(k).cloned().unwrap_or_default();
    Box::new(move |network| match network {
        Network::TextEncoder => open_again(&text, ("text_encoder", "model"), half, &text_print(0)),
        Network::TextEncoder2 => {
            open_again(&text, ("text_encoder_2", "model"), half, &text_print(1))
        }
        Network::UNet => open_again(&unet, ("unet", "diffusion_pytorch_model"), half, &unet_print),
    })
}

/// Opens the files of a network again, if they are still those with this fingerprint.
pub(super) fn open_again(
    source: &Source,
    (folder, stem): (&str, &str),
    half: bool,
    known: &str,
) -> Result<Weights> {
    let weights = source.weights(folder, stem, half)?;
    match fingerprint_of(&weights)? == known {
        true => Ok(weights),
        false => Err(Error::config(
            weights.file_names(),
            "has changed since the model was loaded; load the model again",
        )),
    }
}
