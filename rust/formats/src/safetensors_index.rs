//! `model.safetensors.index.json`: which file of a sharded checkpoint holds which tensor.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use serde::Deserializer as _;
use serde::de::{Error as _, IgnoredAny, MapAccess, Visitor};

use crate::error::{Container, FormatError, quoted};
use crate::json::{JsonState, MAX_JSON_BYTES, Text, TextMapSeed};

const CONTAINER: Container = Container::SafetensorsIndex;
/// What common file systems take as one name.
const MAX_FILE_NAME_BYTES: usize = 255;

/// A parsed index.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SafetensorsIndex {
    /// Tensor name to file name. Each file name was proven to be a plain name in the index's own folder.
    pub weight_map: BTreeMap<String, String>,
}

impl SafetensorsIndex {
    /// Parses the JSON text of an index.
    ///
    /// # Errors
    /// [`FormatError`] if it is not JSON with a `weight_map` from tensor names to file names, is empty, names a
    /// tensor twice, or names a file that is not a plain `*.safetensors` file beside the index.
    pub fn parse(text: &[u8]) -> Result<Self, FormatError> {
        if text.len() > MAX_JSON_BYTES {
            return Err(FormatError::invalid(
                CONTAINER,
                "the index",
                format_args!("{} bytes", text.len()),
                format_args!("at most {MAX_JSON_BYTES} bytes"),
            ));
        }
        let weight_map = JsonState::read(CONTAINER, "the index", text, text.len(), |state, json| {
            json.deserialize_map(IndexVisitor { state })
        })?;
        if weight_map.is_empty() {
            return Err(FormatError::invalid(CONTAINER, "weight_map", "empty", "at least one tensor"));
        }
        for (tensor, file) in &weight_map {
            check_file_name(tensor, file)?;
        }
        Ok(SafetensorsIndex { weight_map })
    }

    /// The distinct file names, sorted.
    pub fn files(&self) -> Vec<&str> {
        let files: BTreeSet<&str> = self.weight_map.values().map(String::as_str).collect();
        files.into_iter().collect()
    }
}

/// A stranger's index chooses file names: only plain names of safetensors files may reach the file system.
/// Pickle files (`.bin`, `.pt`) end here too.
fn check_file_name(tensor: &str, file: &str) -> Result<(), FormatError> {
    let plain = file.len() <= MAX_FILE_NAME_BYTES
        && !file.starts_with('.')
        && !file.chars().any(|letter| matches!(letter, '/' | '\\' | ':') || letter.is_control());
    if plain && file.strip_suffix(".safetensors").is_some_and(|stem| !stem.is_empty()) {
        return Ok(());
    }
    Err(FormatError::invalid(
        CONTAINER,
        format_args!("the file of tensor {}", quoted(tensor)),
        quoted(file),
        "a plain file name that ends in .safetensors, in the folder of the index: no path, no other type",
    ))
}

struct IndexVisitor<'s> {
    state: &'s mut JsonState,
}

impl<'de> Visitor<'de> for IndexVisitor<'_> {
    type Value = BTreeMap<String, String>;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("an object with a weight_map")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut weight_map = None;
        while let Some(key) = map.next_key::<Text<'de>>()? {
            if key.0 != "weight_map" {
                map.next_value::<IgnoredAny>()?;
            } else if weight_map.is_some() {
                return Err(A::Error::duplicate_field("weight_map"));
            } else {
                let seed = TextMapSeed { state: self.state, key: "tensor", object: "weight_map" };
                weight_map = Some(map.next_value_seed(seed)?);
            }
        }
        weight_map.ok_or_else(|| A::Error::missing_field("weight_map"))
    }
}
