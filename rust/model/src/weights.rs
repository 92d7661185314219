//! From roles to packed weights: which tensor, which of its rows in which order, and which constants are folded.
//!
//! A matrix is given to the packer as one byte slice per output row, so fused tensors (Phi-3's QKV), tensors grouped
//! per head (GPT-NeoX), rows reordered by llama.cpp's converter and stacked experts are all the same: a choice of rows.

use std::borrow::Cow;
use std::cell::RefCell;
use std::collections::HashSet;
use std::sync::Arc;

use infer_kernels::{Context, Format, PackedMatrix, round_rows};

pub(crate) use crate::biases::joined_bias;
use crate::checkpoint::{Checkpoint, Tensor};
use crate::late::{LateFiles, LateRows};
use crate::names::Names;
use crate::program::{MatrixKey, VectorKey};
use crate::quantization::PLAIN_ENDS;
use crate::step::{Role, WeightKey};
use crate::table::transpose;
pub(crate) use crate::table::{Source, Table, format_of, unroundable, values};
use crate::{ModelError, ModelSpec, Quantization};

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

/// How a weight is stored.
pub(crate) struct StoredAs<'a> {
    pub name: &'a str,
    pub format: Format,
    /// Whether it is 8-bit floats with scales, and how many columns of a row share one: none means all.
    pub group: Option<Option<usize>>,
}

/// Ends of names of tensors that old checkpoints store although they follow from the configuration.
const DERIVED: &[&str] = &[
    "rotary_emb.inv_freq",
    "attn.bias",
    "attn.masked_bias",
    "attention.bias",
    "attention.masked_bias",
    "attn_rot_embd.weight",
];

/// Reads a checkpoint's weights by role.
pub(crate) struct Loader<'a> {
    pub checkpoint: &'a Checkpoint,
    /// Names of the tensors that some role asked for and found.
    read: RefCell<HashSet<String>>,
    pub spec: &'a ModelSpec,
    pub names: &'static Names,
    quantization: Option<&'static Quantization>,
    /// What embedding and head are rounded to, if not to what the quantization says.
    ends: Option<Format>,
    floats: Format,
    /// Matrices that can be are packed later.
    late: Option<Arc<LateFiles>>,
}

impl<'a> Loader<'a> {
    /// `floats` is the format that 8-bit floats with scales get where they are multiplied plainly.
    pub fn new(
        checkpoint: &'a Checkpoint,
        quantization: Option<&'static Quantization>,
        floats: Format,
    ) -> Self {
        let read = RefCell::default();
        let (spec, names) = (&checkpoint.spec, checkpoint.names);
        Self { checkpoint, read, spec, names, quantization, ends: None, floats, late: None }
    }

    /// The same for an executor outside, whose embedding and head get [`PLAIN_ENDS`].
    pub fn outside(self) -> Self {
        Self { ends: Some(PLAIN_ENDS), ..self }
    }

    /// The same, which puts off what can be packed later.
    pub fn late(self, files: &Arc<LateFiles>) -> Self {
        Self { late: Some(Arc::clone(files)), ..self }
    }

    /// The format of 8-bit floats with scales, where they are multiplied plainly.
    pub fn floats(&self) -> Format {
        self.floats
    }

    /// The format of a tensor's rows; that of 8-bit floats with scales is what they become.
    pub fn format_of(&self, tensor: Tensor<'_>) -> Result<Format, ModelError> {
        match tensor.scaled {
            Some(_) => Ok(self.floats),
            None => format_of(tensor),
        }
    }

    /// How weights are rounded.
    pub fn quantization(&self) -> Option<&'static Quantization> {
        self.quantization
    }

    /// The format that a weight of this role has in memory.
    pub fn target(&self, role: Role, stored: Format) -> Format {
        let rounded = self.quantization.and_then(|quantization| {
            let ends = self.ends.unwrap_or_else(|| quantization.ends_of(self.spec.hidden));
            quantization.format(role, ends)
        });
        rounded.filter(|_| stored.is_float()).unwrap_or(stored)
    }

    /// Looks a tensor up, and remembers that it was.
    pub fn tensor(&self, name: &str) -> Option<Tensor<'a>> {
        let found = self.checkpoint.tensor(name)?;
        self.read.borrow_mut().insert(name.to_owned());
        Some(found)
    }

    /// After everything was loaded: a tensor of a layer that nobody read is a part of the model that would be left out.
    ///
    /// # Errors
    /// Names the first such tensor.
    pub fn check_all_read(&self) -> Result<(), ModelError> {
        let read = self.read.borrow();
        let (before, _) = self.names.layer.split_once("{}").unwrap_or((self.names.layer, ""));
        let of_a_layer = |name: &str| {
            let layer =
                name.strip_prefix(before).and_then(|rest| rest.split('.').next()?.parse::<usize>().ok());
            layer.is_some_and(|layer| layer < self.spec.layers.len())
        };
        let unread = |name: &&str| {
            of_a_layer(name) && !read.contains(*name) && !DERIVED.iter().any(|suffix| name.ends_with(suffix))
        };
        match self.checkpoint.tensors().map(|info| info.name.as_str()).filter(unread).min() {
            None => Ok(()),
            Some(name) => Err(ModelError::UnknownTensor {
                name: name.to_owned(),
                architecture: self.spec.architecture().to_owned(),
            }),
        }
    }

    /// How a weight is stored.
    pub fn stored(&self, part: &WeightKey, rows: usize) -> Result<StoredAs<'a>, ModelError> {
        if let Some(table) = self.random_table(part, 0, 0) {
            return Ok(StoredAs { name: table.name, format: table.format, group: None });
        }
        let (tensor, _) = self.find(part, rows)?;
        let (name, format) = (tensor.info.name.as_str(), self.format_of(tensor)?);
        Ok(StoredAs { name, format, group: tensor.scaled.map(|scaled| scaled.group()) })
    }

    /// May two matrices be multiplied as one? They must be stored in one format.
    pub fn may_merge(&self, left: &MatrixKey, right: &MatrixKey) -> bool {
        let format = |key: &MatrixKey| {
            let part = key.parts.first()?;
            let stored = self.stored(part, key.rows[0]).ok()?;
            Some((stored.format, self.target(part.role, stored.format), stored.group))
        };
        format(left).is_some_and(|own| Some(own) == format(right))
    }

    /// Packs a matrix of one or more parts, or finds out how to do that later.
    pub fn matrix(&self, key: &MatrixKey, context: &Context) -> Result<Matrix, ModelError> {
        let sources = self.sources(key)?;
        let format = sources[0].table.format;
        if let Some(other) = sources.iter().find(|source| source.table.format != format) {
            let found = format!("{:?}", other.table.format);
            return Err(ModelError::TensorType {
                name: key.parts.iter().map(ToString::to_string).collect::<Vec<_>>().join(" and "),
                found: format!("{format:?} and {found}"),
                known: "one type for gate and up".to_owned(),
            });
        }
        let target = self.target(key.parts[0].role, format);
        if let Some(files) = self.late.as_ref().filter(|_| target == format)
            && let Some(packed) = files.matrix(self.checkpoint, key, &sources)?
        {
            return Ok(Matrix { packed, bias: joined_bias(&sources) });
        }
        let decoded: Vec<_> = sources.iter().map(|source| source.decoded(&context.pool)).collect();
        let mut rows: Vec<&[u8]> = Vec::with_capacity(key.rows.iter().sum());
        for (source, decoded) in sources.iter().zip(&decoded) {
            match decoded {
                Some(bytes) => rows.extend(bytes.chunks_exact(bytes.len() / source.outputs().max(1))),
                None => rows.extend(source.rows()),
            }
        }
        let packed = match target == format {
            true => PackedMatrix::pack(context, format, key.columns, &rows, self.checkpoint)?,
            false => {
                let of_tensor = |error| unroundable(&sources[0].table, target, error);
                PackedMatrix::round(context, format, target, key.columns, &rows, self.checkpoint)
                    .map_err(of_tensor)?
            }
        };
        // What pieces shared, or was too scattered to be let go of by them.
        for source in &sources {
            if let Cow::Borrowed(bytes) = source.table.bytes {
                self.checkpoint.release(bytes);
            }
        }
        Ok(Matrix { packed, bias: joined_bias(&sources) })
    }

    /// A table's rows in their file, where they may be read later.
    pub fn late_table(&self, table: &Table<'_>) -> Option<LateRows> {
        self.late.as_ref()?.table(self.checkpoint, table)
    }

    /// Where the parts of a matrix are.
    pub fn sources(&self, key: &MatrixKey) -> Result<Vec<Source<'a>>, ModelError> {
        let parts = key.parts.iter().zip(&key.rows);
        parts.map(|(part, rows)| self.source(part, *rows, key.columns)).collect()
    }

    /// A norm.
    pub fn vector(&self, key: &VectorKey) -> Result<Vector, ModelError> {
        let of_heads = matches!(key.key.role, Role::QueryNorm | Role::KeyNorm);
        if self.checkpoint.dummy.is_some() {
            let bias = (self.spec.arch.norm_bias && !of_heads).then(|| vec![0.0; key.width]);
            return Ok(Vector { weight: vec![1.0; key.width], bias });
        }
        let name = self.name(&key.key)?;
        let mut weight = match self.tensor(&format!("{name}.weight")) {
            Some(tensor) => values(self.checkpoint, tensor)?,
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
        let bias = match self.tensor(&format!("{name}.bias")) {
            Some(tensor) => Some(values(self.checkpoint, tensor)?),
            None if self.spec.arch.norm_bias && !of_heads => {
                return Err(ModelError::MissingTensor { name: format!("{name}.bias") });
            }
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

    /// A table whose rows are looked up instead of multiplied, as it is stored.
    pub fn stored_table(&self, role: Role, rows: usize) -> Result<Table<'a>, ModelError> {
        let key = WeightKey { role, layer: None, expert: None };
        if let Some(table) = self.random_table(&key, rows, self.spec.hidden) {
            return Ok(table);
        }
        let name = format!("{}.weight", self.name(&key)?);
        let tensor = self.tensor(&name).ok_or(ModelError::MissingTensor { name })?;
        let table = self.table_of(tensor, self.spec.hidden, |found| found >= rows, format!("{rows} rows"))?;
        Ok(table.decoded())
    }

    /// The same, rounded if that is wished for.
    pub fn table(&self, role: Role, rows: usize, context: &Context) -> Result<Table<'a>, ModelError> {
        let table = self.stored_table(role, rows)?;
        let target = self.target(role, table.format);
        if target == table.format {
            return Ok(table);
        }
        let rows: Vec<&[u8]> = table.bytes.chunks_exact(table.row_bytes()).collect();
        let rounded = round_rows(context, table.format, target, table.columns, &rows)
            .map_err(|error| unroundable(&table, target, error))?;
        Ok(Table { format: target, bytes: Cow::Owned(rounded), ..table })
    }

    /// Is a matrix of this role stored as (inputs, outputs)?
    pub fn is_transposed(&self, role: Role) -> bool {
        let is_table = matches!(role, Role::Head | Role::Embedding | Role::Position);
        self.spec.arch.transposed && !self.checkpoint.is_gguf() && !is_table
    }

    /// All rows of a tensor, (outputs, inputs); `transposed` where it is stored the other way round.
    pub fn whole(
        &self,
        tensor: Tensor<'a>,
        columns: usize,
        transposed: bool,
    ) -> Result<Table<'a>, ModelError> {
        match transposed {
            true => transpose(tensor, columns, tensor.info.elements() / columns.max(1)),
            false => Ok(self.table_of(tensor, columns, |_| true, "rows".to_owned())?.decoded()),
        }
    }

    fn source(&self, key: &WeightKey, rows: usize, columns: usize) -> Result<Source<'a>, ModelError> {
        if let Some(table) = self.random_table(key, rows, columns) {
            return Ok(Source { bias: self.no_bias(key, rows), ..Source::whole(table, rows) });
        }
        let (tensor, part) = self.find(key, rows)?;
        let total = part.total;
        let table = match self.is_transposed(key.role) {
            true => transpose(tensor, columns, total)?,
            false => {
                let expected =
                    if key.role == Role::Head { format!("at least {total}") } else { total.to_string() };
                let fits = |found: usize| found == total || (key.role == Role::Head && found > total);
                self.table_of(tensor, columns, fits, format!("{expected} rows"))?
            }
        };
        let chosen = self.permuted(key.role, part.rows(rows));
        if let Some(row) = chosen.iter().find(|row| **row >= total) {
            let (name, found) = (tensor.info.name.clone(), tensor.info.shape.clone());
            return Err(ModelError::Shape { name, found, expected: format!("more than {row} rows") });
        }
        let bias = self.chosen_bias(key, &part, &chosen)?;
        Ok(Source { table, rows: chosen, bias })
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
        let bytes = match tensor.packed {
            None => Cow::Borrowed(tensor.bytes),
            Some(packed) => {
                Cow::Owned(packed.blocks(tensor.bytes).ok_or_else(|| ModelError::TensorType {
                    name: tensor.info.name.clone(),
                    found: "integers with a scale that half precision cannot hold".to_owned(),
                    known: "scales that are half-precision numbers".to_owned(),
                })?)
            }
        };
        let (format, scaled) = (self.format_of(tensor)?, tensor.scaled);
        let table = Table { name: &tensor.info.name, format, columns, bytes, scaled };
        match table.row_bytes().checked_mul(rows) {
            Some(size) if size == table.bytes.len() && format.row_bytes(columns).is_some() => Ok(table),
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
            all.extend(values(self.checkpoint, self.tensor(&own).ok_or_else(missing)?)?);
        }
        Ok(all)
    }
}
