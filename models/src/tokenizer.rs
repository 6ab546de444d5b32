//! CLIP's byte-pair tokenizer: a prompt to the ids of exactly one context window.
//!
//! From `tokenizer.json`, or from `vocab.json` and `merges.txt` put together as transformers'
//! `CLIPTokenizer` does (`models/clip/tokenization_clip.py`). Which tokens begin, end and pad a
//! prompt is in `tokenizer_config.json` or `special_tokens_map.json`; SD 2.x pads with another token than 1.x.

use serde_json::{Map, Value, json};
use tokenizers::Tokenizer;

use crate::error::{Error, Result};
use crate::weights::Source;

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
    window: usize,
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
        let window = config.get("model_max_length").and_then(Value::as_u64);
        let window = window.map_or(positions, |w| positions.min(usize::try_from(w).unwrap_or(77)));
        if window < 3 {
            return Err(Error::config(CONFIG, format!("model_max_length: {window} is too short")));
        }
        let comma = tokenizer.token_to_id(",</w>");
        Ok(Self { tokenizer, begin, end, pad, comma, window })
    }

    /// The ids of a prompt. What does not fit is cut off and reported.
    pub fn encode(&self, prompt: &str) -> Result<Tokens> {
        let error = |e: tokenizers::Error| Error::Tokenizer(e.to_string());
        let encoding = self.tokenizer.encode(prompt, false).map_err(error)?;
        let (words, room) = (encoding.get_ids(), self.window - 2);
        let kept = &words[..words.len().min(room)];
        let ids = self.close(kept);
        let cut = (words.len() > room).then(|| {
            let start = encoding.get_offsets()[room].0;
            // Offsets are byte positions in the prompt; a token may begin inside a character.
            let start = (0..=start.min(prompt.len())).rev().find(|i| prompt.is_char_boundary(*i));
            prompt[start.unwrap_or(0)..].trim().to_owned()
        });
        Ok(Tokens { ids, cut })
    }

    /// The ids of the words of a text, without begin, end and padding.
    pub fn words(&self, text: &str) -> Result<Vec<u32>> {
        let encoding = self.tokenizer.encode(text, false);
        Ok(encoding.map_err(|e| Error::Tokenizer(e.to_string()))?.get_ids().to_vec())
    }

    /// One window around words that fit into it: begin, words, end, padding.
    pub fn close(&self, words: &[u32]) -> Vec<u32> {
        let mut ids = Vec::with_capacity(self.window);
        ids.push(self.begin);
        ids.extend_from_slice(words);
        ids.push(self.end);
        ids.resize(self.window, self.pad);
        ids
    }

    /// Tokens of a window, begin and end among them.
    pub fn window(&self) -> usize {
        self.window
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
