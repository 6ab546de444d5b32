//! A file with a UNet, alone or in a whole checkpoint, in the names of the original (LDM) code or of
//! diffusers: as ComfyUI's loaders of diffusion models take it.

use std::path::Path;

use super::family::{self, UNET};
use super::ldm::LdmCheckpoint;
use super::tensors::{Renamed, Weights};
use crate::error::{Error, Result};

/// Prefixes of the original code's names, the usual one first; a UNet alone has none.
const PREFIXES: [&str; 3] = [UNET, "diffusion_model.", ""];

/// Prefixes of diffusers' names.
const DIFFUSERS_PREFIXES: [&str; 2] = ["unet.", ""];

/// The tensors of the file as they would be in a checkpoint of the original code, or under
/// diffusers' names.
enum Tensors {
    Original(Weights),
    Diffusers(Weights),
}

/// The tensors of the UNet under diffusers' names.
pub(super) fn weights(path: &Path) -> Result<Weights> {
    match open(path)? {
        Tensors::Diffusers(weights) => Ok(weights),
        Tensors::Original(weights) => {
            let rename = LdmCheckpoint::new(&weights, None).renamer("unet");
            Ok(weights.renamed(rename))
        }
    }
}

/// The UNet's configuration, if the original code's names and the shapes tell it.
pub(super) fn config(path: &Path) -> Result<Option<serde_json::Value>> {
    match open(path)? {
        Tensors::Diffusers(_) => Ok(None),
        Tensors::Original(weights) => {
            LdmCheckpoint::new(&weights, None).describe("unet/config.json")
        }
    }
}

fn open(path: &Path) -> Result<Tensors> {
    let weights = Weights::whole(path)?;
    let starting = |prefixes: &[&'static str], name: &str| {
        let has = |prefix: &&&str| weights.shape(&format!("{prefix}{name}")).is_some();
        prefixes.iter().find(has).copied()
    };
    if let Some(prefix) = starting(&PREFIXES, "input_blocks.0.0.weight") {
        let weights = weights.renamed(|name, shape| under(UNET, name.strip_prefix(prefix), shape));
        return match family::other(&weights) {
            None => Ok(Tensors::Original(weights)),
            Some(what) => Err(refused(&weights, &what)),
        };
    }
    if let Some(prefix) = starting(&DIFFUSERS_PREFIXES, "down_blocks.0.resnets.0.conv1.weight") {
        let weights = weights.renamed(|name, shape| under("", name.strip_prefix(prefix), shape));
        return Ok(Tensors::Diffusers(weights));
    }
    let what = family::other(&weights);
    Err(refused(&weights, what.as_deref().unwrap_or("no UNet")))
}

/// A name under a prefix.
fn under(prefix: &str, name: Option<&str>, shape: &[usize]) -> Vec<Renamed> {
    let renamed = |name: &str| Renamed {
        name: format!("{prefix}{name}"),
        shape: shape.to_vec(),
        part: (0, 1),
    };
    name.map(renamed).into_iter().collect()
}

fn refused(weights: &Weights, what: &str) -> Error {
    let reason = format!("this is {what}; --unet takes a UNet of Stable Diffusion 1.x, 2.x or XL");
    Error::config(weights.file_names(), reason)
}
