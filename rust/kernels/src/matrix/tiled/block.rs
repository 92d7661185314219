//! A block of a panel of integers, whatever the format, as bytes that a matrix unit multiplies and scales that are `f32`.

use super::super::ahead::AHEAD;
use super::super::coded::{self, Book, Five, Nibbles, Six, Unpack};
use super::super::{GROUP, Layout, PackedMatrix};
use crate::quant::Codes;
use crate::simd::{LANES, Simd};
use std::ops::Range;

/// Groups in a block: 8 KB of bytes.
pub(super) const BLOCK: usize = 16;

/// Integers of some groups of a panel: (groups, 8 steps of four columns, 16 lanes, 4).
pub(super) type Bytes = [[u8; GROUP * LANES]; BLOCK];

/// Some groups of a panel, each with a scale.
#[repr(C, align(64))]
pub(super) struct Integers {
    pub(super) bytes: Bytes,
    /// What sums are multiplied with: (groups, 16).
    pub(super) scales: [[f32; LANES]; BLOCK],
    /// What sums of activations are multiplied with, if the format has minima.
    pub(super) minima: [[f32; LANES]; BLOCK],
}

impl Integers {
    /// An empty one.
    pub(super) fn new() -> Integers {
        let scales = [[0.0; LANES]; BLOCK];
        Integers { bytes: [[0; GROUP * LANES]; BLOCK], scales, minima: scales }
    }

    /// Reads some groups of a panel, at most [`BLOCK`].
    #[inline(always)]
    pub(super) fn read<S: Simd>(
        &mut self,
        simd: S,
        weight: &PackedMatrix,
        panel: usize,
        groups: Range<usize>,
    ) {
        read_codes(simd, weight, panel, &groups, &mut self.bytes[..], false);
        let Layout::Coded(format) = weight.layout() else {
            for (own, scales) in self.scales.iter_mut().zip(&weight.scales(panel)[groups]) {
                simd.store(simd.load_f16(scales), own);
            }
            return;
        };
        for ((group, scale), minimum) in groups.zip(&mut self.scales).zip(&mut self.minima) {
            let scales = weight.scale_bytes(panel);
            let units = coded::load_units(simd, format.scales, format.factor, scales, group);
            simd.store(units.scale, scale);
            simd.store(units.minimum, minimum);
        }
    }
}

/// Where codes go as they are read.
pub(super) trait Place<S: Simd> {
    /// Prepares for those of a group, which exceed integers by `offset`.
    #[inline(always)]
    fn start(&mut self, _simd: S, _group: usize, _offset: u8) {}
    /// Takes those of a step of four columns of a group: four bytes to a lane. They have 8 bits if the offset is 128.
    fn put(&mut self, simd: S, group: usize, step: usize, codes: S::I32, offset: u8);
}

/// As signed integers.
impl<S: Simd> Place<S> for [[u8; GROUP * LANES]] {
    #[inline(always)]
    fn put(&mut self, simd: S, group: usize, step: usize, codes: S::I32, offset: u8) {
        let splat = |byte: u8| simd.splat_i32(i32::from_le_bytes([byte; 4]));
        let upper = splat(0x80);
        // Bytes minus the offset: with the upper bit set there is no borrow, and without it they are right.
        let integers = match offset {
            128 => simd.xor_i32(codes, upper),
            _ => simd.xor_i32(simd.sub_i32(simd.or_i32(codes, upper), splat(offset)), upper),
        };
        simd.store_bytes(integers, &mut self[group].as_chunks_mut().0[step]);
    }
}

/// Reads the codes of some groups of a panel, at most [`BLOCK`]; they are counted from the first one on. `ahead`: asks for weights some way
/// after them.
#[inline(always)]
pub(super) fn read_codes<S: Simd>(
    simd: S,
    weight: &PackedMatrix,
    panel: usize,
    groups: &Range<usize>,
    place: &mut (impl Place<S> + ?Sized),
    ahead: bool,
) {
    let group_bytes = weight.layout().group_bytes();
    let weights = &weight.weights(panel..panel + 1)[groups.start * group_bytes..groups.end * group_bytes];
    match weight.layout() {
        Layout::Int8 => unpack::<S, Whole>(simd, weights, Codes::Nibbles(0), place, ahead),
        Layout::Int4 => unpack::<S, Nibbles>(simd, weights, Codes::Nibbles(8), place, ahead),
        Layout::Coded(format) => match format.codes {
            Codes::Nibbles(_) => unpack::<S, Nibbles>(simd, weights, format.codes, place, ahead),
            Codes::Five(_) => unpack::<S, Five>(simd, weights, format.codes, place, ahead),
            Codes::Six(_) => unpack::<S, Six>(simd, weights, format.codes, place, ahead),
            Codes::Book(_) => unpack::<S, Book>(simd, weights, format.codes, place, ahead),
        },
        Layout::F32 | Layout::F16 | Layout::Bf16 => unreachable!("a layout without integers"),
    }
}

/// Unpacks codes.
#[inline(always)]
fn unpack<S: Simd, U: Unpack>(
    simd: S,
    weights: &[u8],
    codes: Codes,
    place: &mut (impl Place<S> + ?Sized),
    ahead: bool,
) {
    let table = coded::table(codes);
    let offset = if U::BITS == 8 { 128 } else { -coded::offset(codes) as u8 };
    for (group, weights) in weights.chunks_exact(U::BYTES).enumerate() {
        if ahead {
            for line in 0..U::BYTES / 64 {
                simd.prefetch(weights.as_ptr().wrapping_add(AHEAD + line * 64));
            }
        }
        place.start(simd, group, offset);
        for step in 0..8 {
            place.put(simd, group, step, U::step(simd, weights, step, &table), offset);
        }
    }
}

/// Bytes as they are in Int8: offset by 128.
#[derive(Clone, Copy)]
struct Whole;

impl Unpack for Whole {
    const BYTES: usize = GROUP * LANES;
    const BITS: u32 = 8;
    #[inline(always)]
    fn step<S: Simd>(simd: S, weights: &[u8], step: usize, _table: &[u8; 16]) -> S::I32 {
        coded::line(simd, weights, step)
    }
}
