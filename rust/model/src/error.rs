//! The one error of this room: what is wrong with a model, where, and what would be right.

use std::path::{Path, PathBuf};

use infer_formats::shortened;

/// Why a model could not be read, understood or run.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// A file could not be opened or read.
    #[error("cannot read {path}: {source}", path = path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What the operating system said.
        source: std::io::Error,
    },
    /// A file could not be read, or was changed, while weights were still read from it.
    #[error("{path}: {reason} before all of its weights were read; load the model again", path = path.display())]
    Unread {
        /// The file or folder.
        path: PathBuf,
        /// What happened to it.
        reason: String,
    },
    /// A container is malformed.
    #[error("{path}: {source}", path = path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// What the parser said.
        source: Box<infer_formats::FormatError>,
    },
    /// A folder or file is not a model at all.
    #[error("{path} is not a model: {reason}", path = path.display())]
    NotAModel {
        /// The path that was given.
        path: PathBuf,
        /// What is missing.
        reason: String,
    },
    /// A field of the configuration is missing or has a value that cannot be right.
    #[error("model configuration: `{field}` is {value}; expected {expected}", value = shortened(value))]
    Config {
        /// Name of the field as the file writes it.
        field: String,
        /// What was found.
        value: String,
        /// What would be right.
        expected: String,
    },
    /// A configuration is no JSON object.
    #[error("expected a JSON object, but {0}")]
    NoObject(String),
    /// The architecture has no row in `arch.rs`.
    #[error("unknown architecture `{name}`; known: {known}", name = shortened(name))]
    UnknownArchitecture {
        /// The name in the file.
        name: String,
        /// Comma separated list of the names we know.
        known: String,
    },
    /// The checkpoint lacks a tensor which the configuration calls for.
    #[error("the checkpoint has no tensor `{name}`, which its configuration calls for")]
    MissingTensor {
        /// The names that were tried.
        name: String,
    },
    /// The checkpoint has a tensor that no role asks for.
    #[error(
        "tensor `{name}` is no part of {architecture} as this release computes it, or its configuration says that there is none",
        name = shortened(name)
    )]
    UnknownTensor {
        /// Tensor name.
        name: String,
        /// Architecture of the configuration.
        architecture: String,
    },
    /// A tensor has another shape than the configuration implies.
    #[error("tensor `{name}` has shape {found:?}; the configuration implies {expected}")]
    Shape {
        /// Tensor name.
        name: String,
        /// Shape in the file, slowest dimension first.
        found: Vec<usize>,
        /// What would fit.
        expected: String,
    },
    /// A tensor is stored in a type that cannot be computed yet.
    #[error("tensor `{name}` is stored as {found}; types that can be computed: {known}")]
    TensorType {
        /// Tensor name.
        name: String,
        /// Its type.
        found: String,
        /// Comma separated list.
        known: String,
    },
    /// What is wrong with a configuration or a tensor, and where that lies.
    #[error("{path}: {source}", path = path.display())]
    In {
        /// The file; the folder, where a tensor may be in one of several.
        path: PathBuf,
        /// What is wrong.
        source: Box<ModelError>,
    },
    /// A model cannot be rounded, or written, as asked.
    #[error("{0}")]
    Quantization(String),
    /// A request to the model does not fit it.
    #[error("{0}")]
    Request(String),
    /// A kernel refused its arguments or memory ran out.
    #[error(transparent)]
    Kernel(#[from] infer_kernels::KernelError),
}

impl ModelError {
    /// The same with the path that it concerns, unless it names one already or concerns none.
    #[must_use]
    pub(crate) fn at(self, path: &Path) -> Self {
        match self {
            Self::Config { .. }
            | Self::NoObject(_)
            | Self::UnknownArchitecture { .. }
            | Self::MissingTensor { .. }
            | Self::UnknownTensor { .. }
            | Self::Shape { .. }
            | Self::TensorType { .. } => Self::In { path: path.to_owned(), source: Box::new(self) },
            _ => self,
        }
    }

    pub(crate) fn config(field: &str, value: impl ToString, expected: impl ToString) -> Self {
        Self::Config { field: field.to_owned(), value: value.to_string(), expected: expected.to_string() }
    }
}
