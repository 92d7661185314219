//! How much memory keys and values may take.
//!
//! Without a wish, the cache gets what `max_num_seqs` sequences of full length need, but at most 1 GiB, or more if a single sequence
//! needs it, and never more than half of what the machine has free once the weights are there. Pages are touched as they are first
//! used, so a small workload stays small.
//!
//! On a device of its own memory the same, but for the 1 GiB: there is nobody else to leave room for, so the cache gets up to nine
//! tenths of what is free.

use std::fs;

use infer_engine::pages_at_once;
use infer_model::ModelSpec;

/// The default cache's size unless one sequence needs more.
const USUAL_BYTES: u64 = 1 << 30;

/// Pages of some of the layers.
#[derive(Debug, Clone, Copy, Default)]
pub struct PageKind {
    /// Bytes of a page in these layers together.
    pub bytes: usize,
    /// Positions that they see at most.
    pub window: Option<usize>,
}

/// What the layers of a model, and of the one that guesses for it, see.
#[derive(Debug, Clone, Copy)]
pub struct CacheLayout {
    /// The widest window, if every layer of both has one.
    pub window: Option<usize>,
    /// The widest window of those that have one, if the model has others as well: these lie in pages of their own.
    pub local: Option<usize>,
}

impl CacheLayout {
    /// Both models' pages have the same numbers, so what one of them still sees is there for both.
    pub fn of(spec: &ModelSpec, draft: Option<&ModelSpec>) -> Self {
        let widest =
            |draft: &ModelSpec, window: usize| draft.layer_window().map_or(window, |own| own.max(window));
        let window = match draft {
            Some(draft) => spec.page_window().zip(draft.page_window()).map(|(own, other)| own.max(other)),
            None => spec.page_window(),
        };
        let local = spec.local_window().map(|window| draft.map_or(window, |draft| widest(draft, window)));
        Self { window, local }
    }

    /// The kinds of pages, when a page takes so many bytes in all layers and so many in those with a window.
    pub fn kinds(self, page_bytes: usize, local_bytes: usize) -> (PageKind, Option<PageKind>) {
        let local = self.local.map(|window| PageKind { bytes: local_bytes, window: Some(window) });
        (PageKind { bytes: page_bytes - local.map_or(0, |local| local.bytes), window: self.window }, local)
    }
}

/// Sizes that were asked for, and what the model needs.
pub struct CacheRequest {
    /// Pages of the layers that see everything; of all layers, if these are all that there are.
    pub full: PageKind,
    /// Pages of the layers that see only a window, where others see everything.
    pub local: Option<PageKind>,
    pub page_tokens: usize,
    pub max_positions: usize,
    pub max_num_seqs: usize,
    pub max_num_batched_tokens: usize,
    pub max_model_len: Option<usize>,
    pub memory_bytes: Option<u64>,
}

/// Where the cache will be, and how many bytes are free there.
#[derive(Clone, Copy)]
pub enum Budget {
    /// This machine's memory, if the system says what is free.
    Host(Option<u64>),
    /// A device's own.
    Device(u64),
}

impl Budget {
    /// The most that a cache gets unless told otherwise, when a single sequence of full length takes `one` bytes.
    fn usual(self, one: u64) -> u64 {
        match self {
            Self::Host(free) => USUAL_BYTES.max(one).min(free.map_or(u64::MAX, |free| free / 2)),
            Self::Device(free) => free / 10 * 9,
        }
    }

    /// Refuses what cannot be there. (A host may have memory that it does not say is free.)
    fn check(self, wished: Option<u64>) -> Result<(), String> {
        match (self, wished) {
            (Self::Device(free), Some(bytes)) if bytes > free => {
                Err(format!("kv_cache_memory_bytes = {bytes} is more than the device has free, {free} bytes"))
            }
            _ => Ok(()),
        }
    }

    fn describe(self) -> String {
        match self {
            Self::Host(free) => format!("half of the free memory ({} bytes)", free.unwrap_or(0) / 2),
            Self::Device(free) => format!("the device's free memory ({free} bytes)"),
        }
    }
}

/// What was settled.
#[derive(Debug, PartialEq, Eq)]
pub struct CachePlan {
    pub pages: usize,
    /// Pages of the layers that see only a window, where others see everything.
    pub local_pages: Option<usize>,
    pub max_model_len: usize,
}

/// Slots are numbered in 32 bits.
const MAX_PAGES: u64 = 1 << 28;

/// Beyond what one sequence of full length needs, the pages of both kinds are in proportion for sequences of this part of the full length.
const USUAL_PART: usize = 4;

impl CacheRequest {
    /// Pages that a sequence of so many tokens holds at most in layers of one kind.
    fn most(&self, kind: PageKind, tokens: usize) -> u64 {
        pages_at_once(tokens, self.page_tokens, kind.window, self.max_num_batched_tokens) as u64
    }

    fn kinds(&self) -> impl Iterator<Item = PageKind> {
        [Some(self.full), self.local].into_iter().flatten()
    }

    /// Bytes of what a sequence of so many tokens holds at most.
    fn bytes(&self, tokens: usize) -> u64 {
        let bytes = |kind: PageKind| self.most(kind, tokens).saturating_mul(kind.bytes as u64);
        self.kinds().map(bytes).fold(0, u64::saturating_add)
    }

    /// The longest sequence, of at most `longest` tokens, that fits into so many bytes.
    fn longest_within(&self, bytes: u64, longest: usize) -> usize {
        let fits = |tokens: usize| self.bytes(tokens) <= bytes;
        if fits(longest) {
            return longest;
        }
        let (mut least, mut most) = (0, longest.div_ceil(self.page_tokens));
        while least + 1 < most {
            let middle = least + (most - least) / 2;
            if fits(middle * self.page_tokens) { least = middle } else { most = middle }
        }
        least * self.page_tokens
    }

    /// Pages of each kind in `bytes`, among them those of one sequence of `longest` tokens.
    fn split(&self, bytes: u64, longest: usize) -> (u64, Option<u64>) {
        let left = bytes.saturating_sub(self.bytes(longest));
        let usual = (longest / USUAL_PART).max(1);
        let part = |kind: PageKind| self.most(kind, usual) as f64;
        let step: f64 = self.kinds().map(|kind| part(kind) * kind.bytes.max(1) as f64).sum();
        let more = left as f64 / step;
        let pages = |kind: PageKind| {
            let pages = self.most(kind, longest) + (more * part(kind)) as u64;
            pages.min(MAX_PAGES)
        };
        (pages(self.full), self.local.map(pages))
    }
}

/// Settles pages and the longest sequence.
///
/// # Errors
/// Names the argument that cannot be met and what would be possible.
pub fn plan_cache(request: &CacheRequest, budget: Budget) -> Result<CachePlan, String> {
    let longest = request.max_model_len.unwrap_or(request.max_positions);
    if longest > request.max_positions {
        return Err(format!(
            "max_model_len must be at most {}, what this model was trained for; got {longest}",
            request.max_positions
        ));
    }
    budget.check(request.memory_bytes)?;
    let one = request.bytes(longest);
    let bytes = request.memory_bytes.unwrap_or_else(|| {
        let wanted = one.saturating_mul(request.max_num_seqs as u64);
        wanted.min(budget.usual(one))
    });
    let room = request.longest_within(bytes, longest);
    if room == 0 {
        let source = match request.memory_bytes {
            Some(bytes) => format!("kv_cache_memory_bytes = {bytes}"),
            None => budget.describe(),
        };
        return Err(format!(
            "{source} holds not even one page of {} tokens, which takes {} bytes",
            request.page_tokens,
            request.bytes(1)
        ));
    }
    if request.max_model_len.is_some() && room < longest {
        return Err(format!(
            "max_model_len = {longest} does not fit: the key-value cache holds {room} tokens in {bytes} bytes; lower max_model_len or \
             raise kv_cache_memory_bytes to {one}"
        ));
    }
    let (pages, local_pages) = request.split(bytes, room);
    Ok(CachePlan {
        pages: pages as usize,
        local_pages: local_pages.map(|pages| pages as usize),
        max_model_len: room,
    })
}

/// Memory that can be taken without swapping, within the process's cgroup; none where the system does not say.
pub fn free_memory() -> Option<u64> {
    let file = fs::read_to_string("/proc/meminfo").ok()?;
    let line = file.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let machine = line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)?;
    let read = |path: &str| fs::read_to_string(path).ok()?.trim().parse::<u64>().ok();
    // Version 2 and version 1 of the interface; "max", or a file that is not there, is no limit.
    let pairs = [
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ];
    let groups =
        pairs.iter().filter_map(|(limit, used)| Some(read(limit)?.saturating_sub(read(used).unwrap_or(0))));
    Some(groups.fold(machine, u64::min))
}
