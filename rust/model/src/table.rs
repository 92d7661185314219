//! Rows of weights as they lie in a checkpoint: their format, their order, and what they are as plain numbers.

use std::borrow::Cow;
use std::sync::{Mutex, PoisonError};

use infer_kernels::{Format, KernelError, Pool, dequantize};

use crate::checkpoint::{Checkpoint, Tensor};
use crate::scaled::Scaled;
use crate::{ModelError, quantization};

/// Rows of a two-dimensional weight, in a format that kernels know.
pub(crate) struct Table<'a> {
    pub name: &'a str,
    /// Of the bytes; of what becomes of them, where they are 8-bit floats with scales.
    pub format: Format,
    pub columns: usize,
    pub bytes: Cow<'a, [u8]>,
    pub scaled: Option<Scaled<'a>>,
}

impl Table<'_> {
    pub fn row_bytes(&self) -> usize {
        match self.scaled {
            Some(_) => self.columns,
            None => self.format.row_bytes(self.columns).unwrap_or(0),
        }
    }

    /// The same in its format, without scales.
    pub fn decoded(self) -> Self {
        let Some(scaled) = self.scaled else { return self };
        let mut bytes = Vec::new();
        for (row, codes) in self.bytes.chunks_exact(self.columns).enumerate() {
            scaled.append(row, codes, self.format, &mut bytes);
        }
        Table { bytes: Cow::Owned(bytes), scaled: None, ..self }
    }
}

/// Where the rows of one weight are.
pub(crate) struct Source<'a> {
    pub table: Table<'a>,
    pub rows: Vec<usize>,
    pub bias: Option<Vec<f32>>,
}

impl<'a> Source<'a> {
    /// The first rows of a table.
    pub fn whole(table: Table<'a>, rows: usize) -> Self {
        Self { table, rows: (0..rows).collect(), bias: None }
    }

    /// How many rows it has.
    pub fn outputs(&self) -> usize {
        self.rows.len()
    }

    /// The bytes of each row, in the order of outputs.
    pub fn rows(&self) -> impl Iterator<Item = &[u8]> {
        let width = self.table.row_bytes();
        self.rows.iter().map(move |row| &self.table.bytes[row * width..(row + 1) * width])
    }

    /// For rows of 8-bit floats: the number of each in its tensor, in the order of outputs.
    pub fn row_numbers(&self) -> &[usize] {
        &self.rows
    }

    /// Rows of 8-bit floats in the table's format, one after the other; none for others.
    pub fn decoded(&self, pool: &Pool) -> Option<Vec<u8>> {
        let scaled = self.table.scaled?;
        let width = self.table.format.row_bytes(self.table.columns)?;
        let mut out = vec![0; self.rows.len() * width];
        let rows: Vec<(&usize, &[u8])> = self.rows.iter().zip(self.rows()).collect();
        let parts = out.chunks_mut(DECODED_ROWS * width).zip(rows.chunks(DECODED_ROWS));
        let parts: Vec<_> = parts.map(Mutex::new).collect();
        pool.run(parts.len(), |index| {
            let mut part = parts[index].lock().unwrap_or_else(PoisonError::into_inner);
            let (out, rows) = &mut *part;
            let mut bytes = Vec::with_capacity(out.len());
            rows.iter().for_each(|(row, codes)| scaled.append(**row, codes, self.table.format, &mut bytes));
            out.copy_from_slice(&bytes);
        });
        Some(out)
    }
}

/// Rows of 8-bit floats that a thread decodes at a time.
const DECODED_ROWS: usize = 16;

/// The kernels' name of the type of a tensor, which has no scales for 8-bit floats.
pub(crate) fn format_of(tensor: Tensor<'_>) -> Result<Format, ModelError> {
    if let Some(packed) = tensor.packed {
        return Ok(packed.format.format);
    }
    let name = tensor.info.tensor_type.name();
    Format::from_name(name).ok_or_else(|| ModelError::TensorType {
        name: tensor.info.name.clone(),
        found: name.to_owned(),
        known: Format::ALL.iter().map(|format| format.name()).collect::<Vec<_>>().join(", "),
    })
}

/// Why a table could not be rounded.
pub(crate) fn unroundable(table: &Table<'_>, target: Format, error: KernelError) -> ModelError {
    let rows = table.bytes.len() / table.row_bytes().max(1);
    match target.row_bytes(table.columns) {
        None => quantization::unsuitable(table.name, &[rows, table.columns], target),
        Some(_) => ModelError::Quantization(format!("quantization: tensor `{}`: {error}", table.name)),
    }
}

/// All values of a small tensor as f32. A system may map 2 MiB of the file for the few KiB of a norm, so these are read.
pub(crate) fn values(checkpoint: &Checkpoint, tensor: Tensor<'_>) -> Result<Vec<f32>, ModelError> {
    let mut out = vec![0.0; tensor.info.shape.iter().product()];
    dequantize(format_of(tensor)?, &checkpoint.read(tensor.bytes), &mut out);
    Ok(out)
}

/// (inputs, outputs) to (outputs, inputs), for plain formats.
pub(crate) fn transpose(tensor: Tensor<'_>, columns: usize, rows: usize) -> Result<Table<'_>, ModelError> {
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
    Ok(Table { name: &tensor.info.name, format, columns, bytes: Cow::Owned(bytes), scaled: None })
}
