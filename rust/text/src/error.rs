//! The one error type of this crate.

use std::path::{Path, PathBuf};

/// Why a tokenizer or a chat template could not be loaded or used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TextError {
    /// A file could not be read.
    #[error("cannot read {path}: {message}")]
    Read {
        /// The file.
        path: PathBuf,
        /// What the operating system said, or which limit the file exceeds.
        message: String,
    },
    /// A file or a metadata field is malformed.
    #[error("{what}: {message}")]
    Invalid {
        /// The file or field.
        what: String,
        /// What is wrong with it, and what would be right.
        message: String,
    },
    /// A well-formed file asks for something this crate does not do.
    #[error("{what} {value:?} is not supported; {expected}")]
    Unsupported {
        /// The field.
        what: String,
        /// Its value.
        value: String,
        /// What would be accepted.
        expected: String,
    },
    /// Text could not be turned into token ids.
    #[error("cannot tokenize: {0}")]
    Encode(String),
    /// A chat template does not compile, failed while rendering, or called `raise_exception`.
    #[error("chat template: {0}")]
    Template(String),
}

impl TextError {
    pub(crate) fn invalid(what: impl Into<String>, message: impl ToString) -> Self {
        TextError::Invalid { what: what.into(), message: message.to_string() }
    }

    pub(crate) fn unsupported(
        what: impl Into<String>,
        value: impl Into<String>,
        expected: impl Into<String>,
    ) -> Self {
        TextError::Unsupported { what: what.into(), value: value.into(), expected: expected.into() }
    }

    pub(crate) fn read(path: &Path, message: impl ToString) -> Self {
        TextError::Read { path: path.to_owned(), message: message.to_string() }
    }
}

/// Runs third-party code that may panic on a hostile file, and turns the panic into an error.
///
/// The `tokenizers` crate indexes and unwraps on data that it read from the file (for instance a merge
/// longer than every vocabulary entry), so a panic there means "malformed file", not "broken program".
pub(crate) fn shielded<T>(
    what: &str,
    body: impl FnOnce() -> Result<T, TextError> + std::panic::UnwindSafe,
) -> Result<T, TextError> {
    std::panic::catch_unwind(body).unwrap_or_else(|payload| {
        let message = payload
            .downcast_ref::<String>()
            .map(String::as_str)
            .or_else(|| payload.downcast_ref::<&str>().copied())
            .unwrap_or("no message");
        Err(TextError::invalid(what, format!("malformed (the tokenizer library gave up: {message})")))
    })
}
