//! CLIP's byte-pair tokenizer: a prompt to the ids of exactly one chunk.
//!
//! Read from `tokenizer.json`, or assembled from `vocab.json` and `merges.txt` as by transformers'
//! `CLIPTokenizer` (`models/clip/tokenization_clip.py`). The begin, end and padding tokens are in
//! `tokenizer_config.json` and `special_tokens_map.json`; SD 2.x pads with another token than 1.x.
//! Placeholder tokens of textual inversion are found before the text is tokenized.

use serde_json::{Map, Value, json};
use tokenizers::Tokenizer;

use super::inversion::PlaceholderToken;
use crate::error::{Error, Result};
use crate::files::{Source, object};

/// How CLIP splits text into words before byte pairs are merged.
const WORDS: &str =
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+";

/// The tokens of a plain prompt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tokens {
    /// One chunk: begin, prompt, end, padding.
    pub ids: Vec<u32>,
    /// The end of the prompt, if it was truncated.
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
    /// Placeholder tokens; longer ones before their prefixes.
    placeholders: Vec<PlaceholderToken>,
    /// The id of the first embedding of textual inversion.
    first_embedding: usize,
    /// Ids from this one on have no vector in the text encoder.
    vectors: usize,
}

/// A token, or all embeddings of a placeholder token.
struct Piece {
    ids: Vec<u32>,
    /// Byte offset in the text.
    start: usize,
}

impl ClipTokenizer {
    /// Reads the files of `tokenizer/`; `positions` is the text encoder's maximum length.
    pub fn load(source: &Source, positions: usize) -> Result<Self> {
        Self::load_in(source, "tokenizer", positions)
    }

    /// The same of another folder.
    pub fn load_in(source: &Source, folder: &str, positions: usize) -> Result<Self> {
        let file = |name: &str| format!("{folder}/{name}");
        let config_file = file("tokenizer_config.json");
        let mut config = optional(source, &config_file)?;
        // As transformers: the map wins, and is not read beside a config that lists all tokens.
        if !config.contains_key("added_tokens_decoder") {
            config.extend(optional(source, &file("special_tokens_map.json"))?);
        }
        let special = |key: &str, default: &str| special_token(&config, key, default);
        let begin = special("bos_token", "<|startoftext|>");
        let end = special("eos_token", "<|endoftext|>");
        let unknown = special("unk_token", "<|endoftext|>");
        let pad = special("pad_token", &end);
        let whole = file("tokenizer.json");
        let mut tokenizer = match source.read(&whole)? {
            Some(bytes) => parse(&whole, &bytes)?,
            None => assemble((source, folder), &config, &unknown, [&begin, &end, &pad])?,
        };
        tokenizer.with_padding(None);
        tokenizer.with_truncation(None).map_err(|e| Error::Tokenizer(e.to_string()))?;
        let id = |token: &str| {
            let missing = || format!("{token:?} is not in the vocabulary");
            tokenizer.token_to_id(token).ok_or_else(|| Error::config(&config_file, missing()))
        };
        let (begin, end, pad) = (id(&begin)?, id(&end)?, id(&pad)?);
        let max_length = config.get("model_max_length").and_then(Value::as_u64);
        let max_length =
            max_length.map_or(positions, |w| positions.min(usize::try_from(w).unwrap_or(77)));
        if max_length < 3 {
            let reason = format!("model_max_length: {max_length} is too short");
            return Err(Error::config(config_file, reason));
        }
        let comma = tokenizer.token_to_id(",</w>");
        Ok(Self {
            tokenizer,
            begin,
            end,
            pad,
            comma,
            max_length,
            placeholders: Vec::new(),
            first_embedding: 0,
            vectors: usize::MAX,
        })
    }

    /// Refuses, in prompts, words without a vector in the text encoder, which has so many. Returns
    /// a warning if there are any.
    ///
    /// # Errors
    /// [`Error::Config`] if a token of every prompt is such a word: the tokenizer is another model's.
    pub(crate) fn limit(&mut self, vectors: usize) -> Result<Option<String>> {
        let mut words: Vec<_> = self.tokenizer.get_vocab(true).into_iter().collect();
        words.retain(|(_, id)| *id as usize >= vectors);
        words.sort_by_key(|(_, id)| *id);
        let Some((first, _)) = words.first() else { return Ok(None) };
        let numbers = format!(
            "{} words of the tokenizer, {first:?} the first, have no vector in the text encoder, \
             which has {vectors}",
            words.len()
        );
        if [self.begin, self.end, self.pad].iter().any(|id| *id as usize >= vectors) {
            let reason = format!("{numbers}: the tokenizer is another model's");
            return Err(Error::config("tokenizer", reason));
        }
        self.vectors = vectors;
        Ok(Some(format!("tokenizer: {numbers}; prompts with them are refused")))
    }

    /// Adds placeholder tokens, whose embeddings have the ids from `first` on.
    pub(crate) fn add_placeholders(&mut self, words: &[PlaceholderToken], first: usize) {
        self.placeholders = words.to_vec();
        // An empty word would be found everywhere, and again behind itself.
        self.placeholders.retain(|word| !word.word.is_empty());
        self.placeholders.sort_by_key(|word| std::cmp::Reverse(word.word.len()));
        self.first_embedding = first;
    }

    /// The ids of a prompt, truncated to one chunk.
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

    /// The ids of a text without begin, end and padding, token by token; all embeddings of a
    /// placeholder token are one entry.
    pub fn words(&self, text: &str) -> Result<Vec<Vec<u32>>> {
        Ok(self.pieces(text)?.into_iter().map(|piece| piece.ids).collect())
    }

    fn pieces(&self, text: &str) -> Result<Vec<Piece>> {
        let (mut pieces, mut from) = (Vec::new(), 0);
        while let Some((at, placeholder)) = self.find_placeholder(text, from) {
            self.tokens(&text[from..at], from, &mut pieces)?;
            let first = self.first_embedding + placeholder.first;
            let ids = (first..first + placeholder.count).map(|id| id as u32).collect();
            pieces.push(Piece { ids, start: at });
            from = at + placeholder.word.len();
        }
        self.tokens(&text[from..], from, &mut pieces)?;
        Ok(pieces)
    }

    /// The tokens of a part of a text that begins at byte `start`.
    fn tokens(&self, text: &str, start: usize, pieces: &mut Vec<Piece>) -> Result<()> {
        let encoding = self.tokenizer.encode(text, false);
        let encoding = encoding.map_err(|e| Error::Tokenizer(e.to_string()))?;
        // Offsets are byte positions; a token may begin inside a character.
        let place = |offset: usize| (0..=offset).rev().find(|i| text.is_char_boundary(*i));
        if let Some(k) = encoding.get_ids().iter().position(|id| *id as usize >= self.vectors) {
            let word = &encoding.get_tokens()[k];
            let reason = format!("has the word {word:?}, which the text encoder has no vector for");
            return Err(Error::Spec { field: "prompt", reason });
        }
        let tokens = encoding.get_ids().iter().zip(encoding.get_offsets());
        pieces.extend(tokens.map(|(id, (offset, _))| {
            let start = start + place((*offset).min(text.len())).unwrap_or(0);
            Piece { ids: vec![*id], start }
        }));
        Ok(())
    }

    /// The first placeholder token in a text from a byte on, and its offset. Letters and digits at
    /// its ends must not adjoin others: it is not found within a longer word.
    fn find_placeholder(&self, text: &str, from: usize) -> Option<(usize, &PlaceholderToken)> {
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
        if self.placeholders.is_empty() {
            return None;
        }
        text[from..].char_indices().map(|(at, _)| from + at).find_map(|at| {
            Some((at, self.placeholders.iter().find(|placeholder| is_here(at, &placeholder.word))?))
        })
    }

    /// One chunk of at most `max_length` - 2 ids: begin, ids, end, padding.
    pub fn close(&self, words: &[u32]) -> Vec<u32> {
        let mut ids = Vec::with_capacity(self.max_length);
        ids.push(self.begin);
        ids.extend_from_slice(words);
        ids.push(self.end);
        ids.resize(self.max_length, self.pad);
        ids
    }

    /// Tokens of a chunk, begin and end included.
    pub fn max_length(&self) -> usize {
        self.max_length
    }

    /// The id of the token that ends a prompt.
    pub fn end(&self) -> u32 {
        self.end
    }

    /// The id of a comma at the end of a word.
    pub fn comma(&self) -> Option<u32> {
        self.comma
    }
}

/// The tokenizer of a `tokenizer.json`, without the parts that CLIP does not need and on whose
/// errors the library panics.
fn parse(file: &str, bytes: &[u8]) -> Result<Tokenizer> {
    let mut parts = object(file, bytes)?;
    parts.remove("decoder");
    let normalizer = parts.get("normalizer").map(Value::to_string).unwrap_or_default();
    if normalizer.contains("\"Precompiled\"") {
        return Err(Error::config(file, "normalizer: Precompiled is not supported"));
    }
    serde_json::from_value(Value::Object(parts))
        .map_err(|_| Error::config(file, "its parts make no tokenizer of a kind that is known"))
}

/// An optional JSON file; empty if there is none.
fn optional(source: &Source, file: &str) -> Result<Map<String, Value>> {
    source.read(file)?.map_or_else(|| Ok(Map::new()), |bytes| object(file, &bytes))
}

/// A token's text, given as a string or as an object with `content`.
fn special_token(config: &Map<String, Value>, key: &str, default: &str) -> String {
    let value = config.get(key);
    let text = value.and_then(|v| v.as_str().or_else(|| v.get("content")?.as_str()));
    text.unwrap_or(default).to_owned()
}

/// Ids and texts of tokens that were added to the vocabulary, such as those of textual inversion.
fn more_tokens(
    (source, folder): (&Source, &str),
    config: &Map<String, Value>,
) -> Result<Vec<(u64, String)>> {
    let by_text = optional(source, &format!("{folder}/added_tokens.json"))?;
    let by_text = by_text.into_iter().filter_map(|(token, id)| Some((id.as_u64()?, token)));
    let by_id = config.get("added_tokens_decoder").and_then(Value::as_object);
    let by_id = by_id.into_iter().flatten().filter_map(|(id, token)| {
        Some((id.parse().ok()?, token.get("content")?.as_str()?.to_owned()))
    });
    Ok(by_text.chain(by_id).collect())
}

/// The tokenizer of CLIP's vocabulary and merges, assembled as its `tokenizer.json`.
fn assemble(
    (source, folder): (&Source, &str),
    config: &Map<String, Value>,
    unknown: &str,
    special: [&String; 3],
) -> Result<Tokenizer> {
    let file = |name: &str| format!("{folder}/{name}");
    let (vocab_file, merges_file) = (file("vocab.json"), file("merges.txt"));
    let vocab = object(&vocab_file, &source.require(&vocab_file)?)?;
    let merges = source.require(&merges_file)?;
    let merges =
        std::str::from_utf8(&merges).map_err(|_| Error::config(&merges_file, "not UTF-8"))?;
    let merges: Vec<&str> =
        merges.lines().filter(|line| !line.starts_with("#version") && !line.is_empty()).collect();
    let mut added: Vec<Value> = Vec::new();
    for token in special {
        let id = vocab.get(token.as_str()).ok_or_else(|| {
            let reason = format!("{token:?} is not in the vocabulary");
            Error::config(file("tokenizer_config.json"), reason)
        })?;
        if added.iter().all(|a| a["id"] != *id) {
            added.push(json!({
                "id": id, "content": token, "special": true, "normalized": false,
                "single_word": false, "lstrip": false, "rstrip": false,
            }));
        }
    }
    for (id, token) in more_tokens((source, folder), config)? {
        if !vocab.contains_key(&token) && added.iter().all(|a| a["id"] != id) {
            added.push(json!({
                "id": id, "content": token, "special": false, "normalized": true,
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
    let reason = "its lines are not two tokens of the vocabulary each, as merges are";
    serde_json::from_value(description).map_err(|_| Error::config(merges_file, reason))
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
        tokenizer.add_placeholders(
            &[word("sky", 0, 1), word("", 9, 1), word("<cat>", 1, 3), word("<cat>x", 4, 1)],
            5000,
        );
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
    fn files_of_no_tokenizer_are_refused_in_words() {
        let told = |text: &str| parse("tokenizer.json", text.as_bytes()).map(drop).unwrap_err();
        for (text, words) in [
            ("{", "not JSON, from line 1, column 1 on"),
            ("{}", "its parts make no tokenizer of a kind that is known"),
            ("{\"normalizer\": {\"type\": \"Precompiled\"}}", "normalizer: Precompiled is not"),
        ] {
            let error = told(text).to_string();
            assert!(error.starts_with(&format!("tokenizer.json: {words}")), "{error}");
        }
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
