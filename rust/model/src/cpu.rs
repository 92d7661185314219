//! The CPU backend: a checkpoint packed for this machine, its KV cache, and the forward pass.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use infer_kernels::{Context, KvCache, KvLayer, Precision, default_threads};

use crate::batch::Batch;
use crate::checkpoint::Checkpoint;
use crate::fingerprint::{self, Fingerprint};
use crate::interpreter::Interpreter;
use crate::kv::{KvCaches, KvPage, KvTypes, windowed};
use crate::loading::CacheNews;
use crate::memory::Memory;
use crate::packed_cache::PackedCacheUse;
use crate::{ModelError, ModelSpec, Program, Quantization};

/// How to load and compute.
#[derive(Debug, Clone)]
pub struct LoadOptions {
    /// Threads, the caller's included; `None`: one per core that the process may use.
    pub threads: Option<usize>,
    /// Exact activations, or rounded ones where weights are integers.
    pub precision: Precision,
    /// Map files during the load instead of reading them.
    pub mmap: bool,
    /// How keys and values are stored.
    pub kv_types: KvTypes,
    /// How weights are rounded that the files store as floats.
    pub quantization: Option<&'static Quantization>,
    /// A folder where packed weights are kept for the next load; see `packed_cache.rs`.
    pub packed_cache_dir: Option<PathBuf>,
}

/// A model in memory.
pub struct CpuModel {
    interpreter: Interpreter,
    kv_layers: Vec<KvLayer>,
    cache: Option<KvCaches>,
    memory: Memory,
    fingerprint: Fingerprint,
    packed_cache: CacheNews,
    /// How long the last step that was computed with weights not packed took; none before the first one.
    step_time: Option<Duration>,
}

impl CpuModel {
    /// Loads a model folder or `.gguf` file. Weights are copied into compute layouts, at once or, where a mapped file has them as they
    /// are, while the model is used: see [`CpuModel::prepare`]. No file stays mapped.
    ///
    /// # Errors
    /// Whatever is wrong with the checkpoint, rounding where it is quantized already, types for layers that it has not, or `INFER_ISA` naming an instruction set that this machine lacks.
    pub fn load(path: &Path, options: &LoadOptions) -> Result<Self, ModelError> {
        Self::from_checkpoint(&Checkpoint::open(path, options.mmap)?, options)
    }

    /// Loads an opened checkpoint.
    ///
    /// # Errors
    /// As [`CpuModel::load`].
    pub fn from_checkpoint(checkpoint: &Checkpoint, options: &LoadOptions) -> Result<Self, ModelError> {
        let threads = options.threads.unwrap_or_else(default_threads).max(1);
        let kv_layers = options.kv_types.layers(&checkpoint.spec)?;
        let quantization = checkpoint.rounding(options.quantization)?;
        let context = Context::new(threads)?;
        let folder = options.packed_cache_dir.as_deref();
        let (interpreter, packed_cache) =
            Interpreter::load(checkpoint, quantization, context, options.precision, folder)
                .map_err(|error| error.at(checkpoint.path()))?;
        let fingerprint = fingerprint::of(
            checkpoint,
            quantization,
            options.precision,
            &kv_layers,
            interpreter.context.isa.name(),
        );
        if !interpreter.is_late() {
            fingerprint.get()?;
        }
        Ok(Self {
            interpreter,
            kv_layers,
            cache: None,
            memory: Memory::default(),
            fingerprint,
            packed_cache,
            step_time: None,
        })
    }

    /// What came of the folder for packed weights, and what is to be told of it.
    pub fn packed_cache(&self) -> (PackedCacheUse, Option<&str>) {
        (self.packed_cache.0, self.packed_cache.1.as_deref())
    }

    /// What the model is.
    pub fn spec(&self) -> &ModelSpec {
        &self.interpreter.spec
    }

    /// Its program, fused for this backend.
    pub fn program(&self) -> &Program {
        &self.interpreter.program
    }

    /// The instruction set and threads in use.
    pub fn context(&self) -> &Context {
        &self.interpreter.context
    }

    /// Bytes of all weights in memory.
    pub fn weight_bytes(&self) -> usize {
        self.interpreter.weight_bytes()
    }

    /// Bytes of weights whose memory is not taken yet: see [`CpuModel::prepare`].
    pub fn unpacked_bytes(&self) -> usize {
        self.interpreter.late_bytes()
    }

    /// Packs some of the weights that were not packed while the model was loaded; false when there are none left. Steps compute the same
    /// without, slower: the first one packs nothing, the others a part each.
    ///
    /// # Errors
    /// A file that was changed, or cannot be read.
    pub fn prepare(&mut self) -> Result<bool, ModelError> {
        self.pack_late(Duration::ZERO)?;
        Ok(self.interpreter.is_late())
    }

    /// Bytes of one page of the KV cache, all layers together.
    pub fn page_bytes(&self) -> usize {
        KvCache::page_bytes(&self.kv_layers)
    }

    /// Bytes of one page in those layers that see only a window.
    pub fn local_page_bytes(&self) -> usize {
        KvCache::page_bytes(&windowed(&self.kv_layers, self.spec()))
    }

    /// Makes a KV cache of so many pages; an earlier one is dropped.
    ///
    /// # Errors
    /// Memory that the system refuses.
    pub fn allocate_cache(&mut self, pages: usize) -> Result<(), ModelError> {
        self.allocate(pages, None)
    }

    /// The same with other pages for the layers that see only a window: sequences then have a second page table
    /// ([`crate::BatchSequence::local_pages`]), and need pages there for what these layers see only.
    ///
    /// # Errors
    /// As [`CpuModel::allocate_cache`].
    pub fn allocate_split_cache(&mut self, pages: usize, local_pages: usize) -> Result<(), ModelError> {
        self.allocate(pages, Some(local_pages))
    }

    fn allocate(&mut self, pages: usize, local_pages: Option<usize>) -> Result<(), ModelError> {
        self.cache = None;
        self.cache = Some(KvCaches::new(&self.interpreter.spec, &self.kv_layers, pages, local_pages)?);
        Ok(())
    }

    fn cache(&self) -> Result<&KvCaches, ModelError> {
        self.cache.as_ref().ok_or_else(no_cache)
    }

    fn cache_mut(&mut self) -> Result<&mut KvCaches, ModelError> {
        self.cache.as_mut().ok_or_else(no_cache)
    }

    /// An identity of cached keys and values: two models that agree in it compute, bit for bit, the same pages for the same
    /// tokens. See `fingerprint.rs` for what it covers.
    /// It is computed when it is asked for, at the latest when the last weight is packed.
    pub fn fingerprint(&self) -> &Fingerprint {
        &self.fingerprint
    }

    /// Copies page `from` of the KV cache over page `to`, in every layer.
    ///
    /// # Errors
    /// A page beyond the cache.
    pub fn copy_page(&mut self, from: impl Into<KvPage>, to: impl Into<KvPage>) -> Result<(), ModelError> {
        self.cache_mut()?.copy_page(from.into(), to.into())
    }

    /// Replaces the contents of `bytes` by a page of the KV cache, [`CpuModel::page_bytes`] bytes: see
    /// [`KvCache::export_page`]. In a split cache those of layers that see only a window come last, zeros if the page is not there.
    ///
    /// # Errors
    /// A page beyond the cache.
    pub fn export_page(&self, page: impl Into<KvPage>, bytes: &mut Vec<u8>) -> Result<(), ModelError> {
        self.cache()?.export_page(page.into(), bytes)
    }

    /// Fills a page of the KV cache with what [`CpuModel::export_page`] gave in a model of the same fingerprint and with its cache
    /// split alike.
    ///
    /// # Errors
    /// A page beyond the cache, or bytes of another length.
    pub fn import_page(&mut self, page: impl Into<KvPage>, bytes: &[u8]) -> Result<(), ModelError> {
        self.cache_mut()?.import_page(page.into(), bytes)
    }

    /// Computes a batch: writes its keys and values into the cache, and the logits of the wanted rows, as
    /// (logit_rows, vocabulary), into `logits`.
    ///
    /// # Errors
    /// A batch that does not fit the model or the cache, or a file that was changed before all weights were read.
    pub fn forward(&mut self, batch: &Batch<'_>, logits: &mut Vec<f32>) -> Result<(), ModelError> {
        if !self.interpreter.is_late() {
            return self.compute(batch, logits);
        }
        let packed = self.step_time.map_or(Ok(()), |span| self.pack_late(span));
        let begun = Instant::now();
        let outcome = packed.and_then(|()| self.compute(batch, logits));
        self.step_time = Some(begun.elapsed());
        let outcome = outcome.and_then(|()| self.interpreter.check_late());
        if outcome.is_err() {
            logits.clear();
        }
        outcome
    }

    fn pack_late(&mut self, span: Duration) -> Result<(), ModelError> {
        self.interpreter.pack_late(span, || self.fingerprint.get().map(drop))
    }

    fn compute(&mut self, batch: &Batch<'_>, logits: &mut Vec<f32>) -> Result<(), ModelError> {
        let Self { interpreter, cache, memory, .. } = self;
        let Some(cache) = cache.as_mut() else {
            logits.clear();
            return Err(no_cache());
        };
        // They are computed in the caller's memory: for many sequences a copy takes as long as a layer.
        memory.exchange(interpreter.program.logits, logits);
        let outcome = interpreter.forward(batch, cache, memory);
        memory.exchange(interpreter.program.logits, logits);
        let rows = if outcome.is_ok() { batch.logit_rows.len() } else { 0 };
        logits.truncate(rows * interpreter.spec.vocabulary);
        outcome
    }
}

fn no_cache() -> ModelError {
    ModelError::Request("no KV cache was allocated".to_owned())
}
