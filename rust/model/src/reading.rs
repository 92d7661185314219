//! Rows of a weight in the form in which a backend wants them.

use std::ops::Range;

use infer_kernels::{Format, dequantize, quantize};

use crate::ModelError;
use crate::table::{Source, Table};

/// The type in which an outside backend wants its weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PlainType {
    /// Exact.
    F32,
    /// Rounded to nearest, ties to even.
    Bf16,
}

impl PlainType {
    pub(crate) fn format(self) -> Format {
        match self {
            Self::F32 => Format::F32,
            Self::Bf16 => Format::Bf16,
        }
    }

    /// Bytes of one value.
    #[must_use]
    pub fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::Bf16 => 2,
        }
    }
}

/// In what form rows of a weight are read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RowForm {
    /// Converted to plain numbers.
    Plain(PlainType),
    /// In blocks of the format in which they are stored; 8-bit floats with scales without these, see [`crate::Blueprint::matrix_scales`].
    Stored,
}

impl RowForm {
    /// Bytes of a row of a table.
    pub(crate) fn row_bytes(self, table: &Table<'_>) -> usize {
        match self {
            Self::Plain(element) => table.columns * element.bytes(),
            Self::Stored => table.row_bytes(),
        }
    }
}

/// The rows of `width` bytes that `out` has room for.
pub(crate) fn check_rows(
    rows: usize,
    width: usize,
    first: usize,
    out: &[u8],
) -> Result<Range<usize>, ModelError> {
    let count = out.len() / width.max(1);
    match width > 0 && out.len().is_multiple_of(width) && first <= rows && count <= rows - first {
        true => Ok(first..first + count),
        false => Err(ModelError::Request(format!(
            "a weight of {rows} rows of {width} bytes does not have {} bytes from row {first} on",
            out.len()
        ))),
    }
}

/// Converts rows of one format, a share for each thread.
pub(crate) fn convert(
    source: &Source<'_>,
    rows: Range<usize>,
    form: RowForm,
    threads: usize,
    out: &mut [u8],
) {
    let width = form.row_bytes(&source.table).max(1);
    let rows: Vec<(usize, &[u8])> =
        source.row_numbers().iter().copied().zip(source.rows()).skip(rows.start).take(rows.len()).collect();
    let share = rows.len().div_ceil(threads.max(1)).max(1);
    let plainly =
        |element: PlainType| source.table.scaled.is_some() || source.table.format != element.format();
    std::thread::scope(|scope| {
        for (rows, out) in rows.chunks(share).zip(out.chunks_mut(share * width)) {
            scope.spawn(move || match form {
                RowForm::Plain(element) if plainly(element) => {
                    convert_rows(&source.table, rows, element, out);
                }
                _ => (rows.iter().zip(out.chunks_exact_mut(width)))
                    .for_each(|((_, row), out)| out.copy_from_slice(row)),
            });
        }
    });
}

fn convert_rows(table: &Table<'_>, rows: &[(usize, &[u8])], element: PlainType, out: &mut [u8]) {
    let mut values = vec![0.0; table.columns];
    let mut bytes = Vec::new();
    for ((number, row), out) in rows.iter().zip(out.chunks_exact_mut(table.columns * element.bytes())) {
        match table.scaled {
            Some(scaled) => scaled.decode(*number, row, &mut values),
            None => dequantize(table.format, row, &mut values),
        }
        bytes.clear();
        quantize(element.format(), &values, &mut bytes);
        out.copy_from_slice(&bytes);
    }
}
