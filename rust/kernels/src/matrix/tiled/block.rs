//! A block of a panel of integers, whatever the format, as bytes that a matrix unit multiplies and scales that are `f32`.

use super::super::coded::{self, Book, Five, Nibbles, Six, Unpack};
use super::super::{GROUP, Layout, PackedMatrix};
use crate::quant::{Codes, Scales};
use crate::simd::{LANES, Simd};
use std::ops::Range;

/// Groups in a block: 8 KB of bytes.
pub(super) const BLOCK: usize = 16;

/// Some groups of a panel.
#[repr(C, align(64))]
pub(super) struct Integers {
    /// Integers: (groups, 8 steps of four columns, 16 lanes, 4).
    pub(super) bytes: [[u8; GROUP * LANES]; BLOCK],
    /// What sums are multiplied with, of both halves of a group: (groups, 2, 16).
    pub(super) scales: [[[f32; LANES]; 2]; BLOCK],
    /// What sums of activations are multiplied with, if the format has minima of each group.
    pub(super) minima: [[[f32; LANES]; 2]; BLOCK],
    /// The same as pairs of steps, if they are counted in such: (pairs of parts, 16).
    pub(super) drops: [[i32; LANES]; BLOCK],
    /// And what a record's steps count in: (records, 16).
    pub(super) units: [[f32; LANES]; BLOCK],
}

impl Integers {
    /// An empty one.
    pub(super) fn new() -> Integers {
        let scales = [[[0.0; LANES]; 2]; BLOCK];
        let (drops, units) = ([[0; LANES]; BLOCK], [[0.0; LANES]; BLOCK]);
        Integers { bytes: [[0; GROUP * LANES]; BLOCK], scales, minima: scales, drops, units }
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
        let bytes = weight.layout().group_bytes();
        let weights = &weight.weights(panel..panel + 1)[groups.start * bytes..groups.end * bytes];
        match weight.layout() {
            Layout::Int8 => self.integers::<S, Bytes>(simd, weights, Codes::Nibbles(0)),
            Layout::Int4 => self.integers::<S, Nibbles>(simd, weights, Codes::Nibbles(8)),
            Layout::Coded(format) => match format.codes {
                Codes::Nibbles(_) => self.integers::<S, Nibbles>(simd, weights, format.codes),
                Codes::Five(_) => self.integers::<S, Five>(simd, weights, format.codes),
                Codes::Six(_) => self.integers::<S, Six>(simd, weights, format.codes),
                Codes::Book(_) => self.integers::<S, Book>(simd, weights, format.codes),
            },
            Layout::F32 | Layout::F16 | Layout::Bf16 => unreachable!("a layout without integers"),
        }
        match weight.layout() {
            Layout::Coded(format) => {
                let (factor, scales) = (format.factor, weight.scale_bytes(panel));
                self.coded_scales(simd, format.scales, factor, scales, groups);
            }
            _ => {
                for (own, scales) in self.scales.iter_mut().zip(&weight.scales(panel..panel + 1)[groups]) {
                    simd.store(simd.load_f16(scales), &mut own[0]);
                }
            }
        }
    }

    /// Unpacks codes and makes them integers.
    #[inline(always)]
    fn integers<S: Simd, U: Unpack>(&mut self, simd: S, weights: &[u8], codes: Codes) {
        let table = coded::table(codes);
        let splat = |byte: u8| simd.splat_i32(i32::from_le_bytes([byte; 4]));
        // Bytes minus the offset: with the upper bit set there is no borrow, and without it they are right.
        let (upper, offset) = (splat(0x80), splat(-coded::offset(codes) as u8 & 0x7f));
        for (out, weights) in self.bytes.iter_mut().zip(weights.chunks_exact(U::BYTES)) {
            for (step, out) in out.as_chunks_mut::<64>().0.iter_mut().enumerate() {
                let step = U::step(simd, weights, step, &table);
                let integers = match U::BITS {
                    8 => simd.xor_i32(step, upper),
                    _ => simd.xor_i32(simd.sub_i32(simd.or_i32(step, upper), offset), upper),
                };
                let mut words = [0; LANES];
                simd.store_i32(integers, &mut words);
                for (word, out) in words.iter().zip(out.as_chunks_mut::<4>().0) {
                    *out = word.to_le_bytes();
                }
            }
        }
    }

    #[inline(always)]
    fn coded_scales<S: Simd>(
        &mut self,
        simd: S,
        kind: Scales,
        factor: f32,
        scales: &[u8],
        groups: Range<usize>,
    ) {
        if kind.has_drops() {
            self.coded_drops(simd, kind, scales, groups.clone());
        }
        for (at, group) in groups.enumerate() {
            let units = coded::load_units(simd, kind, factor, scales, group);
            let own = coded::load_scales(simd, kind, units, scales, group);
            for half in 0..2 {
                simd.store(own.scales[half], &mut self.scales[at][half]);
                if !kind.has_drops() {
                    simd.store(own.minima[half], &mut self.minima[at][half]);
                }
            }
        }
    }

    /// Reads the minima of whole records.
    #[inline(always)]
    fn coded_drops<S: Simd>(&mut self, simd: S, kind: Scales, scales: &[u8], groups: Range<usize>) {
        let (span, parts) = (coded::span(kind), coded::parts_of(kind));
        let pairs = span * parts / 2;
        for (record, group) in groups.step_by(span).enumerate() {
            simd.store(coded::load_units(simd, kind, 1.0, scales, group).minimum, &mut self.units[record]);
            let bytes = coded::record_of(kind, scales, group);
            for (pair, drops) in self.drops[record * pairs..][..pairs].iter_mut().enumerate() {
                simd.store_i32(coded::load_drops(simd, kind, bytes, pair), drops);
            }
        }
    }
}

/// Bytes as they are in Int8: offset by 128.
#[derive(Clone, Copy)]
struct Bytes;

impl Unpack for Bytes {
    const BYTES: usize = GROUP * LANES;
    const BITS: u32 = 8;
    #[inline(always)]
    fn step<S: Simd>(simd: S, weights: &[u8], step: usize, _table: &[u8; 16]) -> S::I32 {
        coded::line(simd, weights, step)
    }
}
