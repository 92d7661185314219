//! Scales and minima of a panel, out of its records.

use super::{drop_at, parts_of, record, span, step_at};
use crate::quant::Scales;
use crate::simd::{LANES, Simd};

/// Scales of a group's halves, and minima, for 16 rows.
#[derive(Clone, Copy)]
pub(in super::super) struct RowScales<S: Simd> {
    pub(in super::super) scales: [S::F32; 2],
    pub(in super::super) minima: [S::F32; 2],
}

/// What a record's scales and minima are, or count in, for 16 rows.
#[derive(Clone, Copy)]
pub(in super::super) struct Units<S: Simd> {
    pub(in super::super) scale: S::F32,
    pub(in super::super) minimum: S::F32,
}

/// Reads the units of a group's record out of those of its panel.
#[inline(always)]
pub(in super::super) fn load_units<S: Simd>(
    simd: S,
    kind: Scales,
    factor: f32,
    panel: &[u8],
    group: usize,
) -> Units<S> {
    let record = record_of(kind, panel, group);
    let scale = match kind {
        Scales::Brain => simd.load_bf16(words(record, 0)),
        _ => simd.mul(simd.load_f16(words(record, 0)), simd.splat(factor)),
    };
    let minimum = if kind.has_minima() { simd.load_f16(words(record, 2 * LANES)) } else { simd.splat(0.0) };
    Units { scale, minimum }
}

/// Reads a group's scales, in units of its record, out of those of its panel.
#[inline(always)]
pub(in super::super) fn load_scales<S: Simd>(
    simd: S,
    kind: Scales,
    units: Units<S>,
    panel: &[u8],
    group: usize,
) -> RowScales<S> {
    let (record, span) = (record_of(kind, panel, group), span(kind));
    let (mut scales, mut minima) = ([units.scale; 2], [units.minimum; 2]);
    for half in 0..2 {
        let own = if kind.has_halves() { half } else { 0 };
        if let Some(at) = step_at(kind, group % span, own) {
            scales[half] = simd.mul(units.scale, simd.to_f32(simd.load_i8(bytes_at(record, at))));
        }
        if let Some(at) = drop_at(kind, group % span, own) {
            let drop = simd.to_f32(simd.load_i8(bytes_at(record, at)));
            minima[half] = simd.mul(units.minimum, simd.sub(simd.splat(-0.0), drop));
        }
    }
    RowScales { scales, minima }
}

/// The steps of a part of a record's groups.
#[inline(always)]
pub(in super::super) fn load_steps<S: Simd>(simd: S, kind: Scales, record: &[u8], part: usize) -> S::I32 {
    let parts = parts_of(kind);
    match step_at(kind, part / parts, part % parts) {
        Some(at) => simd.load_i8(bytes_at(record, at)),
        None => simd.splat_i32(1),
    }
}

/// The steps of the minima of two parts of a record's groups, as pairs of 16 bits.
#[inline(always)]
pub(in super::super) fn load_drops<S: Simd>(simd: S, kind: Scales, record: &[u8], pair: usize) -> S::I32 {
    let parts = parts_of(kind);
    let of = |part: usize| match drop_at(kind, part / parts, part % parts) {
        Some(at) => simd.load_i8(bytes_at(record, at)),
        None => simd.splat_i32(0),
    };
    simd.or_i32(of(2 * pair), simd.shift_left(of(2 * pair + 1), 16))
}

/// The record of a group among those of its panel.
#[inline(always)]
pub(in super::super) fn record_of(kind: Scales, panel: &[u8], group: usize) -> &[u8] {
    let (span, bytes) = record(kind);
    &panel[group / span * bytes..][..bytes]
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
