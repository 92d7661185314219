//! Who computes: the CPU here, or an executor outside, each with the model that guesses, if there is one.

use std::path::Path;
use std::sync::Arc;

use infer_engine::{Driver, EngineConfig, EngineError, Handover, MonotonicClock, OutsideDevice, Tier};
use infer_model::{
    Blueprint, Checkpoint, CpuModel, Fingerprint, KvTypes, LoadOptions, ModelSpec, PackedCacheUse,
};

use crate::device::CpuDevice;
use crate::load::{Settings, open};
use crate::memory::{Budget, CacheLayout, free_memory};

/// Models of an executor outside, and the bytes that its device has free for their keys and values.
#[derive(Clone)]
pub struct Outside {
    pub model: Arc<Blueprint>,
    pub draft: Option<Arc<Blueprint>>,
    pub free: u64,
}

/// What pages belong to, found out when they are to leave the process.
#[derive(Clone)]
pub struct Namespace {
    model: Fingerprint,
    draft: Option<Fingerprint>,
}

impl Namespace {
    /// # Errors
    /// Why that cannot be found out.
    pub fn get(&self) -> Result<[u8; 32], String> {
        let get = |own: &Fingerprint| own.get().map_err(|error| error.to_string());
        let mut namespace = get(&self.model)?;
        if let Some(guess) = self.draft.as_ref().map(get).transpose()? {
            namespace.iter_mut().zip(guess.iter().cycle().skip(1)).for_each(|(byte, other)| *byte ^= other);
        }
        Ok(namespace)
    }
}

/// Who computes.
pub enum Backend {
    Cpu { model: Box<CpuModel>, draft: Option<Box<CpuModel>> },
    Outside(Outside),
}

impl Backend {
    /// Loads the models, unless an executor did.
    pub fn new(settings: &Settings, checkpoint: &Checkpoint) -> Result<Self, String> {
        let backend = match &settings.outside {
            Some(outside) => Self::Outside(outside.clone()),
            None => {
                let options = LoadOptions {
                    threads: Some(settings.threads),
                    precision: settings.precision,
                    mmap: settings.mmap,
                    kv_types: settings.kv_types.clone(),
                    quantization: settings.quantization,
                    packed_cache_dir: settings.packed_cache_dir.clone(),
                };
                let model =
                    CpuModel::from_checkpoint(checkpoint, &options).map_err(|error| error.to_string())?;
                let draft = settings.draft.as_deref();
                let draft = draft.map(|path| load_draft(path, settings.dummy, &options)).transpose()?;
                Self::Cpu { model: Box::new(model), draft: draft.map(Box::new) }
            }
        };
        match (backend.draft_spec(), &settings.draft) {
            (Some(draft), _) => check_draft(draft, backend.spec(), settings.draft.as_deref())?,
            (None, Some(path)) => {
                return Err(format!("speculative_config[\"model\"]: {} was not loaded", path.display()));
            }
            (None, None) => {}
        }
        Ok(backend)
    }

    /// What the model is.
    pub fn spec(&self) -> &ModelSpec {
        match self {
            Self::Cpu { model, .. } => model.spec(),
            Self::Outside(outside) => outside.model.spec(),
        }
    }

    fn draft_spec(&self) -> Option<&ModelSpec> {
        match self {
            Self::Cpu { draft, .. } => draft.as_ref().map(|draft| draft.spec()),
            Self::Outside(outside) => outside.draft.as_ref().map(|draft| draft.spec()),
        }
    }

    /// What came of the folder for packed weights, by name, and what is to be told of it; of the draft model's weights only what went wrong.
    pub fn packed_cache(&self) -> (&'static str, Option<String>) {
        let Self::Cpu { model, draft } = self else { return (PackedCacheUse::Off.name(), None) };
        let (found, warning) = model.packed_cache();
        let of_draft = draft.as_ref().and_then(|draft| draft.packed_cache().1);
        let warnings: Vec<&str> = warning.into_iter().chain(of_draft).collect();
        (found.name(), (!warnings.is_empty()).then(|| warnings.join("; ")))
    }

    /// Bytes of a page, the draft model's included.
    pub fn page_bytes(&self) -> usize {
        match self {
            Self::Cpu { model, draft } => {
                model.page_bytes() + draft.as_ref().map_or(0, |draft| draft.page_bytes())
            }
            Self::Outside(outside) => {
                outside.model.page_bytes() + outside.draft.as_ref().map_or(0, |draft| draft.page_bytes())
            }
        }
    }

    /// Bytes of a page in layers that see only a window, the draft model's included.
    pub fn local_page_bytes(&self) -> usize {
        match self {
            Self::Cpu { model, draft } => {
                model.local_page_bytes() + draft.as_ref().map_or(0, |draft| draft.local_page_bytes())
            }
            Self::Outside(_) => 0,
        }
    }

    /// What layers see. An executor outside keeps all layers in the same pages: what windows left behind is given up only where every
    /// layer has one.
    pub fn layout(&self) -> CacheLayout {
        let layout = CacheLayout::of(self.spec(), self.draft_spec());
        match self {
            Self::Cpu { .. } => layout,
            Self::Outside(_) => CacheLayout { local: None, ..layout },
        }
    }

    /// Where pages are, and how much is free there.
    pub fn budget(&self) -> Budget {
        match self {
            Self::Cpu { model, draft } => {
                let unpacked =
                    model.unpacked_bytes() + draft.as_ref().map_or(0, |draft| draft.unpacked_bytes());
                Budget::Host(free_memory().map(|free| free.saturating_sub(unpacked as u64)))
            }
            Self::Outside(outside) => Budget::Device(outside.free),
        }
    }

    /// What pages belong to: the models that computed them.
    pub fn namespace(&self) -> Namespace {
        let (model, draft) = match self {
            Self::Cpu { model, draft } => {
                (model.fingerprint(), draft.as_ref().map(|draft| draft.fingerprint()))
            }
            Self::Outside(outside) => {
                (outside.model.fingerprint(), outside.draft.as_ref().map(|draft| draft.fingerprint()))
            }
        };
        Namespace { model: model.clone(), draft: draft.cloned() }
    }

    /// Starts the engine on it; and where an executor outside finds its work.
    pub fn start(
        self,
        config: EngineConfig,
        tier: Option<Arc<dyn Tier>>,
    ) -> Result<(Driver, Option<Arc<Handover>>), String> {
        let clock = Arc::new(MonotonicClock::new());
        let failed = |error: EngineError| error.to_string();
        match self {
            Self::Cpu { mut model, draft } => {
                let mut draft = draft.map(|draft| *draft);
                for model in [Some(&mut *model), draft.as_mut()].into_iter().flatten() {
                    let allocated = match &config.local {
                        Some(local) => model.allocate_split_cache(config.pages, local.pages),
                        None => model.allocate_cache(config.pages),
                    };
                    allocated.map_err(|error| error.to_string())?;
                }
                let device = CpuDevice { model: *model, draft, draft_logits: Vec::new() };
                Ok((Driver::start(config, device, tier, clock).map_err(failed)?, None))
            }
            Self::Outside(_) => {
                let handover = Arc::new(Handover::default());
                let device = OutsideDevice::new(Arc::clone(&handover), true);
                Ok((Driver::start(config, device, tier, clock).map_err(failed)?, Some(handover)))
            }
        }
    }
}

/// Loads the model that guesses.
fn load_draft(path: &Path, dummy: Option<u64>, options: &LoadOptions) -> Result<CpuModel, String> {
    let checkpoint = open(path, options.mmap, dummy)?;
    // Layers are numbered in the model alone: all of the draft's have the types that were wished for. It is computed as it is stored.
    let kv_types = KvTypes { skip_layers: Vec::new(), ..options.kv_types.clone() };
    let options = LoadOptions { kv_types, quantization: None, ..options.clone() };
    CpuModel::from_checkpoint(&checkpoint, &options).map_err(|error| error.to_string())
}

/// A draft model needs the target's vocabulary and at least its positions.
fn check_draft(draft: &ModelSpec, target: &ModelSpec, path: Option<&Path>) -> Result<(), String> {
    let name = path.map_or_else(|| "the draft model".to_owned(), |path| path.display().to_string());
    if draft.vocabulary != target.vocabulary {
        return Err(format!(
            "speculative_config[\"model\"]: {name} has a vocabulary of {} tokens and the model one of {}; a draft model needs the same \
             vocabulary",
            draft.vocabulary, target.vocabulary
        ));
    }
    if draft.max_positions < target.max_positions {
        return Err(format!(
            "speculative_config[\"model\"]: {name} was trained for {} positions and the model for {}; a draft model needs at least as many",
            draft.max_positions, target.max_positions
        ));
    }
    Ok(())
}
