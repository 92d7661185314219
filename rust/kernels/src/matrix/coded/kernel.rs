//! Coded panels times 8-bit activations: exact sums in `i32` inside a group, or inside its halves where these have their
//! own scales, added in `f32` in the order of the columns, each followed by its minimum times the sum of activations.

use super::super::activations::IntegerTile;
use super::super::float::AHEAD;
use super::super::{IntegerTiles, Layout, Output, PackedMatrix};
use super::{drop_at, group_bytes, record, step_at, table};
use crate::quant::{Codes, Scales};
use crate::simd::{Kernel, LANES, Simd};
use std::ops::Range;

/// How codes become bytes that [`Simd::dot`] multiplies.
pub(in super::super) trait Unpack: Copy {
    /// Bytes of 32 columns of a panel.
    const BYTES: usize;
    /// Bits of those bytes, as [`Simd::dot`] counts them.
    const BITS: u32;
    /// `N` steps of four columns.
    fn unpack<S: Simd, const N: usize>(
        simd: S,
        weights: &[u8],
        first: usize,
        table: &[u8; 16],
    ) -> [S::I32; N];
}

#[derive(Clone, Copy)]
pub(in super::super) struct Nibbles;
#[derive(Clone, Copy)]
pub(in super::super) struct Five;
#[derive(Clone, Copy)]
pub(in super::super) struct Six;
#[derive(Clone, Copy)]
pub(in super::super) struct Book;

/// 64 bytes.
#[inline(always)]
fn line<S: Simd>(simd: S, weights: &[u8], index: usize) -> S::I32 {
    let line = &weights.as_chunks::<64>().0[index];
    // SAFETY: these are 64 bytes.
    unsafe { simd.load_bytes(line.as_ptr()) }
}

/// The low 4 bits of a step's codes.
#[inline(always)]
fn low<S: Simd>(simd: S, weights: &[u8], step: usize) -> S::I32 {
    let pair = line(simd, weights, step / 2);
    let pair = if step.is_multiple_of(2) { pair } else { simd.shift_right(pair, 4) };
    simd.and_i32(pair, simd.splat_i32(0x0f0f_0f0f))
}

/// Upper bits, which are at bit `at` of their bytes, at bit 4 under `mask`.
#[inline(always)]
fn upper<S: Simd>(simd: S, bits: S::I32, at: usize, mask: i32) -> S::I32 {
    let moved =
        if at <= 4 { simd.shift_left(bits, 4 - at as u32) } else { simd.shift_right(bits, at as u32 - 4) };
    simd.and_i32(moved, simd.splat_i32(mask))
}

impl Unpack for Nibbles {
    const BYTES: usize = group_bytes(Codes::Nibbles(0));
    const BITS: u32 = 4;
    #[inline(always)]
    fn unpack<S: Simd, const N: usize>(
        simd: S,
        weights: &[u8],
        first: usize,
        _table: &[u8; 16],
    ) -> [S::I32; N] {
        let mut out = [simd.splat_i32(0); N];
        for (i, out) in out.iter_mut().enumerate() {
            *out = low(simd, weights, first + i);
        }
        out
    }
}

impl Unpack for Five {
    const BYTES: usize = group_bytes(Codes::Five(0));
    const BITS: u32 = 5;
    #[inline(always)]
    fn unpack<S: Simd, const N: usize>(
        simd: S,
        weights: &[u8],
        first: usize,
        _table: &[u8; 16],
    ) -> [S::I32; N] {
        let plane = line(simd, weights, 4);
        let mut out = [simd.splat_i32(0); N];
        for (i, out) in out.iter_mut().enumerate() {
            let step = first + i;
            *out = simd.or_i32(low(simd, weights, step), upper(simd, plane, step, 0x1010_1010));
        }
        out
    }
}

impl Unpack for Six {
    const BYTES: usize = group_bytes(Codes::Six(0));
    const BITS: u32 = 6;
    #[inline(always)]
    fn unpack<S: Simd, const N: usize>(
        simd: S,
        weights: &[u8],
        first: usize,
        _table: &[u8; 16],
    ) -> [S::I32; N] {
        let mut out = [simd.splat_i32(0); N];
        for (i, out) in out.iter_mut().enumerate() {
            let step = first + i;
            let plane = line(simd, weights, 4 + step / 4);
            let upper = upper(simd, plane, step % 4 * 2, 0x3030_3030);
            *out = simd.or_i32(low(simd, weights, step), upper);
        }
        out
    }
}

impl Unpack for Book {
    const BYTES: usize = group_bytes(Codes::Nibbles(0));
    const BITS: u32 = 8;
    #[inline(always)]
    fn unpack<S: Simd, const N: usize>(
        simd: S,
        weights: &[u8],
        first: usize,
        table: &[u8; 16],
    ) -> [S::I32; N] {
        let mut out = [simd.splat_i32(0); N];
        for (i, out) in out.iter_mut().enumerate() {
            *out = simd.lookup(table, low(simd, weights, first + i));
        }
        out
    }
}

/// Scales of a group's halves, and minima, for 16 rows.
#[derive(Clone, Copy)]
pub(in super::super) struct RowScales<S: Simd> {
    pub(in super::super) scales: [S::F32; 2],
    pub(in super::super) minima: [S::F32; 2],
}

/// Reads a group's scales out of those of its panel.
#[inline(always)]
pub(in super::super) fn load_scales<S: Simd>(
    simd: S,
    kind: Scales,
    factor: f32,
    panel: &[u8],
    group: usize,
) -> RowScales<S> {
    let (span, bytes) = record(kind);
    let record = &panel[group / span * bytes..][..bytes];
    let unit = match kind {
        Scales::Brain => simd.load_bf16(words(record, 0)),
        _ => simd.mul(simd.load_f16(words(record, 0)), simd.splat(factor)),
    };
    let minimum = if kind.has_minima() { simd.load_f16(words(record, 2 * LANES)) } else { simd.splat(0.0) };
    let (mut scales, mut minima) = ([unit; 2], [minimum; 2]);
    for half in 0..2 {
        let own = if kind.has_halves() { half } else { 0 };
        if let Some(at) = step_at(kind, group % span, own) {
            scales[half] = simd.mul(unit, simd.to_f32(simd.load_i8(bytes_at(record, at))));
        }
        if let Some(at) = drop_at(kind, group % span, own) {
            let drop = simd.to_f32(simd.load_i8(bytes_at(record, at)));
            minima[half] = simd.mul(minimum, simd.sub(simd.splat(-0.0), drop));
        }
    }
    RowScales { scales, minima }
}

#[inline(always)]
fn words(record: &[u8], at: usize) -> &[u16; LANES] {
    // SAFETY: any bits are `u16`s, and records begin at even addresses of an aligned buffer.
    &unsafe { record[at..at + 2 * LANES].align_to::<[u16; LANES]>() }.1[0]
}

#[inline(always)]
fn bytes_at(record: &[u8], at: usize) -> &[i8; LANES] {
    // SAFETY: any bits are `i8`s, which need no alignment.
    &unsafe { record[at..at + LANES].align_to::<[i8; LANES]>() }.1[0]
}

/// A kind of scales, known when a kernel is compiled.
trait Kind: Copy {
    const SCALES: Scales;
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
        for panel in self.panels.clone() {
            for tile in 0..self.input.tiles.count() {
                match self.input.tiles.width(tile) {
                    1 => self.tile::<S, U, K, 1>(simd, panel, tile, table),
                    2 => self.tile::<S, U, K, 2>(simd, panel, tile, table),
                    4 => self.tile::<S, U, K, 4>(simd, panel, tile, table),
                    _ => self.tile::<S, U, K, 8>(simd, panel, tile, table),
                }
            }
        }
    }

    #[inline(always)]
    fn tile<S: Simd, U: Unpack, K: Kind, const T: usize>(
        &self,
        simd: S,
        panel: usize,
        tile: usize,
        table: &[u8; 16],
    ) {
        let sums = multiply::<S, U, K, T>(simd, self.weight, panel, self.input.tile(tile), table);
        self.output.store(simd, panel, self.input.tiles, tile, &sums, true);
    }
}

/// The sums of a panel with `T` rows.
#[inline(always)]
fn multiply<S: Simd, U: Unpack, K: Kind, const T: usize>(
    simd: S,
    weight: &PackedMatrix,
    panel: usize,
    tile: IntegerTile<'_>,
    table: &[u8; 16],
) -> [S::F32; T] {
    let (weights, scales) = (weight.weights(panel..panel + 1), weight.scale_bytes(panel));
    let factor = weight.layout().scale_factor();
    let (rows, row_scales) = (tile.bytes.as_chunks::<T>().0, tile.scales.as_chunks::<T>().0);
    let (offsets, totals) = (tile.offsets.as_chunks::<T>().0, tile.totals.as_chunks::<T>().0);
    let parts = if K::SCALES.has_halves() { 2 } else { 1 };
    let mut sums = [simd.splat(0.0); T];
    for (group, weights) in weights.chunks_exact(U::BYTES).enumerate() {
        for line in 0..U::BYTES / 64 {
            simd.prefetch(weights.as_ptr().wrapping_add(AHEAD + line * 64));
        }
        let own = load_scales(simd, K::SCALES, factor, scales, group);
        for part in 0..parts {
            let at = group * parts + part;
            let exact = if parts == 1 {
                let bytes = U::unpack::<S, 8>(simd, weights, 0, table);
                dot::<S, U, 8, T>(simd, &bytes, &rows[group], 0, &offsets[at])
            } else {
                let bytes = U::unpack::<S, 4>(simd, weights, 4 * part, table);
                dot::<S, U, 4, T>(simd, &bytes, &rows[group], 4 * part, &offsets[at])
            };
            for t in 0..T {
                let scale = simd.mul(own.scales[part], simd.splat(row_scales[group][t]));
                sums[t] = simd.mul_add(simd.to_f32(exact[t]), scale, sums[t]);
                if K::SCALES.has_minima() {
                    sums[t] = simd.mul_add(own.minima[part], simd.splat(totals[at][t]), sums[t]);
                }
            }
        }
    }
    sums
}

/// [`Simd::dot`] of what `U` unpacks.
#[inline(always)]
fn dot<S: Simd, U: Unpack, const N: usize, const T: usize>(
    simd: S,
    bytes: &[S::I32; N],
    rows: &[[u8; 32]; T],
    first: usize,
    offsets: &[i32; T],
) -> [S::I32; T] {
    match U::BITS {
        4 => simd.dot::<N, T, 4>(bytes, rows, first, offsets),
        5 => simd.dot::<N, T, 5>(bytes, rows, first, offsets),
        6 => simd.dot::<N, T, 6>(bytes, rows, first, offsets),
        _ => simd.dot::<N, T, 8>(bytes, rows, first, offsets),
    }
}
