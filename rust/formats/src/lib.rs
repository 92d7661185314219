//! Model containers on disk: safetensors and GGUF, parsed into named, typed, bounds-checked tensor ranges.
//!
//! Every parser takes the whole file as `&[u8]` (mapped or read by the caller) and returns byte ranges into
//! it; no tensor data is copied and nothing is computed. Files are hostile: each length is compared with the
//! bytes that are left before anything is allocated, decoded metadata has a memory budget ([`Safetensors`]
//! and [`Gguf`] refuse files that exceed it), nesting has a depth limit, and all arithmetic is checked. A
//! parser never panics; every refusal is a [`FormatError`] that names the field, its value and what would be
//! right.
//!
//! ```
//! use infer_formats::{Gguf, GgufWriter, TensorType, Value};
//!
//! let mut writer = GgufWriter::new();
//! writer.metadata("general.architecture", Value::String("llama".into()))?;
//! writer.tensor("output.weight", TensorType::F16, &[2, 4], vec![0; 16])?;
//! let file = writer.finish();
//!
//! let gguf = Gguf::parse(&file)?;
//! assert_eq!(gguf.metadata.str("general.architecture")?, Some("llama"));
//! assert_eq!(gguf.tensor("output.weight").unwrap().shape, [2, 4]);
//! # Ok::<(), infer_formats::FormatError>(())
//! ```
#![forbid(unsafe_code)]
// What a lint can prove about the parsers need not be found by a fuzzer: no narrowing cast, no wrapping sum,
// no index that can be out of bounds, no panic.
#![cfg_attr(
    not(test),
    deny(
        clippy::as_conversions,
        clippy::arithmetic_side_effects,
        clippy::indexing_slicing,
        clippy::string_slice,
        clippy::unwrap_used,
        clippy::expect_used,
        clippy::panic,
        clippy::unreachable
    )
)]

mod budget;
mod error;
mod gguf;
mod json;
mod names;
mod safetensors;
mod safetensors_index;
mod safetensors_writer;
mod tensor;

pub use error::{Container, FormatError, shortened};
pub use gguf::{Array, Gguf, GgufWriter, Metadata, Split, Value, check_splits};
pub use safetensors::Safetensors;
pub use safetensors_index::SafetensorsIndex;
pub use safetensors_writer::SafetensorsWriter;
pub use tensor::{TensorInfo, TensorType};
