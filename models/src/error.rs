//! The one error of the mathematics. Every variant is a sentence that names what is wrong.

use std::path::PathBuf;

/// What can go wrong between a directory of files and a picture.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file of the model is missing or cannot be read.
    #[error("{}: {source}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A configuration file is not what this program can run.
    #[error("{file}: {reason}")]
    Config {
        /// The file, relative to the model.
        file: String,
        /// The key and what is wrong with its value.
        reason: String,
    },
    /// A tensor is missing or has another shape or type.
    #[error("{file}: tensor {tensor}: {reason}")]
    Tensor {
        /// The file, or the files, that should hold it.
        file: String,
        /// The tensor's name.
        tensor: String,
        /// Missing, or the expected and the found shape.
        reason: String,
    },
    /// The tokenizer could not be built or could not encode.
    #[error("tokenizer: {0}")]
    Tokenizer(String),
    /// The request asks for what this model cannot do.
    #[error("{field}: {reason}")]
    Spec {
        /// The field of [`crate::Spec`].
        field: &'static str,
        /// What it must be.
        reason: String,
    },
    /// The device has no memory left for this operation.
    #[error("out of memory on the device: {0}")]
    OutOfMemory(String),
    /// The device is lost; nothing will run on it again.
    #[error("the device failed: {0}")]
    DeviceLost(String),
    /// A computation failed.
    #[error("computation failed: {0}")]
    Compute(candle_core::Error),
}

/// The result of everything in this crate.
pub type Result<T> = std::result::Result<T, Error>;

impl From<candle_core::Error> for Error {
    /// Device errors are told apart by their text: the driver's code is not kept by candle.
    fn from(error: candle_core::Error) -> Self {
        let text = error.to_string();
        if text.contains("OUT_OF_MEMORY") || text.contains("out of memory") {
            return Self::OutOfMemory(first_line(&text));
        }
        const LOST: [&str; 5] = [
            "ILLEGAL_ADDRESS",
            "LAUNCH_FAILED",
            "ECC_UNCORRECTABLE",
            "DEVICE_UNAVAILABLE",
            "CUDA_ERROR_ASSERT",
        ];
        if LOST.iter().any(|code| text.contains(code)) {
            return Self::DeviceLost(first_line(&text));
        }
        Self::Compute(error)
    }
}

fn first_line(text: &str) -> String {
    text.lines().next().unwrap_or_default().to_owned()
}

impl Error {
    /// A configuration error.
    pub fn config(file: impl Into<String>, reason: impl Into<String>) -> Self {
        Self::Config { file: file.into(), reason: reason.into() }
    }
}
