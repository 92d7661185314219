//! A model as data, and the CPU backend that computes it.
//!
//! row ([`Arch`]) + configuration -> [`ModelSpec`] -> [`Program`] -> interpreter ([`CpuModel`]).
//!
//! * `arch.rs`: one row per family; `family.rs`: what rows can say. `names.rs`: what its tensors are called.
//! * `config.rs`, `gguf.rs`, `spec.rs`, `layers.rs`: configuration, of either container, to a checked spec.
//! * `step.rs`, `program.rs`: the steps, how they read, and the one function that writes them. `narrow.rs`: the last layer for wanted rows only.
//! * `folder.rs`, `checkpoint.rs`, `table.rs`, `weights.rs`, `places.rs`: files to tensors to packed weights.
//! * `late.rs`: weights that are packed when there is time.
//! * `blueprint.rs`, `reading.rs`: program and weights for backends outside of this crate.
//! * `methods.rs`, `packed.rs`, `scaled.rs`: integers or 8-bit floats and scales that a folder stores apart. `quantization.rs`: ways of rounding.
//! * `export/`: a checkpoint as a quantized file or folder.
//! * `dummy.rs`: random weights in the place of files.
//! * `fingerprint.rs`: the identity of cached keys and values.
//! * `cpu.rs`, `interpreter.rs`, `memory.rs`, `experts.rs`, `rope.rs`, `batch.rs`: the interpreter.

#![deny(unsafe_code)] // but for the one mapping in file_bytes.rs

mod arch;
mod batch;
mod biases;
mod blueprint;
mod checkpoint;
mod config;
mod cpu;
mod dummy;
mod error;
mod experts;
mod export;
mod family;
mod file_bytes;
mod fingerprint;
mod folder;
mod gate;
mod gguf;
mod interpreter;
mod kv;
mod late;
mod layers;
mod loading;
mod memory;
mod methods;
mod names;
mod narrow;
mod packed;
mod packed_cache;
mod places;
mod program;
mod quantization;
mod reading;
mod rope;
mod row_pages;
mod scaled;
mod spec;
mod step;
mod table;
mod weights;

pub use arch::ARCHITECTURES;
pub use batch::{Batch, BatchSequence, NO_PAGE};
pub use blueprint::{Blueprint, StoredRows};
pub use checkpoint::{Checkpoint, Tensor, known_architectures};
pub use config::Config;
pub use cpu::{CpuModel, LoadOptions};
pub use error::ModelError;
pub use export::{ExportOptions, export};
pub use family::{Arch, Bias, ExpertsRow, Parallel, Positions, QkNorm, Rotated, Scale, Windows};
pub use fingerprint::Fingerprint;
pub use gguf::END_TOKENS_KEY;
pub use kv::{KvPage, KvTypes};
pub use packed_cache::PackedCacheUse;
pub use program::{Buffer, MatrixKey, Program, VectorKey};
pub use quantization::{QUANTIZATIONS, Quantization};
pub use reading::{PlainType, RowForm};
pub use rope::{RopeScaling, RopeSpec};
pub use spec::{FeedForward, LayerSpec, ModelSpec, QkNormSpec};
pub use step::{Role, Slice, Step, WeightKey};
