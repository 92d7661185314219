//! What the engine refuses.

use thiserror::Error;

/// A refusal, in a sentence that names the field, the value and what would be right.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum EngineError {
    /// The engine's own settings do not fit together.
    #[error("{0}")]
    Config(String),
    /// A request or its sampling parameters cannot be served.
    #[error("{0}")]
    Request(String),
    /// As many requests wait as may; one may be submitted again later.
    #[error("{0}")]
    Full(String),
    /// The engine was closed, or its thread died.
    #[error("{0}")]
    Closed(String),
}

/// Shorthand for a refused request.
pub(crate) fn refuse<T>(message: impl Into<String>) -> Result<T, EngineError> {
    Err(EngineError::Request(message.into()))
}
