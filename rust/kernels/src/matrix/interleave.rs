//! Panels of 16 whole rows, packed with vectors: the same bytes as word by word (`pack.rs`), and 1.4 (Q8_0, BF16) to 1.8 times (Q4_0) as
//! fast from memory to fresh memory on one thread (`examples/packing.rs`).

use super::Layout;
use super::pack::ask_ahead;
use crate::simd::{Kernel, LANES, Simd};

/// A panel of a layout whose words are those of its rows, or made of two of them.
pub(super) struct InterleavePanel<'a> {
    pub(super) layout: Layout,
    pub(super) rows: &'a [&'a [u8]; LANES],
    pub(super) weights: &'a mut [u8],
    pub(super) scales: &'a mut [u8],
}

impl InterleavePanel<'_> {
    /// Whether there is a way for this layout.
    pub(super) fn knows(layout: Layout) -> bool {
        matches!(layout, Layout::F32 | Layout::Bf16 | Layout::Int8 | Layout::Int4)
    }
}

impl Kernel for InterleavePanel<'_> {
    type Output = ();
    const MULTIPLIES_BYTES: bool = false;

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        match self.layout {
            Layout::F32 | Layout::Bf16 => self.words(simd),
            Layout::Int8 => self.int8(simd),
            Layout::Int4 => self.int4(simd),
            Layout::F16 | Layout::Coded(_) => unreachable!("layouts that are packed word by word"),
        }
    }
}

impl InterleavePanel<'_> {
    /// Words as they are; what is left of the rows, word by word and byte by byte.
    #[inline(always)]
    fn words<S: Simd>(self, simd: S) {
        let whole = self.rows[0].len() / 16;
        let (lines, rest) = self.weights.split_at_mut(whole * 256);
        for (part, lines) in lines.as_chunks_mut::<256>().0.iter_mut().enumerate() {
            if part % 4 == 0 {
                self.rows.iter().for_each(|row| ask_ahead(row, part * 16, 64));
            }
            let words = simd.transpose_words(sixteen(self.rows, part * 16));
            for (line, words) in lines.as_chunks_mut::<64>().0.iter_mut().zip(words) {
                simd.store_bytes(words, line);
            }
        }
        for (lane, row) in self.rows.iter().enumerate() {
            for (word, bytes) in row[whole * 16..].chunks(4).enumerate() {
                rest[(word * LANES + lane) * 4..][..bytes.len()].copy_from_slice(bytes);
            }
        }
    }

    #[inline(always)]
    fn int8<S: Simd>(self, simd: S) {
        let flip = simd.splat_i32(0x8080_8080_u32 as i32);
        let groups =
            self.weights.as_chunks_mut::<512>().0.iter_mut().zip(self.scales.as_chunks_mut::<32>().0);
        for (group, (weights, scales)) in groups.enumerate() {
            begin_blocks::<34>(self.rows, group, scales);
            for (half, lines) in weights.as_chunks_mut::<256>().0.iter_mut().enumerate() {
                let words = simd.transpose_words(sixteen(self.rows, group * 34 + 2 + 16 * half));
                for (line, words) in lines.as_chunks_mut::<64>().0.iter_mut().zip(words) {
                    simd.store_bytes(simd.xor_i32(words, flip), line);
                }
            }
        }
    }

    #[inline(always)]
    fn int4<S: Simd>(self, simd: S) {
        let groups =
            self.weights.as_chunks_mut::<256>().0.iter_mut().zip(self.scales.as_chunks_mut::<32>().0);
        for (group, (weights, scales)) in groups.enumerate() {
            begin_blocks::<18>(self.rows, group, scales);
            // Weights 0..16 are the low nibbles of the file's bytes, weights 16..32 the high ones.
            let words = simd.transpose_words(sixteen(self.rows, group * 18 + 2));
            let lines = weights.as_chunks_mut::<64>().0;
            for (pair, words) in words.as_chunks::<2>().0.iter().enumerate() {
                let [lows, highs] = pair_nibbles(simd, words);
                simd.store_bytes(lows, &mut lines[pair]);
                simd.store_bytes(highs, &mut lines[2 + pair]);
            }
        }
    }
}

/// Copies the scales at the begin of a block of each row, and asks for the next panel's block.
#[inline(always)]
fn begin_blocks<const BYTES: usize>(rows: &[&[u8]; LANES], block: usize, scales: &mut [u8; 32]) {
    for (row, scale) in rows.iter().zip(scales.as_chunks_mut::<2>().0) {
        ask_ahead(row, block * BYTES, BYTES);
        scale.copy_from_slice(&row.as_chunks::<BYTES>().0[block][..2]);
    }
}

/// The low halves of two vectors' bytes in one, those of the second above those of the first; and the high halves likewise.
#[inline(always)]
pub(super) fn pair_nibbles<S: Simd>(simd: S, words: &[S::I32; 2]) -> [S::I32; 2] {
    let (low, high) = (simd.splat_i32(0x0f0f_0f0f), simd.splat_i32(0xf0f0_f0f0_u32 as i32));
    [
        simd.or_i32(simd.and_i32(words[0], low), simd.shift_left(simd.and_i32(words[1], low), 4)),
        simd.or_i32(simd.and_i32(simd.shift_right(words[0], 4), low), simd.and_i32(words[1], high)),
    ]
}

/// Sixteen bytes of each row.
#[inline(always)]
pub(super) fn sixteen<'a>(rows: &[&'a [u8]; LANES], at: usize) -> [&'a [u8; 16]; LANES] {
    let mut out = [&[0; 16]; LANES];
    for (out, row) in out.iter_mut().zip(rows) {
        if let Some(bytes) = row[at..].first_chunk() {
            *out = bytes;
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::super::PackedMatrix;
    use super::super::pack::fill_words;
    use super::*;
    use crate::quant::sample_rows;
    use crate::{Format, Isa};

    #[test]
    fn vectors_pack_as_words_do() {
        for (format, widths) in [
            (Format::F32, [1, 8, 67, 256]),
            (Format::Bf16, [1, 8, 75, 256]),
            (Format::Q8_0, [32, 64, 96, 512]),
            (Format::Q4_0, [32, 64, 96, 512]),
        ] {
            for columns in widths {
                let rows = sample_rows(format, LANES, columns);
                let rows: Vec<&[u8]> = rows.iter().map(Vec::as_slice).collect();
                let mut words = PackedMatrix::empty(format, columns, LANES).expect("memory");
                let layout = words.layout();
                let [weights, scales] = words.parts_mut();
                fill_words(layout, &rows, weights, scales);
                for isa in Isa::available() {
                    let mut panel = PackedMatrix::empty(format, columns, LANES).expect("memory");
                    let [weights, scales] = panel.parts_mut();
                    let rows = rows.as_slice().try_into().expect("sixteen rows");
                    isa.dispatch(InterleavePanel { layout, rows, weights, scales });
                    assert!(panel.parts() == words.parts(), "{format:?}, {columns} columns, {}", isa.name());
                }
            }
        }
    }
}
