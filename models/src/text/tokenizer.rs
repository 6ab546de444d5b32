//! CLIP's byte-pair tokenizer: a prompt to the ids of exactly one context window.
//!
//! From `tokenizer.json`, or from `vocab.json` and `merges.txt` put together as transformers'
//! `CLIPTokenizer` does (`models/clip/tokenization_clip.py`). Which tokens begin, end and pad a
//! prompt is in `tokenizer_config.json` or `special_tokens_map.json`; SD 2.x pads with another token than 1.x.
//! Words that were learned later are found in the text before it is cut into tokens.

use serde_json::{Map, Value, json};
use tokenizers::Tokenizer;

use super::inversion::PlaceholderToken;
use crate::error::{Error, Result};
use crate::files::Source;

/// How CLIP cuts text into words before byte pairs are merged.
const WORDS: &str =
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+";
const CONFIG: &str = "tokenizer/tokenizer_config.json";

/// A prompt as the text encoder takes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tokens {
    /// One window: begin, prompt, end, padding.
    pub ids: Vec<u32>,
    /// The end of the prompt that the window had no room for.
    pub cut: Option<String>,
}

/// The tokenizer of a model.
pub struct ClipTokenizer {
    tokenizer: Tokenizer,
    begin: u32,
    end: u32,
    pad: u32,
    comma: Option<u32>,
    max_length: usize,
    /// Longer ones come before those that they begin with.
    learned: Vec<PlaceholderToken>,
    /// The id of the first learned vector.
    first_learned: usize,
}

/// What a text is cut into, none of it in part: a token, or all vectors of a learned word.
struct Piece {
    ids: Vec<u32>,
    /// Where it begins, in bytes.
    start: usize,
}

impl ClipTokenizer {
    /// Reads the files under `tokenizer/`; `positions` is what the text encoder has room for.
    pub fn load(source: &Source, positions: usize) -> Result<Self> {
        let mut config = object(source, CONFIG)?;
        for (key, value) in object(source, "tokenizer/special_tokens_map.json")? {
            config.entry(key).or_insert(value);
        }
        let special = |key: &str, default: &str| special_token(&config, key, default);
        let begin = special("bos_token", "<|startoftext|>");
        let end = special("eos_token", "<|endoftext|>");
        let unknown = special("unk_token", "<|endoftext|>");
        let pad = special("pad_token", &end);
        let mut tokenizer = match source.read("tokenizer/tokenizer.json")? {
            Some(bytes) => Tokenizer::from_bytes(&bytes)
                .map_err(|e| Error::config("tokenizer/tokenizer.json", e.to_string()))?,
            None => assemble(source, &unknown, [&begin, &end, &pad])?,
        };
        tokenizer.with_padding(None);
        tokenizer.with_truncation(None).map_err(|e| Error::Tokenizer(e.to_string()))?;
        let id = |token: &str| {
            tokenizer
                .token_to_id(token)
                .ok_or_else(|| Error::config(CONFIG, format!("{token:?} is not in the vocabulary")))
        };
        let (begin, end, pad) = (id(&begin)?, id(&end)?, id(&pad)?);
        let max_length = config.get("model_max_length").and_then(Value::as_u64);
        let max_length =
            max_length.map_or(positions, |w| positions.min(usize::try_from(w).unwrap_or(77)));
        if max_length < 3 {
            return Err(Error::config(
                CONFIG,
                format!("model_max_length: {max_length} is too short"),
            ));
        }
        let comma = tokenizer.token_to_id(",</w>");
        let (learned, first_learned) = (Vec::new(), 0);
        Ok(Self { tokenizer, begin, end, pad, comma, max_length, learned, first_learned })
    }

    /// Adds words whose vectors have the ids from `first` on.
    pub(crate) fn learn(&mut self, words: &[PlaceholderToken], first: usize) {
        self.learned = words.to_vec();
        self.learned.sort_by_key(|word| std::cmp::Reverse(word.word.len()));
        self.first_learned = first;
    }

    /// The ids of a prompt. What does not fit is cut off and reported.
    pub fn encode(&self, prompt: &str) -> Result<Tokens> {
        let (mut ids, mut cut) = (Vec::new(), None);
        let room = self.max_length - 2;
        for piece in self.pieces(prompt)? {
            ids.extend(piece.ids);
            if ids.len() > room {
                cut = Some(prompt[piece.start..].trim().to_owned());
                break;
            }
        }
        ids.truncate(room);
        Ok(Tokens { ids: self.close(&ids), cut })
    }

    /// The ids of a text without begin, end and padding, token by token; all vectors of a learned
    /// word are together.
    pub fn words(&self, text: &str) -> Result<Vec<Vec<u32>>> {
        Ok(self.pieces(text)?.into_iter().map(|piece| piece.ids).collect())
    }

    fn pieces(&self, text: &str) -> Result<Vec<Piece>> {
        let (mut pieces, mut from) = (Vec::new(), 0);
        while let Some((at, learned)) = self.find_learned(text, from) {
            self.tokens(&text[from..at], from, &mut pieces)?;
            let first = self.first_learned + learned.first;
            let ids = (first..first + learned.count).map(|id| id as u32).collect();
            pieces.push(Piece { ids, start: at });
            from = at + learned.word.len();
        }
        self.tokens(&text[from..], from, &mut pieces)?;
        Ok(pieces)
    }

    /// The tokens of a stretch of text that begins at `start`.
    fn tokens(&self, text: &str, start: usize, pieces: &mut Vec<Piece>) -> Result<()> {
        let encoding = self.tokenizer.encode(text, false);
        let encoding = encoding.map_err(|e| Error::Tokenizer(e.to_string()))?;
        // Offsets are byte positions; a token may begin inside a character.
        let place = |offset: usize| (0..=offset).rev().find(|i| text.is_char_boundary(*i));
        let tokens = encoding.get_ids().iter().zip(encoding.get_offsets());
        pieces.extend(tokens.map(|(id, (offset, _))| {
            let start = start + place((*offset).min(text.len())).unwrap_or(0);
            Piece { ids: vec![*id], start }
        }));
        Ok(())
    }

    /// The first learned word in a text from a place on, and where. What begins or ends with a
    /// letter or digit is not found inside of a longer word.
    fn find_learned(&self, text: &str, from: usize) -> Option<(usize, &PlaceholderToken)> {
        let joined = |a: Option<char>, b: Option<char>| {
            a.is_some_and(char::is_alphanumeric) && b.is_some_and(char::is_alphanumeric)
        };
        let is_here = |at: usize, word: &str| {
            let found = text[at..].get(..word.len());
            let (before, after) = (&text[..at], text.get(at + word.len()..).unwrap_or_default());
            found.is_some_and(|found| found.eq_ignore_ascii_case(word))
                && !joined(before.chars().next_back(), word.chars().next())
                && !joined(word.chars().next_back(), after.chars().next())
        };
        if self.learned.is_empty() {
            return None;
        }
        text[from..].char_indices().map(|(at, _)| from + at).find_map(|at| {
            Some((at, self.learned.iter().find(|learned| is_here(at, &learned.word))?))
        })
    }

    /// One window around words that fit into it: begin, words, end, padding.
    pub fn close(&self, words: &[u32]) -> Vec<u32> {
        let mut ids = Vec::with_capacity(self.max_length);
        ids.push(self.begin);
        ids.extend_from_slice(words);
        ids.push(self.end);
        ids.resize(self.max_length, self.pad);
        ids
    }

    /// Tokens of a window, begin and end among them.
    pub fn max_length(&self) -> usize {
        self.max_length
    }

    /// The comma that ends a word.
    pub fn comma(&self) -> Option<u32> {
        self.comma
    }
}

/// A JSON object that a model may leave out.
fn object(source: &Source, file: &str) -> Result<Map<String, Value>> {
    let Some(bytes) = source.read(file)? else { return Ok(Map::new()) };
    serde_json::from_slice(&bytes)
        .map_err(|e| Error::config(file, format!("not a JSON object: {e}")))
}

/// A token's text, which is given as a string or as an object around it.
fn special_token(config: &Map<String, Value>, key: &str, default: &str) -> String {
    let value = config.get(key);
    let text = value.and_then(|v| v.as_str().or_else(|| v.get("content")?.as_str()));
    text.unwrap_or(default).to_owned()
}

/// The `tokenizer.json` that CLIP's vocabulary and merges stand for.
fn assemble(source: &Source, unknown: &str, special: [&String; 3]) -> Result<Tokenizer> {
    let (vocab_file, merges_file) = ("tokenizer/vocab.json", "tokenizer/merges.txt");
    let vocab: Map<String, Value> = serde_json::from_slice(&source.require(vocab_file)?)
        .map_err(|e| Error::config(vocab_file, format!("not a JSON object: {e}")))?;
    let merges = source.require(merges_file)?;
    let merges = std::str::from_utf8(&merges)
        .map_err(|e| Error::config(merges_file, format!("not UTF-8: {e}")))?;
    let merges: Vec<&str> =
        merges.lines().filter(|line| !line.starts_with("#version") && !line.is_empty()).collect();
    let mut added: Vec<Value> = Vec::new();
    for token in special {
        let id = vocab
            .get(token.as_str())
            .ok_or_else(|| Error::config(CONFIG, format!("{token:?} is not in the vocabulary")))?;
        if added.iter().all(|a| a["id"] != *id) {
            added.push(json!({
                "id": id, "content": token, "special": true, "normalized": false,
                "single_word": false, "lstrip": false, "rstrip": false,
            }));
        }
    }
    added.sort_by_key(|a| a["id"].as_u64());
    let description = json!({
        "version": "1.0",
        "added_tokens": added,
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "NFC"},
            {"type": "Replace", "pattern": {"Regex": r"\s+"}, "content": " "},
            {"type": "Lowercase"},
        ]},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": WORDS}, "behavior": "Removed", "invert": true},
            {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true,
             "use_regex": true},
        ]},
        "model": {"type": "BPE", "unk_token": unknown, "end_of_word_suffix": "</w>",
                  "continuing_subword_prefix": "", "fuse_unk": false,
                  "vocab": vocab, "merges": merges},
    });
    serde_json::from_value(description).map_err(|e| Error::config(merges_file, e.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn learned_words_are_found_in_a_text() {
        let mut tokenizer = ClipTokenizer::load(&Source::Demo, 77).unwrap();
        let plain = |text: &str| tokenizer.words(text).unwrap();
        let [red, house, comma, end] = ["red", "house", ",", ">,"].map(|word| plain(word).concat());
        assert_ne!(end, comma, "signs are one token");
        let word = |word: &str, first, count| PlaceholderToken { word: word.into(), first, count };
        tokenizer.learn(&[word("sky", 0, 1), word("<cat>", 1, 3), word("<cat>x", 4, 1)], 5000);
        let table: [(&str, Vec<Vec<u32>>); 5] = [
            ("red house", vec![red.clone(), house.clone()]),
            ("red <CAT>, house", vec![red.clone(), vec![5001, 5002, 5003], comma, house]),
            ("red<cat>x", vec![red.clone(), vec![5004]]),
            ("Sky<cat>", vec![vec![5000], vec![5001, 5002, 5003]]),
            ("é sky", [tokenizer.words("é").unwrap(), vec![vec![5000]]].concat()),
        ];
        for (text, ids) in table {
            assert_eq!(tokenizer.words(text).unwrap(), ids, "{text}");
        }
        let inside = tokenizer.words("skyline bluesky skyé").unwrap();
        assert!(inside.concat().iter().all(|id| *id < 5000), "{inside:?}");
        let long = tokenizer.encode(&format!("{} <cat> red", "red ".repeat(73))).unwrap();
        assert_eq!(long.ids[74..], [5001, 5002, long.ids[76]], "a plain prompt is cut anywhere");
        assert_eq!(long.cut.as_deref(), Some("<cat> red"));
    }

    #[test]
    fn a_long_prompt_is_cut_with_its_rest_named() {
        let tokenizer = ClipTokenizer::load(&Source::Demo, 77).unwrap();
        let short = tokenizer.encode("a red house").unwrap();
        assert_eq!(short.ids.len(), 77);
        assert_eq!(short.cut, None);
        let prompt = format!("{}a boat at night", "house ".repeat(75));
        let long = tokenizer.encode(&prompt).unwrap();
        assert_eq!(long.ids.len(), 77);
        assert_eq!(long.cut.as_deref(), Some("a boat at night"));
    }
}
