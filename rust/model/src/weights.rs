//! From roles to packed weights: which tensor, which of its rows in which order, and which constants are folded.
//!
//! A matrix is given to the packer as one byte slice per output row, so fused tensors (Phi-3's QKV), tensors grouped
//! per head (GPT-NeoX), rows reordered by llama.cpp's converter and stacked experts are all the same: a choice of rows.

use std::borrow::Cow;

use infer_formats::TensorType;
use infer_kernels::{Format, PackedMatrix, Pool, dequantize};

use crate::checkpoint::{Checkpoint, Tensor};
use crate::names::Names;
use crate::program::{MatrixKey, VectorKey};
use crate::spec::FeedForward;
use crate::step::{Role, WeightKey};
use crate::{ModelError, ModelSpec};

/// A weight ready to be multiplied.
pub(crate) struct Matrix {
    pub packed: PackedMatrix,
    pub bias: Option<Vec<f32>>,
}

/// A norm's weight and bias.
pub(crate) struct Vector {
    pub weight: Vec<f32>,
    pub bias: Option<Vec<f32>>,
}

/// Rows of a two-dimensional weight, in a format that kernels know.
pub(crate) struct Table<'a> {
    pub format: Format,
    pub columns: usize,
    pub bytes: Cow<'a, [u8]>,
}

impl Table<'_> {
    pub fn row_bytes(&self) -> usize {
        self.format.row_bytes(self.columns).unwrap_or(0)
    }
}

/// Where the rows of one weight are.
struct Source<'a> {
    table: Table<'a>,
    rows: Vec<usize>,
    bias: Option<Vec<f32>>,
}

/// The kernels' name of a tensor's type.
pub(crate) fn format_of(tensor: Tensor<'_>) -> Result<Format, ModelError> {
    Ok(match tensor.info.tensor_type {
        TensorType::F32 => Format::F32,
        TensorType::F16 => Format::F16,
        TensorType::Bf16 => Format::Bf16,
        TensorType::Q8_0 => Format::Q8_0,
        TensorType::Q4_0 => Format::Q4_0,
        other => {
            return Err(ModelError::TensorType {
                name: tensor.info.name.clone(),
                found: other.name().to_owned(),
                known: "F32, F16, BF16, Q8_0, Q4_0".to_owned(),
            });
        }
    })
}

/// Reads a checkpoint's weights by role.
pub(crate) struct Loader<'a> {
    checkpoint: &'a Checkpoint,
    spec: &'a ModelSpec,
    names: &'static Names,
}

impl<'a> Loader<'a> {
    pub fn new(checkpoint: &'a Checkpoint) -> Self {
        Self { checkpoint, spec: &checkpoint.spec, names: checkpoint.names }
    }

    /// May two matrices be multiplied as one? They must be stored in one format.
    pub fn may_merge(&self, left: &MatrixKey, right: &MatrixKey) -> bool {
        let format = |key: &MatrixKey| {
            let (tensor, _) = self.find(key.parts.first()?, key.rows[0]).ok()?;
            Some(tensor.info.tensor_type)
        };
        format(left).is_some_and(|own| Some(own) == format(right))
    }

    /// Packs a matrix of one or more parts.
    pub fn matrix(&self, key: &MatrixKey, pool: &Pool) -> Result<Matrix, ModelError> {
        let sources = key
            .parts
            .iter()
            .zip(&key.rows)
            .map(|(part, rows)| self.source(part, *rows, key.columns))
            .collect::<Result<Vec<_>, _>>()?;
        let format = sources[0].table.format;
        if let Some(other) = sources.iter().find(|source| source.table.format != format) {
            let found = format!("{:?}", other.table.format);
            return Err(ModelError::TensorType {
                name: key.parts.iter().map(ToString::to_string).collect::<Vec<_>>().join(" and "),
                found: format!("{format:?} and {found}"),
                known: "one type for gate and up".to_owned(),
            });
        }
        let rows: Vec<&[u8]> = sources
            .iter()
            .flat_map(|source| {
                let width = source.table.row_bytes();
                source.rows.iter().map(move |row| &source.table.bytes[row * width..(row + 1) * width])
            })
            .collect();
        let packed = PackedMatrix::pack(pool, format, key.columns, &rows)?;
        Ok(Matrix { packed, bias: joined_bias(&sources) })
    }

    /// A norm.
    pub fn vector(&self, key: &VectorKey) -> Result<Vector, ModelError> {
        let name = self.name(&key.key)?;
        let mut weight = match self.checkpoint.tensor(&format!("{name}.weight")) {
            Some(tensor) => values(tensor)?,
            None => self.weights_per_head(&name, key.heads)?,
        };
        if weight.len() != key.width && weight.len() != key.width * key.heads {
            let expected = format!("{} values", key.width);
            return Err(ModelError::Shape {
                name: format!("{name}.weight"),
                found: vec![weight.len()],
                expected,
            });
        }
        if self.spec.arch.norm_unit_offset && !self.checkpoint.is_gguf() {
            weight.iter_mut().for_each(|value| *value += 1.0);
        }
        let bias = match self.checkpoint.tensor(&format!("{name}.bias")) {
            Some(tensor) => Some(values(tensor)?),
            None => None,
        };
        if let Some(bias) = bias.as_ref().filter(|bias| bias.len() != weight.len()) {
            let expected = format!("{} values", weight.len());
            return Err(ModelError::Shape {
                name: format!("{name}.bias"),
                found: vec![bias.len()],
                expected,
            });
        }
        Ok(Vector { weight, bias })
    }

    /// A table whose rows are looked up instead of multiplied.
    pub fn table(&self, role: Role, rows: usize) -> Result<Table<'a>, ModelError> {
        let key = WeightKey { role, layer: None, expert: None };
        let name = format!("{}.weight", self.name(&key)?);
        let tensor = self.checkpoint.tensor(&name).ok_or(ModelError::MissingTensor { name })?;
        self.table_of(tensor, self.spec.hidden, |found| found >= rows, format!("{rows} rows"))
    }

    fn source(&self, key: &WeightKey, rows: usize, columns: usize) -> Result<Source<'a>, ModelError> {
        let (tensor, part) = self.find(key, rows)?;
        let transposed = self.spec.arch.transposed && !self.checkpoint.is_gguf() && key.role != Role::Head;
        let total = part.total;
        let table = match transposed {
            true => transpose(tensor, columns, total)?,
            false => {
                let expected =
                    if key.role == Role::Head { format!("at least {total}") } else { total.to_string() };
                let fits = |found: usize| found == total || (key.role == Role::Head && found > total);
                self.table_of(tensor, columns, fits, format!("{expected} rows"))?
            }
        };
        let chosen = self.permuted(key.role, part.rows(rows));
        let bias = match self.checkpoint.tensor(&format!("{}.bias", part.name)) {
            Some(bias) if key.role != Role::Router => {
                let all = values(bias)?;
                let pick = |row: &usize| all.get(*row).copied();
                let picked: Option<Vec<f32>> = chosen.iter().map(pick).collect();
                Some(picked.ok_or_else(|| ModelError::Shape {
                    name: bias.info.name.clone(),
                    found: bias.info.shape.clone(),
                    expected: format!("{total} values"),
                })?)
            }
            _ => None,
        };
        Ok(Source { table, rows: chosen, bias })
    }

    /// The tensor that holds a weight, and which part of it the weight is: a tensor of its own, or part of a fused one.
    fn find(&self, key: &WeightKey, rows: usize) -> Result<(Tensor<'a>, Part), ModelError> {
        let key = match key.role {
            Role::Head if self.spec.tied => WeightKey { role: Role::Embedding, ..*key },
            _ => *key,
        };
        let fused = self.fused(&key, rows);
        let own = self.name(&key).ok().map(|name| Part { name, total: rows, ..Part::default() });
        // "up" of a gated network may be the name of gate and up together, so the fused meaning is tried first.
        let candidates = match key.role {
            Role::Up => [fused, own],
            _ => [own, fused],
        };
        let mut tried = Vec::new();
        for part in candidates.into_iter().flatten() {
            let name = format!("{}.weight", part.name);
            match self.checkpoint.tensor(&name) {
                Some(tensor) => return Ok((tensor, part)),
                None => tried.push(name),
            }
        }
        Err(ModelError::MissingTensor { name: tried.join("` or `") })
    }

    /// The part of a fused or stacked tensor that a weight is, if this naming has one.
    fn fused(&self, key: &WeightKey, rows: usize) -> Option<Part> {
        let (names, spec) = (self.names, self.spec);
        let layer = self.layer_prefix(key);
        let part = |name: &str, total: usize, first: usize| {
            (!name.is_empty()).then(|| Part { name: format!("{layer}{name}"), total, first, block: None })
        };
        let (queries, keys, dim) = (spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim, spec.head_dim);
        let qkv = |index: usize, first: usize| {
            let whole = part(names.fused_qkv, queries + 2 * keys, first)?;
            match spec.arch.qkv_per_head && !self.checkpoint.is_gguf() {
                true => Some(Part { first: index * dim, block: Some((dim, 3 * dim)), ..whole }),
                false => Some(whole),
            }
        };
        let gate_up = |first: usize| {
            let gate = format!("{layer}{}.weight", names.gate);
            let fused = spec.arch.gated && self.checkpoint.tensor(&gate).is_none();
            if fused { part(names.fused_gate_up, 2 * rows, first) } else { None }
        };
        let experts = match key.layer.and_then(|layer| spec.layers.get(layer)).map(|layer| layer.feed_forward)
        {
            Some(FeedForward::Experts { count, .. }) => count,
            _ => 1,
        };
        let stacked = |name: &str| part(name, experts * rows, key.expert.unwrap_or(0) * rows);
        match key.role {
            Role::Query => qkv(0, 0),
            Role::Key => qkv(1, queries),
            Role::Value => qkv(2, queries + keys),
            Role::Gate => gate_up(0),
            Role::Up => gate_up(rows),
            Role::ExpertGate => stacked(names.stacked_gate),
            Role::ExpertUp => stacked(names.stacked_up),
            Role::ExpertDown => stacked(names.stacked_down),
            _ => None,
        }
    }

    /// Undoes the row order that llama.cpp's converter gives Q and K: pairs side by side instead of halves.
    fn permuted(&self, role: Role, rows: Vec<usize>) -> Vec<usize> {
        let affected = self.checkpoint.is_gguf() && self.spec.arch.gguf_permuted;
        if !affected || !matches!(role, Role::Query | Role::Key) {
            return rows;
        }
        let (dim, half) = (self.spec.head_dim, self.spec.head_dim / 2);
        let moved = |row: usize| {
            let (head, at) = (row / dim, row % dim);
            head * dim + 2 * (at % half) + at / half
        };
        (0..rows.len()).map(|row| rows[moved(row)]).collect()
    }

    fn table_of(
        &self,
        tensor: Tensor<'a>,
        columns: usize,
        fits: impl Fn(usize) -> bool,
        expected: String,
    ) -> Result<Table<'a>, ModelError> {
        let shape = &tensor.info.shape;
        let rows: usize = shape.iter().rev().skip(1).product();
        if shape.last() != Some(&columns) || !fits(rows) {
            return Err(ModelError::Shape {
                name: tensor.info.name.clone(),
                found: shape.clone(),
                expected: format!("{expected} of {columns}"),
            });
        }
        let table = Table { format: format_of(tensor)?, columns, bytes: Cow::Borrowed(tensor.bytes) };
        match table.format.row_bytes(columns) {
            Some(width) if width * rows == tensor.bytes.len() => Ok(table),
            _ => Err(ModelError::Shape {
                name: tensor.info.name.clone(),
                found: shape.clone(),
                expected: format!("rows of whole {:?} blocks", table.format),
            }),
        }
    }

    fn weights_per_head(&self, name: &str, heads: usize) -> Result<Vec<f32>, ModelError> {
        let mut all = Vec::new();
        for head in 0..heads {
            let own = format!("{name}.norms.{head}.weight");
            let missing = || ModelError::MissingTensor { name: format!("{name}.weight") };
            all.extend(values(self.checkpoint.tensor(&own).ok_or_else(missing)?)?);
        }
        Ok(all)
    }

    fn layer_prefix(&self, key: &WeightKey) -> String {
        key.layer.map(|layer| self.names.layer.replace("{}", &layer.to_string())).unwrap_or_default()
    }

    fn name(&self, key: &WeightKey) -> Result<String, ModelError> {
        let names = self.names;
        let own = match key.role {
            Role::Embedding => names.embedding,
            Role::Position => names.position,
            Role::FinalNorm => names.final_norm,
            Role::Head => names.head,
            Role::AttentionNorm => names.attention_norm,
            Role::AttentionPostNorm => names.attention_post_norm,
            Role::FeedForwardNorm => names.feed_forward_norm,
            Role::FeedForwardPostNorm => names.feed_forward_post_norm,
            Role::Query => names.query,
            Role::Key => names.key,
            Role::Value => names.value,
            Role::Output => names.output,
            Role::QueryNorm => names.query_norm,
            Role::KeyNorm => names.key_norm,
            Role::Gate => names.gate,
            Role::Up => names.up,
            Role::Down => names.down,
            Role::Router => names.router,
            Role::ExpertGate => names.expert_gate,
            Role::ExpertUp => names.expert_up,
            Role::ExpertDown => names.expert_down,
            Role::SharedGate => names.shared_gate,
            Role::SharedUp => names.shared_up,
            Role::SharedDown => names.shared_down,
            Role::SharedRouter => names.shared_router,
        };
        if own.is_empty() {
            return Err(ModelError::MissingTensor { name: format!("{key} (this family has none)") });
        }
        let own = key.expert.map_or(own.to_owned(), |expert| own.replace("{}", &expert.to_string()));
        Ok(format!("{}{own}", self.layer_prefix(key)))
    }
}

/// Which rows of a tensor a weight is.
#[derive(Default)]
struct Part {
    name: String,
    /// Rows of the whole tensor.
    total: usize,
    /// First row.
    first: usize,
    /// (rows taken, rows from one block to the next), for tensors grouped per head.
    block: Option<(usize, usize)>,
}

impl Part {
    fn rows(&self, count: usize) -> Vec<usize> {
        match self.block {
            None => (self.first..self.first + count).collect(),
            Some((taken, step)) => {
                (0..count).map(|row| self.first + row / taken * step + row % taken).collect()
            }
        }
    }
}

fn joined_bias(sources: &[Source<'_>]) -> Option<Vec<f32>> {
    sources.iter().any(|source| source.bias.is_some()).then(|| {
        let zeros = |source: &Source<'_>| vec![0.0; source.rows.len()];
        sources.iter().flat_map(|source| source.bias.clone().unwrap_or_else(|| zeros(source))).collect()
    })
}

/// All values of a tensor as f32.
pub(crate) fn values(tensor: Tensor<'_>) -> Result<Vec<f32>, ModelError> {
    let mut out = vec![0.0; tensor.info.shape.iter().product()];
    dequantize(format_of(tensor)?, tensor.bytes, &mut out);
    Ok(out)
}

/// (inputs, outputs) to (outputs, inputs), for plain formats.
fn transpose(tensor: Tensor<'_>, columns: usize, rows: usize) -> Result<Table<'_>, ModelError> {
    let format = format_of(tensor)?;
    let item = tensor.info.tensor_type.block_bytes();
    if tensor.info.shape[..] != [columns, rows] || tensor.info.tensor_type.block_len() != 1 {
        return Err(ModelError::Shape {
            name: tensor.info.name.clone(),
            found: tensor.info.shape.clone(),
            expected: format!("{columns} rows of {rows}, transposed"),
        });
    }
    let mut bytes = vec![0; tensor.bytes.len()];
    for column in 0..columns {
        for row in 0..rows {
            let (from, to) = ((column * rows + row) * item, (row * columns + column) * item);
            bytes[to..to + item].copy_from_slice(&tensor.bytes[from..from + item]);
        }
    }
    Ok(Table { format, columns, bytes: Cow::Owned(bytes) })
}
