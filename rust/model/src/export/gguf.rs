//! A GGUF file, as llama.cpp reads it: its tensor names and metadata, its order of rows.
//!
//! Of a GGUF file everything but the tensors that are rounded is copied. Of a folder the metadata are made anew, and what our own reader
//! makes of them is compared with the folder's configuration before a byte is written: GGUF cannot say everything (sliding windows in
//! some families, scales in others), and a file that says something else would be another model.

use std::collections::HashMap;
use std::io::BufWriter;
use std::path::Path;

use infer_formats::{GgufWriter, TensorType, Value};
use infer_kernels::Format;

use super::ExportOptions;
use super::difference::{check, of_heads};
use super::header::{Entries, header};
use super::output::{Draft, WriteError};
use super::plan::{self, Planned, Source, target, tensor_type};
use crate::checkpoint::{Checkpoint, Tensor};
use crate::names::{self, Names};
use crate::rope::RopeScaling;
use crate::spec::FeedForward;
use crate::step::Role;
use crate::weights::Loader;
use crate::{ModelError, Quantization};

/// What a file says about its types.
const FILE_TYPE: &str = "general.file_type";
const QUANTIZATION_VERSION: &str = "general.quantization_version";

/// What GGUF calls a file that is rounded so.
pub(super) fn file_type(quantization: &Quantization) -> Result<u32, ModelError> {
    quantization.file_type.ok_or_else(|| {
        ModelError::Quantization(format!(
            "quantization: GGUF has no type for {:?}; write a folder, or use \"int4\"",
            quantization.name()
        ))
    })
}

/// A GGUF file with its matrices rounded.
pub(super) fn copy(
    checkpoint: &Checkpoint,
    output: &Path,
    options: &ExportOptions<'_>,
) -> Result<u64, ModelError> {
    let Some(metadata) = &checkpoint.metadata else { return Ok(0) };
    let loader = Loader::new(checkpoint, None, Format::F32);
    let roles = plan::roles(&loader)?;
    let mut tensors = Vec::new();
    for name in plan::in_order(checkpoint) {
        let Some(tensor) = checkpoint.tensor(&name) else { continue };
        let info = tensor.info;
        let planned = match roles.get(&name) {
            Some((role, columns)) => {
                let format = target(options.quantization, *role, tensor, *columns)?;
                let order = (0..info.elements() / columns).collect();
                let rows = Source::Rows {
                    names: vec![name],
                    order,
                    columns: *columns,
                    transposed: false,
                    target: format,
                };
                Planned::new(info.name.clone(), tensor_type(format)?, info.shape.clone(), rows)
            }
            None => Planned::new(info.name.clone(), info.tensor_type, info.shape.clone(), Source::Copy(name)),
        };
        tensors.push(planned);
    }
    let kept = metadata
        .iter()
        .filter(|(key, _)| !key.starts_with("split.") && ![FILE_TYPE, QUANTIZATION_VERSION].contains(key));
    let entries = kept.map(|(key, value)| (key.to_owned(), value.clone())).collect();
    write(&loader, output, options, entries, &tensors)
}

/// A folder as a GGUF file.
pub(super) fn convert(
    checkpoint: &Checkpoint,
    output: &Path,
    options: &ExportOptions<'_>,
) -> Result<u64, ModelError> {
    let loader = Loader::new(checkpoint, None, Format::F32);
    let tensors = tensors(&loader, options)?;
    loader.check_all_read().map_err(|error| of_heads(&loader, error))?;
    let mut entries = header(checkpoint)?;
    if let Some(unsaid) = check(checkpoint, &entries, &tensors)? {
        // A folder of such a family cannot be written, so it is not advised.
        let instead = match checkpoint.spec.arch.transposed {
            true => "nor can a folder hold this model: its matrices are stored transposed",
            false => "write a folder instead",
        };
        return Err(ModelError::Quantization(format!(
            "output: a GGUF file of {} cannot say {unsaid}; {instead}",
            checkpoint.spec.architecture()
        )));
    }
    let own: Vec<String> = options.metadata.iter().map(|(key, _)| key.clone()).collect();
    entries.retain(|(key, _)| !own.contains(key));
    entries.extend(options.metadata.iter().cloned());
    write(&loader, output, options, entries, &tensors)
}

/// What a GGUF file cannot say of a folder, if there is something.
pub(super) fn unsaid(
    checkpoint: &Checkpoint,
    options: &ExportOptions<'_>,
) -> Result<Option<String>, ModelError> {
    let plain = ExportOptions { quantization: None, metadata: Vec::new(), ..*options };
    let loader = Loader::new(checkpoint, None, Format::F32);
    check(checkpoint, &header(checkpoint)?, &tensors(&loader, &plain)?)
}

fn write(
    loader: &Loader<'_>,
    output: &Path,
    options: &ExportOptions<'_>,
    mut entries: Entries,
    tensors: &[Planned],
) -> Result<u64, ModelError> {
    if let Some(quantization) = options.quantization {
        entries.push((FILE_TYPE.to_owned(), Value::U32(file_type(quantization)?)));
        entries.push((QUANTIZATION_VERSION.to_owned(), Value::U32(2)));
    }
    let draft = Draft::new(output)?;
    let in_output = |source| ModelError::Format { path: output.to_owned(), source: Box::new(source) };
    let mut writer = GgufWriter::new();
    for (key, value) in entries {
        writer.metadata(key, value).map_err(in_output)?;
    }
    for tensor in tensors {
        let info = &tensor.info;
        writer.declare(info.name.clone(), info.tensor_type, &info.shape).map_err(in_output)?;
    }
    let by_name: HashMap<&str, &Planned> =
        tensors.iter().map(|tensor| (tensor.info.name.as_str(), tensor)).collect();
    let bytes = writer.file_len() as u64;
    draft.file(None, bytes, |file| {
        let make = |name: &str| {
            options.go_on()?;
            let tensor =
                by_name.get(name).ok_or_else(|| ModelError::MissingTensor { name: name.to_owned() })?;
            Ok::<_, WriteError>(tensor.bytes(loader, options.context)?)
        };
        let mut out = BufWriter::with_capacity(1 << 20, file);
        writer.write_with(&mut out, make).map_err(|error| error.0)?;
        out.into_inner().map(|_| ()).map_err(|error| WriteError::from(error.into_error()).0)
    })?;
    draft.commit()?;
    Ok(bytes)
}

/// A tensor's name in one naming.
type Named = fn(&Names) -> &'static str;

/// Tensors that every layer may have, and the role that tells how each is rounded and ordered.
const OF_LAYERS: &[(Named, Role)] = &[
    (|names| names.attention_norm, Role::AttentionNorm),
    (|names| names.query, Role::Query),
    (|names| names.key, Role::Key),
    (|names| names.value, Role::Value),
    (|names| names.fused_qkv, Role::Value),
    (|names| names.query_norm, Role::QueryNorm),
    (|names| names.key_norm, Role::KeyNorm),
    (|names| names.output, Role::Output),
    (|names| names.attention_post_norm, Role::AttentionPostNorm),
    (|names| names.feed_forward_norm, Role::FeedForwardNorm),
    (|names| names.gate, Role::Gate),
    (|names| names.up, Role::Up),
    (|names| names.fused_gate_up, Role::Up),
    (|names| names.down, Role::Down),
    (|names| names.feed_forward_post_norm, Role::FeedForwardPostNorm),
    (|names| names.router, Role::Router),
    (|names| names.shared_gate, Role::SharedGate),
    (|names| names.shared_up, Role::SharedUp),
    (|names| names.shared_down, Role::SharedDown),
    (|names| names.shared_router, Role::SharedRouter),
];

/// Tensors that a model has once.
const OF_MODEL: &[(Named, Role)] = &[
    (|names| names.embedding, Role::Embedding),
    (|names| names.position, Role::Position),
    (|names| names.final_norm, Role::FinalNorm),
    (|names| names.head, Role::Head),
];

/// Experts: a tensor each in a folder, stacked in GGUF.
const STACKED: &[(Named, Named, Role)] = &[
    (|names| names.expert_gate, |names| names.stacked_gate, Role::ExpertGate),
    (|names| names.expert_up, |names| names.stacked_up, Role::ExpertUp),
    (|names| names.expert_down, |names| names.stacked_down, Role::ExpertDown),
];

/// All tensors of a file that is made from a folder.
fn tensors(loader: &Loader<'_>, options: &ExportOptions<'_>) -> Result<Vec<Planned>, ModelError> {
    let spec = loader.spec;
    let mut planner = Planner { loader, options, planned: Vec::new() };
    for (named, role) in OF_MODEL {
        if *role != Role::Head || !spec.tied {
            planner.add("", "", *named, *role)?;
        }
    }
    planner.frequency_factors()?;
    for (index, layer) in spec.layers.iter().enumerate() {
        let of_layer = |names: &Names| names.layer.replace("{}", &index.to_string());
        let (from, to) = (of_layer(loader.names), of_layer(&names::GGUF));
        for (named, role) in OF_LAYERS {
            planner.add(&from, &to, *named, *role)?;
        }
        if let FeedForward::Experts { count, .. } = layer.feed_forward {
            for (own, stacked, role) in STACKED {
                planner.stack(&from, &to, (*own, *stacked), *role, count)?;
            }
        }
    }
    Ok(planner.planned)
}

struct Planner<'a> {
    loader: &'a Loader<'a>,
    options: &'a ExportOptions<'a>,
    planned: Vec<Planned>,
}

impl Planner<'_> {
    /// The weight and the bias of one name, those that there are.
    fn add(&mut self, from: &str, to: &str, named: Named, role: Role) -> Result<(), ModelError> {
        let (own, gguf) = (named(self.loader.names), named(&names::GGUF));
        if own.is_empty() || gguf.is_empty() {
            return Ok(());
        }
        let own = format!("{from}{own}");
        for part in ["weight", "bias"] {
            let name = format!("{own}.{part}");
            let Some(tensor) = self.loader.tensor(&name) else { continue };
            // "up" of one naming is gate and up together of another.
            if self.planned.iter().any(|planned| planned.info.name == format!("{to}{gguf}.{part}")) {
                continue;
            }
            let new = format!("{to}{gguf}.{part}");
            let is_matrix = tensor.info.shape.len() == 2;
            self.planned.push(match is_matrix {
                true => self.matrix(new, name, tensor, role)?,
                false => self.vector(new, name, tensor, role)?,
            });
        }
        Ok(())
    }

    fn matrix(
        &self,
        new: String,
        name: String,
        tensor: Tensor<'_>,
        role: Role,
    ) -> Result<Planned, ModelError> {
        let (mut rows, mut columns) = (tensor.info.shape[0], tensor.info.shape[1]);
        let transposed = self.loader.is_transposed(role);
        if transposed {
            std::mem::swap(&mut rows, &mut columns);
        }
        if matches!(role, Role::Embedding | Role::Head) {
            rows = rows.min(self.loader.spec.vocabulary); // more are padding
        }
        let format = target(self.options.quantization, role, tensor, columns)?;
        let (order, shape) = (self.order(role, &name, rows), vec![rows, columns]);
        let rows = Source::Rows { names: vec![name], order, columns, transposed, target: format };
        Ok(Planned::new(new, tensor_type(format)?, shape, rows))
    }

    /// Norms and biases, which llama.cpp wants in `f32`.
    fn vector(
        &self,
        new: String,
        name: String,
        tensor: Tensor<'_>,
        role: Role,
    ) -> Result<Planned, ModelError> {
        let shape = tensor.info.shape.clone();
        if shape.len() != 1 {
            let expected = "one or two dimensions".to_owned();
            return Err(ModelError::Shape { name, found: shape, expected });
        }
        let is_weight = is_norm(role) && name.ends_with(".weight");
        let plus = if is_weight && self.loader.spec.arch.norm_unit_offset { 1.0 } else { 0.0 };
        let order = (!is_norm(role)).then(|| self.order(role, &name, shape[0]));
        Ok(Planned::new(new, TensorType::F32, shape, Source::Values { name, order, plus }))
    }

    /// Which row of the folder comes first, second, ... in the file.
    fn order(&self, role: Role, name: &str, rows: usize) -> Vec<usize> {
        let (spec, head) = (self.loader.spec, self.loader.spec.head_dim);
        let fused = !self.loader.names.fused_qkv.is_empty() && name.contains(self.loader.names.fused_qkv);
        let source = |row: usize| match role {
            // Pairs for interleaved rotation instead of halves.
            Role::Query | Role::Key if spec.arch.gguf_permuted => {
                let at = row % head;
                row - at + at % 2 * (head / 2) + at / 2
            }
            // Queries, keys and values of all heads instead of each head's three.
            Role::Value if fused && spec.arch.qkv_per_head => {
                let (kind, of_kind) = (row / (spec.heads * head), row % (spec.heads * head));
                (of_kind / head * 3 + kind) * head + of_kind % head
            }
            _ => row,
        };
        (0..rows).map(source).collect()
    }

    fn stack(
        &mut self,
        from: &str,
        to: &str,
        (own, stacked): (Named, Named),
        role: Role,
        count: usize,
    ) -> Result<(), ModelError> {
        let name = |expert: usize| {
            let own = own(self.loader.names).replace("{}", &expert.to_string());
            format!("{from}{own}.weight")
        };
        let names: Vec<String> = (0..count).map(name).collect();
        let Some(first) = self.loader.tensor(&names[0]) else {
            return Err(ModelError::MissingTensor { name: names[0].clone() });
        };
        let &[rows, columns] = &first.info.shape[..] else {
            let expected = "two dimensions".to_owned();
            return Err(ModelError::Shape {
                name: names[0].clone(),
                found: first.info.shape.clone(),
                expected,
            });
        };
        for name in &names {
            let shape = self.loader.tensor(name).map(|tensor| tensor.info.shape.clone()).unwrap_or_default();
            if shape != [rows, columns] {
                let expected = format!("{rows} rows of {columns}, as the first expert has");
                return Err(ModelError::Shape { name: name.clone(), found: shape, expected });
            }
        }
        let format: Format = target(self.options.quantization, role, first, columns)?;
        let order = (0..rows).collect();
        let new = format!("{to}{}.weight", stacked(&names::GGUF));
        let source = Source::Rows { names, order, columns, transposed: false, target: format };
        self.planned.push(Planned::new(new, tensor_type(format)?, vec![count, rows, columns], source));
        Ok(())
    }

    /// What frequencies are divided by, where no metadata tell it.
    fn frequency_factors(&mut self) -> Result<(), ModelError> {
        let Some(rope) = self.loader.spec.ropes.first() else { return Ok(()) };
        let mut given = |name: &str, factors: &[f32]| {
            let bytes = factors.iter().flat_map(|factor| factor.to_le_bytes()).collect();
            let name = format!("{name}.weight");
            self.planned.push(Planned::new(name, TensorType::F32, vec![factors.len()], Source::Given(bytes)));
        };
        match &rope.scaling {
            RopeScaling::Llama3 { .. } => given("rope_freqs", &rope.frequency_factors()),
            RopeScaling::Long { short, long, .. } => {
                given("rope_factors_long", long);
                given("rope_factors_short", short);
            }
            _ => {}
        }
        Ok(())
    }
}

fn is_norm(role: Role) -> bool {
    matches!(
        role,
        Role::FinalNorm
            | Role::AttentionNorm
            | Role::AttentionPostNorm
            | Role::FeedForwardNorm
            | Role::FeedForwardPostNorm
            | Role::QueryNorm
            | Role::KeyNorm
    )
}
