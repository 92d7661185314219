//! The one error of this crate. A running store has none: what fails after [`crate::Store::open`] is counted in
//! [`crate::StoreStats`], and the page is a miss.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

/// Why a store could not be opened, or a session not be written or read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    /// An option holds a value that cannot work.
    #[error("{field} is {value}; expected {expected}")]
    Option {
        /// The option.
        field: &'static str,
        /// What it held.
        value: String,
        /// What would be right.
        expected: String,
    },
    /// The directory holds something else, and nothing may be written or deleted there.
    #[error("dir is {dir:?}, which holds {found} but no page store; name an empty or a new directory")]
    NotOurs {
        /// The directory.
        dir: PathBuf,
        /// The name of a file in it, quoted.
        found: String,
    },
    /// The directory's marker file is not one that this version writes.
    #[error(
        "dir is {dir:?}, whose file `infer-store` holds {found}; expected {expected}: another version made \
         this directory; name a new one"
    )]
    Version {
        /// The directory.
        dir: PathBuf,
        /// What the marker file holds, quoted and shortened.
        found: String,
        /// What this version writes.
        expected: String,
    },
    /// Another process holds the directory's lock, which it should for milliseconds only.
    #[error(
        "dir is {dir:?}, which another process keeps locked; end that process, or name another directory"
    )]
    Busy {
        /// The directory.
        dir: PathBuf,
    },
    /// The operating system refused.
    #[error("{path:?} cannot be {action}: {source}")]
    Io {
        /// What was tried, as a participle.
        action: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// What the operating system said.
        source: io::Error,
    },
    /// A session file is damaged or belongs to something else, or pages cannot become one.
    #[error("session {path:?}: {field} is {value}; expected {expected}")]
    Session {
        /// The file.
        path: PathBuf,
        /// What was wrong.
        field: String,
        /// What it held.
        value: String,
        /// What would be right.
        expected: String,
    },
}

impl StoreError {
    pub(crate) fn io(action: &'static str, path: &Path, source: io::Error) -> Self {
        StoreError::Io { action, path: path.to_owned(), source }
    }

    pub(crate) fn session(
        path: &Path,
        field: impl fmt::Display,
        value: impl fmt::Display,
        expected: impl fmt::Display,
    ) -> Self {
        StoreError::Session {
            path: path.to_owned(),
            field: field.to_string(),
            value: value.to_string(),
            expected: expected.to_string(),
        }
    }
}
