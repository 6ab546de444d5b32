//! The crate's error. Every variant is a sentence that names the cause.

use std::path::PathBuf;

use crate::ops::{DeviceFault, device_fault};

/// What can fail between a model's files and an image.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file of the model is missing or cannot be read.
    #[error("{}: {reason}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// The system's error. Not a source, which a chain of causes would tell a second time.
        reason: std::io::Error,
    },
    /// A configuration file is invalid or not supported.
    #[error("{file}: {reason}")]
    Config {
        /// File name, relative to the model.
        file: String,
        /// The key, and why its value is rejected.
        reason: String,
    },
    /// A tensor is missing or has another shape or type.
    #[error("{file}: tensor {tensor}: {reason}")]
    Tensor {
        /// The file or files that should contain it.
        file: String,
        /// The tensor's name.
        tensor: String,
        /// Missing, or the expected and the found shape.
        reason: String,
    },
    /// The tokenizer could not be built or could not encode.
    #[error("tokenizer: {0}")]
    Tokenizer(String),
    /// The request exceeds the limits of the model.
    #[error("{field}: {reason}")]
    Spec {
        /// The field of [`crate::Spec`].
        field: &'static str,
        /// The rule that it violates.
        reason: String,
    },
    /// The device is out of memory.
    #[error("out of memory on the device: {0}")]
    OutOfMemory(String),
    /// The device is lost: nothing will run on it again.
    #[error("the device failed: {0}")]
    DeviceLost(String),
    /// A computation overflowed.
    #[error("computation failed: {0}: NaN or infinite numbers")]
    NotFinite(&'static str),
    /// A computation failed.
    #[error("computation failed: {}", first_line(&.0.to_string()))]
    Compute(candle_core::Error),
}

/// The result of everything in this crate.
pub type Result<T> = std::result::Result<T, Error>;

impl From<candle_core::Error> for Error {
    fn from(error: candle_core::Error) -> Self {
        let fault = device_fault(&error);
        let text = || first_line(&error.to_string());
        match fault {
            Some(DeviceFault::Lost) => Self::DeviceLost(text()),
            Some(DeviceFault::OutOfMemory) => Self::OutOfMemory(text()),
            // What candle wraps as a text.
            None if text().contains("OUT_OF_MEMORY") => Self::OutOfMemory(text()),
            None => Self::Compute(error),
        }
    }
}

/// Without the backtrace and its paths, which candle writes below the error.
fn first_line(text: &str) -> String {
    text.lines().next().unwrap_or_default().to_owned()
}

impl Error {
    /// A configuration error.
    pub fn config(file: impl Into<String>, reason: impl Into<String>) -> Self {
        Self::Config { file: file.into(), reason: reason.into() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_backtrace_is_told() {
        let error = candle_core::Error::Msg("no such shape\n   0: f\n at /home/a/src/b.rs".into());
        let error = Error::from(error);
        assert_eq!(error.to_string(), "computation failed: no such shape");
    }
}
