//! The files of a ControlNet: a directory in the Diffusers format, a file with its tensors in the
//! names of the original code (`control_model.`) or of diffusers, or one in the binary.
//!
//! Reference: diffusers 0.42 `loaders/single_file_utils.py`, `convert_controlnet_checkpoint`.

use std::path::{Path, PathBuf};

use super::family::{self, UNET};
use super::json::Keys;
use super::ldm::LdmCheckpoint;
use super::names;
use super::source::Source;
use super::tensors::{Renamed, Weights};
use crate::error::{Error, Result};

/// Folder of the network in a directory of the Diffusers format, and the stem of its weights.
const FOLDER: (&str, &str) = ("controlnet", "diffusion_pytorch_model");

/// Folder of the built-in model's nets.
const BUILT_IN: &str = "controlnets";

/// Prefixes of the names in single files; some have none.
const ORIGINAL_PREFIXES: [&str; 2] = ["control_model.", ""];
const DIFFUSERS_PREFIXES: [&str; 3] = ["controlnet.", "control_model.", ""];

/// Parts of names that files of other families have, and what they are. The first counts.
const OTHERS: [(&str, &str); 13] = [
    ("lora_controlnet", "a control LoRA, which holds a difference from a UNet"),
    ("control_add_embedding.", "a ControlNet Union, whose kinds of control are an input"),
    ("task_embedding", "a ControlNet Union, whose kinds of control are an input"),
    ("lllite_", "a ControlNet-LLLite"),
    ("motion_modules.", "a SparseCtrl net of AnimateDiff"),
    ("image_proj", "an IP-Adapter"),
    ("style_embedding", "a T2I style adapter"),
    ("body.0.in_conv", "a T2I-Adapter"),
    ("body.0.block", "a T2I-Adapter"),
    ("body.0.resnets", "a T2I-Adapter"),
    ("controlnet_x_embedder", "a ControlNet of Flux"),
    ("pos_embed_input", "a ControlNet of Stable Diffusion 3"),
    ("transformer_blocks.0.ff_context", "a ControlNet of Stable Diffusion 3"),
];

/// Where a ControlNet is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ControlNetFile {
    /// A file or a directory.
    Path(PathBuf),
    /// One of the built-in model's, by its name.
    BuiltIn(&'static str),
}

impl ControlNetFile {
    /// Its name: that of the directory, or the file's stem; a file of diffusers' usual stem has that of
    /// its folder.
    pub(crate) fn name(&self) -> String {
        let path = match self {
            Self::Path(path) => path,
            Self::BuiltIn(name) => return (*name).to_owned(),
        };
        let stem = path.file_stem().unwrap_or_default();
        let end = if path.is_dir() {
            path.file_name()
        } else if stem.as_encoded_bytes().starts_with(FOLDER.1.as_bytes()) {
            path.parent().and_then(Path::file_name).or(Some(stem))
        } else {
            Some(stem)
        };
        end.unwrap_or_default().to_string_lossy().into_owned()
    }

    /// Its configuration: in a directory, or beside the file of one.
    pub(crate) fn config(&self) -> Result<Option<Keys>> {
        let (source, folder) = match self {
            Self::BuiltIn(name) => (Source::Demo, format!("{BUILT_IN}/{name}")),
            Self::Path(path) => {
                let stem = path.file_stem().unwrap_or_default().to_string_lossy();
                let directory = match (path.is_dir(), path.parent()) {
                    (true, _) => path.clone(),
                    (false, Some(parent)) if stem.starts_with(FOLDER.1) => parent.to_owned(),
                    _ => return Ok(None),
                };
                (Source::Network(directory), FOLDER.0.to_owned())
            }
        };
        let name = format!("{folder}/config.json");
        match source.read(&name)? {
            Some(_) => Ok(Some(Keys::read(&source, &name)?)),
            None => Ok(None),
        }
    }

    /// Whether a net without configuration is one of those whose residuals are pooled: shuffle's,
    /// which the A1111 extension tells by their names, too.
    pub(crate) fn pools(&self) -> bool {
        self.name().to_ascii_lowercase().contains("shuffle")
    }

    /// Its tensors under diffusers' names.
    pub(crate) fn weights(&self, half: bool) -> Result<Weights> {
        match self {
            Self::BuiltIn(name) => {
                Source::Demo.weights(&format!("{BUILT_IN}/{name}"), FOLDER.1, half)
            }
            Self::Path(path) if path.is_dir() => {
                Source::Network(path.clone()).weights(FOLDER.0, FOLDER.1, half)
            }
            Self::Path(path) => of_file(path),
        }
    }
}

fn of_file(path: &Path) -> Result<Weights> {
    let weights = Weights::whole(path)?;
    if let Some(what) = other(&weights) {
        return Err(refused(&weights, what));
    }
    let starting = |prefixes: &[&'static str], name: &str| {
        let has = |prefix: &&str| weights.shape(&format!("{prefix}{name}")).is_some();
        prefixes.iter().copied().find(has)
    };
    if let Some(prefix) = starting(&ORIGINAL_PREFIXES, "input_hint_block.0.weight") {
        // Its copy of the UNet as that of a checkpoint, whose names are known.
        let weights = weights.renamed(|name, shape| {
            let name = name.strip_prefix(prefix).map(|name| match ours(name) {
                Some(name) => name,
                None => format!("{UNET}{name}"),
            });
            renamed(name, shape)
        });
        let layers = LdmCheckpoint::new(&weights, None).layers();
        return Ok(weights.renamed(|name, shape| {
            let name = match name.strip_prefix(UNET) {
                Some(name) => names::unet(name, layers),
                None => name.to_owned(),
            };
            renamed(Some(name), shape)
        }));
    }
    let name = "controlnet_cond_embedding.conv_in.weight";
    if let Some(prefix) = starting(&DIFFUSERS_PREFIXES, name) {
        return Ok(weights.renamed(|name, shape| {
            renamed(name.strip_prefix(prefix).map(ToOwned::to_owned), shape)
        }));
    }
    let what = family::other(&weights);
    Err(refused(&weights, what.as_deref().unwrap_or("a checkpoint of a whole model")))
}

/// diffusers' name of a tensor that the UNet has none of.
fn ours(name: &str) -> Option<String> {
    if let Some(rest) = name.strip_prefix("middle_block_out.0.") {
        return Some(format!("controlnet_mid_block.{rest}"));
    }
    let (block, rest) = name.split_once('.')?;
    let (number, rest) = rest.split_once('.')?;
    match block {
        "zero_convs" => {
            Some(format!("controlnet_down_blocks.{number}.{}", rest.strip_prefix("0.")?))
        }
        "input_hint_block" => {
            // Between two of its layers is an activation.
            let layer = number.parse::<usize>().ok()?.checked_div(2)?;
            let name = match layer {
                0 => "conv_in".to_owned(),
                7 => "conv_out".to_owned(),
                layer => format!("blocks.{}", layer - 1),
            };
            Some(format!("controlnet_cond_embedding.{name}.{rest}"))
        }
        _ => None,
    }
}

/// What a file is that has a ControlNet's names or none, and is another.
fn other(weights: &Weights) -> Option<&'static str> {
    if weights.shape("difference").is_some() {
        return Some("a ControlNet stored as a difference from a UNet");
    }
    let has = |mark: &str| weights.names().any(|name| name.contains(mark));
    OTHERS.iter().find(|(mark, _)| has(mark)).map(|(_, what)| *what)
}

fn renamed(name: Option<String>, shape: &[usize]) -> Vec<Renamed> {
    let whole = |name| Renamed { name, shape: shape.to_vec(), part: (0, 1) };
    name.map(whole).into_iter().collect()
}

fn refused(weights: &Weights, what: &str) -> Error {
    if what == "a ControlNet" {
        let reason = "this is a ControlNet whose tensors have unknown names";
        return Error::config(weights.file_names(), reason);
    }
    let reason = format!("this is {what}; what is wanted is a ControlNet of Stable Diffusion");
    Error::config(weights.file_names(), reason)
}
