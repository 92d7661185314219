//! Integer panels times 8-bit activations.

use super::super::activations::IntegerTile;
use super::super::{GROUP, IntegerTiles, Output, PackedMatrix};
use super::block::{BLOCK, Integers};
use super::{Block, BlockKernel, Work};
use crate::simd::{Kernel, MatrixUnit, Simd, TILE_ROWS, TileShape, TileSums};
use std::ops::Range;

/// Products that are under way together, while as many others are scaled and added.
const SLOTS: usize = 2;

/// Some panels times all tiles, which are of 16 rows.
pub(crate) struct ByteTiles<'a> {
    /// The weights, in a layout of integers.
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
        let rounding = self.weight.layout().rounding();
        match rounding.map(|rounding| (rounding.halves, rounding.totals)) {
            Some((false, false)) if self.weight.layout().shares_scales() => {
                self.multiply::<S, 1, false, true>(simd)
            }
            Some((false, false)) => self.multiply::<S, 1, false, false>(simd),
            Some((false, true)) => self.multiply::<S, 1, true, false>(simd),
            Some((true, false)) => self.multiply::<S, 2, false, false>(simd),
            Some((true, true)) => self.multiply::<S, 2, true, false>(simd),
            None => unreachable!("a layout without integers"),
        }
    }
}

impl ByteTiles<'_> {
    #[inline(always)]
    fn multiply<S: Simd, const PARTS: usize, const MINIMA: bool, const SHARED: bool>(self, simd: S) {
        let unit = MatrixUnit::new(simd, TileShape { rows: TILE_ROWS, bytes: GROUP / PARTS });
        let (weight, input, integers) = (self.weight, self.input, Integers::new());
        let (span, exact) = (input.rounding.span, [Exact::default(); 2]);
        let kernel = Multiply::<S, PARTS, MINIMA, SHARED> { unit, weight, input, span, integers, exact };
        let work = Work { weight, tiles: input.tiles, output: self.output, panels: self.panels };
        work.run(simd, kernel);
    }
}

/// Exact sums of some groups, or halves of groups.
type Exact = [TileSums<i32>; SLOTS];

/// The kernel for groups of `PARTS` parts with their own scales.
struct Multiply<'a, S: Simd, const PARTS: usize, const MINIMA: bool, const SHARED: bool> {
    unit: MatrixUnit<S>,
    weight: &'a PackedMatrix,
    input: IntegerTiles<'a>,
    span: usize,
    integers: Integers,
    exact: [Exact; 2],
}

/// Sums of a panel with a tile.
struct Sums<S: Simd> {
    /// Of the spans of groups that are complete.
    complete: [S::F32; TILE_ROWS],
    /// Of the groups since, not yet times the scales of the activations.
    inner: [S::F32; TILE_ROWS],
    /// Of the groups since, where these share a scale and are added exactly.
    whole: [S::I32; TILE_ROWS],
}

impl<S: Simd, const PARTS: usize, const MINIMA: bool, const SHARED: bool> BlockKernel<S>
    for Multiply<'_, S, PARTS, MINIMA, SHARED>
{
    const PANELS: usize = 1;
    const TILES: usize = 1;

    #[inline(always)]
    fn groups(&self) -> usize {
        BLOCK
    }

    #[inline(always)]
    fn begin(&mut self, simd: S, block: &Block) {
        self.integers.read(simd, self.weight, block.panels.start, block.groups.clone());
    }

    /// The unit multiplies some groups while those before are scaled and added.
    #[inline(always)]
    fn multiply(&mut self, simd: S, block: &Block, tiles: Range<usize>, sums: &mut [TileSums<f32>]) {
        let tile = self.input.tile(tiles.start);
        let meeting = Meeting::<PARTS> {
            tile,
            span: self.span,
            integers: &self.integers,
            groups: block.groups.clone(),
        };
        let (kept, zero) = (&mut sums[0].0, simd.splat(0.0));
        let whole = [simd.splat_i32(0); TILE_ROWS];
        let mut sums = Sums { complete: [zero; TILE_ROWS], inner: [zero; TILE_ROWS], whole };
        for t in 0..TILE_ROWS {
            sums.complete[t] = simd.load(&kept[t]);
        }
        let [even, odd] = &mut self.exact;
        let count = meeting.count();
        meeting.multiply(&self.unit, 0, even);
        for first in (0..count).step_by(2 * SLOTS) {
            meeting.multiply(&self.unit, first + SLOTS, odd);
            meeting.add::<S, MINIMA, SHARED>(simd, first, even, &mut sums);
            meeting.multiply(&self.unit, first + 2 * SLOTS, even);
            meeting.add::<S, MINIMA, SHARED>(simd, first + SLOTS, odd, &mut sums);
        }
        for t in 0..TILE_ROWS {
            simd.store(sums.complete[t], &mut kept[t]);
        }
    }

    #[inline(always)]
    fn at(panel: usize, tile: usize, tiles: usize) -> usize {
        panel * tiles + tile
    }
}

/// A block that meets a tile.
struct Meeting<'a, const PARTS: usize> {
    tile: IntegerTile<'a>,
    span: usize,
    integers: &'a Integers,
    groups: Range<usize>,
}

impl<const PARTS: usize> Meeting<'_, PARTS> {
    /// Parts of the block's groups.
    #[inline(always)]
    fn count(&self) -> usize {
        self.groups.len() * PARTS
    }

    /// Exact sums of the parts from `first` on, as many as there are slots or parts.
    #[inline(always)]
    fn multiply<S: Simd>(&self, unit: &MatrixUnit<S>, first: usize, exact: &mut Exact) {
        if first < self.count() {
            self.multiply_one::<S, 0>(unit, first, exact);
        }
        if first + 1 < self.count() {
            self.multiply_one::<S, 1>(unit, first + 1, exact);
        }
    }

    #[inline(always)]
    fn multiply_one<S: Simd, const SLOT: usize>(&self, unit: &MatrixUnit<S>, part: usize, exact: &mut Exact) {
        let (group, half) = (part / PARTS, part % PARTS);
        let input = &self.tile.bytes[(self.groups.start + group) * TILE_ROWS..];
        let weights = &self.integers.bytes[group][half * 256..];
        unit.bytes::<SLOT>(input, half * 16, weights, &mut exact[SLOT]);
    }

    /// Adds those parts to the sums, of which there is one per row.
    #[inline(always)]
    fn add<S: Simd, const MINIMA: bool, const SHARED: bool>(
        &self,
        simd: S,
        first: usize,
        exact: &Exact,
        sums: &mut Sums<S>,
    ) {
        for (slot, exact) in exact.iter().enumerate() {
            let part = first + slot;
            if part < self.count() {
                self.add_one::<S, MINIMA, SHARED>(simd, part, exact, sums);
                if (part + 1).is_multiple_of(self.span * PARTS) {
                    self.complete::<S, SHARED>(simd, part / PARTS, sums);
                }
            }
        }
    }

    #[inline(always)]
    fn add_one<S: Simd, const MINIMA: bool, const SHARED: bool>(
        &self,
        simd: S,
        part: usize,
        exact: &TileSums<i32>,
        sums: &mut Sums<S>,
    ) {
        let (group, half) = (part / PARTS, part % PARTS);
        let scale = simd.load(&self.integers.scales[group][half]);
        for t in 0..TILE_ROWS {
            let exact = simd.load_i32(&exact.0[t]);
            match SHARED {
                true => sums.whole[t] = simd.add_i32(sums.whole[t], exact),
                false => sums.inner[t] = simd.mul_add(simd.to_f32(exact), scale, sums.inner[t]),
            }
        }
        if MINIMA {
            let minimum = simd.load(&self.integers.minima[group][half]);
            let totals = &self.tile.totals.as_chunks::<TILE_ROWS>().0[self.groups.start * PARTS + part];
            for t in 0..TILE_ROWS {
                sums.inner[t] = simd.mul_add(minimum, simd.splat(totals[t]), sums.inner[t]);
            }
        }
    }

    /// Completes the span that ends with this group of the block.
    #[inline(always)]
    fn complete<S: Simd, const SHARED: bool>(&self, simd: S, group: usize, sums: &mut Sums<S>) {
        let scale = simd.load(&self.integers.scales[group][0]);
        let row_scales =
            &self.tile.scales.as_chunks::<TILE_ROWS>().0[(self.groups.start + group) / self.span];
        for t in 0..TILE_ROWS {
            let inner = match SHARED {
                true => simd.mul(simd.to_f32(sums.whole[t]), scale),
                false => sums.inner[t],
            };
            sums.complete[t] = simd.mul_add(inner, simd.splat(row_scales[t]), sums.complete[t]);
            (sums.inner[t], sums.whole[t]) = (simd.splat(0.0), simd.splat_i32(0));
        }
    }
}
