//! Integer panels whose groups have each a scale, of weights and of activations, times 8-bit activations.
//!
//! A product of 16 rows, 16 outputs and a group takes the unit 16 cycles of about 90: instructions that read and write tiles keep the
//! processor's front end as busy as the vectors that scale sums, so that neither hides the other (a loop of nothing else: 20 to write the
//! sums, 18 to read tiles, 18 to 24 to scale and add). Keeping sums in registers, a panel by a tile, four groups at a time, was no faster.
//! So formats whose groups share a scale of activations are multiplied otherwise: see `spans`.

use super::super::activations::{IntegerTile, Totals};
use super::super::{GROUP, IntegerTiles, Output, PackedMatrix};
use super::block::{BLOCK, Integers};
use super::{Block, BlockKernel, Work, by_pairs};
use crate::simd::{Kernel, MatrixUnit, Simd, TILE_ROWS, TileShape, TileSums};
use std::ops::Range;

/// Groups whose exact sums, of two panels with two tiles, are kept until they are scaled and added: 16 KB.
const KEPT: usize = 4;

/// Some panels times all tiles, which are of 16 rows.
pub(crate) struct ByteTiles<'a> {
    /// The weights, in a layout of integers whose groups share nothing.
    pub(crate) weight: &'a PackedMatrix,
    /// The input rows.
    pub(crate) input: IntegerTiles<'a>,
    /// Where results go.
    pub(crate) output: Output<'a>,
    /// Which panels.
    pub(crate) panels: Range<usize>,
}

impl Kernel for ByteTiles<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        debug_assert_eq!(self.input.rounding.span, 1);
        match self.input.rounding.totals {
            Totals::None => self.multiply::<S, false>(simd),
            Totals::Floats | Totals::Pairs => self.multiply::<S, true>(simd),
        }
    }
}

impl ByteTiles<'_> {
    #[inline(always)]
    fn multiply<S: Simd, const MINIMA: bool>(self, simd: S) {
        let (weight, input, panels) = (self.weight, self.input, self.panels);
        let kernel = Multiply::<S, MINIMA> {
            unit: MatrixUnit::new(simd, TileShape { rows: TILE_ROWS, bytes: GROUP }),
            weight,
            input,
            integers: [Integers::new(), Integers::new()],
            exact: [TileSums::default(); 4 * KEPT],
        };
        Work { weight, tiles: input.tiles, output: self.output, panels }.run(simd, kernel);
    }
}

/// Two panels by two tiles, or by one.
struct Multiply<'a, S: Simd, const MINIMA: bool> {
    unit: MatrixUnit<S>,
    weight: &'a PackedMatrix,
    input: IntegerTiles<'a>,
    integers: [Integers; 2],
    exact: [TileSums<i32>; 4 * KEPT], // (groups, 2 panels, tiles)
}

impl<S: Simd, const MINIMA: bool> BlockKernel<S> for Multiply<'_, S, MINIMA> {
    const PANELS: usize = 2;
    const TILES: usize = 2;

    #[inline(always)]
    fn groups(&self) -> usize {
        BLOCK
    }

    #[inline(always)]
    fn begin(&mut self, simd: S, block: &Block) {
        for (integers, panel) in self.integers.iter_mut().zip(block.panels.clone()) {
            integers.read(simd, self.weight, panel, block.groups.clone());
        }
    }

    #[inline(always)]
    fn multiply(&mut self, simd: S, block: &Block, tiles: Range<usize>, sums: &mut [TileSums<f32>]) {
        match tiles.len() {
            1 => self.part(simd, block, [self.input.tile(tiles.start)], sums),
            _ => {
                let tiles = [self.input.tile(tiles.start), self.input.tile(tiles.start + 1)];
                self.part(simd, block, tiles, sums);
            }
        }
    }

    #[inline(always)]
    fn at(panel: usize, tile: usize, tiles: usize) -> usize {
        by_pairs(panel, tile, tiles)
    }
}

impl<S: Simd, const MINIMA: bool> Multiply<'_, S, MINIMA> {
    /// A block of two panels by `T` tiles. Of a panel alone the other one's sums mean nothing.
    #[inline(always)]
    fn part<const T: usize>(
        &mut self,
        simd: S,
        block: &Block,
        tiles: [IntegerTile<'_>; T],
        sums: &mut [TileSums<f32>],
    ) {
        let start = block.groups.start;
        for first in (0..block.groups.len()).step_by(KEPT) {
            let groups = first..block.groups.len().min(first + KEPT);
            for (group, exact) in groups.clone().zip(self.exact.chunks_exact_mut(2 * T)) {
                let input = std::array::from_fn(|t| &tiles[t].bytes[(start + group) * TILE_ROWS..]);
                let weights = [0, 1].map(|panel| &self.integers[panel].bytes[group][..]);
                self.unit.bytes::<T, false>(input, weights, 1, exact);
            }
            for panel in 0..block.panels.len() {
                for (t, tile) in tiles.iter().enumerate() {
                    let meeting = Meeting::<MINIMA> { tile: *tile, integers: &self.integers[panel], start };
                    let at = panel * T + t;
                    meeting.add(simd, groups.clone(), self.exact[at..].iter().step_by(2 * T), &mut sums[at]);
                }
            }
        }
    }
}

/// A block of a panel that meets a tile.
struct Meeting<'a, const MINIMA: bool> {
    tile: IntegerTile<'a>,
    integers: &'a Integers,
    start: usize, // first group of the block
}

impl<const MINIMA: bool> Meeting<'_, MINIMA> {
    /// Adds the exact sums of some groups, in order.
    #[inline(always)]
    fn add<'a, S: Simd>(
        &self,
        simd: S,
        groups: Range<usize>,
        exact: impl Iterator<Item = &'a TileSums<i32>>,
        sums: &mut TileSums<f32>,
    ) {
        let mut complete = [simd.splat(0.0); TILE_ROWS];
        for (complete, sums) in complete.iter_mut().zip(&sums.0) {
            *complete = simd.load(sums);
        }
        for (group, exact) in groups.zip(exact) {
            let scale = simd.load(&self.integers.scales[group]);
            let minimum = simd.load(&self.integers.minima[group]);
            let row_scales: &[f32; TILE_ROWS] = &self.tile.scales.as_chunks().0[self.start + group];
            let totals =
                if MINIMA { &self.tile.totals.as_chunks().0[self.start + group] } else { row_scales };
            for t in 0..TILE_ROWS {
                let mut inner = simd.mul(simd.to_f32(simd.load_i32(&exact.0[t])), scale);
                if MINIMA {
                    inner = simd.mul_add(minimum, simd.splat(totals[t]), inner);
                }
                complete[t] = simd.mul_add(inner, simd.splat(row_scales[t]), complete[t]);
            }
        }
        for (complete, sums) in complete.into_iter().zip(&mut sums.0) {
            simd.store(complete, sums);
        }
    }
}
