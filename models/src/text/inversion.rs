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
const NAMELESS: [&str; 3] = ["emb_params", "*", "clip_l"];

/// The textual inversion embeddings of a model.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Embeddings {
    /// The placeholder tokens in the order of their vectors.
    pub words: Vec<PlaceholderToken>,
    /// Files of which something is not used, and why: the whole file, or a word that it names.
    pub skipped: Vec<(String, String)>,
    /// Numbers of a vector: the text encoder's hidden size, of two encoders the sum.
    pub width: usize,
}

/// Widths of the first and of the second text encoder, where there are such.
pub(crate) type Widths = [Option<usize>; 2];

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
    /// Reads the embeddings for the first and the second text encoder of these widths, whose chunks
    /// have room for `room` tokens: the placeholder tokens, and the vectors (n, width) f32 of each
    /// encoder, or `None` if there are none.
    pub(crate) fn read(
        folder: &AssetDir,
        max_bytes: u64,
        widths: Widths,
        room: usize,
    ) -> Result<(Self, Option<Vec<Tensor>>)> {
        let width = widths.iter().flatten().sum();
        let mut embeddings = Self { width, ..Self::default() };
        let (mut vectors, mut count) = (Vec::new(), 0);
        for (stem, path) in folder.list() {
            let read = match widths {
                [Some(width), None] => {
                    let read = read(&path, width).transpose();
                    read.map(|read| read.map(|(word, vectors)| (word, vec![vectors])))
                }
                widths => read_pair(&path, widths).transpose(),
            };
            let Some(read) = read else { continue };
            let read = read.and_then(|(word, vectors)| {
                let rows = vectors.first().map_or(0, |vectors| vectors.dims()[0]);
                let bytes = ((count + rows) * width * size_of::<f32>()) as u64;
                match rows {
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
                    if embeddings.add(&stem, word, count, rows) {
                        count += rows;
                        vectors.push(tensor);
                    }
                }
            }
        }
        if vectors.is_empty() {
            return Ok((embeddings, None));
        }
        let encoders = 0..widths.iter().flatten().count();
        let of = |encoder: usize| {
            let own: Vec<_> = vectors.iter().filter_map(|vectors| vectors.get(encoder)).collect();
            Ok(Tensor::cat(&own, 0)?)
        };
        Ok((embeddings, Some(encoders.map(of).collect::<Result<_>>()?)))
    }

    /// Adds the words of a file: its stem and the token that it names. Whether there are any.
    fn add(&mut self, stem: &str, token: Option<String>, first: usize, count: usize) -> bool {
        let own = self.words.len();
        for (word, what) in [(Some(stem.to_owned()), "file name"), (token, "token")] {
            let Some(word) = word.map(|word| word.trim().to_owned()) else { continue };
            // Prompts are searched without regard to case.
            let known = self.words.iter().position(|old| old.word.eq_ignore_ascii_case(&word));
            let reason = match known {
                _ if word.is_empty() => format!("{stem}: its {what} is blank, which no prompt has"),
                None => {
                    self.words.push(PlaceholderToken { word, first, count });
                    continue;
                }
                Some(known) if known >= own => continue,
                Some(known) => {
                    format!(
                        "{stem}: its {what} {:?} is a word of another file",
                        self.words[known].word
                    )
                }
            };
            self.skipped.push((stem.to_owned(), reason));
        }
        self.words.len() > own
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
        let shape = [rows.len(), rows.first().map_or(0, Vec::len)];
        if rows.iter().any(|row| row.len() != shape[1]) {
            return Err(format!("{file}: its vectors have different lengths"));
        }
        let read = || Tensor::from_vec(rows.concat(), &shape, &Device::Cpu);
        let tensor = fitting(&shape, || read().map_err(Error::from), width, &file)?;
        return Ok(Some((word, tensor)));
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
    let word = (!NAMELESS.contains(&name)).then(|| name.to_owned());
    let shape = weights.shape(name).unwrap_or_default();
    Ok(Some((word, fitting(shape, || weights.widened(name), width, &file)?)))
}

/// Names of the vectors of the first and of the second text encoder of Stable Diffusion XL, as
/// AUTOMATIC1111 and diffusers write them, and as diffusers' training script does.
const PAIRS: [[&str; 2]; 2] = [["clip_l", "clip_g"], ["text_encoders_0", "text_encoders_1"]];

/// The token that a file names, if it does, and its vectors (n, width) f32 of each text encoder.
type Learned = (Option<String>, Vec<Tensor>);

/// A file of Stable Diffusion XL: no token, and the vectors (n, width) f32 of the text encoders that
/// there are; none if the file is a picture without any.
fn read_pair(path: &Path, widths: Widths) -> std::result::Result<Option<Learned>, String> {
    let file = path.file_name().unwrap_or_default().to_string_lossy();
    let is_picture = path.extension().is_some_and(|ending| ending.eq_ignore_ascii_case("png"));
    let none = || {
        let numbers = |width: Option<usize>| width.map(|width| format!(" of {width} numbers"));
        let [first, second] = widths.map(|width| numbers(width).unwrap_or_default());
        format!(
            "{file}: is no embedding of Stable Diffusion XL, which holds clip_l{first} and \
             clip_g{second}"
        )
    };
    if is_picture {
        let picture = inversion_png::read(path).map_err(|error| format!("{file}: {error}"))?;
        return picture.map_or(Ok(None), |_| Err(none()));
    }
    let weights = Weights::copied(path).map_err(|error| error.to_string())?;
    let has = |names: &&[&str; 2]| names.iter().all(|name| weights.shape(name).is_some());
    let names = PAIRS.iter().find(has).ok_or_else(none)?;
    let read = |(name, width): (&&str, Option<usize>)| {
        let shape = weights.shape(name).unwrap_or_default();
        let what = format!("{file}: {name}");
        width.map(|width| fitting(shape, || weights.widened(name), width, &what))
    };
    let vectors: Vec<_> =
        names.iter().zip(widths).filter_map(read).collect::<std::result::Result<_, _>>()?;
    let rows: Vec<_> = vectors.iter().map(|vectors| vectors.dims()[0]).collect();
    if rows.windows(2).any(|pair| pair[0] != pair[1]) {
        let [first, second] = names;
        return Err(format!(
            "{file}: has {} vectors of {first}, but {} of {second}",
            rows[0], rows[1]
        ));
    }
    Ok(Some((None, vectors)))
}

/// The vectors (n, width) or the one vector (width) of a file as (n, width), if they are of this
/// width and finite. Read only if the shape fits.
fn fitting(
    shape: &[usize],
    read: impl FnOnce() -> Result<Tensor>,
    width: usize,
    file: &str,
) -> std::result::Result<Tensor, String> {
    let refuse = |reason: String| Err(format!("{file}: {reason}"));
    let (rows, wide) = match *shape {
        [wide] => (1, wide),
        [rows, wide] => (rows, wide),
        _ => return refuse(format!("is no embedding: it holds a tensor of shape {shape:?}")),
    };
    if rows == 0 {
        return refuse("holds no vector".into());
    }
    if wide != width {
        let known = [(768, "1.x"), (1024, "2.x"), (1280, "XL")];
        let of = known.iter().find(|(known, _)| *known == wide);
        let of =
            of.map_or_else(String::new, |(_, of)| format!(", as those of Stable Diffusion {of}"));
        return refuse(format!(
            "its vectors have {wide} numbers{of}; those of this model have {width}"
        ));
    }
    let vectors = read().map_err(|error| error.to_string())?;
    let finite = vectors.flatten_all().and_then(|all| all.to_vec1::<f32>());
    if !finite.is_ok_and(|all| all.iter().all(|x| x.is_finite())) {
        return refuse("holds NaN or infinite numbers".into());
    }
    vectors.reshape((rows, width)).map_err(|error| format!("{file}: {error}"))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use candle_core::DType;

    use super::*;

    const WIDTH: usize = 4;

    /// Two vectors under a name, in a file.
    fn save(folder: &Path, file: &str, name: &str) {
        let vectors = Tensor::ones((2, WIDTH), DType::F32, &Device::Cpu).unwrap();
        let tensors = BTreeMap::from([(name, vectors)]);
        safetensors::serialize_to_file(tensors, None, &folder.join(file)).unwrap();
    }

    fn read(folder: &Path) -> Embeddings {
        let directory = Some(folder.to_owned());
        let files = AssetDir { directory, endings: &["safetensors", "png"], ..AssetDir::default() };
        let (embeddings, vectors) =
            Embeddings::read(&files, 1 << 20, [Some(WIDTH), None], 75).unwrap();
        let count = embeddings.words.iter().map(|word| word.first + word.count).max();
        assert_eq!(vectors.map(|all| all[0].dims()[0]), count);
        embeddings
    }

    #[test]
    fn a_word_is_of_one_file_and_never_blank() {
        let folder = tempfile::tempdir().unwrap();
        for (file, name) in [
            ("a", ""),
            ("b", "  "),
            ("c", " <cat> "),
            ("d", "<CAT>"),
            ("e", "E"),
            ("f", "emb_params"),
            ("g", "h"),
            ("h", "A"),
            (" ", " "),
        ] {
            save(folder.path(), &format!("{file}.safetensors"), name);
        }
        let embeddings = read(folder.path());
        let words: Vec<_> = embeddings.words.iter().map(|word| &*word.word).collect();
        assert_eq!(words, ["a", "b", "c", "<cat>", "d", "e", "f", "g", "h"]);
        let skipped: Vec<_> = embeddings.skipped.iter().map(|(_, reason)| &**reason).collect();
        assert_eq!(
            skipped,
            [
                " : its file name is blank, which no prompt has",
                " : its token is blank, which no prompt has",
                "a: its token is blank, which no prompt has",
                "b: its token is blank, which no prompt has",
                "d: its token \"<cat>\" is a word of another file",
                "h: its file name \"h\" is a word of another file",
                "h: its token \"a\" is a word of another file",
            ]
        );
    }

    /// A picture with one text chunk.
    fn picture(path: &Path, json: &str) {
        let mut encoder = png::Encoder::new(std::fs::File::create(path).unwrap(), 1, 1);
        let text = base64::Engine::encode(&base64::prelude::BASE64_STANDARD, json);
        encoder.add_ztxt_chunk("sd-ti-embedding".into(), text).unwrap();
        encoder.write_header().unwrap().write_image_data(&[0]).unwrap();
    }

    #[test]
    fn hostile_pictures_are_refused_in_a_sentence() {
        let folder = tempfile::tempdir().unwrap();
        let of = |name: &str, rows: &str| {
            format!(r#"{{"name": {name}, "string_to_param": {{"*": {{"TORCHTENSOR": {rows}}}}}}}"#)
        };
        let sound = "[[1, 2, 3, 4]]";
        for (file, json) in [
            ("blank", of(r#""""#, sound)),
            ("long", of("null", &format!("{sound}{}", " ".repeat(20 << 20)))),
            ("none", r#"{"name": null, "string_to_param": {}}"#.into()),
            ("ragged", of("null", "[[1, 2, 3, 4], [1, 2], [1, 2, 3, 4, 5, 6]]")),
            ("empty", of("null", "[]")),
        ] {
            picture(&folder.path().join(file).with_extension("png"), &json);
        }
        let embeddings = read(folder.path());
        let words: Vec<_> = embeddings.words.iter().map(|word| &*word.word).collect();
        assert_eq!(words, ["blank"]);
        let skipped: Vec<_> = embeddings.skipped.iter().map(|(_, reason)| &**reason).collect();
        assert_eq!(
            skipped,
            [
                "blank: its token is blank, which no prompt has",
                "empty.png: holds no vector",
                "long.png: sd-ti-embedding: its text is damaged, or longer than 16777216 bytes",
                "none.png: holds no embedding",
                "ragged.png: its vectors have different lengths",
            ]
        );
    }

    #[test]
    fn the_shape_is_checked_before_the_numbers_are_read() {
        let folder = tempfile::tempdir().unwrap();
        for (file, shape) in [
            ("a", "[0, 1099511627776, 1099511627776]"),
            ("b", "[0, 4]"),
            ("c", "[72057594037927936, 0]"),
            ("d", "[0]"),
        ] {
            let header =
                format!(r#"{{"x": {{"dtype": "F32", "shape": {shape}, "data_offsets": [0, 0]}}}}"#);
            let file = folder.path().join(file).with_extension("safetensors");
            let length = (header.len() as u64).to_le_bytes();
            std::fs::write(file, [&length[..], header.as_bytes()].concat()).unwrap();
        }
        let embeddings = read(folder.path());
        assert!(embeddings.words.is_empty() && embeddings.skipped.len() == 4, "{embeddings:?}");
    }
}
