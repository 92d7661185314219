//! A block of a panel of integers, whatever the format, as bytes that a matrix unit multiplies and scales that are `f32`.

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
        read_integers(simd, weight, panel, &groups, &mut self.bytes);
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

/// Where integers go as they are read.
pub(super) trait Place<S: Simd> {
    /// Takes those of a step of four columns of a group: four bytes to a lane.
    fn put(&mut self, simd: S, group: usize, step: usize, integers: S::I32);
}

impl<S: Simd> Place<S> for Bytes {
    #[inline(always)]
    fn put(&mut self, simd: S, group: usize, step: usize, integers: S::I32) {
        simd.store_bytes(integers, &mut self[group].as_chunks_mut().0[step]);
    }
}

/// Reads the integers of some groups of a panel, at most [`BLOCK`]; they are counted from the first one on.
#[inline(always)]
pub(super) fn read_integers<S: Simd>(
    simd: S,
    weight: &PackedMatrix,
    panel: usize,
    groups: &Range<usize>,
    place: &mut impl Place<S>,
) {
    let group_bytes = weight.layout().group_bytes();
    let weights = &weight.weights(panel..panel + 1)[groups.start * group_bytes..groups.end * group_bytes];
    match weight.layout() {
        Layout::Int8 => unpack::<S, Whole>(simd, weights, Codes::Nibbles(0), place),
        Layout::Int4 => unpack::<S, Nibbles>(simd, weights, Codes::Nibbles(8), place),
        Layout::Coded(format) => match format.codes {
            Codes::Nibbles(_) => unpack::<S, Nibbles>(simd, weights, format.codes, place),
            Codes::Five(_) => unpack::<S, Five>(simd, weights, format.codes, place),
            Codes::Six(_) => unpack::<S, Six>(simd, weights, format.codes, place),
            Codes::Book(_) => unpack::<S, Book>(simd, weights, format.codes, place),
        },
        Layout::F32 | Layout::F16 | Layout::Bf16 => unreachable!("a layout without integers"),
    }
}

/// Unpacks codes and makes them integers.
#[inline(always)]
fn unpack<S: Simd, U: Unpack>(simd: S, weights: &[u8], codes: Codes, place: &mut impl Place<S>) {
    let table = coded::table(codes);
    let splat = |byte: u8| simd.splat_i32(i32::from_le_bytes([byte; 4]));
    // Bytes minus the offset: with the upper bit set there is no borrow, and without it they are right.
    let (upper, offset) = (splat(0x80), splat(-coded::offset(codes) as u8 & 0x7f));
    for (group, weights) in weights.chunks_exact(U::BYTES).enumerate() {
        for step in 0..8 {
            let bytes = U::step(simd, weights, step, &table);
            let integers = match U::BITS {
                8 => simd.xor_i32(bytes, upper),
                _ => simd.xor_i32(simd.sub_i32(simd.or_i32(bytes, upper), offset), upper),
            };
            place.put(simd, group, step, integers);
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
