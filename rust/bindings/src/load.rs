//! From a path and settings to a running engine.

use std::collections::hash_map::RandomState;
use std::hash::{BuildHasher, Hasher};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use infer_engine::{Driver, EngineConfig, Handover, LocalLayers, PROMPT_ROW_UNIT, Speculation, Tier};
use infer_kernels::{PAGE_TOKENS, Precision};
use infer_model::{Checkpoint, KvTypes, ModelSpec, Quantization};
use infer_store::{Store, StoreError, StoreOptions};
use pyo3::prelude::*;

use crate::backend::{Backend, Namespace, Outside};
use crate::error::refusal;
use crate::info::ModelInfo;
use crate::memory::{CacheLayout, CachePlan, CacheRequest, plan_cache};
use crate::tier::StoreTier;
use crate::tokenizer::TextModel;

/// Checked arguments of `Engine`.
pub struct Settings {
    pub path: PathBuf,
    pub precision: Precision,
    pub kv_types: KvTypes,
    pub quantization: Option<&'static Quantization>,
    pub threads: usize,
    pub max_model_len: Option<usize>,
    pub max_num_seqs: usize,
    pub max_num_batched_tokens: usize,
    pub enable_prefix_caching: bool,
    pub kv_cache_memory_bytes: Option<u64>,
    pub seed: u64,
    pub mmap: bool,
    /// The seed of random weights, if they are to be such.
    pub dummy: Option<u64>,
    /// Where packed weights are kept for the next load.
    pub packed_cache_dir: Option<PathBuf>,
    pub max_waiting: Option<usize>,
    pub patience: Duration,
    pub step_time_target: Option<Duration>,
    pub speculation: Option<Speculation>,
    /// The model that guesses.
    pub draft: Option<PathBuf>,
    /// Loaded models of an executor that computes instead of this process's CPU.
    pub outside: Option<Outside>,
    pub offload: Option<Offload>,
    pub cache_events: bool,
    pub trace: bool,
}

/// Where pages go that memory has no room for, and how many bytes of them.
pub struct Offload {
    pub dir: PathBuf,
    pub max_bytes: u64,
}

/// A loaded model and its engine.
pub struct Loaded {
    pub driver: Driver,
    /// Where an executor outside finds its work.
    pub handover: Option<Arc<Handover>>,
    pub store: Option<Arc<Store>>,
    /// The identity of this model's pages outside this process.
    pub namespace: Namespace,
    pub page_bytes: usize,
    pub text: Option<Arc<TextModel>>,
    pub info: ModelInfo,
    pub threads: usize,
    /// What came of `packed_cache_dir`, and what is to be told of it.
    pub packed_cache: (&'static str, Option<String>),
    /// When the engine's clock began, since 1970.
    pub began: Duration,
}

/// `dtype` as the kernels' precision.
pub fn precision(dtype: &str) -> PyResult<Precision> {
    match dtype {
        "auto" => Ok(Precision::Auto),
        "float32" => Ok(Precision::Exact),
        _ => Err(refusal(format!("dtype must be \"auto\" or \"float32\", got {dtype:?}"))),
    }
}

/// Loads the model and starts its engine.
///
/// # Errors
/// What is wrong with the model's files, or which argument does not fit it or the machine.
pub fn load(settings: &Settings) -> Result<Loaded, String> {
    let checkpoint = open(&settings.path, settings.mmap, settings.dummy)?;
    let text = TextModel::of_checkpoint(&checkpoint)?;
    let (kv_types, quantization) = match &settings.outside {
        Some(outside) => (outside.model.kv_types(), outside.model.quantization()),
        None => (&settings.kv_types, settings.quantization),
    };
    let info = ModelInfo::new(&checkpoint, text.as_ref(), kv_types, quantization)?;
    let backend = Backend::new(settings, &checkpoint)?;
    drop(checkpoint);
    let page_bytes = backend.page_bytes();
    let layout = backend.layout();
    let (full, local) = layout.kinds(page_bytes, backend.local_page_bytes());
    let request = CacheRequest {
        full,
        local,
        page_tokens: PAGE_TOKENS,
        max_positions: backend.spec().max_positions,
        max_num_seqs: settings.max_num_seqs,
        max_num_batched_tokens: settings.max_num_batched_tokens,
        max_model_len: settings.max_model_len,
        memory_bytes: settings.kv_cache_memory_bytes,
    };
    let plan = plan_cache(&request, backend.budget())?;
    let mut config = engine_config(settings, &plan, layout, backend.spec(), text.as_ref());
    config.validate().map_err(|error| error.to_string())?;
    let (namespace, packed_cache) = (backend.namespace(), backend.packed_cache());
    let store = settings
        .offload
        .as_ref()
        .map(|offload| open_store(offload, namespace.get()?, page_bytes))
        .transpose()?;
    config.digest_key = store.as_ref().map_or_else(random_key, |store| store.secret());
    let tier = store.as_ref().map(|store| Arc::new(StoreTier(Arc::clone(store))) as Arc<dyn Tier>);
    let began = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let (driver, handover) = backend.start(config, tier)?;
    let text = text.map(Arc::new);
    Ok(Loaded {
        driver,
        handover,
        store,
        namespace,
        page_bytes,
        text,
        info,
        threads: settings.threads,
        packed_cache,
        began,
    })
}

/// A model's files; or, with a seed, its configuration with random weights.
pub fn open(path: &Path, mmap: bool, dummy: Option<u64>) -> Result<Checkpoint, String> {
    let opened = match dummy {
        Some(seed) => Checkpoint::open_dummy(path, seed),
        None => Checkpoint::open(path, mmap),
    };
    opened.map_err(|error| error.to_string())
}

fn open_store(offload: &Offload, namespace: [u8; 32], page_bytes: usize) -> Result<Arc<Store>, String> {
    let Offload { dir, max_bytes } = offload;
    let options = StoreOptions { dir: dir.clone(), max_bytes: *max_bytes, namespace, page_bytes };
    Store::open(options).map(Arc::new).map_err(|error| match error {
        StoreError::Option { field: "max_bytes", .. } => format!("kv_offload_{error}"),
        error => format!("kv_offload_dir: {error}"),
    })
}

/// A key that no other process has: the standard library seeds its hashers from the system's random numbers.
fn random_key() -> [u8; 32] {
    let mut key = [0; 32];
    for word in key.as_chunks_mut::<8>().0 {
        *word = RandomState::new().build_hasher().finish().to_le_bytes();
    }
    key
}

fn engine_config(
    settings: &Settings,
    plan: &CachePlan,
    layout: CacheLayout,
    spec: &ModelSpec,
    text: Option<&TextModel>,
) -> EngineConfig {
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
        max_waiting: settings.max_waiting,
        patience: settings.patience,
        step_time_target: settings.step_time_target,
        row_unit: if settings.outside.is_some() { PROMPT_ROW_UNIT } else { 1 },
        window: layout.window,
        local: layout.local.zip(plan.local_pages).map(|(window, pages)| LocalLayers { window, pages }),
        speculation: settings.speculation.clone(),
        digest_key: [0; 32],
        cache_events: settings.cache_events,
        trace: settings.trace,
        device_draws: settings.outside.is_some(),
        check_invariants: false,
    }
}
