//! What the fuzzer calls: one function for each target, which takes any bytes and panics if the
//! server or the model reader does not behave. `tests/it/corpus.rs` calls the same functions.

#[allow(dead_code, reason = "the tests use all of it")]
#[path = "../../it/fake.rs"]
mod fake;
mod files;
mod http;

pub use files::{
    archive, controlnet, embedding, gguf, lora, model_files, peft, pickle, prompt, safetensors,
    unet_file, upscaler,
};
pub use http::{a1111, data_url, form, infotext, json, lines, multipart, openai, picture, request};

/// The top of the repository.
const ROOT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../..");
