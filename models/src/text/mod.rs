//! Prompts: their syntax, their tokens, and textual inversion.

mod editing;
mod inversion;
mod inversion_png;
mod parts;
mod syntax;
mod tags;
mod tokenizer;
mod unread;
mod words;

pub(crate) use self::editing::most_texts;
pub use self::editing::{Counted, MAX_TEXTS, Schedule, TooManyTexts};
pub use self::inversion::{Embeddings, PlaceholderToken};
pub use self::parts::{MAX_PARTS, Part, parts};
pub(crate) use self::syntax::max_chunks;
pub use self::syntax::{PromptChunk, chunks};
pub(crate) use self::tags::{LORA_TAGS, without_loras};
pub use self::tags::{LoraUse, Loras};
pub use self::tokenizer::{ClipTokenizer, Tokens};
pub use self::unread::{PromptRole, unread};
