//! Prompts: their syntax, their tokens, and textual inversion.

mod inversion;
mod inversion_png;
mod syntax;
mod tags;
mod tokenizer;
mod unread;

pub use self::inversion::{Embeddings, PlaceholderToken};
pub(crate) use self::syntax::max_chunks;
pub use self::syntax::{PromptChunk, chunks};
pub(crate) use self::tags::{LORA_TAGS, without_loras};
pub use self::tags::{LoraUse, Loras};
pub use self::tokenizer::{ClipTokenizer, Tokens};
pub use self::unread::unread;
