//! From a path and settings to a running engine.

use std::path::PathBuf;
use std::sync::Arc;

use infer_engine::{Driver, EngineConfig, MonotonicClock};
use infer_kernels::{KvElement, PAGE_TOKENS, Precision};
use infer_model::{Checkpoint, CpuModel, LoadOptions};
use pyo3::prelude::*;

use crate::device::CpuDevice;
use crate::error::refusal;
use crate::info::ModelInfo;
use crate::memory::{CachePlan, CacheRequest, free_memory, plan_cache};
use crate::tokenizer::TextModel;

/// Checked arguments of `Engine`.
pub struct Settings {
    pub path: PathBuf,
    pub precision: Precision,
    pub kv_element: KvElement,
    pub threads: usize,
    pub max_model_len: Option<usize>,
    pub max_num_seqs: usize,
    pub max_num_batched_tokens: usize,
    pub enable_prefix_caching: bool,
    pub kv_cache_memory_bytes: Option<u64>,
    pub seed: u64,
    pub mmap: bool,
}

/// A loaded model and its engine.
pub struct Loaded {
    pub driver: Driver,
    pub text: Option<Arc<TextModel>>,
    pub info: ModelInfo,
    pub threads: usize,
}

/// Threads that compute unless told otherwise: what the process may use.
pub fn default_threads() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// `dtype` as the kernels' precision.
pub fn precision(dtype: &str) -> PyResult<Precision> {
    match dtype {
        "auto" => Ok(Precision::Auto),
        "float32" => Ok(Precision::Exact),
        _ => Err(refusal(format!("dtype must be \"auto\" or \"float32\", got {dtype:?}"))),
    }
}

/// `kv_cache_dtype` as the cache's element; "auto" is exact where `dtype` is.
pub fn kv_element(kind: &str, precision: Precision) -> PyResult<KvElement> {
    match (kind, precision) {
        ("auto", Precision::Exact) | ("float32", _) => Ok(KvElement::F32),
        ("auto", Precision::Auto) | ("float16", _) => Ok(KvElement::F16),
        ("bfloat16", _) => Ok(KvElement::Bf16),
        _ => {
            let known = "\"auto\", \"float32\", \"float16\" or \"bfloat16\"";
            Err(refusal(format!("kv_cache_dtype must be {known}, got {kind:?}")))
        }
    }
}

/// Loads the model and starts its engine.
///
/// # Errors
/// What is wrong with the model's files, or which argument does not fit it or the machine.
pub fn load(settings: &Settings) -> Result<Loaded, String> {
    let checkpoint = Checkpoint::open(&settings.path, settings.mmap).map_err(|error| error.to_string())?;
    let text = TextModel::of_checkpoint(&checkpoint)?;
    let info = ModelInfo::new(&checkpoint, text.as_ref());
    let options = LoadOptions {
        threads: Some(settings.threads),
        precision: settings.precision,
        mmap: settings.mmap,
        kv_element: settings.kv_element,
    };
    let mut model = CpuModel::from_checkpoint(&checkpoint, &options).map_err(|error| error.to_string())?;
    drop(checkpoint);
    let request = CacheRequest {
        page_bytes: model.page_bytes(),
        page_tokens: PAGE_TOKENS,
        max_positions: model.spec().max_positions,
        max_num_seqs: settings.max_num_seqs,
        max_model_len: settings.max_model_len,
        memory_bytes: settings.kv_cache_memory_bytes,
    };
    let plan = plan_cache(&request, free_memory())?;
    let config = engine_config(settings, &plan, &model, text.as_ref());
    config.validate().map_err(|error| error.to_string())?;
    model.allocate_cache(plan.pages).map_err(|error| error.to_string())?;
    let clock = Arc::new(MonotonicClock::new());
    let driver = Driver::start(config, CpuDevice { model }, clock).map_err(|error| error.to_string())?;
    Ok(Loaded { driver, text: text.map(Arc::new), info, threads: settings.threads })
}

fn engine_config(
    settings: &Settings,
    plan: &CachePlan,
    model: &CpuModel,
    text: Option<&TextModel>,
) -> EngineConfig {
    let spec = model.spec();
    EngineConfig {
        pages: plan.pages,
        page_tokens: PAGE_TOKENS,
        max_num_seqs: settings.max_num_seqs,
        max_num_batched_tokens: settings.max_num_batched_tokens,
        max_model_len: plan.max_model_len,
        enable_prefix_caching: settings.enable_prefix_caching,
        vocabulary: spec.vocabulary,
        context_switch: spec.context_switch(),
        eos_token_ids: text.map_or(&spec.eos_token_ids, |text| &text.eos_token_ids).clone(),
        seed: settings.seed,
        max_logit_values: EngineConfig::MAX_LOGIT_VALUES,
    }
}
