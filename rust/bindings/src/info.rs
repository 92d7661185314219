//! What a model and a machine are.

use std::collections::BTreeMap;
use std::path::PathBuf;

use infer_kernels::{Isa, PAGE_TOKENS, Precision};
use infer_model::{Checkpoint, KvTypes, ModelSpec, Quantization};
use pyo3::prelude::*;
use pyo3::types::PyDict;

use crate::advice::{self, Number};
use crate::error::{guarded, refusal};
use crate::kv::{automatic, read_kv_types};
use crate::memory::{Budget, CacheLayout, CacheRequest, free_memory, plan_cache};
use crate::tokenizer::TextModel;
use crate::wait::interruptible;

/// What a model is, read from its headers alone.
#[pyclass(frozen, get_all, skip_from_py_object, module = "infer._core")]
#[derive(Clone)]
pub struct ModelInfo {
    /// Where it lies.
    path: String,
    /// "safetensors" or "gguf".
    container: &'static str,
    /// Its name in Hugging Face's form.
    architecture: &'static str,
    /// The storage type of most weight bytes, or the way in which the weights are rounded.
    quantization: &'static str,
    /// Number of weights.
    parameters: u64,
    /// Bytes of the weights in the file.
    weight_bytes: u64,
    layers: usize,
    hidden_size: usize,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    vocabulary_size: usize,
    /// Longest sequence that the model was trained for.
    max_positions: usize,
    /// Tokens that end an answer.
    eos_token_ids: Vec<u32>,
    has_tokenizer: bool,
    /// Bytes of one token's keys and values in all layers, in the types of `kv_cache_dtype`.
    kv_bytes_per_token: usize,
    /// Tokens whose keys and values `LLM` would make room for, by its other defaults, with the memory that is free now.
    kv_cache_tokens: usize,
    /// The sampling that a GGUF file advises, by the names of `SamplingParams`.
    advised_sampling: BTreeMap<&'static str, Number>,
    /// The Jinja source.
    chat_template: Option<String>,
}

/// `LLM`'s default.
pub const MAX_NUM_SEQS: usize = 64;

/// `LLM`'s default.
pub const MAX_NUM_BATCHED_TOKENS: usize = 512;

/// Bytes of a page in these types, and the tokens that the default budget holds once the weights are there.
fn cache_budget(spec: &ModelSpec, weight_bytes: u64, kv_types: &KvTypes) -> Result<(usize, usize), String> {
    let page_bytes = kv_types.page_bytes(spec).map_err(|error| error.to_string())?;
    let local_bytes = kv_types.local_page_bytes(spec).map_err(|error| error.to_string())?;
    let (full, local) = CacheLayout::of(spec, None).kinds(page_bytes, local_bytes);
    let request = CacheRequest {
        full,
        local,
        page_tokens: PAGE_TOKENS,
        max_positions: spec.max_positions,
        max_num_seqs: MAX_NUM_SEQS,
        max_num_batched_tokens: MAX_NUM_BATCHED_TOKENS,
        max_model_len: None,
        memory_bytes: None,
    };
    let free = free_memory().map(|free| free.saturating_sub(weight_bytes));
    let pages = plan_cache(&request, Budget::Host(free)).map_or(0, |plan| plan.pages);
    Ok((page_bytes, pages * PAGE_TOKENS))
}

impl ModelInfo {
    /// Where it lies.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// # Errors
    /// `kv_cache_dtype` names a layer that the model has not, or the file's advice on sampling is no numbers.
    pub fn new(
        checkpoint: &Checkpoint,
        text: Option<&TextModel>,
        kv_types: &KvTypes,
        quantization: Option<&Quantization>,
    ) -> Result<Self, String> {
        let spec = &checkpoint.spec;
        let parameters = checkpoint.parameters();
        let weight_bytes = checkpoint.weight_bytes();
        let (page_bytes, kv_cache_tokens) = cache_budget(spec, weight_bytes, kv_types)?;
        Ok(Self {
            path: checkpoint.path().display().to_string(),
            container: if checkpoint.is_gguf() { "gguf" } else { "safetensors" },
            architecture: spec.architecture(),
            quantization: quantization.map_or(checkpoint.storage(), Quantization::name),
            parameters,
            weight_bytes,
            layers: spec.layers.len(),
            hidden_size: spec.hidden,
            heads: spec.heads,
            kv_heads: spec.kv_heads,
            head_dim: spec.head_dim,
            vocabulary_size: spec.vocabulary,
            max_positions: spec.max_positions,
            eos_token_ids: text.map_or(&spec.eos_token_ids, |text| &text.eos_token_ids).clone(),
            has_tokenizer: text.is_some(),
            kv_bytes_per_token: page_bytes / PAGE_TOKENS,
            kv_cache_tokens,
            advised_sampling: advice::from_metadata(checkpoint.metadata.as_ref())?,
            chat_template: text.and_then(TextModel::chat_template).map(str::to_owned),
        })
    }
}

#[pymethods]
impl ModelInfo {
    /// All of it.
    fn as_dict<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let dict = PyDict::new(py);
        dict.set_item("path", &self.path)?;
        dict.set_item("container", self.container)?;
        dict.set_item("architecture", self.architecture)?;
        dict.set_item("quantization", self.quantization)?;
        dict.set_item("parameters", self.parameters)?;
        dict.set_item("weight_bytes", self.weight_bytes)?;
        dict.set_item("layers", self.layers)?;
        dict.set_item("hidden_size", self.hidden_size)?;
        dict.set_item("heads", self.heads)?;
        dict.set_item("kv_heads", self.kv_heads)?;
        dict.set_item("head_dim", self.head_dim)?;
        dict.set_item("vocabulary_size", self.vocabulary_size)?;
        dict.set_item("max_positions", self.max_positions)?;
        dict.set_item("eos_token_ids", &self.eos_token_ids)?;
        dict.set_item("has_tokenizer", self.has_tokenizer)?;
        dict.set_item("kv_bytes_per_token", self.kv_bytes_per_token)?;
        dict.set_item("kv_cache_tokens", self.kv_cache_tokens)?;
        dict.set_item("chat_template", &self.chat_template)?;
        Ok(dict)
    }

    fn __repr__(&self) -> String {
        format!(
            "ModelInfo(architecture='{}', quantization='{}', parameters={}, path='{}')",
            self.architecture, self.quantization, self.parameters, self.path
        )
    }
}

/// Describe a model folder or GGUF file without loading its weights.
#[pyfunction]
#[pyo3(signature = (path, *, kv_cache_dtype=None), text_signature = "(path, *, kv_cache_dtype='auto')")]
pub fn inspect(
    py: Python<'_>,
    path: PathBuf,
    kv_cache_dtype: Option<&Bound<'_, PyAny>>,
) -> PyResult<ModelInfo> {
    guarded(|| {
        let kv_types = read_kv_types(kv_cache_dtype, automatic(Precision::Auto))?;
        interruptible(py, "infer-load", move || {
            let checkpoint = Checkpoint::open(&path, true).map_err(|error| error.to_string())?;
            let text = TextModel::of_checkpoint(&checkpoint)?;
            ModelInfo::new(&checkpoint, text.as_ref(), &kv_types, None)
        })
    })
}

/// This machine as the core sees it.
#[pyfunction]
pub fn system_info(py: Python<'_>) -> PyResult<Bound<'_, PyDict>> {
    guarded(|| {
        let dict = PyDict::new(py);
        dict.set_item("isa", Isa::from_env().map_err(refusal)?.name())?;
        dict.set_item("available_isas", Isa::available().into_iter().map(Isa::name).collect::<Vec<_>>())?;
        dict.set_item("threads", infer_kernels::default_threads())?;
        Ok(dict)
    })
}
