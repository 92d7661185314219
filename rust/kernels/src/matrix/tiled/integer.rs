//! Integer panels times 8-bit activations.
//!
//! Where each group has a scale, a product of 16 rows, 16 outputs and a group takes the unit 16 cycles of about 90: instructions that
//! read and write tiles keep the processor's front end as busy as the vectors that scale sums, so that neither hides the other (a loop
//! of nothing else: 20 to write the sums, 18 to read tiles, 18 to 24 to scale and add). Keeping sums in registers, a panel by a tile, four
//! groups at a time, was no faster. Where four groups share a scale the unit adds them, two at a time, in 55 of 95 cycles.

use super::super::activations::{IntegerTile, Totals};
use super::super::coded;
use super::super::{GROUP, IntegerTiles, Output, PackedMatrix};
use super::block::{BLOCK, Integers};
use super::{Block, BlockKernel, Work, by_pairs};
use crate::simd::{Kernel, MatrixUnit, Simd, TILE_ROWS, TileShape, TileSums};
use std::ops::Range;

/// Columns of two groups, which lie side by side where groups share scales: see [`Tiles::full`](super::super::Tiles::full).
const PAIR: usize = 2 * GROUP;

/// Parts of groups whose exact sums, of two panels with two tiles, are kept until they are scaled and added: 16 KB.
const KEPT: usize = 4;

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
        match rounding.map(|rounding| (rounding.halves, rounding.totals != Totals::None)) {
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
        let bytes = if SHARED { PAIR } else { GROUP / PARTS };
        let unit = MatrixUnit::new(simd, TileShape { rows: TILE_ROWS, bytes });
        let (weight, input, integers) = (self.weight, self.input, [Integers::new(), Integers::new()]);
        let span = input.rounding.span;
        debug_assert!(BLOCK.is_multiple_of(span) && (!SHARED || (span * GROUP).is_multiple_of(PAIR)));
        let kept = Kept { exact: [TileSums::default(); 4 * KEPT], inner: [TileSums::default(); 4] };
        let kernel = Multiply::<S, PARTS, MINIMA, SHARED> { unit, weight, input, span, integers, kept };
        let work = Work { weight, tiles: input.tiles, output: self.output, panels: self.panels };
        work.run(simd, kernel);
    }
}

/// What two panels with two tiles need from one step to the next.
struct Kept {
    /// Exact sums of some parts of groups: (parts, 2 panels, tiles).
    exact: [TileSums<i32>; 4 * KEPT],
    /// Sums over a span's groups so far, not yet times the scales of the activations: (2 panels, tiles).
    inner: [TileSums<f32>; 4],
}

/// The kernel for groups of `PARTS` parts with their own scales: two panels by two tiles, or by one.
struct Multiply<'a, S: Simd, const PARTS: usize, const MINIMA: bool, const SHARED: bool> {
    unit: MatrixUnit<S>,
    weight: &'a PackedMatrix,
    input: IntegerTiles<'a>,
    span: usize,
    integers: [Integers; 2],
    kept: Kept,
}

impl<S: Simd, const PARTS: usize, const MINIMA: bool, const SHARED: bool> BlockKernel<S>
    for Multiply<'_, S, PARTS, MINIMA, SHARED>
{
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
            1 => self.part(simd, block, [tiles.start], sums),
            _ => self.part(simd, block, [tiles.start, tiles.start + 1], sums),
        }
    }

    #[inline(always)]
    fn at(panel: usize, tile: usize, tiles: usize) -> usize {
        by_pairs(panel, tile, tiles)
    }
}

impl<S: Simd, const PARTS: usize, const MINIMA: bool, const SHARED: bool>
    Multiply<'_, S, PARTS, MINIMA, SHARED>
{
    /// A block of two panels by `T` tiles. Of a panel alone the other one's sums mean nothing.
    #[inline(always)]
    fn part<const T: usize>(
        &mut self,
        simd: S,
        block: &Block,
        tiles: [usize; T],
        sums: &mut [TileSums<f32>],
    ) {
        let (tiles, span) = (tiles.map(|tile| self.input.tile(tile)), self.span);
        if SHARED {
            return self.spans(simd, block, tiles, sums);
        }
        let count = block.groups.len() * PARTS;
        for first in (0..count).step_by(KEPT) {
            let parts = first..count.min(first + KEPT);
            for (part, exact) in parts.clone().zip(self.kept.exact.chunks_exact_mut(2 * T)) {
                let (group, half) = (part / PARTS, part % PARTS);
                let input = tiles.map(|tile| &tile.bytes[(block.groups.start + group) * TILE_ROWS..]);
                let weights = [0, 1].map(|panel| &self.integers[panel].bytes[group][half * 256..]);
                self.unit.bytes::<T>(input, half * 16, weights, 1, exact);
            }
            for panel in 0..block.panels.len() {
                for (t, tile) in tiles.iter().enumerate() {
                    let (integers, start) = (&self.integers[panel], block.groups.start);
                    let end = (self.weight.groups() - start) * PARTS;
                    let meeting = Meeting::<PARTS, MINIMA> { tile: *tile, span, integers, start, end };
                    let at = panel * T + t;
                    let (exact, inner) = (&self.kept.exact[at..], &mut self.kept.inner[at]);
                    match span {
                        1 => meeting.add(simd, parts.clone(), exact, 2 * T, &mut sums[at]),
                        _ => meeting.add_span(simd, parts.clone(), exact, 2 * T, (inner, &mut sums[at])),
                    }
                }
            }
        }
    }

    /// The same where the groups of a span share a scale of weights as well: the unit adds them, exactly, two at a time.
    #[inline(always)]
    fn spans<const T: usize>(
        &mut self,
        simd: S,
        block: &Block,
        tiles: [IntegerTile<'_>; T],
        sums: &mut [TileSums<f32>],
    ) {
        let start = block.groups.start;
        let steps = self.span * GROUP / PAIR;
        for first in (0..block.groups.len()).step_by(self.span) {
            let input = tiles.map(|tile| &tile.bytes[(start + first) * TILE_ROWS..]);
            let weights = [0, 1].map(|panel| self.integers[panel].bytes[first..].as_flattened());
            self.unit.bytes::<T>(input, 0, weights, steps, &mut self.kept.exact);
            for panel in 0..block.panels.len() {
                for (t, tile) in tiles.iter().enumerate() {
                    let (integers, at) = (&self.integers[panel], panel * T + t);
                    let end = self.weight.groups() - start;
                    let meeting = Meeting::<1, false> { tile: *tile, span: self.span, integers, start, end };
                    meeting.add_shared(simd, first, &self.kept.exact[at], &mut sums[at]);
                }
            }
        }
    }
}

/// A block of a panel that meets a tile.
struct Meeting<'a, const PARTS: usize, const MINIMA: bool> {
    tile: IntegerTile<'a>,
    span: usize,
    integers: &'a Integers,
    start: usize, // first group of the block
    end: usize,   // parts from there to the row's end
}

/// Adds exact sums of parts, which are `step` apart, in order.
impl<const PARTS: usize, const MINIMA: bool> Meeting<'_, PARTS, MINIMA> {
    /// Groups have their own scales of activations.
    #[inline(always)]
    fn add<S: Simd>(
        &self,
        simd: S,
        parts: Range<usize>,
        exact: &[TileSums<i32>],
        step: usize,
        sums: &mut TileSums<f32>,
    ) {
        let mut complete = load(simd, sums);
        for (part, exact) in parts.zip(exact.iter().step_by(step)) {
            let scale = simd.load(&self.integers.scales[part / PARTS][part % PARTS]);
            let minimum = simd.load(&self.integers.minima[part / PARTS][part % PARTS]);
            let row_scales = self.row_scales(part);
            for t in 0..TILE_ROWS {
                let mut inner = simd.mul(simd.to_f32(simd.load_i32(&exact.0[t])), scale);
                if MINIMA {
                    inner = simd.mul_add(minimum, simd.splat(self.totals(part)[t]), inner);
                }
                complete[t] = simd.mul_add(inner, simd.splat(row_scales[t]), complete[t]);
            }
        }
        store(simd, complete, sums);
    }

    /// Several groups share a scale of activations: the inner sums over them go on from call to call.
    #[inline(always)]
    fn add_span<S: Simd>(
        &self,
        simd: S,
        parts: Range<usize>,
        exact: &[TileSums<i32>],
        step: usize,
        (inner, sums): (&mut TileSums<f32>, &mut TileSums<f32>),
    ) {
        let (last, per_span) = (parts.end - 1, self.span * PARTS);
        let begins = parts.start.is_multiple_of(per_span);
        let ends = parts.end.is_multiple_of(per_span) || parts.end == self.end;
        let mut own = match begins {
            true if MINIMA => self.minima(simd, parts.start),
            true => [simd.splat(0.0); TILE_ROWS],
            false => load(simd, inner),
        };
        for (part, exact) in parts.zip(exact.iter().step_by(step)) {
            let scale = simd.load(&self.integers.scales[part / PARTS][part % PARTS]);
            for (own, exact) in own.iter_mut().zip(&exact.0) {
                *own = simd.mul_add(simd.to_f32(simd.load_i32(exact)), scale, *own);
            }
        }
        match ends {
            true => self.complete(simd, last, own, sums),
            false => store(simd, own, inner),
        }
    }

    /// What the inner sums of a span begin with, given its first part.
    #[inline(always)]
    fn minima<S: Simd>(&self, simd: S, part: usize) -> [S::F32; TILE_ROWS] {
        let pairs = self.span * PARTS / 2;
        let totals = self.tile.total_pairs.as_chunks().0;
        let totals = &totals[(self.start * PARTS + part) / 2..][..pairs];
        let drops = &self.integers.drops[part / 2..][..pairs];
        let unit = simd.load(&self.integers.units[part / (self.span * PARTS)]);
        coded::minima(simd, totals, unit, |pair| simd.load_i32(&drops[pair]))
    }

    /// A span that begins with a part and shares a scale of weights as well, given its exact sums.
    #[inline(always)]
    fn add_shared<S: Simd>(&self, simd: S, part: usize, exact: &TileSums<i32>, sums: &mut TileSums<f32>) {
        let scale = simd.load(&self.integers.scales[part][0]);
        let mut inner = [scale; TILE_ROWS];
        for (inner, exact) in inner.iter_mut().zip(&exact.0) {
            *inner = simd.mul(simd.to_f32(simd.load_i32(exact)), scale);
        }
        self.complete(simd, part, inner, sums);
    }

    /// Adds the inner sums of the span that ends with a part.
    #[inline(always)]
    fn complete<S: Simd>(&self, simd: S, part: usize, inner: [S::F32; TILE_ROWS], sums: &mut TileSums<f32>) {
        let row_scales = self.row_scales(part);
        for t in 0..TILE_ROWS {
            let sum = simd.mul_add(inner[t], simd.splat(row_scales[t]), simd.load(&sums.0[t]));
            simd.store(sum, &mut sums.0[t]);
        }
    }

    /// The scales of the activations that a part is multiplied with.
    #[inline(always)]
    fn row_scales(&self, part: usize) -> &[f32; TILE_ROWS] {
        &self.tile.scales.as_chunks().0[(self.start + part / PARTS) / self.span]
    }

    /// The sums of their bytes.
    #[inline(always)]
    fn totals(&self, part: usize) -> &[f32; TILE_ROWS] {
        &self.tile.totals.as_chunks().0[self.start * PARTS + part]
    }
}

#[inline(always)]
fn load<S: Simd>(simd: S, sums: &TileSums<f32>) -> [S::F32; TILE_ROWS] {
    let mut vectors = [simd.splat(0.0); TILE_ROWS];
    for (vector, sums) in vectors.iter_mut().zip(&sums.0) {
        *vector = simd.load(sums);
    }
    vectors
}

#[inline(always)]
fn store<S: Simd>(simd: S, vectors: [S::F32; TILE_ROWS], sums: &mut TileSums<f32>) {
    for (vector, sums) in vectors.into_iter().zip(&mut sums.0) {
        simd.store(vector, sums);
    }
}
