//! A safetensors folder: the format "pack-quantized" of compressed-tensors, which vLLM and transformers read too.
//!
//! The embedding and the head stay whole in it, since those readers have no packed ones; a field of `config.json` tells ours to round
//! them while loading, so that it computes with the very weights that a rounding load or a GGUF file gives.

use std::collections::HashMap;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use infer_formats::{SafetensorsWriter, TensorType};
use infer_kernels::{Format, PackedFormat, round_rows};
use serde_json::{Value, json};

use super::output::{Draft, WriteError};
use super::plan::{self, Planned, Source, target};
use super::{ExportOptions, gguf};
use crate::checkpoint::{Checkpoint, QUANTIZATION_FIELD};
use crate::step::Role;
use crate::weights::{Loader, unroundable};
use crate::{ModelError, Quantization};

/// Ends of names of small files that belong to a model.
const TEXTS: &[&str] = &[".json", ".jinja", ".model", ".txt", ".tiktoken"];
/// Beginnings of further ones.
const LICENCES: &[&str] = &["LICENSE", "LICENCE", "NOTICE", "USE_POLICY"];
/// The folder of named chat templates.
const TEMPLATES: &str = "additional_chat_templates";

/// Writes the folder.
pub(super) fn write(
    checkpoint: &Checkpoint,
    output: &Path,
    options: &ExportOptions<'_>,
) -> Result<u64, ModelError> {
    let Some(quantization) = options.quantization else {
        return Err(ModelError::Quantization("a folder is written in quantized form only".to_owned()));
    };
    if checkpoint.spec.arch.transposed {
        let instead = match gguf::unsaid(checkpoint, options)? {
            None => "write a .gguf file".to_owned(),
            Some(unsaid) => format!("nor can a .gguf file hold this model, which cannot say {unsaid}"),
        };
        return Err(ModelError::Quantization(format!(
            "output: {} stores its matrices transposed, which packed safetensors cannot say; {instead}",
            checkpoint.spec.architecture()
        )));
    }
    let draft = Draft::new(output)?;
    let loader = Loader::new(checkpoint, None, Format::F32);
    let (tensors, plain) = tensors(&loader, quantization)?;
    check_ends(&loader, quantization, options)?;
    let config = config(checkpoint, quantization, &plain)?;
    let in_output = |source: infer_formats::FormatError| ModelError::Format {
        path: output.to_owned(),
        source: Box::new(source),
    };
    let mut writer = SafetensorsWriter::new();
    for tensor in &tensors {
        for (name, kind, shape) in tensor.stored()? {
            writer.declare(&name, kind, &shape).map_err(in_output)?;
        }
    }
    draft.make_folder()?;
    for (name, bytes) in small_files(checkpoint.path())? {
        let length = bytes.len() as u64;
        draft.file(Some(&name), length, |file| {
            file.write_all(&bytes).map_err(|error| WriteError::from(error).0)
        })?;
    }
    let text = format!("{config:#}\n");
    draft.file(Some(Path::new("config.json")), text.len() as u64, |file| {
        file.write_all(text.as_bytes()).map_err(|error| WriteError::from(error).0)
    })?;
    let bytes = writer.file_len() as u64;
    draft.file(Some(Path::new("model.safetensors")), bytes, |file| {
        let by_name: HashMap<&str, &Stored> =
            tensors.iter().map(|tensor| (tensor.planned.info.name.as_str(), tensor)).collect();
        let mut scales = Vec::new();
        let parts = |name: &str| {
            options.go_on()?;
            Ok::<_, WriteError>(part(name, &by_name, &loader, options, &mut scales)?)
        };
        writer.write_with(file, parts).map_err(|error| error.0)
    })?;
    draft.commit()?;
    Ok(bytes)
}

/// A tensor of the source, and how it is packed if it is.
struct Stored {
    planned: Planned,
    packed: Option<PackedFormat>,
}

impl Stored {
    /// The tensors that the file gets for it, in the order in which they are written.
    fn stored(&self) -> Result<Vec<(String, TensorType, Vec<usize>)>, ModelError> {
        let info = &self.planned.info;
        let Some(packed) = self.packed else {
            return Ok(vec![(info.name.clone(), info.tensor_type, info.shape.clone())]);
        };
        let &[rows, columns] = &info.shape[..] else {
            let expected = "two dimensions".to_owned();
            return Err(ModelError::Shape { name: info.name.clone(), found: info.shape.clone(), expected });
        };
        Ok(vec![
            (format!("{}_packed", info.name), TensorType::I32, vec![rows, columns * packed.bits / 32]),
            (format!("{}_scale", info.name), TensorType::F16, vec![rows, columns / packed.group]),
            (format!("{}_shape", info.name), TensorType::I64, vec![2]),
        ])
    }
}

/// All tensors, and the modules whose matrices stay as they are.
fn tensors(
    loader: &Loader<'_>,
    quantization: &Quantization,
) -> Result<(Vec<Stored>, Vec<String>), ModelError> {
    let checkpoint = loader.checkpoint;
    let roles = plan::roles(loader)?;
    let (mut all, mut plain) = (Vec::new(), vec![checkpoint.names.head.to_owned()]);
    for name in plan::in_order(checkpoint) {
        let Some(tensor) = checkpoint.tensor(&name) else { continue };
        let is_end = |role: Role| matches!(role, Role::Embedding | Role::Head);
        let role = roles.get(&name).filter(|(role, _)| !is_end(*role));
        let info = tensor.info;
        let format = match role {
            Some((role, columns)) => {
                let format = target(Some(quantization), *role, tensor, *columns)?;
                Some((format, *columns)).filter(|(format, _)| !format.is_float())
            }
            None => None,
        };
        let stored = match format {
            Some((format, columns)) => {
                let order = (0..info.elements() / columns).collect();
                let rows =
                    Source::Rows { names: vec![name], order, columns, transposed: false, target: format };
                Stored {
                    planned: Planned::new(info.name.clone(), info.tensor_type, info.shape.clone(), rows),
                    packed: PackedFormat::of(format),
                }
            }
            None => {
                let is_matrix =
                    info.shape.len() == 2 && !roles.get(&name).is_some_and(|(role, _)| is_end(*role));
                plain.extend(info.name.strip_suffix(".weight").filter(|_| is_matrix).map(str::to_owned));
                let copy = Source::Copy(name);
                Stored {
                    planned: Planned::new(info.name.clone(), info.tensor_type, info.shape.clone(), copy),
                    packed: None,
                }
            }
        };
        all.push(stored);
    }
    plain.sort_unstable();
    plain.dedup();
    Ok((all, plain))
}

/// Rows that are rounded at a time, only to see whether they can be.
const CHECKED_ROWS: usize = 4096;

/// The embedding and the head are copied, and rounded whenever the folder is loaded: what cannot be rounded then is refused now.
fn check_ends(
    loader: &Loader<'_>,
    quantization: &Quantization,
    options: &ExportOptions<'_>,
) -> Result<(), ModelError> {
    for (name, (role, columns)) in plan::roles(loader)? {
        let Some(tensor) = loader.checkpoint.tensor(&name) else { continue };
        if !matches!(role, Role::Embedding | Role::Head) {
            continue;
        }
        let target = target(Some(quantization), role, tensor, columns)?;
        let table = loader.whole(tensor, columns, false)?;
        let mut rows: Vec<&[u8]> = table.bytes.chunks_exact(table.row_bytes()).collect();
        if role == Role::Head {
            rows.truncate(loader.spec.vocabulary); // more are padding, which no load reads
        }
        for part in rows.chunks(CHECKED_ROWS) {
            options.go_on()?;
            round_rows(options.context, table.format, target, columns, part)
                .map_err(|error| unroundable(&table, target, error))?;
        }
        loader.checkpoint.release(tensor.bytes);
    }
    Ok(())
}

/// The bytes of one tensor of the file. Integers and scales come of one rounding: the scales wait for their turn, which is the next.
fn part(
    name: &str,
    tensors: &HashMap<&str, &Stored>,
    loader: &Loader<'_>,
    options: &ExportOptions<'_>,
    scales: &mut Vec<u8>,
) -> Result<Vec<u8>, ModelError> {
    if let Some(stored) = tensors.get(name) {
        return stored.planned.bytes(loader, options.context);
    }
    let split = |suffix: &str| name.strip_suffix(suffix).and_then(|base| tensors.get(base));
    if split("_scale").is_some() {
        return Ok(std::mem::take(scales));
    }
    if let Some(stored) = split("_shape") {
        let sizes = stored.planned.info.shape.iter();
        return Ok(sizes.flat_map(|size| (*size as u64).to_le_bytes()).collect());
    }
    let Some((stored, packed)) = split("_packed").and_then(|stored| Some((stored, stored.packed?))) else {
        return Err(ModelError::MissingTensor { name: name.to_owned() });
    };
    let blocks = stored.planned.bytes(loader, options.context)?;
    let mut integers = Vec::with_capacity(blocks.len());
    packed.split(&blocks, &mut integers, scales);
    Ok(integers)
}

/// The configuration with what is said about rounding.
fn config(
    checkpoint: &Checkpoint,
    quantization: &Quantization,
    plain: &[String],
) -> Result<Value, ModelError> {
    let path = checkpoint.path().join("config.json");
    let bytes = fs::read(&path).map_err(|source| ModelError::Io { path, source })?;
    let mut config: Value = serde_json::from_slice(&bytes)
        .map_err(|error| ModelError::config("config.json", error, "a JSON object"))?;
    let group = |format: Format| {
        let Some(packed) = PackedFormat::of(format) else { return Value::Null };
        json!({
            "targets": ["Linear"],
            "weights": {
                "num_bits": packed.bits, "type": "int", "symmetric": true, "strategy": "group",
                "group_size": packed.group, "dynamic": false,
            },
            "input_activations": null,
            "output_activations": null,
        })
    };
    config["quantization_config"] = json!({
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group(quantization.matrices)},
        "ignore": plain,
    });
    config[QUANTIZATION_FIELD] = json!(quantization.name());
    Ok(config)
}

/// Tokenizer, templates and licences: everything small that is no weight, index or configuration.
fn small_files(folder: &Path) -> Result<Vec<(PathBuf, Vec<u8>)>, ModelError> {
    let mut found = Vec::new();
    for inner in ["", TEMPLATES] {
        let place = folder.join(inner);
        let io = |source| ModelError::Io { path: place.clone(), source };
        if !place.is_dir() {
            continue;
        }
        for entry in fs::read_dir(&place).map_err(io)? {
            let path = entry.map_err(io)?.path();
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            let kept = TEXTS.iter().any(|end| name.ends_with(end))
                || LICENCES.iter().any(|start| name.starts_with(start));
            if path.is_file() && kept && name != "config.json" && !name.ends_with(".index.json") {
                let bytes =
                    fs::read(&path).map_err(|source| ModelError::Io { path: path.clone(), source })?;
                found.push((Path::new(inner).join(name), bytes));
            }
        }
    }
    found.sort();
    Ok(found)
}
