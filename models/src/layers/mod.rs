//! Layers built from the tensors of a model's files, and LoRAs that add to them.

mod builder;
mod lora;
mod lora_delta;
mod lora_layer;
mod lora_names;
mod lora_parts;
mod lora_peft;
mod placed_delta;

pub(crate) use self::builder::{LayerBuilder, LinearPart, activation_dtype};
pub(crate) use self::lora::{LoraCache, Reopen, TargetIndex};
pub use self::lora_layer::LoraStack;
pub(crate) use self::lora_layer::{LoraLayer, Part, ScaledLora};
pub(crate) use self::lora_names::Network;
