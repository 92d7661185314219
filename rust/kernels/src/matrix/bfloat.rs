//! Panels of bfloat16 times activations rounded to bfloat16, for instruction sets that multiply pairs of them. A sum is one chain over
//! the columns: two at a time, the odd one first, each addition rounded to `f32`.

use super::activations::Value;
use super::ahead::{AHEAD, NextPanel};
use super::{GROUP, Output, PackedMatrix, RowTiles};
use crate::simd::{Kernel, Simd};
use std::ops::Range;

/// Two columns of a row rounded to bfloat16: the even one in the low half.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Pair(u32);

impl Value for Pair {
    const COLUMNS: usize = 2;
    fn of(row: &[f32]) -> impl Iterator<Item = Pair> {
        let (pairs, last) = row.as_chunks::<2>();
        let whole = pairs.iter().map(|&[even, odd]| Pair(round(even) >> 16 | round(odd) & 0xffff_0000));
        whole.chain(last.iter().map(|&even| Pair(round(even) >> 16)))
    }
}

/// The bits of the nearest bfloat16, ties to even, in the high half; what the low half holds is no part of it. A NaN stays one.
/// (`half` gives the same with branches, which costs a prompt of bfloat16 weights 4 % of its speed.)
#[inline(always)]
fn round(value: f32) -> u32 {
    let bits = value.to_bits();
    let nearest = bits.wrapping_add(0x7fff + (bits >> 16 & 1));
    if bits & 0x7fff_ffff > 0x7f80_0000 { bits | 0x40_0000 } else { nearest }
}

/// Some panels times all tiles.
pub(crate) struct BfloatLinear<'a> {
    /// The weights, in the layout Bf16.
    pub(crate) weight: &'a PackedMatrix,
    /// The input rows.
    pub(crate) input: RowTiles<'a, Pair>,
    /// Where results go.
    pub(crate) output: Output<'a>,
    /// Which panels.
    pub(crate) panels: Range<usize>,
}

impl Kernel for BfloatLinear<'_> {
    type Output = ();
    const MULTIPLIES_BYTES: bool = false;

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let mut panel = self.panels.start;
        while panel < self.panels.end {
            let two = self.panels.end - panel >= 2;
            let count = self.input.tiles.count();
            for tile in 0..count {
                match (self.input.tiles.width(tile), two) {
                    (1, true) => self.tile::<S, 1, 2, false>(simd, panel, tile),
                    (2, true) => self.tile::<S, 2, 2, false>(simd, panel, tile),
                    (4, true) => self.tile::<S, 4, 2, false>(simd, panel, tile),
                    (_, true) if count == 1 => self.tile::<S, 8, 2, false>(simd, panel, tile),
                    (_, true) => self.tile::<S, 8, 2, true>(simd, panel, tile),
                    (1, false) => self.tile::<S, 1, 1, false>(simd, panel, tile),
                    (2, false) => self.tile::<S, 2, 1, false>(simd, panel, tile),
                    (4, false) => self.tile::<S, 4, 1, false>(simd, panel, tile),
                    (_, false) => self.tile::<S, 8, 1, false>(simd, panel, tile),
                }
            }
            panel += if two { 2 } else { 1 };
        }
    }
}

impl BfloatLinear<'_> {
    /// `P` panels by one tile of `T` rows, over all columns.
    #[inline(always)]
    fn tile<S: Simd, const T: usize, const P: usize, const SEVERAL: bool>(
        &self,
        simd: S,
        panel: usize,
        tile: usize,
    ) {
        let weights = self.weight.weights(panel..panel + P);
        let steps = self.weight.groups() * GROUP / 2;
        let next = NextPanel::<SEVERAL>::new(weights, steps, tile, self.input.tiles.count());
        let sums = multiply::<S, T, P, SEVERAL>(simd, weights, steps, self.input.tile(tile), next);
        for (p, sums) in sums.iter().enumerate() {
            self.output.store(simd, panel + p, self.input.tiles, tile, sums, true);
        }
    }
}

/// The sums of `P` panels with `T` rows. `weights` is (P, steps, 64 bytes), `input` (steps, T).
#[inline(always)]
#[allow(clippy::needless_range_loop)] // indices say which of several arrays' elements meet
fn multiply<S: Simd, const T: usize, const P: usize, const SEVERAL: bool>(
    simd: S,
    weights: &[u8],
    steps: usize,
    input: &[Pair],
    next: NextPanel<SEVERAL>,
) -> [[S::F32; T]; P] {
    let input = &input.as_chunks::<T>().0[..steps];
    assert!(weights.len() >= P * steps * 64);
    let mut sums = [[simd.splat(0.0); T]; P];
    for (step, pairs) in input.iter().enumerate() {
        next.fetch(simd, step);
        for p in 0..P {
            let at = weights.as_ptr().wrapping_add((p * steps + step) * 64);
            simd.prefetch(at.wrapping_add(AHEAD));
            // SAFETY: checked above.
            let words = unsafe { simd.load_bytes(at) };
            for t in 0..T {
                sums[p][t] = simd.dot_bf16(sums[p][t], words, pairs[t].0);
            }
        }
    }
    sums
}

#[cfg(test)]
mod tests {
    use super::*;
    use half::bf16;

    #[test]
    fn rounding_equals_the_library() {
        let specials = [0.0, -0.0, f32::NAN, f32::INFINITY, f32::MAX, f32::MIN_POSITIVE, 1e-40];
        let edges = (0..4000_u32).map(|n| f32::from_bits(0x3f80_0000 + n * 0x1fff));
        for value in specials.into_iter().chain(edges) {
            let (own, expected) = ((round(value) >> 16) as u16, bf16::from_f32(value));
            assert!(own == expected.to_bits() || value.is_nan() && bf16::from_bits(own).is_nan(), "{value}");
        }
    }
}
