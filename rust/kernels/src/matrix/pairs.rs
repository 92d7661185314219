//! Input rows rounded to bfloat16, two columns to a word: what [`super::BfloatLinear`] broadcasts.

use super::GROUP;
use super::activations::{Activations, Tiles, at_least};
use crate::rows::SharedSlice;
use crate::{Context, Rows};

/// Columns of a group, two by two.
const PAIRS: usize = GROUP / 2;

/// Tiles of pairs: (tiles, groups * 16 pairs of columns, rows of the tile); the low half of a word is the even column.
#[derive(Clone, Copy)]
pub(crate) struct PairTiles<'a> {
    /// How rows are cut.
    pub(crate) tiles: Tiles,
    groups: usize,
    pairs: &'a [u32],
}

impl<'a> PairTiles<'a> {
    /// The pairs of a tile: (pairs, width).
    #[inline(always)]
    pub(crate) fn tile(&self, tile: usize) -> &'a [u32] {
        let pairs = self.groups * PAIRS;
        &self.pairs[self.tiles.first(tile) * pairs..][..self.tiles.width(tile) * pairs]
    }
}

impl Activations {
    /// The rows as tiles of pairs of bfloat16, rounded to nearest even; a NaN stays one.
    pub(crate) fn pair(&mut self, context: &Context, input: Rows<'_>) -> PairTiles<'_> {
        let tiles = Tiles::new(context.isa, input.rows());
        let groups = input.width().div_ceil(GROUP);
        let count = groups * PAIRS;
        let shared = SharedSlice::new(at_least(&mut self.pairs, tiles.padded_rows() * count));
        context.pool.run(tiles.count(), |tile| {
            let width = tiles.width(tile);
            // SAFETY: tiles are disjoint.
            let pairs = unsafe { shared.part_mut(tiles.first(tile) * count, width * count) };
            match width {
                1 => pair_up::<1>(input, tiles, tile, pairs),
                2 => pair_up::<2>(input, tiles, tile, pairs),
                4 => pair_up::<4>(input, tiles, tile, pairs),
                _ => pair_up::<8>(input, tiles, tile, pairs),
            }
        });
        PairTiles { tiles, groups, pairs: &self.pairs }
    }
}

fn pair_up<const WIDTH: usize>(input: Rows<'_>, tiles: Tiles, tile: usize, pairs: &mut [u32]) {
    let pairs = pairs.as_chunks_mut::<WIDTH>().0;
    for lane in 0..WIDTH {
        let row = if lane < tiles.rows(tile) { input.row(tiles.first(tile) + lane) } else { &[] };
        let (whole, last) = row.as_chunks::<2>();
        let (present, missing) = pairs.split_at_mut(whole.len());
        for (out, &[even, odd]) in present.iter_mut().zip(whole) {
            out[lane] = round(even) >> 16 | round(odd) & 0xffff_0000;
        }
        missing.iter_mut().for_each(|out| out[lane] = 0);
        if let (Some(out), &[even]) = (missing.first_mut(), last) {
            out[lane] = round(even) >> 16;
        }
    }
}

/// The bits of a bfloat16 in the high half; what the low half holds is no part of it.
#[inline(always)]
pub(super) fn round(value: f32) -> u32 {
    let bits = value.to_bits();
    if bits & 0x7fff_ffff > 0x7f80_0000 { bits | 0x40_0000 } else { bits + 0x7fff + (bits >> 16 & 1) }
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
