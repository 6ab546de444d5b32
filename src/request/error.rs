//! Validation errors of requests. Messages repeat little of what clients have typed.

use std::borrow::Cow;
use std::fmt;

/// Maximum length of an error message, in bytes. SageMaker forwards 2048 characters.
const MAX_MESSAGE_BYTES: usize = 600;

/// Maximum length of what a message repeats of a request, in characters.
const MAX_QUOTED_CHARS: usize = 64;

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
    /// A field that no format has.
    #[error("unknown field {param:?}")]
    Unknown {
        /// The start of its name.
        param: String,
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
        Self::Malformed { param: None, message: shortened(&message.into()) }
    }

    /// The error of a malformed field.
    pub(crate) fn malformed(param: &str, reason: impl fmt::Display) -> Self {
        Self::Malformed { param: Some(param.into()), message: message(param, reason) }
    }

    /// The error of an unknown field.
    pub(super) fn unknown(name: &str) -> Self {
        Self::Unknown { param: brief(name).into_owned() }
    }

    /// The error of a value that is out of range.
    pub(crate) fn range(param: &str, reason: impl fmt::Display) -> Self {
        Self::OutOfRange { param: param.into(), message: message(param, reason) }
    }

    /// The error of a field that goes by another name, if it does.
    pub(crate) fn renamed(mut self, name: impl FnOnce(&str) -> Option<String>) -> Self {
        if let Self::Malformed { param: Some(param), message }
        | Self::OutOfRange { param, message } = &mut self
        {
            let (told, reason) = message.split_at(message.find(' ').unwrap_or(message.len()));
            if let Some(other) = name(told) {
                (*message, *param) = (format!("{other}{reason}"), other);
            }
        }
        self
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
    shortened(&format!("{param} {reason}"))
}

/// The start of what a client has typed.
pub(crate) fn brief(text: &str) -> Cow<'_, str> {
    match text.char_indices().nth(MAX_QUOTED_CHARS) {
        Some((end, _)) => format!("{}…", &text[..end]).into(),
        None => text.into(),
    }
}

/// An error message without the ends of long quotations, which are what clients have typed.
pub(crate) fn shortened(message: &str) -> String {
    let mut short = String::new();
    // The quotation mark and the number of characters after it.
    let mut quotation: Option<(char, usize)> = None;
    let mut escaped = false;
    for c in message.chars() {
        if short.len() > MAX_MESSAGE_BYTES {
            short.push('…');
            break;
        }
        quotation = match quotation {
            None => matches!(c, '"' | '`').then_some((c, 0)),
            Some((mark, _)) if c == mark && !escaped => None,
            Some((mark, length)) => Some((mark, length + 1)),
        };
        escaped = c == '\\' && !escaped;
        match quotation {
            Some((_, length)) if length == MAX_QUOTED_CHARS + 1 => short.push('…'),
            Some((_, length)) if length > MAX_QUOTED_CHARS => {}
            _ => short.push(c),
        }
    }
    short
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quotations_and_messages_are_short() {
        let long = "é".repeat(100);
        let quoted = format!("{}…", "é".repeat(64));
        let table = [
            (format!("a {long:?} b"), format!("a {quoted:?} b")),
            (format!("a `{long}`, not {long:?}"), format!("a `{quoted}`, not {quoted:?}")),
            (format!("a {:?}", "\"".repeat(70)), format!("a \"{}…\"", "\\\"".repeat(32))),
            (format!("a \"{long}"), format!("a \"{quoted}")),
            ("a \"b\" c \\ \"d\"".into(), "a \"b\" c \\ \"d\"".into()),
        ];
        for (message, expected) in table {
            assert_eq!(shortened(&message), expected, "{message}");
        }
        let message = shortened(&"ab".repeat(1000));
        assert!(message.len() < MAX_MESSAGE_BYTES + 5 && message.ends_with('…'), "{message}");
        assert_eq!(brief(&long), quoted);
        assert_eq!(brief("abc"), "abc");
    }
}
