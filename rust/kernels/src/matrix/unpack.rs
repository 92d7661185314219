//! One row of a packed matrix as it was: an embedding that is also the head is then kept in memory once.

use half::{bf16, f16};

use super::{GROUP, Layout, PackedMatrix, coded};
use crate::simd::LANES;

impl PackedMatrix {
    /// Writes the exact values of one row, bit-equal to dequantizing the row that was packed.
    ///
    /// # Panics
    /// If there is no such row, or `out` is not as wide as the matrix.
    pub fn unpack_row(&self, row: usize, out: &mut [f32]) {
        assert!(
            row < self.rows && out.len() == self.columns,
            "row {row} of {} to {} columns",
            self.rows,
            out.len()
        );
        if let Some(bytes) = self.late_row(row) {
            return crate::dequantize(self.format, &bytes, out);
        }
        let (panel, lane) = (row / LANES, row % LANES);
        let weights = self.weights(panel..panel + 1);
        if let Layout::Coded(format) = self.layout {
            return coded::unpack_lane(format, weights, self.scale_bytes(panel), lane, out);
        }
        let half = |column: usize| [2 * column, 2 * column + 1].map(|at| weights[at]);
        let scale = |column: usize| f16::from_bits(self.scales(panel)[column / GROUP][lane]).to_f32();
        for (column, value) in out.iter_mut().enumerate() {
            *value = match self.layout {
                Layout::F32 => f32::from_le_bytes(weights.as_chunks().0[column * LANES + lane]),
                Layout::F16 => f16::from_le_bytes(half(column * LANES + lane)).to_f32(),
                Layout::Bf16 => {
                    bf16::from_le_bytes(half((column / 2 * LANES + lane) * 2 + column % 2)).to_f32()
                }
                Layout::Int8 => {
                    let byte = weights[(column / 4 * LANES + lane) * 4 + column % 4];
                    scale(column) * (i32::from(byte) - 128) as f32
                }
                Layout::Int4 => {
                    let byte = weights[(column / 8 * LANES + lane) * 4 + column % 4];
                    let nibble = if column % 8 < 4 { byte & 15 } else { byte >> 4 };
                    scale(column) * (i32::from(nibble) - 8) as f32
                }
                Layout::Coded(_) => unreachable!("unpacked above"),
            };
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::quant::sample_rows;
    use crate::{Context, Format, PackedMatrix, dequantize};

    #[test]
    fn rows_come_back_bit_for_bit() {
        let context = Context::new(2).expect("threads");
        for &format in Format::ALL {
            let block = format.block_len();
            for columns in if block == 1 { [32, 96, 37] } else { [block, 3 * block, 4 * block] } {
                let rows = sample_rows(format, 35, columns);
                let slices: Vec<&[u8]> = rows.iter().map(Vec::as_slice).collect();
                let matrix = PackedMatrix::pack(&context, format, columns, &slices, &()).expect("packs");
                for (row, bytes) in rows.iter().enumerate() {
                    let (mut found, mut expected) = (vec![0.0; columns], vec![0.0; columns]);
                    matrix.unpack_row(row, &mut found);
                    dequantize(format, bytes, &mut expected);
                    let bits =
                        |values: &[f32]| values.iter().map(|value| value.to_bits()).collect::<Vec<_>>();
                    // Zero has two signs: a scale times quant 0 is +0 or -0 in both.
                    assert_eq!(bits(&found), bits(&expected), "{format:?} {columns} columns, row {row}");
                }
            }
        }
    }
}
