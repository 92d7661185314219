//! The sampling that a model's authors advise, as a GGUF file holds it.
//!
//! Of a folder Python reads it (`defaults.py`); a file that is made from a folder takes it along, under llama.cpp's keys where it has
//! some, and a file's own advice is read here.

use std::collections::BTreeMap;
use std::path::Path;

use infer_formats::{Metadata, Value};
use pyo3::prelude::*;
use serde_json::Value as Json;

/// (field of `generation_config.json`, field of `SamplingParams`, key of GGUF, whether it is a whole number).
const FIELDS: &[(&str, &str, &str, bool)] = &[
    ("temperature", "temperature", "general.sampling.temp", false),
    ("top_k", "top_k", "general.sampling.top_k", true),
    ("top_p", "top_p", "general.sampling.top_p", false),
    ("min_p", "min_p", "general.sampling.min_p", false),
    ("repetition_penalty", "repetition_penalty", "general.sampling.penalty_repeat", false),
    // llama.cpp has no key for it.
    ("max_new_tokens", "max_tokens", "infer.sampling.max_new_tokens", true),
];
/// How many tokens llama.cpp looks back for what is repeated; -1 are all, as in transformers.
const PENALTY_LAST_N: &str = "general.sampling.penalty_last_n";

/// A number as Python is to see it.
#[derive(Clone, Copy, Debug, PartialEq, IntoPyObject)]
pub enum Number {
    /// An `int`.
    Whole(i64),
    /// A `float`.
    Real(f64),
}

/// What a file advises, by the names of `SamplingParams`; nothing in a folder, whose advice is no metadata.
///
/// # Errors
/// A key that holds no number.
pub fn from_metadata(metadata: Option<&Metadata>) -> Result<BTreeMap<&'static str, Number>, String> {
    let mut advice = BTreeMap::new();
    let Some(metadata) = metadata else { return Ok(advice) };
    for (_, ours, key, whole) in FIELDS {
        let number = match (metadata.i64(key), whole) {
            (Ok(number), _) => number.map(Number::Whole),
            (Err(error), true) => return Err(error.to_string()),
            // The shortest decimal that is this f32: 0.7 stays 0.7 when it is widened.
            (Err(_), false) => metadata
                .f32(key)
                .map_err(|error| error.to_string())?
                .and_then(|number| number.to_string().parse().ok())
                .map(Number::Real),
        };
        advice.extend(number.map(|number| (*ours, number)));
    }
    Ok(advice)
}

/// The advice of a folder as metadata.
///
/// # Errors
/// A `generation_config.json` that cannot be read, or a field of it that is no number.
pub fn of_folder(folder: &Path) -> Result<Vec<(String, Value)>, String> {
    let path = folder.join("generation_config.json");
    if !path.is_file() {
        return Ok(Vec::new());
    }
    let bytes = std::fs::read(&path).map_err(|error| format!("cannot read {}: {error}", path.display()))?;
    let config: Json = serde_json::from_slice(&bytes)
        .map_err(|error| format!("{}: not readable as JSON ({error})", path.display()))?;
    to_metadata(&config).map_err(|error| format!("{}: {error}", path.display()))
}

fn to_metadata(config: &Json) -> Result<Vec<(String, Value)>, String> {
    let mut metadata = Vec::new();
    for (theirs, _, key, whole) in FIELDS {
        let Some(found) = config.get(theirs).filter(|found| !found.is_null()) else { continue };
        let value = match whole {
            true => found.as_i64().and_then(|number| i32::try_from(number).ok()).map(Value::I32),
            #[allow(clippy::as_conversions, reason = "GGUF's readers expect 32-bit floats")]
            false => found.as_f64().map(|number| Value::F32(number as f32)),
        };
        let expected = if *whole { "a whole number of 32 bits" } else { "a number" };
        let value = value.ok_or_else(|| format!("{theirs} is {found}; expected {expected}"))?;
        metadata.push(((*key).to_owned(), value));
        if *theirs == "repetition_penalty" {
            metadata.push((PENALTY_LAST_N.to_owned(), Value::I32(-1)));
        }
    }
    Ok(metadata)
}
