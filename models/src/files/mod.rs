//! Files of models, LoRAs and embeddings: where they are, their tensors and their settings. Not
//! what is computed with them.

mod alias;
mod asset_dir;
mod bytes;
mod container;
mod control_net;
mod demo;
mod family;
mod fingerprint;
mod gguf;
mod ip_adapter;
mod json;
mod ldm;
pub(crate) mod names;
mod numbers;
mod old_pickle;
mod original_config;
mod pickle;
mod safetensors;
mod source;
mod stored;
mod tensors;
mod unet_file;
mod unpickle;
mod version;

pub(crate) use self::asset_dir::{AssetCache, PEFT_SETTINGS, peft_settings};
pub use self::asset_dir::{AssetDir, AssetFile};
pub(crate) use self::bytes::open;
pub use self::control_net::ControlNetFile;
pub(crate) use self::family::what;
pub(crate) use self::fingerprint::Fingerprint;
pub use self::ip_adapter::IpAdapterFile;
pub(crate) use self::ip_adapter::{encoder_source, encoder_weights};
pub use self::json::Keys;
pub(crate) use self::json::{not_json, object};
pub(crate) use self::source::SAFETY_CHECKER;
pub use self::source::{Checkpoint, Source};
pub(crate) use self::stored::StoredTensor;
pub use self::tensors::Weights;
pub(crate) use self::tensors::{LoraTarget, LoraTargets};
pub use self::version::FileVersion;
