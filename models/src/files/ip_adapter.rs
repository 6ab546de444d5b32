//! The file of an IP-Adapter, and where its image encoder is: folders beside it, as h94/IP-Adapter has
//! them.
//!
//! Reference: diffusers 0.42 `loaders/ip_adapter.py`, and `_convert_ip_adapter_image_proj_to_diffusers`
//! of `loaders/unet.py`.

use std::path::{Path, PathBuf};

use super::family;
use super::source::Source;
use super::tensors::{Renamed, Weights};
use crate::error::{Error, Result};

/// The folders of h94/IP-Adapter: adapters of one take the image encoder of the other, too.
const SIBLINGS: [&str; 2] = ["models", "sdxl_models"];

/// Stem of the weights of an image encoder.
const ENCODER_STEM: &str = "model";

/// Parts of names that adapters of other kinds have, and what they are. The first counts.
const OTHERS: [(&str, &str); 9] = [
    ("double_blocks.", "an IP-Adapter of Flux"),
    ("double_stream", "an IP-Adapter of Flux"),
    ("joint_transformer_blocks", "an IP-Adapter of Stable Diffusion 3"),
    ("time_embed_seq", "an IP-Adapter of Stable Diffusion 3"),
    ("pulid_ca", "PuLID, which takes the vectors of a face recognition network"),
    ("id_encoder.", "PuLID, which takes the vectors of a face recognition network"),
    ("image_proj.perceiver_resampler.", FACE_ID),
    ("to_q_lora.", FACE_ID),
    ("image_proj.norm.weight", FACE_ID),
];

const FACE_ID: &str = "an IP-Adapter FaceID, which takes the vectors of a face recognition network \
                       (InsightFace) that is not part of the server; take a plus-face one";

/// Width of the vectors of a face recognition network, by which InstantID is told.
const FACE_WIDTH: usize = 512;

/// What names begin with, and with what in published files: of these, and of what the authors' training
/// writes beside the UNet.
const PREFIXES: [(&str, &str); 4] = [
    (PROJECTION, PROJECTION),
    (KEYS, KEYS),
    ("image_proj_model.", PROJECTION),
    ("adapter_modules.", KEYS),
];

const PROJECTION: &str = "image_proj.";
const KEYS: &str = "ip_adapter.";

/// Where an IP-Adapter is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IpAdapterFile {
    /// The file.
    pub path: PathBuf,
}

impl IpAdapterFile {
    /// What the names of folders with image encoders begin with, in small letters: no files there are
    /// adapters.
    pub const ENCODER_FOLDERS: &[&str] = &["image_encoder", "clip_vision"];

    /// Its name: the file's stem.
    pub(crate) fn name(&self) -> String {
        self.path.file_stem().unwrap_or_default().to_string_lossy().into_owned()
    }

    /// Its tensors: `image_proj.*`, and by the numbers of the cross attentions `ip_adapter.*`.
    ///
    /// # Errors
    /// Adapters of other kinds, by name, and files that are none.
    pub(crate) fn weights(&self) -> Result<Weights> {
        let weights = Weights::whole(&self.path)?;
        if let Some(what) = other(&weights) {
            let wanted = "an IP-Adapter of Stable Diffusion 1.x, 2.x or XL, plain, plus or full";
            let reason = format!("this is {what}; what is wanted is {wanted}");
            return Err(Error::config(weights.file_names(), reason));
        }
        Ok(weights.renamed(|name, shape| {
            let own = |(theirs, ours): &(&str, &str)| {
                name.strip_prefix(theirs).map(|rest| format!("{ours}{rest}"))
            };
            let name = PREFIXES.iter().find_map(own);
            let whole = |name| Renamed { name, shape: shape.to_vec(), part: (0, 1) };
            name.map(whole).into_iter().collect()
        }))
    }

    /// The folders in which its image encoder may be, the nearest first: beside it, beside its folder,
    /// and in the folders of h94/IP-Adapter there. Blocks: reads folders.
    pub(crate) fn encoders(&self) -> Vec<PathBuf> {
        let folder = self.path.parent().filter(|folder| !folder.as_os_str().is_empty());
        let folder = folder.unwrap_or(Path::new(".")).to_owned();
        let above = folder.canonicalize().ok().and_then(|full| Some(full.parent()?.to_owned()));
        let mut found = encoders_in(&folder);
        if let Some(above) = above {
            found.extend(encoders_in(&above));
            SIBLINGS.iter().for_each(|name| found.extend(encoders_in(&above.join(name))));
        }
        let mut seen = Vec::new();
        found.retain(|path| {
            let full = path.canonicalize().unwrap_or_else(|_| path.clone());
            let is_new = !seen.contains(&full);
            seen.push(full);
            is_new
        });
        found
    }
}

/// What a file is that is no adapter of a known kind.
fn other(weights: &Weights) -> Option<String> {
    let has = |mark: &str| weights.names().any(|name| name.contains(mark));
    let is_plain = has("image_proj.proj.weight");
    let others = OTHERS.iter().filter(|(_, what)| !is_plain || *what != FACE_ID);
    if let Some((_, what)) = others.into_iter().find(|(mark, _)| has(mark)) {
        return Some((*what).to_owned());
    }
    let width = weights.shape("image_proj.proj_in.weight").and_then(|shape| shape.get(1));
    if width == Some(&FACE_WIDTH) {
        return Some("InstantID, which takes the vectors of a face recognition network".to_owned());
    }
    let begins = |start: &str| weights.names().any(|name| name.starts_with(start));
    let has_part = |ours: &str| PREFIXES.iter().any(|(theirs, is)| *is == ours && begins(theirs));
    if has_part(PROJECTION) && has_part(KEYS) {
        return None;
    }
    let what = family::what(weights).unwrap_or_else(|| "no IP-Adapter".to_owned());
    Some(match what.as_str() {
        "an IP-Adapter" => "an IP-Adapter whose tensors have unknown names".to_owned(),
        _ => what,
    })
}

/// The folders in a folder, by name.
fn folders_in(folder: &Path) -> Vec<PathBuf> {
    let entries = folder.read_dir().into_iter().flatten().flatten();
    let mut folders: Vec<_> = entries.map(|entry| entry.path()).filter(|p| p.is_dir()).collect();
    folders.sort();
    folders
}

fn encoders_in(folder: &Path) -> Vec<PathBuf> {
    let is_encoder = |path: &PathBuf| {
        let name = path.file_name().unwrap_or_default().to_string_lossy().to_lowercase();
        IpAdapterFile::ENCODER_FOLDERS.iter().any(|known| name.starts_with(known))
    };
    folders_in(folder).into_iter().filter(is_encoder).collect()
}

/// The folder of an image encoder: its source, and the name in front of its files there.
pub(crate) fn encoder_source(folder: &Path) -> (Source, &'static str) {
    (Source::Network(folder.to_owned()), IpAdapterFile::ENCODER_FOLDERS[0])
}

/// The tensors of the image encoder of a folder.
pub(crate) fn encoder_weights(folder: &Path, half: bool) -> Result<Weights> {
    let (source, name) = encoder_source(folder);
    source.weights(name, ENCODER_STEM, half)
}
