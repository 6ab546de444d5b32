//! Layers built from the tensors of a model's files, and LoRAs that add to them.

mod builder;
mod lora;
mod lora_layer;

pub(crate) use self::builder::{LayerBuilder, LinearPart, activation_dtype};
pub(crate) use self::lora::{LoraCache, TargetIndex};
pub use self::lora_layer::LoraStack;
pub(crate) use self::lora_layer::{LoraLayer, Part};
