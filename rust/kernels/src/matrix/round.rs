//! WeightRounding to a smaller format on the way into panels, or into bytes for a file: row by row, in parallel, so that no more than
//! a panel per thread exists twice. A row's rounding depends on that row alone: a matrix that is rounded while it is packed is, bit
//! for bit, the one that was rounded into a file and packed from there.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use super::{PackedMatrix, RowHolder};
use crate::quant::quantize_with;
use crate::simd::LANES;
use crate::{Context, Format, Isa, KernelError, dequantize};

/// The greatest magnitude of a weight: beyond it not even a scale of half precision reaches.
const GREATEST: f32 = 65504.0;

/// From one format to another.
pub(super) struct WeightRounding {
    isa: Isa,
    from: Format,
    to: Format,
    columns: usize,
    /// A weight was no number that can be rounded.
    refused: AtomicBool,
}

impl WeightRounding {
    /// # Errors
    /// When `to` has no quantizer, or `columns` is no whole number of its blocks.
    fn new(
        context: &Context,
        from: Format,
        to: Format,
        columns: usize,
    ) -> Result<WeightRounding, KernelError> {
        let expected = match (to.is_writable(), to.row_bytes(columns)) {
            (false, _) => "one with a quantizer".to_owned(),
            (true, None) => format!("a multiple of {} for {}", to.block_len(), to.name()),
            (true, Some(_)) => {
                return Ok(WeightRounding {
                    isa: context.isa,
                    from,
                    to,
                    columns,
                    refused: AtomicBool::new(false),
                });
            }
        };
        Err(KernelError::Size { what: "number of columns", actual: columns, expected })
    }

    /// Appends a row, rounded.
    fn append(&self, row: &[u8], out: &mut Vec<u8>) {
        let mut values = vec![0.0; self.columns];
        dequantize(self.from, row, &mut values);
        if !values.iter().all(|value| value.abs() <= GREATEST) {
            self.refused.store(true, Ordering::Relaxed);
        }
        quantize_with(self.isa, self.to, &values, out);
    }

    /// Some rows, rounded, one after the other.
    pub(super) fn rows(&self, rows: &[&[u8]]) -> Vec<u8> {
        let mut out = Vec::with_capacity(rows.len() * self.to.row_bytes(self.columns).unwrap_or(0));
        rows.iter().for_each(|row| self.append(row, &mut out));
        out
    }

    fn check(&self) -> Result<(), KernelError> {
        match self.refused.load(Ordering::Relaxed) {
            true => Err(KernelError::Weight { format: self.to.name() }),
            false => Ok(()),
        }
    }
}

impl PackedMatrix {
    /// Packs a matrix as [`PackedMatrix::pack`] does, its rows rounded from one format to another.
    ///
    /// # Errors
    /// As there; when `to` has no quantizer; and when a weight is not finite or exceeds half precision.
    pub fn round(
        context: &Context,
        from: Format,
        to: Format,
        columns: usize,
        rows: &[&[u8]],
        holder: &dyn RowHolder,
    ) -> Result<PackedMatrix, KernelError> {
        super::pack::check(from, columns, rows)?;
        let rounding = WeightRounding::new(context, from, to, columns)?;
        let mut matrix = PackedMatrix::empty(to, columns, rows.len())?;
        super::pack::fill(context, &mut matrix, rows, Some(&rounding), holder);
        rounding.check()?;
        Ok(matrix)
    }
}

/// The rows of a matrix, rounded from one format to another, one after the other.
///
/// # Errors
/// As [`PackedMatrix::round`].
pub fn round_rows(
    context: &Context,
    from: Format,
    to: Format,
    columns: usize,
    rows: &[&[u8]],
) -> Result<Vec<u8>, KernelError> {
    super::pack::check(from, columns, rows)?;
    let rounding = WeightRounding::new(context, from, to, columns)?;
    let row_bytes = to.row_bytes(columns).unwrap_or(0);
    let mut out = vec![0; rows.len() * row_bytes];
    if !out.is_empty() {
        let chunks: Vec<_> =
            out.chunks_mut(LANES * row_bytes).zip(rows.chunks(LANES)).map(Mutex::new).collect();
        context.pool.run(chunks.len(), |index| {
            let mut chunk = chunks[index].lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            let (out, rows) = &mut *chunk;
            out.copy_from_slice(&rounding.rows(rows));
        });
    }
    rounding.check()?;
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quant::{sample_rows, sample_values};

    fn unpacked(matrix: &PackedMatrix) -> Vec<u32> {
        let mut row = vec![0.0; matrix.columns()];
        let mut bits = Vec::new();
        for index in 0..matrix.rows() {
            matrix.unpack_row(index, &mut row);
            bits.extend(row.iter().map(|value| value.to_bits()));
        }
        bits
    }

    #[test]
    fn rounded_in_passing_and_rounded_before_are_the_same() {
        let columns = 256;
        for from in [Format::F32, Format::F16, Format::Bf16] {
            let rows = sample_rows(from, 37, columns);
            let rows: Vec<&[u8]> = rows.iter().map(Vec::as_slice).collect();
            for to in Format::ALL.iter().copied().filter(|to| to.is_writable() && !to.is_float()) {
                for threads in [1, 3] {
                    let context = Context::new(threads).expect("threads");
                    let direct = PackedMatrix::round(&context, from, to, columns, &rows, &()).expect("packs");
                    let bytes = round_rows(&context, from, to, columns, &rows).expect("rounds");
                    let rounded: Vec<&[u8]> = bytes.chunks(to.row_bytes(columns).expect("whole")).collect();
                    let later = PackedMatrix::pack(&context, to, columns, &rounded, &()).expect("packs");
                    assert_eq!(direct.format(), to);
                    assert!(unpacked(&direct) == unpacked(&later), "{from:?} {to:?}");
                    // The oracle: one row, without threads and vectors.
                    let (mut values, mut alone) = (vec![0.0; columns], Vec::new());
                    dequantize(from, rows[20], &mut values);
                    crate::quantize(to, &values, &mut alone);
                    assert_eq!(rounded[20], alone, "{from:?} {to:?}");
                }
            }
        }
    }

    #[test]
    fn what_cannot_be_rounded_is_refused() {
        let context = Context::new(2).expect("threads");
        for wrong in [f32::NAN, f32::INFINITY, 70000.0] {
            let mut values = sample_values(4 * 128);
            values[300] = wrong;
            let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
            let rows: Vec<&[u8]> = bytes.chunks(128 * 4).collect();
            let error =
                PackedMatrix::round(&context, Format::F32, Format::Q8_0, 128, &rows, &()).unwrap_err();
            assert!(error.to_string().contains("not finite"), "{error}");
            let error = round_rows(&context, Format::F32, Format::INT4_G128, 128, &rows).unwrap_err();
            assert!(error.to_string().contains("INT4_G128"), "{error}");
        }
        let row = [0_u8; 64 * 4];
        let error = round_rows(&context, Format::F32, Format::INT4_G128, 64, &[&row]).unwrap_err();
        assert_eq!(error.to_string(), "number of columns is 64, expected a multiple of 128 for INT4_G128");
        let error = round_rows(&context, Format::F32, Format::IQ1_S, 64, &[&row]).unwrap_err();
        assert!(error.to_string().contains("quantizer"), "{error}");
    }
}
