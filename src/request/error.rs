//! Validation errors of requests.

use std::fmt;

/// Maximum length of an error message, in bytes. Messages may quote client input, and SageMaker
/// forwards 2048 characters.
const MAX_MESSAGE_BYTES: usize = 600;

/// A request that is malformed or out of range.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum ValidationError {
    /// A missing, unknown, repeated or wrongly typed field.
    #[error("{message}")]
    Malformed {
        /// The field, as the client spelt it.
        param: Option<String>,
        /// The field and the rule, in one sentence.
        message: String,
    },
    /// A value out of range.
    #[error("{message}")]
    OutOfRange {
        /// The field, as the client spelt it.
        param: String,
        /// The field and the rule, in one sentence.
        message: String,
    },
}

impl ValidationError {
    /// The error of a body that has no fields.
    pub fn body(message: impl Into<String>) -> Self {
        Self::Malformed { param: None, message: truncate(message.into()) }
    }

    /// The error of a malformed field.
    pub(crate) fn malformed(param: &str, reason: impl fmt::Display) -> Self {
        Self::Malformed { param: Some(truncate(param.into())), message: message(param, reason) }
    }

    /// The error of a value that is out of range.
    pub(crate) fn range(param: &str, reason: impl fmt::Display) -> Self {
        Self::OutOfRange { param: truncate(param.into()), message: message(param, reason) }
    }

    /// The error with the name of the whole field, if it names an item of a list.
    pub(crate) fn of_field(mut self) -> Self {
        if let Self::Malformed { param: Some(param), .. } | Self::OutOfRange { param, .. } =
            &mut self
        {
            param.truncate(param.find('[').unwrap_or(param.len()));
        }
        self
    }
}

fn message(param: &str, reason: impl fmt::Display) -> String {
    truncate(format!("{param} {reason}"))
}

fn truncate(mut text: String) -> String {
    if text.len() > MAX_MESSAGE_BYTES {
        text.truncate(text.floor_char_boundary(MAX_MESSAGE_BYTES));
        text.push('…');
    }
    text
}
