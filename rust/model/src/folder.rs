//! The files of a model folder, and what can be wrong with them.

use std::fs;
use std::path::{Path, PathBuf};

use infer_formats::{FormatError, SafetensorsIndex};

use crate::ModelError;

/// How much of a small text file of a model folder is read at most, bytes.
const MAX_CONFIG_BYTES: u64 = 64 << 20;

/// What is wrong with a file, with its path.
pub(crate) fn in_file(path: &Path) -> impl Fn(FormatError) -> ModelError + '_ {
    |source| ModelError::Format { path: path.to_owned(), source: Box::new(source) }
}

/// A path that is no model.
pub(crate) fn not_a_model(path: &Path, reason: &str) -> ModelError {
    ModelError::NotAModel { path: path.to_owned(), reason: reason.to_owned() }
}

/// Reads a small text file.
pub(crate) fn read_small(path: &Path) -> Result<Vec<u8>, ModelError> {
    let io = |source| ModelError::Io { path: path.to_owned(), source };
    let length = fs::metadata(path).map_err(io)?.len();
    if length > MAX_CONFIG_BYTES {
        return Err(not_a_model(path, &format!("{length} bytes is too long for a configuration")));
    }
    fs::read(path).map_err(io)
}

/// Files of a folder, in order.
pub(crate) fn files_with_extension(folder: &Path, extension: &str) -> Result<Vec<PathBuf>, ModelError> {
    let io = |source| ModelError::Io { path: folder.to_owned(), source };
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).map_err(io)? {
        let path = entry.map_err(io)?.path();
        if path.is_file() && path.extension().is_some_and(|own| own == extension) {
            found.push(path);
        }
    }
    found.sort();
    Ok(found)
}

/// The files of a folder that its weights are in.
pub(crate) fn safetensors_files(folder: &Path) -> Result<Vec<PathBuf>, ModelError> {
    let index = folder.join("model.safetensors.index.json");
    if index.is_file() {
        let parsed = SafetensorsIndex::parse(&read_small(&index)?).map_err(in_file(&index))?;
        return Ok(parsed.files().into_iter().map(|name| folder.join(name)).collect());
    }
    let single = folder.join("model.safetensors");
    if single.is_file() {
        return Ok(vec![single]);
    }
    let found = files_with_extension(folder, "safetensors")?;
    match found.len() {
        0 if files_with_extension(folder, "bin")?.is_empty() => {
            Err(not_a_model(folder, "there is a config.json but no .safetensors file"))
        }
        0 => Err(not_a_model(
            folder,
            "weights are .bin pickles, which can run code when read; convert to safetensors",
        )),
        1 => Ok(found),
        _ => Err(not_a_model(folder, "several .safetensors files but no model.safetensors.index.json")),
    }
}
