//! Textual inversion (Gal et al. 2022): embeddings of new tokens, each of one or several vectors,
//! that placeholder tokens in prompts stand for.
//!
//! Reference: diffusers 0.42 `loaders/textual_inversion.py`; stable-diffusion-webui 1.10
//! `modules/textual_inversion/textual_inversion.py`. Files are safetensors or PyTorch's, in
//! AUTOMATIC1111's form (`emb_params`, `string_to_param`) or in diffusers' (a tensor named like the
//! token), or pictures ([`super::inversion_png`]). All are read with the model, since any prompt may
//! use any of them.

use std::path::Path;

use candle_core::{Device, Tensor};

use super::inversion_png;
use crate::error::{Error, Result};
use crate::files::{AssetDir, Weights};

/// AUTOMATIC1111's names of the vectors, which do not name the token.
const NAMELESS: [&str; 2] = ["emb_params", "*"];

/// The textual inversion embeddings of a model.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Embeddings {
    /// The placeholder tokens in the order of their vectors.
    pub words: Vec<PlaceholderToken>,
    /// Skipped files, and why.
    pub skipped: Vec<(String, String)>,
    /// Numbers of a vector: the text encoder's hidden size.
    pub width: usize,
}

/// A placeholder token and the position of its vectors among all.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PlaceholderToken {
    /// As prompts spell it, in any case.
    pub word: String,
    /// Index of its first vector.
    pub first: usize,
    /// Number of its vectors.
    pub count: usize,
}

impl Embeddings {
    /// Reads the embeddings for a text encoder with `width` channels, whose chunks have room for
    /// `room` tokens: the placeholder tokens, and the vectors (n, width) f32, or `None` if there
    /// are none.
    pub(crate) fn read(
        folder: &AssetDir,
        max_bytes: u64,
        width: usize,
        room: usize,
    ) -> Result<(Self, Option<Tensor>)> {
        let mut embeddings = Self { width, ..Self::default() };
        let (mut vectors, mut count) = (Vec::new(), 0);
        for (stem, path) in folder.list() {
            let Some(read) = read(&path, width).transpose() else { continue };
            let read = read.and_then(|(word, vectors)| {
                let rows = vectors.dims()[0];
                let bytes = ((count + rows) * width * size_of::<f32>()) as u64;
                match rows {
                    0 => Err(format!("{stem}: holds no vector")),
                    rows if rows > room => {
                        Err(format!("{stem}: has {rows} vectors; a chunk has room for {room}"))
                    }
                    _ if bytes > max_bytes => {
                        Err(format!("{stem}: embeddings would take more than {max_bytes} bytes"))
                    }
                    _ => Ok((word, rows, vectors)),
                }
            });
            match read {
                Err(reason) => embeddings.skipped.push((stem, reason)),
                Ok((word, rows, tensor)) => {
                    for word in [Some(stem), word].into_iter().flatten() {
                        if embeddings.words.iter().all(|known| known.word != word) {
                            embeddings.words.push(PlaceholderToken {
                                word,
                                first: count,
                                count: rows,
                            });
                        }
                    }
                    count += rows;
                    vectors.push(tensor);
                }
            }
        }
        let vectors = (!vectors.is_empty()).then(|| Tensor::cat(&vectors, 0)).transpose()?;
        Ok((embeddings, vectors))
    }
}

/// The token that a file names, if it does, and its vectors (n, width) f32; none if the file is a
/// picture without any.
fn read(
    path: &Path,
    width: usize,
) -> std::result::Result<Option<(Option<String>, Tensor)>, String> {
    let file = path.file_name().unwrap_or_default().to_string_lossy();
    if path.extension().is_some_and(|ending| ending.eq_ignore_ascii_case("png")) {
        let picture = inversion_png::read(path).map_err(|error| format!("{file}: {error}"))?;
        let Some(picture) = picture else { return Ok(None) };
        let word = picture.name.clone();
        let rows = picture.rows().map_err(|error| format!("{file}: {error}"))?;
        let (count, wide) = (rows.len(), rows.first().map_or(0, Vec::len));
        let tensor = Tensor::from_vec(rows.concat(), (count, wide), &Device::Cpu);
        let tensor = tensor.map_err(|_| format!("{file}: its vectors have different lengths"))?;
        return Ok(Some((word, fitting(&tensor, width, &file)?)));
    }
    let text = |error: Error| error.to_string();
    let weights = Weights::copied(path).map_err(text)?;
    let names: Vec<&str> = weights.names().collect();
    let name = match names[..] {
        [one] => one,
        _ if names.contains(&"emb_params") => "emb_params",
        _ => {
            let reason = if names.contains(&"clip_g") {
                "is of Stable Diffusion XL"
            } else {
                "is no embedding"
            };
            return Err(match names.first() {
                None => format!("{file}: {reason}: it holds no tensors"),
                Some(first) => {
                    format!(
                        "{file}: {reason}: it holds {} tensors, the first {first:?}",
                        names.len()
                    )
                }
            });
        }
    };
    let tensor = weights.widened(name).map_err(text)?;
    let word = (!NAMELESS.contains(&name)).then(|| name.to_owned());
    Ok(Some((word, fitting(&tensor, width, &file)?)))
}

/// The vectors (n, width) or the one vector (width) of a file as (n, width), if they are of this
/// width and finite.
fn fitting(vectors: &Tensor, width: usize, file: &str) -> std::result::Result<Tensor, String> {
    let refuse = |reason: String| Err(format!("{file}: {reason}"));
    let (rows, wide) = match *vectors.dims() {
        [wide] => (1, wide),
        [rows, wide] => (rows, wide),
        ref shape => {
            return refuse(format!("is no embedding: it holds a tensor of shape {shape:?}"));
        }
    };
    if wide != width {
        let known = [(768, "1.x"), (1024, "2.x"), (1280, "XL")];
        let of = known.iter().find(|(known, _)| *known == wide);
        let of =
            of.map_or_else(String::new, |(_, of)| format!(", as those of Stable Diffusion {of}"));
        return refuse(format!(
            "its vectors have {wide} numbers{of}; those of this model have {width}"
        ));
    }
    let finite = vectors.flatten_all().and_then(|all| all.to_vec1::<f32>());
    if !finite.is_ok_and(|all| all.iter().all(|x| x.is_finite())) {
        return refuse("holds NaN or infinite numbers".into());
    }
    vectors.reshape((rows, width)).map_err(|error| format!("{file}: {error}"))
}
