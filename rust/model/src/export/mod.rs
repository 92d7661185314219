//! A checkpoint as another file: rounded, tensor by tensor, straight to the disk.
//!
//! * `output.rs`: a file or folder that appears whole or not at all.
//! * `plan.rs`: which tensors a file gets, and how each is made when it is its turn.
//! * `gguf.rs`: the tensors of a GGUF file, `header.rs` what it says about a model, and `difference.rs` what it cannot say;
//!   `folder.rs`: the same for a safetensors folder.
//!
//! What is written is what a load with the same quantization computes with, bit for bit: both round with [`round_rows`]'s code, and a
//! row's rounding depends on that row alone.
//!
//! [`round_rows`]: infer_kernels::round_rows

mod difference;
mod folder;
mod gguf;
mod header;
mod output;
mod plan;

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use infer_formats::Value;
use infer_kernels::Context;

use crate::checkpoint::Checkpoint;
use crate::{ModelError, Quantization};

/// How to write.
pub struct ExportOptions<'a> {
    /// How to round.
    pub quantization: Option<&'a Quantization>,
    /// Further metadata of a GGUF file that is made from a folder: tokenizer, chat template, licence.
    pub metadata: Vec<(String, Value)>,
    /// Threads and instructions.
    pub context: &'a Context,
    /// Ends the work between two tensors when it becomes true; nothing is left behind.
    pub stop: &'a AtomicBool,
}

impl ExportOptions<'_> {
    /// # Errors
    /// When the work is to end.
    fn go_on(&self) -> Result<(), ModelError> {
        match self.stop.load(Ordering::Relaxed) {
            true => Err(ModelError::Quantization("interrupted; nothing was written".to_owned())),
            false => Ok(()),
        }
    }
}

/// Writes a checkpoint: as a GGUF file if `output` ends in `.gguf`, else as a safetensors folder. Returns the bytes written.
///
/// # Errors
/// An output that exists already or cannot be written, a checkpoint that is quantized already, tensors that cannot be rounded, or a
/// model of which the container cannot say everything.
pub fn export(
    checkpoint: &Checkpoint,
    output: &Path,
    options: &ExportOptions<'_>,
) -> Result<u64, ModelError> {
    if let Some(quantization) = options.quantization
        && checkpoint.is_quantized()
    {
        return Err(ModelError::Quantization(format!(
            "quantization is {:?}, but {} is quantized already ({}); name the model it was made from",
            quantization.name(),
            checkpoint.path().display(),
            checkpoint.storage()
        )));
    }
    let is_gguf = output.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("gguf"));
    if is_gguf {
        options.quantization.map(gguf::file_type).transpose()?;
    }
    let written = match (is_gguf, checkpoint.is_gguf()) {
        (true, true) => gguf::copy(checkpoint, output, options),
        (true, false) => gguf::convert(checkpoint, output, options),
        (false, false) => folder::write(checkpoint, output, options),
        (false, true) => Err(ModelError::Quantization(format!(
            "output: {} is no .gguf file, and a GGUF model can only be written as one: it has neither the names nor the configuration \
             of a folder",
            output.display()
        ))),
    };
    written.map_err(|error| error.at(checkpoint.path()))
}
