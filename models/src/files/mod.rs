//! The files of a model and of what requests add to it: where they are, what tensors and settings
//! they hold. Not what is computed with them.

mod asset_dir;
mod demo;
mod json;
pub(crate) mod ldm;
mod mapped;
mod pickle;
mod source;
mod tensors;

pub(crate) use self::asset_dir::AssetCache;
pub use self::asset_dir::AssetDir;
pub use self::json::Keys;
pub(crate) use self::source::SAFETY_CHECKER;
pub use self::source::{Checkpoint, Source};
pub use self::tensors::Weights;
pub(crate) use self::tensors::{LoraTarget, LoraTargets, StoredTensor};
