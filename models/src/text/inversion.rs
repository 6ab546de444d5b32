//! Textual inversion (Gal et al. 2022): embeddings of new tokens, each of one or several vectors,
//! that placeholder tokens in prompts stand for.
//!
//! Reference: diffusers 0.42 `loaders/textual_inversion.py`; stable-diffusion-webui 1.10
//! `modules/textual_inversion/textual_inversion.py`. Files are safetensors or PyTorch's, in
//! AUTOMATIC1111's form (`emb_params`, `string_to_param`) or in diffusers' (a tensor named like the
//! token). All are read with the model, since any prompt may use any of them.

use std::path::Path;

use candle_core::{Device, Tensor};

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
            let read = read(&path, width).map_err(|error| error.to_string());
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

/// The token that a file names, if it does, and its vectors (n, width) f32.
fn read(path: &Path, width: usize) -> Result<(Option<String>, Tensor)> {
    let weights = Weights::copied(path)?;
    let names: Vec<&str> = weights.names().collect();
    let name = match names[..] {
        [one] => one,
        _ if names.contains(&"emb_params") => "emb_params",
        _ => {
            let reason = if names.contains(&"clip_g") { "is of SDXL" } else { "is no embedding" };
            let names = names.join(", ");
            return Err(Error::config(
                weights.file_names(),
                format!("{reason}: it holds the tensors {names:?}"),
            ));
        }
    };
    let vector = weights.shape(name).is_some_and(|shape| shape.len() == 1);
    let rows = weights.shape(name).filter(|_| !vector).and_then(|shape| shape.first().copied());
    let rows = rows.unwrap_or(1);
    let shape = [rows, width];
    let tensor = weights.tensor(name, if vector { &shape[1..] } else { &shape })?;
    let word = (!NAMELESS.contains(&name)).then(|| name.to_owned());
    Ok((word, tensor.reshape((rows, width))?.to_device(&Device::Cpu)?))
}
