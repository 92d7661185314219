//! Integer panels whose groups share a scale of activations, over a span of them, times 8-bit activations: the unit adds a whole span, exactly,
//! two groups an instruction, before vectors touch it.
//!
//! Where the groups of a span share a scale of weights too, it multiplies two panels. Where their scales are integers, steps of a unit, it multiplies
//! two planes of one panel (`scaled`) as it does two panels, and a sum is 256 times that of the high bytes plus that of the low ones. That is
//! two products where groups added by vectors need one for each of them or, in Q6_K, for each half, but those vectors, and writing out what
//! they read, take four times as long as a product (512 rows of Q6_K 2.1 to 2.2 times as fast).

use super::super::activations::IntegerTile;
use super::super::coded;
use super::super::integer;
use super::super::{GROUP, IntegerTiles, Layout, Output, PackedMatrix};
use super::block::{BLOCK, Bytes, read_codes};
use super::scaled::Scaled;
use super::{Block, BlockKernel, PANELS, Work, by_pairs, parts};
use crate::quant::Scales;
use crate::simd::{Kernel, LANES, MatrixUnit, Simd, TILE_ROWS, TileShape, TileSums};
use std::marker::PhantomData;
use std::ops::Range;

/// Groups that lie side by side: see [`Tiles::full`](super::super::Tiles::full).
const PAIR: usize = 2;

/// Pairs of parts of a span, at most.
const MOST_DROPS: usize = 8;

/// Some panels times all tiles, which are of 16 rows.
pub(crate) struct SpanTiles<'a> {
    /// The weights, in a layout of integers whose groups share a scale of activations.
    pub(crate) weight: &'a PackedMatrix,
    /// The input rows.
    pub(crate) input: IntegerTiles<'a>,
    /// Where results go.
    pub(crate) output: Output<'a>,
    /// Which panels.
    pub(crate) panels: Range<usize>,
}

impl Kernel for SpanTiles<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        match self.weight.layout() {
            Layout::Int4 => self.multiply::<S, RowSteps>(simd),
            Layout::Coded(format) => match format.scales {
                Scales::Shared => self.multiply::<S, Shared>(simd),
                Scales::Steps { halves: false } => self.multiply::<S, Steps>(simd),
                Scales::Steps { halves: true } => self.multiply::<S, HalfSteps>(simd),
                Scales::StepsDrops { halves: false } => self.multiply::<S, StepsDrops>(simd),
                Scales::StepsDrops { halves: true } => self.multiply::<S, HalfStepsDrops>(simd),
                Scales::Half | Scales::Brain | Scales::HalfMinimum => unreachable!("groups share nothing"),
            },
            Layout::Int8 | Layout::F32 | Layout::F16 | Layout::Bf16 => unreachable!("groups share nothing"),
        }
    }
}

impl SpanTiles<'_> {
    #[inline(always)]
    fn multiply<S: Simd, K: Kind>(self, simd: S) {
        let (weight, input, panels) = (self.weight, self.input, self.panels);
        const { assert!(BLOCK.is_multiple_of(K::SPAN) && K::SPAN.is_multiple_of(PAIR)) };
        debug_assert_eq!(input.rounding.span, K::SPAN);
        let mut kernel = Multiply::<S, K> {
            unit: MatrixUnit::new(simd, TileShape { rows: TILE_ROWS, bytes: PAIR * GROUP }),
            weight,
            input,
            weights: Planes([[[0; GROUP * LANES]; BLOCK]; 2]),
            units: [[[0.0; LANES]; BLOCK]; 2],
            row_units: [[0.0; LANES]; PANELS],
            drops: [[0; LANES]; BLOCK],
            exact: [[TileSums::default(); 4]; 2],
            kind: PhantomData,
        };
        match input.tiles.count() {
            1 => kernel.stream::<1>(simd, &self.output, panels),
            2 => kernel.stream::<2>(simd, &self.output, panels),
            _ => Work { weight, tiles: input.tiles, output: self.output, panels }.run(simd, kernel),
        }
    }
}

/// What the groups of a span share.
pub(super) trait Kind {
    /// Scales of the coded layout, or none: those of Int4, steps of a unit of their row.
    const SCALES: Option<Scales>;
    /// Groups of a span.
    const SPAN: usize = match Self::SCALES {
        Some(scales) => coded::span(scales),
        None => integer::INT4_SPAN,
    };
    /// Planes of a panel: two where weights are multiplied with steps.
    const PLANES: usize = match Self::SCALES {
        Some(Scales::Shared) => 1,
        _ => 2,
    };
    /// Pairs of parts whose minima, counted in steps too, a span subtracts.
    const DROPS: usize = match Self::SCALES {
        Some(Scales::StepsDrops { halves: false }) => MOST_DROPS / 2,
        Some(Scales::StepsDrops { halves: true }) => MOST_DROPS,
        _ => 0,
    };
}

/// The kinds that there are.
macro_rules! kinds {
    ($($kind:ident $scales:expr;)*) => {$(
        struct $kind;
        impl Kind for $kind {
            const SCALES: Option<Scales> = $scales;
        }
    )*};
}

kinds! {
    RowSteps None;
    Shared Some(Scales::Shared);
    Steps Some(Scales::Steps { halves: false });
    HalfSteps Some(Scales::Steps { halves: true });
    StepsDrops Some(Scales::StepsDrops { halves: false });
    HalfStepsDrops Some(Scales::StepsDrops { halves: true });
}

/// What the unit multiplies with at once: two panels, or two planes of one.
#[repr(C, align(64))]
struct Planes([Bytes; 2]);

/// One panel or two by two tiles, or by one.
pub(super) struct Multiply<'a, S: Simd, K> {
    unit: MatrixUnit<S>,
    pub(super) weight: &'a PackedMatrix,
    pub(super) input: IntegerTiles<'a>,
    weights: Planes,
    units: [[[f32; LANES]; BLOCK]; 2], // of spans: (2 panels, spans, 16); or of scales, and of minima
    row_units: [[f32; LANES]; PANELS], // of panels whose sums are kept together
    drops: [[i32; LANES]; BLOCK],      // steps of minima, two parts to a number: (pairs of parts, 16)
    exact: [[TileSums<i32>; 4]; 2],    // of two spans, in a stream: (2 panels or planes, tiles)
    kind: PhantomData<K>,
}

impl<S: Simd, K: Kind> BlockKernel<S> for Multiply<'_, S, K> {
    const PANELS: usize = 2 / K::PLANES;
    const TILES: usize = 2;

    #[inline(always)]
    fn groups(&self) -> usize {
        BLOCK
    }

    #[inline(always)]
    fn begin(&mut self, simd: S, block: &Block) {
        self.read(simd, block, 0, false);
        self.read_units(simd, block);
    }

    #[inline(always)]
    fn multiply(&mut self, simd: S, block: &Block, tiles: Range<usize>, sums: &mut [TileSums<f32>]) {
        match tiles.len() {
            1 => self.part(simd, block, &[self.input.tile(tiles.start)], sums),
            _ => {
                let tiles = [self.input.tile(tiles.start), self.input.tile(tiles.start + 1)];
                self.part(simd, block, &tiles, sums);
            }
        }
    }

    #[inline(always)]
    fn at(panel: usize, tile: usize, tiles: usize) -> usize {
        match K::PLANES {
            1 => by_pairs(panel, tile, tiles),
            _ => panel * tiles + tile,
        }
    }

    #[inline(always)]
    fn finish(&self, simd: S, panel: usize, sum: S::F32) -> S::F32 {
        if K::SCALES.is_some() { sum } else { simd.mul(sum, simd.load(&self.row_units[panel % PANELS])) }
    }
}

impl<S: Simd, K: Kind> Multiply<'_, S, K> {
    /// Reads weights of a block; its first group takes place `at`. A group that is missing in the last pair gets zeros. `ahead`: asks for those
    /// some way after them.
    #[inline(always)]
    pub(super) fn read(&mut self, simd: S, block: &Block, at: usize, ahead: bool) {
        let (weight, groups, [low, high]) = (self.weight, &block.groups, &mut self.weights.0);
        let end = at + groups.len();
        if K::PLANES == 1 {
            for (panel, bytes) in block.panels.clone().zip([low, high]) {
                read_codes(simd, weight, panel, groups, &mut bytes[at..end], ahead);
            }
            return;
        }
        if !groups.len().is_multiple_of(PAIR) {
            (low[end], high[end]) = ([0; GROUP * LANES], [0; GROUP * LANES]);
        }
        let planes = [&mut low[at..end], &mut high[at..end]];
        let mut place = Scaled::<S, K>::new(simd, weight, block.panels.start, groups.start, planes);
        read_codes(simd, weight, block.panels.start, groups, &mut place, ahead);
    }

    /// Reads what the scales of a block's spans or rows are, or are counted in, and their minima.
    #[inline(always)]
    pub(super) fn read_units(&mut self, simd: S, block: &Block) {
        for (index, panel) in block.panels.clone().enumerate() {
            let (Some(kind), Layout::Coded(format)) = (K::SCALES, self.weight.layout()) else {
                self.row_units[panel % PANELS] = *self.weight.units(panel);
                continue;
            };
            let (factor, scales) = (format.factor, self.weight.scale_bytes(panel));
            for (at, group) in block.groups.clone().step_by(K::SPAN).enumerate() {
                let units = coded::load_units(simd, kind, factor, scales, group);
                simd.store(units.scale, &mut self.units[index][at]);
                if K::DROPS > 0 {
                    simd.store(simd.mul(units.minimum, simd.splat(-1.0)), &mut self.units[1][at]);
                    let record = coded::record_of(kind, scales, group);
                    for (pair, drops) in self.drops[at * K::DROPS..][..K::DROPS].iter_mut().enumerate() {
                        simd.store_i32(coded::load_drops(simd, kind, record, pair), drops);
                    }
                }
            }
        }
    }

    /// A block of a panel, or of two, by `T` tiles. Of a panel alone the other one's sums mean nothing.
    #[inline(always)]
    fn part<const T: usize>(
        &mut self,
        simd: S,
        block: &Block,
        tiles: &[IntegerTile<'_>; T],
        sums: &mut [TileSums<f32>],
    ) {
        for (span, groups) in parts(block.groups.clone(), K::SPAN).enumerate() {
            let block = Block { panels: block.panels.clone(), groups };
            self.multiply_span(&block, span * K::SPAN, tiles, 0);
            self.add_span(simd, &block, span, tiles, 0, sums);
        }
    }

    /// The exact sums of a span whose weights are at `at` with `T` tiles.
    #[inline(always)]
    pub(super) fn multiply_span<const T: usize>(
        &mut self,
        span: &Block,
        at: usize,
        tiles: &[IntegerTile<'_>; T],
        kept: usize,
    ) {
        let input = std::array::from_fn(|t| &tiles[t].bytes[span.groups.start * TILE_ROWS..]);
        let weights = [0, 1].map(|plane| self.weights.0[plane][at..].as_flattened());
        let (steps, exact) = (span.groups.len().div_ceil(PAIR), &mut self.exact[kept]);
        match K::PLANES {
            1 => self.unit.bytes::<T, false>(input, weights, steps, exact),
            _ => self.unit.bytes::<T, true>(input, weights, steps, exact),
        }
    }

    /// Adds the exact sums of a span, the block's `at`th.
    #[inline(always)]
    pub(super) fn add_span<const T: usize>(
        &self,
        simd: S,
        span: &Block,
        at: usize,
        tiles: &[IntegerTile<'_>; T],
        kept: usize,
        sums: &mut [TileSums<f32>],
    ) {
        let exact = self.exact[kept].as_chunks::<T>().0;
        for panel in 0..span.panels.len() {
            for (t, tile) in tiles.iter().enumerate() {
                let exact = [&exact[panel][t], &exact[1][t]];
                self.add(
                    simd,
                    tile,
                    exact,
                    (panel, at),
                    span.groups.start / K::SPAN,
                    &mut sums[panel * T + t],
                );
            }
        }
    }

    /// Adds the exact sums of span `span` of a panel and a tile, or those of both planes; its units are the `at`th.
    #[inline(always)]
    fn add(
        &self,
        simd: S,
        tile: &IntegerTile<'_>,
        exact: [&TileSums<i32>; 2],
        (panel, at): (usize, usize),
        span: usize,
        sums: &mut TileSums<f32>,
    ) {
        let unit = simd.load(&self.units[panel][at]);
        let row_scales: &[f32; TILE_ROWS] = &tile.scales.as_chunks().0[span];
        let (mut drops, mut drop_unit, mut totals) = ([simd.splat_i32(0); MOST_DROPS], unit, &[][..]);
        if K::DROPS > 0 {
            for (drops, own) in drops.iter_mut().zip(&self.drops[at * K::DROPS..][..K::DROPS]) {
                *drops = simd.load_i32(own);
            }
            drop_unit = simd.load(&self.units[1][at]);
            totals = &tile.total_pairs.as_chunks::<TILE_ROWS>().0[span * K::DROPS..][..K::DROPS];
        }
        for row in 0..TILE_ROWS {
            let mut whole = simd.load_i32(&exact[0].0[row]);
            if K::PLANES == 2 {
                whole = simd.add_i32(whole, simd.shift_left(simd.load_i32(&exact[1].0[row]), 8));
            }
            let mut inner = simd.to_f32(whole);
            if K::SCALES.is_some() {
                inner = simd.mul(inner, unit);
            }
            if K::DROPS > 0 {
                let mut dropped = simd.splat_i32(0);
                for (drops, totals) in drops.iter().zip(totals) {
                    dropped = simd.dot_i16(dropped, *drops, totals[row]);
                }
                inner = simd.mul_add(simd.to_f32(dropped), drop_unit, inner);
            }
            let sum = simd.mul_add(inner, simd.splat(row_scales[row]), simd.load(&sums.0[row]));
            simd.store(sum, &mut sums.0[row]);
        }
    }
}
