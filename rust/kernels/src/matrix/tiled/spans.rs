//! Integer panels whose groups share a scale of activations, over a span of them, times 8-bit activations: the unit adds a whole span, exactly,
//! two groups an instruction, before vectors touch it.
//!
//! Where the groups of a span share a scale of weights too, it multiplies two panels. Where their scales are integers, steps of a unit,
//! a weight times its step fits 16 bits: two planes of bytes of one panel, which it multiplies as it does two panels, and a sum is 256 times that of
//! the high bytes plus that of the low ones. That is two products where groups added by vectors need one for each of them or, in Q6_K, for each half,
//! but those vectors, and writing out what they read, take four times as long as a product (512 rows of Q6_K 2.1 to 2.2 times as fast).

use super::super::activations::IntegerTile;
use super::super::coded;
use super::super::integer;
use super::super::{GROUP, IntegerTiles, Layout, Output, PackedMatrix};
use super::block::{BLOCK, Bytes, Place, read_integers};
use super::{Block, BlockKernel, PANELS, Work, by_pairs};
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
                Scales::Steps { .. } => self.multiply::<S, Steps>(simd),
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
        let kernel = Multiply::<S, K> {
            unit: MatrixUnit::new(simd, TileShape { rows: TILE_ROWS, bytes: PAIR * GROUP }),
            weight,
            input,
            weights: Planes([[[0; GROUP * LANES]; BLOCK]; 2]),
            units: [[[0.0; LANES]; BLOCK]; 2],
            row_units: [[0.0; LANES]; PANELS],
            drops: [[0; LANES]; BLOCK],
            exact: [TileSums::default(); 4],
            kind: PhantomData,
        };
        Work { weight, tiles: input.tiles, output: self.output, panels }.run(simd, kernel);
    }
}

/// What the groups of a span share.
trait Kind {
    /// Groups of a span.
    const SPAN: usize;
    /// Planes of a panel: two where weights are multiplied with steps.
    const PLANES: usize = 2;
    /// Whether spans have units, or rows.
    const OF_SPANS: bool = true;
    /// Pairs of parts whose minima, counted in steps too, a span subtracts.
    const DROPS: usize = 0;
}

struct Shared;
impl Kind for Shared {
    const SPAN: usize = coded::span(Scales::Shared);
    const PLANES: usize = 1;
}

struct Steps;
impl Kind for Steps {
    const SPAN: usize = coded::span(Scales::Steps { halves: true });
}

struct StepsDrops;
impl Kind for StepsDrops {
    const SPAN: usize = coded::span(Scales::StepsDrops { halves: false });
    const DROPS: usize = 4;
}

/// Of halves of groups.
struct HalfStepsDrops;
impl Kind for HalfStepsDrops {
    const SPAN: usize = coded::span(Scales::StepsDrops { halves: true });
    const DROPS: usize = MOST_DROPS;
}

/// Of Int4.
struct RowSteps;
impl Kind for RowSteps {
    const SPAN: usize = integer::INT4_SPAN;
    const OF_SPANS: bool = false;
}

/// What the unit multiplies with at once: two panels, or two planes of one.
#[repr(C, align(64))]
struct Planes([Bytes; 2]);

/// Two planes, whose bytes are integers times the steps of their group's halves.
struct Scaled<'a, S: Simd> {
    steps: [[S::I32; 2]; BLOCK],
    low: &'a mut Bytes,
    high: &'a mut Bytes,
}

impl<S: Simd> Place<S> for Scaled<'_, S> {
    #[inline(always)]
    fn put(&mut self, simd: S, group: usize, step: usize, integers: S::I32) {
        let [low, high] = simd.scale_bytes(integers, self.steps[group][step / 4]);
        simd.store_bytes(low, &mut self.low[group].as_chunks_mut().0[step]);
        simd.store_bytes(high, &mut self.high[group].as_chunks_mut().0[step]);
    }
}

/// One panel or two by two tiles, or by one.
struct Multiply<'a, S: Simd, K> {
    unit: MatrixUnit<S>,
    weight: &'a PackedMatrix,
    input: IntegerTiles<'a>,
    weights: Planes,
    units: [[[f32; LANES]; BLOCK]; 2], // of spans: (2 panels, spans, 16); or of scales, and of minima
    row_units: [[f32; LANES]; PANELS], // of panels whose sums are kept together
    drops: [[i32; LANES]; BLOCK],      // steps of minima, two parts to a number: (pairs of parts, 16)
    exact: [TileSums<i32>; 4],         // (2 panels or planes, tiles)
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
        for (index, panel) in block.panels.clone().enumerate() {
            match K::OF_SPANS {
                true => self.read_units(simd, index, panel, &block.groups),
                false => self.row_units[panel % PANELS] = *self.weight.units(panel),
            }
            match K::PLANES {
                1 => read_integers(simd, self.weight, panel, &block.groups, &mut self.weights.0[index]),
                _ => self.read_scaled(simd, panel, &block.groups),
            }
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
        match K::PLANES {
            1 => by_pairs(panel, tile, tiles),
            _ => panel * tiles + tile,
        }
    }

    #[inline(always)]
    fn finish(&self, simd: S, panel: usize, sum: S::F32) -> S::F32 {
        if K::OF_SPANS { sum } else { simd.mul(sum, simd.load(&self.row_units[panel % PANELS])) }
    }
}

impl<S: Simd, K: Kind> Multiply<'_, S, K> {
    /// Reads what the scales of spans are, or are counted in, and their minima.
    #[inline(always)]
    fn read_units(&mut self, simd: S, index: usize, panel: usize, groups: &Range<usize>) {
        let Layout::Coded(format) = self.weight.layout() else { unreachable!("spans without units") };
        let (kind, factor, scales) = (format.scales, format.factor, self.weight.scale_bytes(panel));
        for (at, group) in groups.clone().step_by(K::SPAN).enumerate() {
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

    /// Reads weights and multiplies them with their steps; a group that is missing in the last pair gets zeros.
    #[inline(always)]
    fn read_scaled(&mut self, simd: S, panel: usize, groups: &Range<usize>) {
        let mut steps = [[simd.splat_i32(0); 2]; BLOCK];
        if let Layout::Coded(format) = self.weight.layout() {
            let (kind, parts) = (format.scales, coded::parts_of(format.scales));
            for (steps, group) in steps.iter_mut().zip(groups.clone()) {
                let record = coded::record_of(kind, self.weight.scale_bytes(panel), group);
                for (half, steps) in steps.iter_mut().enumerate() {
                    let part = group % K::SPAN * parts + half * (parts - 1);
                    *steps = coded::load_steps(simd, kind, record, part);
                }
            }
        } else {
            let inverse = integer::inverse(simd, simd.load(self.weight.units(panel)));
            for (steps, scales) in steps.iter_mut().zip(&self.weight.scales(panel)[groups.clone()]) {
                *steps = [integer::steps(simd, scales, inverse); 2];
            }
        }
        let [low, high] = &mut self.weights.0;
        if !groups.len().is_multiple_of(PAIR) {
            (low[groups.len()], high[groups.len()]) = ([0; GROUP * LANES], [0; GROUP * LANES]);
        }
        read_integers(simd, self.weight, panel, groups, &mut Scaled { steps, low, high });
    }

    /// A block of a panel, or of two, by `T` tiles. Of a panel alone the other one's sums mean nothing.
    #[inline(always)]
    fn part<const T: usize>(
        &mut self,
        simd: S,
        block: &Block,
        tiles: [IntegerTile<'_>; T],
        sums: &mut [TileSums<f32>],
    ) {
        let start = block.groups.start;
        for first in (0..block.groups.len()).step_by(K::SPAN) {
            let input = std::array::from_fn(|t| &tiles[t].bytes[(start + first) * TILE_ROWS..]);
            let weights = [0, 1].map(|plane| self.weights.0[plane][first..].as_flattened());
            let steps = K::SPAN.min(block.groups.len() - first).div_ceil(PAIR);
            self.unit.bytes::<T>(input, weights, steps, &mut self.exact);
            for panel in 0..block.panels.len() {
                for (t, tile) in tiles.iter().enumerate() {
                    self.add::<T>(simd, tile, (panel, t), start, first, &mut sums[panel * T + t]);
                }
            }
        }
    }

    /// Adds the exact sums of a span of a panel and a tile, which begins with a group of the block.
    #[inline(always)]
    fn add<const T: usize>(
        &self,
        simd: S,
        tile: &IntegerTile<'_>,
        (panel, t): (usize, usize),
        start: usize,
        first: usize,
        sums: &mut TileSums<f32>,
    ) {
        let span = first / K::SPAN;
        let unit = simd.load(&self.units[panel][span]);
        let row_scales: &[f32; TILE_ROWS] = &tile.scales.as_chunks().0[start / K::SPAN + span];
        let (mut drops, mut drop_unit, mut totals) = ([simd.splat_i32(0); MOST_DROPS], unit, &[][..]);
        if K::DROPS > 0 {
            for (drops, own) in drops.iter_mut().zip(&self.drops[span * K::DROPS..][..K::DROPS]) {
                *drops = simd.load_i32(own);
            }
            drop_unit = simd.load(&self.units[1][span]);
            let pairs = tile.total_pairs.as_chunks::<TILE_ROWS>().0;
            totals = &pairs[(start / K::SPAN + span) * K::DROPS..][..K::DROPS];
        }
        for row in 0..TILE_ROWS {
            let mut exact = simd.load_i32(&self.exact[panel * T + t].0[row]);
            if K::PLANES == 2 {
                let high = simd.load_i32(&self.exact[T + t].0[row]);
                exact = simd.add_i32(exact, simd.shift_left(high, 8));
            }
            let mut inner = simd.to_f32(exact);
            if K::OF_SPANS {
                inner = simd.mul(inner, unit);
            }
            if K::DROPS > 0 {
                let mut exact = simd.splat_i32(0);
                for (drops, totals) in drops.iter().zip(totals) {
                    exact = simd.dot_i16(exact, *drops, totals[row]);
                }
                inner = simd.mul_add(simd.to_f32(exact), drop_unit, inner);
            }
            let sum = simd.mul_add(inner, simd.splat(row_scales[row]), simd.load(&sums.0[row]));
            simd.store(sum, &mut sums.0[row]);
        }
    }
}
