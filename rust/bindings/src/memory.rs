//! How much memory keys and values may take.
//!
//! Without a wish, the cache gets what `max_num_seqs` sequences of full length need, but at most 1 GiB, or more if a single sequence
//! needs it, and never more than half of what the machine has free once the weights are there. Pages are touched as they are first
//! used, so a small workload stays small.
//!
//! On a device of its own memory the same, but for the 1 GiB: there is nobody else to leave room for, so the cache gets up to nine
//! tenths of what is free.

use std::fs;

/// The default cache's size unless one sequence needs more.
const USUAL_BYTES: u64 = 1 << 30;

/// Sizes that were asked for, and what the model needs.
pub struct CacheRequest {
    pub page_bytes: usize,
    pub page_tokens: usize,
    pub max_positions: usize,
    pub max_num_seqs: usize,
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
    pub max_model_len: usize,
}

/// Slots are numbered in 32 bits.
const MAX_PAGES: u64 = 1 << 28;

/// Settles pages and the longest sequence.
///
/// # Errors
/// Names the argument that cannot be met and what would be possible.
pub fn plan_cache(request: &CacheRequest, budget: Budget) -> Result<CachePlan, String> {
    let page_bytes = request.page_bytes.max(1) as u64;
    let pages_for = |tokens: usize| tokens.div_ceil(request.page_tokens) as u64;
    let longest = request.max_model_len.unwrap_or(request.max_positions);
    if longest > request.max_positions {
        return Err(format!(
            "max_model_len must be at most {}, what this model was trained for; got {longest}",
            request.max_positions
        ));
    }
    let wanted = pages_for(longest).saturating_mul(request.max_num_seqs as u64);
    let pages = match request.memory_bytes {
        Some(bytes) => {
            if let Budget::Device(free) = budget
                && bytes > free
            {
                return Err(format!(
                    "kv_cache_memory_bytes = {bytes} is more than the device has free, {free} bytes"
                ));
            }
            bytes / page_bytes
        }
        None => {
            let one = pages_for(longest).saturating_mul(page_bytes);
            wanted.min(budget.usual(one) / page_bytes)
        }
    };
    let pages = pages.min(MAX_PAGES) as usize;
    let room = pages.saturating_mul(request.page_tokens);
    if room == 0 {
        let source = match request.memory_bytes {
            Some(bytes) => format!("kv_cache_memory_bytes = {bytes}"),
            None => budget.describe(),
        };
        return Err(format!(
            "{source} holds not even one page of {} tokens, which takes {page_bytes} bytes",
            request.page_tokens
        ));
    }
    if request.max_model_len.is_some() && room < longest {
        return Err(format!(
            "max_model_len = {longest} does not fit: the key-value cache holds {room} tokens in {} bytes; lower max_model_len or \
             raise kv_cache_memory_bytes to {}",
            pages as u64 * page_bytes,
            pages_for(longest) * page_bytes
        ));
    }
    Ok(CachePlan { pages, max_model_len: longest.min(room) })
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
