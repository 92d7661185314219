//! Writing a model in quantized form.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, sync_channel};
use std::time::Duration;

use infer_kernels::Context;
use infer_model::{Checkpoint, ExportOptions, Quantization, export};
use infer_text::GgufVocabulary;
use pyo3::prelude::*;

use crate::advice;
use crate::convert::{Arg, Int};
use crate::error::guarded;
use crate::settings::{MAX_THREADS, named_quantization, thread_count};
use crate::vocabulary;
use crate::wait::interruptible;

/// How long a signal waits for the work to clean up after itself.
const CLEANING: Duration = Duration::from_secs(10);

/// Stops the work when a signal ends the call that waits for it, and lets it remove what it has written.
struct Stop {
    stop: Arc<AtomicBool>,
    done: Receiver<()>,
}

impl Drop for Stop {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        let _ = self.done.recv_timeout(CLEANING); // done, or too slow to wait for
    }
}

/// Write a model in quantized form, as a GGUF file or a safetensors folder; the bytes of its weights file.
#[pyfunction]
#[pyo3(
    signature = (path, output, quantization, *, threads=None, mmap=Arg::of(true)),
    text_signature = "(path, output, quantization, *, threads=None, mmap=True)"
)]
pub fn quantize(
    py: Python<'_>,
    path: Arg<PathBuf>,
    output: Arg<PathBuf>,
    quantization: Arg<String>,
    threads: Option<Arg<Int>>,
    mmap: Arg<bool>,
) -> PyResult<u64> {
    guarded(|| {
        let (path, output) = (path.get("path", "a path")?, output.get("output", "a path")?);
        let quantization = Some(named_quantization(quantization, "a string")?);
        let threads = threads.map_or(Ok(infer_kernels::default_threads().min(MAX_THREADS)), thread_count)?;
        let mmap = mmap.flag("mmap")?;
        let stop = Arc::new(AtomicBool::new(false));
        let (sender, done) = sync_channel(1);
        let stopper = Stop { stop: Arc::clone(&stop), done };
        let work = move || {
            let written = write(&path, &output, quantization, threads, mmap, &stop);
            let _ = sender.send(()); // nobody listens when the call has returned
            written
        };
        let written = interruptible(py, "infer-quantize", work);
        py.detach(|| drop(stopper));
        written
    })
}

fn write(
    path: &Path,
    output: &Path,
    quantization: Option<&'static Quantization>,
    threads: usize,
    mmap: bool,
    stop: &AtomicBool,
) -> Result<u64, String> {
    let text = |error: &dyn std::fmt::Display| error.to_string();
    let checkpoint = Checkpoint::open(path, mmap).map_err(|error| text(&error))?;
    let mut metadata = Vec::new();
    if !checkpoint.is_gguf() && path.is_dir() {
        let (size, ends) = (checkpoint.spec.vocabulary, &checkpoint.spec.eos_token_ids);
        let found = GgufVocabulary::of_folder(path, size, ends).map_err(|error| text(&error))?;
        metadata = vocabulary::to_metadata(found.unwrap_or_else(|| GgufVocabulary::without_tokenizer(ends)));
        metadata.extend(advice::of_folder(path)?);
    }
    let context = Context::new(threads).map_err(|error| text(&error))?;
    let options = ExportOptions { quantization, metadata, context: &context, stop };
    export(&checkpoint, output, &options).map_err(|error| text(&error))
}
