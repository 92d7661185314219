//! The exact values of coded panels: for `f32` activations, and for rows that are looked up.

use super::super::{GROUP, PackedMatrix};
use super::scales::{load_scales, load_units};
use super::unpack::{Book, Five, Nibbles, Six, Unpack, Unpacked};
use super::{drop_at, group_bytes, offset, record, step_at, table, upper_bits};
use crate::quant::{Codes, Grouped, Scales};
use crate::simd::{LANES, Simd, WeightSteps};
use half::{bf16, f16};
use std::ops::Range;

/// Unpacks some groups of a panel: (columns, 16).
#[inline(always)]
pub(in super::super) fn unpack_groups<S: Simd>(
    simd: S,
    format: &Grouped,
    weight: &PackedMatrix,
    panel: usize,
    groups: Range<usize>,
    values: &mut [[f32; LANES]],
) {
    match format.codes {
        Codes::Nibbles(_) => unpack::<S, Nibbles>(simd, format, weight, panel, groups, values),
        Codes::Five(_) => unpack::<S, Five>(simd, format, weight, panel, groups, values),
        Codes::Six(_) => unpack::<S, Six>(simd, format, weight, panel, groups, values),
        Codes::Book(_) => unpack::<S, Book>(simd, format, weight, panel, groups, values),
    }
}

#[inline(always)]
fn unpack<S: Simd, U: Unpack>(
    simd: S,
    format: &Grouped,
    weight: &PackedMatrix,
    panel: usize,
    groups: Range<usize>,
    values: &mut [[f32; LANES]],
) {
    let (weights, scales) = (weight.weights(panel..panel + 1), weight.scale_bytes(panel));
    let (table, offset) = (table(format.codes), simd.splat_i32(offset(format.codes)));
    for (group, values) in groups.zip(values.as_chunks_mut::<GROUP>().0) {
        let units = load_units(simd, format.scales, format.factor, scales, group);
        let own = load_scales(simd, format.scales, units, scales, group);
        let weights = &weights[group * U::BYTES..][..U::BYTES];
        let steps: [S::I32; 8] = Unpacked::<U>::new(weights, &table, 0).all(simd);
        for (column, value) in values.iter_mut().enumerate() {
            let byte = simd.shift_right(steps[column / 4], 8 * (column % 4) as u32);
            let integer = simd.add_i32(simd.and_i32(byte, simd.splat_i32(255)), offset);
            let mut exact = simd.mul(own.scales[column / 16], simd.to_f32(integer));
            if format.scales.has_minima() {
                exact = simd.add(exact, own.minima[column / 16]);
            }
            simd.store(exact, value);
        }
    }
}

/// A row of a panel, without vectors.
pub(in super::super) fn unpack_lane(
    format: &Grouped,
    weights: &[u8],
    scales: &[u8],
    lane: usize,
    out: &mut [f32],
) {
    let weights = weights.chunks_exact(group_bytes(format.codes));
    for (group, (out, weights)) in out.chunks_exact_mut(GROUP).zip(weights).enumerate() {
        let (own, minima) = lane_scales(format.scales, format.factor, scales, group, lane);
        for (column, value) in out.iter_mut().enumerate() {
            let product = own[column / 16] * integer(format.codes, weights, column, lane) as f32;
            *value = if format.scales.has_minima() { product + minima[column / 16] } else { product };
        }
    }
}

/// A weight's integer.
fn integer(codes: Codes, weights: &[u8], column: usize, lane: usize) -> i32 {
    let byte = |line: usize| weights[line * 64 + lane * 4 + column % 4];
    let (step, upper) = (column / 4, upper_bits(codes));
    let mut code = byte(step / 2) >> (4 * (step % 2)) & 15;
    // Steps whose upper bits fill a line.
    if let Some(steps) = 8_usize.checked_div(upper) {
        let bits = byte(4 + step / steps) >> (upper * (step % steps)) & ((1 << upper) - 1);
        code |= bits << 4;
    }
    match codes {
        Codes::Book(integers) => i32::from(integers[usize::from(code)]),
        _ => i32::from(code) + offset(codes),
    }
}

/// The scales and minima of a group's halves, for one row.
fn lane_scales(kind: Scales, factor: f32, panel: &[u8], group: usize, lane: usize) -> ([f32; 2], [f32; 2]) {
    let (span, bytes) = record(kind);
    let record = &panel[group / span * bytes..][..bytes];
    let bits = |at: usize| u16::from_le_bytes([record[at + 2 * lane], record[at + 2 * lane + 1]]);
    let unit = match kind {
        Scales::Brain => bf16::from_bits(bits(0)).to_f32(),
        _ => f16::from_bits(bits(0)).to_f32() * factor,
    };
    let minimum = if kind.has_minima() { f16::from_bits(bits(2 * LANES)).to_f32() } else { 0.0 };
    let of_half = |half: usize| {
        let own = if kind.has_halves() { half } else { 0 };
        let count = |at: usize| f32::from(record[at + lane] as i8);
        let scale = step_at(kind, group % span, own).map_or(unit, |at| unit * count(at));
        let minimum = drop_at(kind, group % span, own).map_or(minimum, |at| minimum * -count(at));
        (scale, minimum)
    };
    let (first, second) = (of_half(0), of_half(1));
    ([first.0, second.0], [first.1, second.1])
}
