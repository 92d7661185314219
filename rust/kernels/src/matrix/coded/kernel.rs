//! Coded panels times 8-bit activations: exact sums in `i32` inside a group, or inside its halves where these have their
//! own scales; times scales they are added in `f32` in the order of the columns, each followed by its minimum times the sum of
//! activations, over a record; times the activations' scale, records are added in their order. Where the groups of a record
//! share a scale, their integers are added exactly. Where minima are counted in steps, these times the sums of activations are added
//! exactly over a record, and its sum begins with them times the unit: an instruction for two groups in place of two for each
//! (prompts of Q4_K_M 2 % faster on Zen 5).

use super::super::activations::IntegerTile;
use super::super::ahead::AHEAD;
use super::super::blocks::blocks;
use super::super::{IntegerTiles, Layout, Output, PackedMatrix};
use super::scales::{load_drops, load_scales, load_units, record_of};
use super::unpack::{Book, Five, Nibbles, Six, Unpack, Unpacked};
use super::{parts_of, record, span, table};
use crate::quant::{Codes, Scales};
use crate::simd::{Kernel, Simd, WeightSteps};
use std::marker::PhantomData;
use std::ops::Range;

/// A kind of scales, known when a kernel is compiled.
trait Kind: Copy {
    const SCALES: Scales;
    /// Groups in a record.
    const SPAN: usize = span(Self::SCALES);
}

macro_rules! kinds {
    ($($name:ident = $scales:expr;)*) => {
        $(
            #[derive(Clone, Copy)]
            struct $name;
            impl Kind for $name {
                const SCALES: Scales = $scales;
            }
        )*
    };
}

kinds! {
    Half = Scales::Half;
    Shared = Scales::Shared;
    Brain = Scales::Brain;
    HalfMinimum = Scales::HalfMinimum;
    Steps = Scales::Steps { halves: false };
    HalfSteps = Scales::Steps { halves: true };
    StepsDrops = Scales::StepsDrops { halves: false };
    HalfStepsDrops = Scales::StepsDrops { halves: true };
}

/// Some panels times all tiles.
pub(crate) struct CodedLinear<'a> {
    /// The weights, coded.
    pub(crate) weight: &'a PackedMatrix,
    /// The input rows.
    pub(crate) input: IntegerTiles<'a>,
    /// Where results go.
    pub(crate) output: Output<'a>,
    /// Which panels.
    pub(crate) panels: Range<usize>,
}

impl Kernel for CodedLinear<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Layout::Coded(format) = self.weight.layout() else { unreachable!("a layout without codes") };
        let table = &table(format.codes);
        let (halves, steps) = (Scales::Steps { halves: true }, Scales::Steps { halves: false });
        match (format.codes, format.scales) {
            (Codes::Nibbles(_), Scales::Half) => self.panels::<S, Nibbles, Half>(simd, table),
            (Codes::Nibbles(_), Scales::Shared) => self.panels::<S, Nibbles, Shared>(simd, table),
            (Codes::Nibbles(_), Scales::HalfMinimum) => self.panels::<S, Nibbles, HalfMinimum>(simd, table),
            (Codes::Nibbles(_), Scales::StepsDrops { halves: false }) => {
                self.panels::<S, Nibbles, StepsDrops>(simd, table);
            }
            (Codes::Nibbles(_), Scales::StepsDrops { halves: true }) => {
                self.panels::<S, Nibbles, HalfStepsDrops>(simd, table);
            }
            (Codes::Nibbles(_), scales) if scales == halves => {
                self.panels::<S, Nibbles, HalfSteps>(simd, table);
            }
            (Codes::Five(_), Scales::Half) => self.panels::<S, Five, Half>(simd, table),
            (Codes::Five(_), Scales::HalfMinimum) => self.panels::<S, Five, HalfMinimum>(simd, table),
            (Codes::Five(_), Scales::StepsDrops { halves: false }) => {
                self.panels::<S, Five, StepsDrops>(simd, table);
            }
            (Codes::Six(_), scales) if scales == halves => self.panels::<S, Six, HalfSteps>(simd, table),
            (Codes::Book(_), Scales::Half) => self.panels::<S, Book, Half>(simd, table),
            (Codes::Book(_), Scales::Brain) => self.panels::<S, Book, Brain>(simd, table),
            (Codes::Book(_), scales) if scales == halves => self.panels::<S, Book, HalfSteps>(simd, table),
            (Codes::Book(_), scales) if scales == steps => self.panels::<S, Book, Steps>(simd, table),
            (codes, scales) => unreachable!("no format has {codes:?} and {scales:?}"),
        }
    }
}

impl CodedLinear<'_> {
    #[inline(always)]
    fn panels<S: Simd, U: Unpack, K: Kind>(&self, simd: S, table: &[u8; 16]) {
        let (panel_bytes, row_bytes) = (self.weight.groups() * U::BYTES, self.weight.columns());
        for block in blocks(self.panels.clone(), panel_bytes, self.input.tiles, row_bytes) {
            for panel in block.panels {
                for tile in block.tiles.clone() {
                    match self.input.tiles.width(tile) {
                        1 => simd.apart(Meeting::<U, K, 1, true>::new(self, panel, tile, table)),
                        2 => simd.apart(Meeting::<U, K, 2, true>::new(self, panel, tile, table)),
                        4 => simd.apart(Meeting::<U, K, 4, true>::new(self, panel, tile, table)),
                        _ if block.again || tile > block.tiles.start => {
                            simd.apart(Meeting::<U, K, 8, false>::new(self, panel, tile, table))
                        }
                        _ => simd.apart(Meeting::<U, K, 8, true>::new(self, panel, tile, table)),
                    }
                }
            }
        }
    }
}

/// A panel and a tile of `T` rows; with `FETCH` memory is asked for what comes next.
struct Meeting<'a, U, K, const T: usize, const FETCH: bool> {
    linear: &'a CodedLinear<'a>,
    panel: usize,
    tile: usize,
    table: &'a [u8; 16],
    kinds: PhantomData<(U, K)>,
}

impl<'a, U, K, const T: usize, const FETCH: bool> Meeting<'a, U, K, T, FETCH> {
    #[inline(always)]
    fn new(linear: &'a CodedLinear<'a>, panel: usize, tile: usize, table: &'a [u8; 16]) -> Self {
        Meeting { linear, panel, tile, table, kinds: PhantomData }
    }
}

impl<U: Unpack, K: Kind, const T: usize, const FETCH: bool> Kernel for Meeting<'_, U, K, T, FETCH> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Meeting { linear: CodedLinear { weight, input, output, .. }, panel, tile, table, .. } = self;
        let sums = multiply::<S, U, K, T, FETCH>(simd, weight, panel, input.tile(tile), table);
        output.store(simd, panel, input.tiles, tile, &sums, true);
    }
}

/// The sums of a panel with `T` rows.
#[inline(always)]
fn multiply<S: Simd, U: Unpack, K: Kind, const T: usize, const FETCH: bool>(
    simd: S,
    weight: &PackedMatrix,
    panel: usize,
    tile: IntegerTile<'_>,
    table: &[u8; 16],
) -> [S::F32; T] {
    let weights = weight.weights(panel..panel + 1);
    let record = Record::<S, U, K> {
        simd,
        scales: weight.scale_bytes(panel),
        factor: weight.layout().scale_factor(),
        table,
        kinds: PhantomData,
    };
    let mut sums = [simd.splat(0.0); T];
    let row_scales = tile.scales.as_chunks::<T>().0;
    for ((index, weights), row_scales) in weights.chunks_exact(K::SPAN * U::BYTES).enumerate().zip(row_scales)
    {
        if FETCH && (K::SCALES.has_halves() || K::SCALES.has_drops()) {
            record.fetch(index);
        }
        let inner = match K::SCALES {
            Scales::Shared => record.multiply_shared::<T, FETCH>(index, weights, tile),
            _ => record.multiply::<T, FETCH>(index, weights, tile),
        };
        for t in 0..T {
            sums[t] = simd.mul_add(inner[t], simd.splat(row_scales[t]), sums[t]);
        }
    }
    sums
}

/// The minima of a record, in steps of `unit`, times the sums of activations: what its sums begin with.
#[inline(always)]
pub(in super::super) fn minima<S: Simd, const T: usize>(
    simd: S,
    totals: &[[i32; T]],
    unit: S::F32,
    drops: impl Fn(usize) -> S::I32,
) -> [S::F32; T] {
    let mut exact = [simd.splat_i32(0); T];
    for (pair, totals) in totals.iter().enumerate() {
        let drops = drops(pair);
        for t in 0..T {
            exact[t] = simd.dot_i16(exact[t], drops, totals[t]);
        }
    }
    let unit = simd.mul(unit, simd.splat(-1.0));
    let mut inner = [unit; T];
    for t in 0..T {
        inner[t] = simd.mul(simd.to_f32(exact[t]), unit);
    }
    inner
}

/// How a record of groups is multiplied.
struct Record<'a, S: Simd, U: Unpack, K: Kind> {
    simd: S,
    scales: &'a [u8],
    factor: f32,
    table: &'a [u8; 16],
    kinds: PhantomData<(U, K)>,
}

impl<S: Simd, U: Unpack, K: Kind> Record<'_, S, U, K> {
    /// Sums of a record, of weights times the bytes of activations.
    #[inline(always)]
    fn multiply<const T: usize, const FETCH: bool>(
        &self,
        index: usize,
        weights: &[u8],
        tile: IntegerTile<'_>,
    ) -> [S::F32; T] {
        let (simd, totals) = (self.simd, tile.totals.as_chunks::<T>().0);
        let parts = const { parts_of(K::SCALES) };
        let units = load_units(simd, K::SCALES, self.factor, self.scales, index * K::SPAN);
        let mut inner = [simd.splat(0.0); T];
        if K::SCALES.has_drops() {
            let record = record_of(K::SCALES, self.scales, index * K::SPAN);
            let pairs = const { K::SPAN * parts_of(K::SCALES) / 2 };
            let totals = &tile.total_pairs.as_chunks::<T>().0[index * pairs..][..pairs];
            inner = minima(simd, totals, units.minimum, |pair| load_drops(simd, K::SCALES, record, pair));
        }
        for (group, weights) in (index * K::SPAN..).zip(weights.chunks_exact(U::BYTES)) {
            let own = load_scales(simd, K::SCALES, units, self.scales, group);
            for part in 0..parts {
                let exact = self.exact::<T, FETCH>(group, part, weights, tile);
                for t in 0..T {
                    inner[t] = simd.mul_add(simd.to_f32(exact[t]), own.scales[part], inner[t]);
                    if K::SCALES.has_minima() && !K::SCALES.has_drops() {
                        let total = simd.splat(totals[group * parts + part][t]);
                        inner[t] = simd.mul_add(own.minima[part], total, inner[t]);
                    }
                }
            }
        }
        inner
    }

    /// Asks for the scales of weights as far ahead as these are asked for. (One row of Q6_K: 4 to 7 %; where a record holds half as many, nothing.)
    #[inline(always)]
    fn fetch(&self, index: usize) {
        let bytes = const { record(K::SCALES).1 };
        let ahead = const { 1 + AHEAD / (K::SPAN * U::BYTES) };
        let next = self.scales.as_ptr().wrapping_add((index + ahead) * bytes);
        for line in 0..bytes.div_ceil(64) {
            self.simd.prefetch(next.wrapping_add(line * 64));
        }
    }

    /// The same where the groups of a record share a scale.
    #[inline(always)]
    fn multiply_shared<const T: usize, const FETCH: bool>(
        &self,
        index: usize,
        weights: &[u8],
        tile: IntegerTile<'_>,
    ) -> [S::F32; T] {
        let simd = self.simd;
        let mut exact = [simd.splat_i32(0); T];
        for (group, weights) in (index * K::SPAN..).zip(weights.chunks_exact(U::BYTES)) {
            let own = self.exact::<T, FETCH>(group, 0, weights, tile);
            for t in 0..T {
                exact[t] = simd.add_i32(exact[t], own[t]);
            }
        }
        let scale = load_units(simd, K::SCALES, self.factor, self.scales, index * K::SPAN).scale;
        let mut inner = [simd.splat(0.0); T];
        for t in 0..T {
            inner[t] = simd.mul(simd.to_f32(exact[t]), scale);
        }
        inner
    }

    /// Exact sums of a group, or of a half if halves have their own scales.
    #[inline(always)]
    fn exact<const T: usize, const FETCH: bool>(
        &self,
        group: usize,
        part: usize,
        weights: &[u8],
        tile: IntegerTile<'_>,
    ) -> [S::I32; T] {
        let rows = &tile.bytes.as_chunks::<T>().0[group];
        // Codes with minima are not offset: nothing to load.
        let offsets =
            |at: usize| if K::SCALES.has_minima() { &[0; T] } else { &tile.offsets.as_chunks::<T>().0[at] };
        if FETCH && part == 0 {
            for line in 0..U::BYTES / 64 {
                self.simd.prefetch(weights.as_ptr().wrapping_add(AHEAD + line * 64));
            }
        }
        if K::SCALES.has_halves() {
            let steps = Unpacked::<U>::new(weights, self.table, 4 * part);
            dot::<S, U, 4, T>(self.simd, &steps, rows, 4 * part, offsets(2 * group + part))
        } else {
            let steps = Unpacked::<U>::new(weights, self.table, 0);
            dot::<S, U, 8, T>(self.simd, &steps, rows, 0, offsets(group))
        }
    }
}

/// [`Simd::dot`] of what `U` unpacks.
#[inline(always)]
fn dot<S: Simd, U: Unpack, const N: usize, const T: usize>(
    simd: S,
    steps: &Unpacked<'_, U>,
    rows: &[[u8; 32]; T],
    first: usize,
    offsets: &[i32; T],
) -> [S::I32; T] {
    // Eight steps for eight rows are unpacked where they are used: with all of them in registers, a compiler adds products row by
    // row, and each addition waits for the one before. Fewer are better unpacked first. (Measured: up to 4 and 18 %.)
    if N * T == 64 {
        dot_steps::<S, U, _, N, T>(simd, steps, rows, first, offsets)
    } else {
        let unpacked: [S::I32; N] = steps.all(simd);
        dot_steps::<S, U, _, N, T>(simd, &unpacked, rows, first, offsets)
    }
}

#[inline(always)]
fn dot_steps<S: Simd, U: Unpack, W: WeightSteps<S>, const N: usize, const T: usize>(
    simd: S,
    steps: &W,
    rows: &[[u8; 32]; T],
    first: usize,
    offsets: &[i32; T],
) -> [S::I32; T] {
    match U::BITS {
        4 => simd.dot::<W, N, T, 4>(steps, rows, first, offsets),
        5 => simd.dot::<W, N, T, 5>(steps, rows, first, offsets),
        6 => simd.dot::<W, N, T, 6>(steps, rows, first, offsets),
        _ => simd.dot::<W, N, T, 8>(steps, rows, first, offsets),
    }
}
