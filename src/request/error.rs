//! Requests that cannot be honoured as they are.

use std::fmt;

/// Of an error, which may quote the client.
const MAX_MESSAGE_BYTES: usize = 600;

/// A request that cannot be honoured as it is.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum ValidationError {
    /// It does not say what it should: a missing, unknown, repeated or wrongly typed field.
    #[error("{message}")]
    Malformed {
        /// The field, as the client spelt it.
        param: Option<String>,
        /// One sentence.
        message: String,
    },
    /// It says something that is out of range.
    #[error("{message}")]
    OutOfRange {
        /// The field, as the client spelt it.
        param: String,
        /// One sentence.
        message: String,
    },
}

impl ValidationError {
    /// A body that is not even a list of fields.
    pub fn body(message: impl Into<String>) -> Self {
        Self::Malformed { param: None, message: truncate(message.into()) }
    }

    /// A field that is not what it should be.
    pub(crate) fn malformed(param: &str, reason: impl fmt::Display) -> Self {
        Self::Malformed { param: Some(truncate(param.into())), message: message(param, reason) }
    }

    /// A field whose value cannot be had.
    pub(crate) fn range(param: &str, reason: impl fmt::Display) -> Self {
        Self::OutOfRange { param: truncate(param.into()), message: message(param, reason) }
    }
}

fn message(param: &str, reason: impl fmt::Display) -> String {
    truncate(format!("{param} {reason}"))
}

/// What quotes a client is as long as the client likes; SageMaker passes on 2048 characters.
fn truncate(mut text: String) -> String {
    if text.len() > MAX_MESSAGE_BYTES {
        text.truncate(text.floor_char_boundary(MAX_MESSAGE_BYTES));
        text.push('…');
    }
    text
}
