//! Rounding of activations to 8 bits, a scale per span of groups.

use super::super::GROUP;
use super::{Rounding, Tiles, Totals};
use crate::Rows;
use crate::simd::{Kernel, LANES, Simd};

/// A tile that is rounded to bytes.
pub(super) struct QuantizeTile<'a> {
    pub(super) input: Rows<'a>,
    pub(super) tiles: Tiles,
    pub(super) tile: usize,
    pub(super) rounding: Rounding,
    pub(super) bytes: &'a mut [[u8; GROUP]],
    pub(super) scales: &'a mut [f32],
    pub(super) offsets: &'a mut [i32],
    pub(super) totals: &'a mut [f32],
    pub(super) total_pairs: &'a mut [i32],
}

impl Kernel for QuantizeTile<'_> {
    type Output = ();
    const MULTIPLIES_BYTES: bool = false;

    #[inline(always)]
    fn run<S: Simd>(mut self, simd: S) {
        let (width, rows) = (self.tiles.width(self.tile), self.tiles.rows(self.tile));
        for lane in 0..rows {
            let row = self.input.row(self.tiles.first(self.tile) + lane).as_chunks::<GROUP>().0;
            for (span, groups) in row.chunks(self.rounding.span).enumerate() {
                let (scale, inverse) = scale_of(simd, groups);
                self.scales[span * width + lane] = scale;
                for (index, values) in groups.iter().enumerate() {
                    let group = span * self.rounding.span + index;
                    let at = self.tiles.at(width, group, lane);
                    let sums = quantize_group(simd, values, inverse, &mut self.bytes[at]);
                    if self.tiles.are_full() && self.rounding.totals == Totals::None {
                        continue; // a matrix unit multiplies integers that are not offset
                    }
                    if self.rounding.halves {
                        self.sums(simd, (2 * group, width), lane, sums.0);
                        self.sums(simd, (2 * group + 1, width), lane, sums.1);
                    } else {
                        self.sums(simd, (group, width), lane, simd.add_i32(sums.0, sums.1));
                    }
                }
            }
        }
        for lane in rows..width {
            for group in 0..self.bytes.len() / width {
                self.bytes[self.tiles.at(width, group, lane)] = [0; GROUP];
            }
            self.scales.iter_mut().skip(lane).step_by(width).for_each(|scale| *scale = 0.0);
            self.offsets.iter_mut().skip(lane).step_by(width).for_each(|offset| *offset = 0);
            self.totals.iter_mut().skip(lane).step_by(width).for_each(|total| *total = 0.0);
            self.total_pairs.iter_mut().skip(lane).step_by(width).for_each(|pair| *pair = 0);
        }
    }
}

impl QuantizeTile<'_> {
    /// Notes what follows from the sums of a part's bytes per lane, given the part's number in the row and the tile's width; parts come in order.
    #[inline(always)]
    fn sums<S: Simd>(&mut self, simd: S, (part, width): (usize, usize), row: usize, lanes: S::I32) {
        let sum = simd.reduce_sum_i32(lanes);
        match self.rounding.totals {
            Totals::Floats => self.totals[part * width + row] = sum as f32,
            Totals::Pairs if part.is_multiple_of(2) => {
                self.total_pairs[part / 2 * width + row] = sum & 0xffff
            }
            Totals::Pairs => self.total_pairs[part / 2 * width + row] |= sum << 16,
            Totals::None => self.offsets[part * width + row] = self.rounding.weight_offset * sum,
        }
    }
}

/// The scale that makes the greatest magnitude of some groups 127, and what values are multiplied with for it. A NaN or
/// infinity makes the scale one, so that it reaches the result, and the values zeros; magnitudes below 127 / `f32::MAX` vanish.
#[inline(always)]
fn scale_of<S: Simd>(simd: S, groups: &[[f32; GROUP]]) -> (f32, Option<f32>) {
    let mut magnitudes = simd.splat_i32(0);
    for (low, high) in groups.iter().map(halves) {
        // As integers, magnitudes are ordered alike and a NaN is the greatest of all.
        let (low, high) = (simd.to_bits(simd.abs(simd.load(low))), simd.to_bits(simd.abs(simd.load(high))));
        magnitudes = simd.max_i32(magnitudes, simd.max_i32(low, high));
    }
    let greatest = f32::from_bits(simd.reduce_max_i32(magnitudes) as u32);
    let inverse = 127.0 / greatest;
    (greatest / 127.0, (greatest.is_finite() && inverse.is_finite()).then_some(inverse))
}

/// Rounds 32 values, multiplied with `inverse`, to bytes; the bytes of each half as integers.
#[inline(always)]
fn quantize_group<S: Simd>(
    simd: S,
    values: &[f32; GROUP],
    inverse: Option<f32>,
    bytes: &mut [u8; GROUP],
) -> (S::I32, S::I32) {
    let Some(inverse) = inverse else {
        *bytes = [0; GROUP];
        return (simd.splat_i32(0), simd.splat_i32(0));
    };
    let (low, high) = halves(values);
    let inverse = simd.splat(inverse);
    let low = simd.to_i32(simd.mul(simd.load(low), inverse));
    let high = simd.to_i32(simd.mul(simd.load(high), inverse));
    let (mut low_bytes, mut high_bytes) = ([0; LANES], [0; LANES]);
    simd.store_low_bytes(low, &mut low_bytes);
    simd.store_low_bytes(high, &mut high_bytes);
    bytes[..LANES].copy_from_slice(&low_bytes);
    bytes[LANES..].copy_from_slice(&high_bytes);
    (low, high)
}

#[inline(always)]
fn halves(values: &[f32; GROUP]) -> (&[f32; LANES], &[f32; LANES]) {
    let (low, high) = values.as_chunks::<LANES>().0.split_at(1);
    (&low[0], &high[0])
}

/// The oracle of the kernel above: every value rounded to 8 bits, and the scale of its span of groups.
#[cfg(test)]
pub(crate) fn round_ref(row: &[f32], span: usize) -> Vec<(f32, f32)> {
    row.chunks(span * GROUP)
        .flat_map(|values| {
            let greatest = values.iter().fold(0.0_f32, |greatest, value| greatest.max(value.abs()));
            let inverse = if greatest > 0.0 { 127.0 / greatest } else { 0.0 };
            values.iter().map(move |value| ((value * inverse).round_ties_even(), greatest / 127.0))
        })
        .collect()
}
