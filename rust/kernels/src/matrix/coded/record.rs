//! A record of a coded panel times a tile of rows: see `kernel`.

use super::super::activations::IntegerTile;
use super::super::ahead::AHEAD;
use super::kernel::Kind;
use super::scales::{load_drops, load_steps, load_units, record_of};
use super::unpack::{Unpack, Unpacked};
use super::{parts_of, record};
use crate::quant::Scales;
use crate::simd::{Simd, WeightSteps};
use std::marker::PhantomData;
use std::ops::Range;

/// Subtracts the minima of a record, counted in steps of `unit`, times the sums of activations.
#[inline(always)]
fn subtract_drops<S: Simd, const T: usize>(
    simd: S,
    record: &[u8],
    kind: Scales,
    totals: &[[i32; T]],
    unit: S::F32,
    inner: &mut [S::F32; T],
) {
    let mut exact = [simd.splat_i32(0); T];
    for (pair, totals) in totals.iter().enumerate() {
        let drops = load_drops(simd, kind, record, pair);
        for t in 0..T {
            exact[t] = simd.dot_i16(exact[t], drops, totals[t]);
        }
    }
    let unit = simd.mul(unit, simd.splat(-1.0));
    for t in 0..T {
        inner[t] = simd.mul_add(simd.to_f32(exact[t]), unit, inner[t]);
    }
}

/// How many parts of a record, times their steps, single precision adds without rounding: integers below 2^24. Two such sums, added, are the
/// nearest number to that of both, as an exact integer is when it is converted.
const fn exact_parts(bits: u32, scales: Scales) -> usize {
    let integer = match bits {
        4 => 15,
        5 => 31,
        6 => 32, // minus the offset
        _ => 127,
    };
    let step = match scales {
        Scales::StepsDrops { .. } => 63,
        _ if bits == 6 => 128,
        _ => 32,
    };
    (1 << 24) / (integer * (32 / parts_of(scales)) * 127 * step)
}

/// How a record of groups is multiplied.
pub(super) struct Record<'a, S: Simd, U: Unpack, K: Kind> {
    pub(super) simd: S,
    pub(super) scales: &'a [u8],
    pub(super) factor: f32,
    pub(super) exact: bool,
    pub(super) table: &'a [u8; 16],
    pub(super) kinds: PhantomData<(U, K)>,
}

impl<S: Simd, U: Unpack, K: Kind> Record<'_, S, U, K> {
    /// Sums of a record, of weights times the bytes of activations.
    #[inline(always)]
    pub(super) fn multiply<const T: usize, const FETCH: bool>(
        &self,
        index: usize,
        weights: &[u8],
        tile: IntegerTile<'_>,
    ) -> [S::F32; T] {
        let (simd, totals) = (self.simd, tile.totals.as_chunks::<T>().0);
        let mut inner = [simd.splat(0.0); T];
        for (group, weights) in (index * K::SPAN..).zip(weights.chunks_exact(U::BYTES)) {
            let own = load_units(simd, K::SCALES, self.factor, self.scales, group);
            let exact = self.exact::<T, FETCH>(group, 0, weights, tile);
            for t in 0..T {
                inner[t] = simd.mul_add(simd.to_f32(exact[t]), own.scale, inner[t]);
                if K::SCALES.has_minima() {
                    inner[t] = simd.mul_add(own.minimum, simd.splat(totals[group][t]), inner[t]);
                }
            }
        }
        inner
    }

    /// The same where scales are counted in steps of a unit.
    #[inline(always)]
    pub(super) fn multiply_steps<const T: usize, const FETCH: bool>(
        &self,
        index: usize,
        weights: &[u8],
        tile: IntegerTile<'_>,
    ) -> [S::F32; T] {
        let simd = self.simd;
        let record = record_of(K::SCALES, self.scales, index * K::SPAN);
        let chains = const { (K::SPAN * parts_of(K::SCALES)).div_ceil(exact_parts(U::BITS, K::SCALES)) };
        let whole = match (chains, self.exact) {
            (2, true) => {
                let (first, second) = weights.split_at(const { K::SPAN / 2 * U::BYTES });
                let mut whole = self.chain::<T, FETCH>(index, (record, 0..K::SPAN / 2), first, tile);
                let rest = self.chain::<T, FETCH>(index, (record, K::SPAN / 2..K::SPAN), second, tile);
                for t in 0..T {
                    whole[t] = simd.add(whole[t], rest[t]);
                }
                whole
            }
            (3.., true) => self.whole::<T, FETCH>(index, record, weights, tile),
            _ => self.chain::<T, FETCH>(index, (record, 0..K::SPAN), weights, tile),
        };
        let units = load_units(simd, K::SCALES, self.factor, self.scales, index * K::SPAN);
        let mut inner = whole;
        for inner in &mut inner {
            *inner = simd.mul(*inner, units.scale);
        }
        if K::SCALES.has_drops() {
            let pairs = const { K::SPAN * parts_of(K::SCALES) / 2 };
            let totals = &tile.total_pairs.as_chunks::<T>().0[index * pairs..][..pairs];
            subtract_drops(simd, record, K::SCALES, totals, units.minimum, &mut inner);
        }
        inner
    }

    /// Sums of some groups of a record, times their steps, added in order.
    #[inline(always)]
    fn chain<const T: usize, const FETCH: bool>(
        &self,
        index: usize,
        (record, groups): (&[u8], Range<usize>),
        weights: &[u8],
        tile: IntegerTile<'_>,
    ) -> [S::F32; T] {
        let (simd, parts) = (self.simd, const { parts_of(K::SCALES) });
        let mut exact = [simd.splat(0.0); T];
        for (group, weights) in groups.zip(weights.chunks_exact(U::BYTES)) {
            for part in 0..parts {
                let steps = simd.to_f32(load_steps(simd, K::SCALES, record, group * parts + part));
                let own = self.exact::<T, FETCH>(index * K::SPAN + group, part, weights, tile);
                for t in 0..T {
                    exact[t] = simd.mul_add(simd.to_f32(own[t]), steps, exact[t]);
                }
            }
        }
        exact
    }

    /// Sums of a record, times their steps, added exactly.
    #[inline(always)]
    fn whole<const T: usize, const FETCH: bool>(
        &self,
        index: usize,
        record: &[u8],
        weights: &[u8],
        tile: IntegerTile<'_>,
    ) -> [S::F32; T] {
        let (simd, parts) = (self.simd, const { parts_of(K::SCALES) });
        let mut exact = [simd.splat_i32(0); T];
        for (group, weights) in weights.chunks_exact(U::BYTES).enumerate() {
            for part in 0..parts {
                let steps = load_steps(simd, K::SCALES, record, group * parts + part);
                let own = self.exact::<T, FETCH>(index * K::SPAN + group, part, weights, tile);
                for t in 0..T {
                    exact[t] = simd.mul_add_i32(own[t], steps, exact[t]);
                }
            }
        }
        let mut whole = [simd.splat(0.0); T];
        for t in 0..T {
            whole[t] = simd.to_f32(exact[t]);
        }
        whole
    }

    /// Asks for the scales of weights as far ahead as these are asked for. (One row of Q6_K: 4 to 7 %; where a record holds half as many, nothing.)
    #[inline(always)]
    pub(super) fn fetch(&self, index: usize) {
        let bytes = const { record(K::SCALES).1 };
        let ahead = const { 1 + AHEAD / (K::SPAN * U::BYTES) };
        let next = self.scales.as_ptr().wrapping_add((index + ahead) * bytes);
        for line in 0..bytes.div_ceil(64) {
            self.simd.prefetch(next.wrapping_add(line * 64));
        }
    }

    /// The same where the groups of a record share a scale.
    #[inline(always)]
    pub(super) fn multiply_shared<const T: usize, const FETCH: bool>(
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
