//! From a path and settings to a running engine.

use std::collections::hash_map::RandomState;
use std::hash::{BuildHasher, Hasher};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use infer_engine::{Driver, EngineConfig, LocalLayers, MonotonicClock, Speculation, Tier};
use infer_kernels::{PAGE_TOKENS, Precision};
use infer_model::{Checkpoint, CpuModel, KvTypes, LoadOptions, Quantization};
use infer_store::{Store, StoreOptions};
use pyo3::prelude::*;

use crate::device::CpuDevice;
use crate::error::refusal;
use crate::info::ModelInfo;
use crate::memory::{CacheLayout, CachePlan, CacheRequest, free_memory, plan_cache};
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
    pub max_waiting: Option<usize>,
    pub patience: Duration,
    pub step_time_target: Option<Duration>,
    pub speculation: Option<Speculation>,
    /// The model that guesses.
    pub draft: Option<PathBuf>,
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
    pub store: Option<Arc<Store>>,
    /// The identity of this model's pages outside this process.
    pub namespace: [u8; 32],
    pub page_bytes: usize,
    pub text: Option<Arc<TextModel>>,
    pub info: ModelInfo,
    pub threads: usize,
    /// When the engine's clock began, since 1970.
    pub began: Duration,
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

/// Loads the model and starts its engine.
///
/// # Errors
/// What is wrong with the model's files, or which argument does not fit it or the machine.
pub fn load(settings: &Settings) -> Result<Loaded, String> {
    let checkpoint = Checkpoint::open(&settings.path, settings.mmap).map_err(|error| error.to_string())?;
    let text = TextModel::of_checkpoint(&checkpoint)?;
    let info = ModelInfo::new(&checkpoint, text.as_ref(), &settings.kv_types, settings.quantization)?;
    let options = LoadOptions {
        threads: Some(settings.threads),
        precision: settings.precision,
        mmap: settings.mmap,
        kv_types: settings.kv_types.clone(),
        quantization: settings.quantization,
    };
    let mut model = CpuModel::from_checkpoint(&checkpoint, &options).map_err(|error| error.to_string())?;
    drop(checkpoint);
    let mut draft = settings.draft.as_deref().map(|path| load_draft(path, &options, &model)).transpose()?;
    let page_bytes = model.page_bytes() + draft.as_ref().map_or(0, CpuModel::page_bytes);
    let layout = CacheLayout::of(model.spec(), draft.as_ref().map(CpuModel::spec));
    let local_bytes =
        [Some(&model), draft.as_ref()].into_iter().flatten().map(CpuModel::local_page_bytes).sum();
    let (full, local) = layout.kinds(page_bytes, local_bytes);
    let request = CacheRequest {
        full,
        local,
        page_tokens: PAGE_TOKENS,
        max_positions: model.spec().max_positions,
        max_num_seqs: settings.max_num_seqs,
        max_num_batched_tokens: settings.max_num_batched_tokens,
        max_model_len: settings.max_model_len,
        memory_bytes: settings.kv_cache_memory_bytes,
    };
    let plan = plan_cache(&request, free_memory())?;
    let mut config = engine_config(settings, &plan, layout, &model, text.as_ref());
    config.validate().map_err(|error| error.to_string())?;
    for model in [Some(&mut model), draft.as_mut()].into_iter().flatten() {
        let allocated = match plan.local_pages {
            Some(local_pages) => model.allocate_split_cache(plan.pages, local_pages),
            None => model.allocate_cache(plan.pages),
        };
        allocated.map_err(|error| error.to_string())?;
    }
    let namespace = namespace(&model, draft.as_ref());
    let store =
        settings.offload.as_ref().map(|offload| open_store(offload, namespace, page_bytes)).transpose()?;
    config.digest_key = store.as_ref().map_or_else(random_key, |store| store.secret());
    let tier = store.as_ref().map(|store| Arc::new(StoreTier(Arc::clone(store))) as Arc<dyn Tier>);
    let clock = Arc::new(MonotonicClock::new());
    let began = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let device = CpuDevice { model, draft };
    let driver = Driver::start(config, device, tier, clock).map_err(|error| error.to_string())?;
    let text = text.map(Arc::new);
    Ok(Loaded { driver, store, namespace, page_bytes, text, info, threads: settings.threads, began })
}

/// Loads the model that guesses for `target`.
fn load_draft(path: &Path, options: &LoadOptions, target: &CpuModel) -> Result<CpuModel, String> {
    let checkpoint = Checkpoint::open(path, options.mmap).map_err(|error| error.to_string())?;
    // Layers are numbered in the model alone: all of the draft's have the types that were wished for. It is computed as it is stored.
    let kv_types = KvTypes { skip_layers: Vec::new(), ..options.kv_types.clone() };
    let options = LoadOptions { kv_types, quantization: None, ..options.clone() };
    let draft = CpuModel::from_checkpoint(&checkpoint, &options).map_err(|error| error.to_string())?;
    let (own, wanted) = (draft.spec().vocabulary, target.spec().vocabulary);
    if own != wanted {
        return Err(format!(
            "speculative_config[\"model\"]: {} has a vocabulary of {own} tokens and the model one of {wanted}; a draft model needs the \
             same vocabulary",
            path.display()
        ));
    }
    let (own, wanted) = (draft.spec().max_positions, target.spec().max_positions);
    if own < wanted {
        return Err(format!(
            "speculative_config[\"model\"]: {} was trained for {own} positions and the model for {wanted}; a draft model needs at \
             least as many",
            path.display()
        ));
    }
    Ok(draft)
}

/// What pages belong to: the models that computed them.
fn namespace(model: &CpuModel, draft: Option<&CpuModel>) -> [u8; 32] {
    let mut namespace = model.fingerprint();
    if let Some(draft) = draft {
        let guess = draft.fingerprint();
        namespace.iter_mut().zip(guess.iter().cycle().skip(1)).for_each(|(byte, other)| *byte ^= other);
    }
    namespace
}

fn open_store(offload: &Offload, namespace: [u8; 32], page_bytes: usize) -> Result<Arc<Store>, String> {
    let Offload { dir, max_bytes } = offload;
    let options = StoreOptions { dir: dir.clone(), max_bytes: *max_bytes, namespace, page_bytes };
    Store::open(options).map(Arc::new).map_err(|error| format!("kv_offload_dir: {error}"))
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
        max_waiting: settings.max_waiting,
        patience: settings.patience,
        step_time_target: settings.step_time_target,
        window: layout.window,
        local: layout.local.zip(plan.local_pages).map(|(window, pages)| LocalLayers { window, pages }),
        speculation: settings.speculation.clone(),
        digest_key: [0; 32],
        cache_events: settings.cache_events,
        trace: settings.trace,
        check_invariants: false,
    }
}
