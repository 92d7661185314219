//! Arguments that need more than a conversion.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use infer_engine::Speculation;
use infer_model::Quantization;
use pyo3::prelude::*;

use crate::convert::{Arg, Int};
use crate::error::refusal;
use crate::load::{Offload, Settings};

/// More than any machine has cores; each thread costs a stack.
pub const MAX_THREADS: usize = 1024;

/// Method, drafts in a row, fewest and most tokens of a lookup, the draft model, drafts of a tree.
pub type SpeculationArgs =
    (Arg<String>, Arg<Int>, Arg<Int>, Arg<Int>, Option<Arg<PathBuf>>, Option<Arg<Int>>);

/// Folder and most bytes.
pub type OffloadArgs = (Arg<PathBuf>, Arg<Int>);

/// How many threads compute.
pub fn thread_count(threads: Arg<Int>) -> PyResult<usize> {
    let count = threads.positive("threads")?;
    if count > MAX_THREADS {
        return Err(refusal(format!("threads must be at most {MAX_THREADS}, got {count}")));
    }
    Ok(count)
}

/// A positive span of time in seconds.
pub fn seconds(name: &str, value: Arg<f64>) -> PyResult<Duration> {
    let value = value.number(name)?;
    if value.is_nan() || value <= 0.0 {
        return Err(refusal(format!("{name} must be a number of seconds greater than 0, got {value}")));
    }
    // Less than a nanosecond is one, and more than a Duration holds, infinity too, is all of it.
    Ok(Duration::try_from_secs_f64(value).unwrap_or(Duration::MAX).max(Duration::from_nanos(1)))
}

/// How weights are rounded.
pub fn read_quantization(value: Option<Arg<String>>) -> PyResult<Option<&'static Quantization>> {
    let Some(name) = value else { return Ok(None) };
    named_quantization(name, "None or a string").map(Some)
}

/// The same where there must be one.
pub fn named_quantization(name: Arg<String>, right: &str) -> PyResult<&'static Quantization> {
    Quantization::from_name(&name.get("quantization", right)?).map_err(refusal)
}

/// The seed of random weights, if the way of loading is that.
pub fn read_load_format(format: Arg<String>, seed: u64) -> PyResult<Option<u64>> {
    match format.get("load_format", "a string")?.as_str() {
        "auto" => Ok(None),
        "dummy" => Ok(Some(seed)),
        other => Err(refusal(format!("load_format must be \"auto\" or \"dummy\", got {other:?}"))),
    }
}

/// A folder that need not exist.
fn folder(name: &str, dir: Arg<PathBuf>) -> PyResult<PathBuf> {
    let dir = dir.get(name, "None or a path")?;
    if dir.as_os_str().is_empty() {
        return Err(refusal(format!("{name} must be None or a path, got an empty one")));
    }
    Ok(dir)
}

/// Where packed weights are kept.
pub fn read_packed_cache(dir: Option<Arg<PathBuf>>) -> PyResult<Option<PathBuf>> {
    dir.map(|dir| folder("packed_cache_dir", dir)).transpose()
}

/// A tenant's salt.
pub fn salt(value: Option<Arg<String>>) -> PyResult<Option<Arc<str>>> {
    Ok(value.map(|salt| salt.get("cache_salt", "None or a string")).transpose()?.map(Into::into))
}

/// Where pages go that memory has no room for.
pub fn read_offload((dir, max_bytes): OffloadArgs) -> PyResult<Offload> {
    let dir = folder("kv_offload_dir", dir)?;
    let max_bytes = max_bytes.positive("kv_offload_max_bytes")? as u64;
    Ok(Offload { dir, max_bytes })
}

/// Refuses what only the prefix cache would do where there is to be none.
pub fn check_prefix_options(settings: &Settings) -> PyResult<()> {
    let options = [("kv_offload_dir", settings.offload.is_some()), ("kv_events", settings.cache_events)];
    match options.iter().find(|(_, is_given)| *is_given && !settings.enable_prefix_caching) {
        Some((name, _)) => Err(refusal(format!(
            "{name} needs enable_prefix_caching=True, got False: it is about what the prefix cache holds"
        ))),
        None => Ok(()),
    }
}

/// How tokens are guessed ahead, and the model that guesses.
pub fn read_speculation(
    (method, drafts, least, most, draft, tree): SpeculationArgs,
) -> PyResult<(Speculation, Option<PathBuf>)> {
    let num_speculative_tokens = drafts.positive("speculative_config[\"num_speculative_tokens\"]")?;
    let prompt_lookup_min = least.positive("speculative_config[\"prompt_lookup_min\"]")?;
    let prompt_lookup_max = most.positive("speculative_config[\"prompt_lookup_max\"]")?;
    let in_tree = |tree: Arg<Int>| tree.positive("speculative_config[\"num_draft_tokens\"]");
    let num_draft_tokens = tree.map(in_tree).transpose()?;
    let draft = draft.map(|path| path.get("speculative_config[\"model\"]", "a path")).transpose()?;
    match (method.get("speculative_config[\"method\"]", "a string")?.as_str(), &draft) {
        ("ngram", None) => {
            let lookup = Speculation::Ngram {
                num_speculative_tokens,
                num_draft_tokens,
                prompt_lookup_min,
                prompt_lookup_max,
            };
            Ok((lookup, None))
        }
        ("draft_model", Some(_)) => {
            Ok((Speculation::DraftModel { num_speculative_tokens, num_draft_tokens }, draft))
        }
        ("ngram" | "draft_model", _) => Err(refusal(
            "speculative_config[\"model\"] must be given for the method \"draft_model\", and only for it",
        )),
        (other, _) => Err(refusal(format!(
            "speculative_config[\"method\"] must be \"ngram\" or \"draft_model\", got {other:?}"
        ))),
    }
}
