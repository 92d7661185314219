//! The one error of this crate.

use std::fmt;
use std::ops::Range;

/// The container in which something was wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Container {
    /// A `.safetensors` file.
    Safetensors,
    /// A `model.safetensors.index.json` file.
    SafetensorsIndex,
    /// A `.gguf` file.
    Gguf,
}

impl fmt::Display for Container {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Container::Safetensors => "safetensors",
            Container::SafetensorsIndex => "safetensors index",
            Container::Gguf => "GGUF",
        })
    }
}

/// Why a file was refused, or why a [`crate::GgufWriter`] refused its input.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FormatError {
    /// A field holds a value that the format does not allow.
    #[error("{container}: {field} is {value}; expected {expected}")]
    Invalid {
        /// The kind of file.
        container: Container,
        /// What was read.
        field: String,
        /// What it held, shortened where long.
        value: String,
        /// What would be right.
        expected: String,
    },
    /// The file ends before a field does.
    #[error(
        "{container}: {field} needs {needed} bytes at byte {offset}, but {available} are left; \
         the file is truncated, or a length in it is wrong"
    )]
    Truncated {
        /// The kind of file.
        container: Container,
        /// What was read.
        field: String,
        /// Bytes that the field needs.
        needed: u128,
        /// Where the field starts, in bytes from the start of the file.
        offset: usize,
        /// Bytes between there and the end of the file.
        available: usize,
    },
    /// A name occurs twice where names must be unique.
    #[error("{container}: {field} {name} occurs more than once; each must be unique")]
    Duplicate {
        /// The kind of file.
        container: Container,
        /// What is named: a tensor, a metadata key.
        field: &'static str,
        /// The name, quoted, shortened where long.
        name: String,
    },
    /// Two tensors claim the same bytes.
    #[error(
        "{container}: tensor {first} (bytes {}..{}) and tensor {second} (bytes {}..{}) overlap; \
         each needs bytes of its own", first_range.start, first_range.end, second_range.start, second_range.end
    )]
    Overlap {
        /// The kind of file.
        container: Container,
        /// Name of the tensor that starts first, quoted.
        first: String,
        /// Its bytes within the file.
        first_range: Range<usize>,
        /// Name of the other tensor, quoted.
        second: String,
        /// Its bytes within the file.
        second_range: Range<usize>,
    },
    /// What the file describes would take more memory than a file of its size may.
    #[error(
        "{container}: {field} needs {needed} bytes of memory, but {left} are left of the budget \
         of {budget} bytes that a file of this size has for its names and metadata"
    )]
    OverBudget {
        /// The kind of file.
        container: Container,
        /// What was to be held.
        field: String,
        /// Bytes that it needs.
        needed: u128,
        /// Bytes that are left of the budget.
        left: usize,
        /// The whole budget in bytes.
        budget: usize,
    },
    /// JSON that does not parse, or has the wrong form.
    #[error(
        "{container}: {part} is not the JSON that the format asks for: {reason} (line {line}, column {column})"
    )]
    Json {
        /// The kind of file.
        container: Container,
        /// Which part of the file.
        part: &'static str,
        /// What the JSON parser found, shortened where long.
        reason: String,
        /// The line, from 1; 0 if the text ended.
        line: usize,
        /// The column in bytes, from 1; 0 if the text ended.
        column: usize,
    },
}

impl FormatError {
    /// Keeps of a JSON error what a message needs: the original repeats strings of any length.
    pub(crate) fn json(container: Container, part: &'static str, error: &serde_json::Error) -> Self {
        let text = error.to_string();
        let place = format!(" at line {} column {}", error.line(), error.column());
        let reason = shortened(text.strip_suffix(&place).unwrap_or(&text));
        FormatError::Json { container, part, reason, line: error.line(), column: error.column() }
    }

    /// An [`FormatError::Invalid`] from anything that can be displayed.
    pub(crate) fn invalid(
        container: Container,
        field: impl fmt::Display,
        value: impl fmt::Display,
        expected: impl fmt::Display,
    ) -> Self {
        FormatError::Invalid {
            container,
            field: field.to_string(),
            value: value.to_string(),
            expected: expected.to_string(),
        }
    }
}

/// Characters of a stranger's text that an error message repeats.
const SHOWN_CHARACTERS: usize = 80;

/// The start of a stranger's text, for a message, and how much was left out.
#[must_use]
pub fn shortened(text: &str) -> String {
    let shown: String = text.chars().take(SHOWN_CHARACTERS).collect();
    let rest = text.len().saturating_sub(shown.len());
    if rest == 0 { shown } else { format!("{shown}... (and {rest} bytes more)") }
}

/// Quotes and escapes text from a file for a message, and shortens it: a name may be megabytes of control
/// characters.
pub(crate) fn quoted(text: &str) -> String {
    let shown: String = text.chars().take(SHOWN_CHARACTERS).collect();
    let rest = text.len().saturating_sub(shown.len());
    if rest == 0 { format!("{shown:?}") } else { format!("{shown:?} (and {rest} bytes more)") }
}
