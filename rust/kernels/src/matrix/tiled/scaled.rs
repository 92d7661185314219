//! Weights times the steps that their scales are: numbers of 16 bits, as two planes of bytes, the low ones unsigned and the high ones signed.

use super::super::coded;
use super::super::integer;
use super::super::{GROUP, PackedMatrix};
use super::block::Place;
use super::spans::Kind;
use crate::simd::{LANES, Simd};
use std::marker::PhantomData;

/// The low and the high bytes of some groups of a panel, as its codes are read.
pub(super) struct Scaled<'a, S: Simd, K: Kind> {
    /// Records of the panel, or scales of Int4: (groups, 16).
    records: &'a [u8],
    scales: &'a [[u16; LANES]],
    /// The group that comes first.
    first: usize,
    /// One over the units of rows, of Int4.
    inverse: S::F32,
    /// What codes of the group's halves are multiplied with, and what their offset makes too much.
    steps: [S::I32; 2],
    drops: [S::I32; 2],
    planes: [&'a mut [[u8; GROUP * LANES]]; 2],
    kind: PhantomData<K>,
}

impl<'a, S: Simd, K: Kind> Scaled<'a, S, K> {
    /// Planes for groups of a panel from `first` on.
    #[inline(always)]
    pub(super) fn new(
        simd: S,
        weight: &'a PackedMatrix,
        panel: usize,
        first: usize,
        planes: [&'a mut [[u8; GROUP * LANES]]; 2],
    ) -> Scaled<'a, S, K> {
        let (mut inverse, mut scales) = (simd.splat(0.0), &[][..]);
        if K::SCALES.is_none() {
            inverse = integer::inverse(simd, simd.load(weight.units(panel)));
            scales = weight.scales(panel);
        }
        let zeros = [simd.splat_i32(0); 2];
        Scaled {
            records: weight.scale_bytes(panel),
            scales,
            first,
            inverse,
            steps: zeros,
            drops: zeros,
            planes,
            kind: PhantomData,
        }
    }
}

impl<S: Simd, K: Kind> Place<S> for Scaled<'_, S, K> {
    #[inline(always)]
    fn start(&mut self, simd: S, group: usize, offset: u8) {
        debug_assert!(offset == 0 || K::DROPS == 0);
        let offset = simd.splat_i32(i32::from(offset));
        let group = self.first + group;
        for half in 0..2 {
            let steps = match K::SCALES {
                Some(scales) if half == 0 || scales.has_halves() => {
                    let record = coded::record_of(scales, self.records, group);
                    let part = group % K::SPAN * coded::parts_of(scales) + half;
                    coded::load_steps(simd, scales, record, part)
                }
                None if half == 0 => integer::steps(simd, &self.scales[group], self.inverse),
                _ => {
                    (self.steps[1], self.drops[1]) = (self.steps[0], self.drops[0]);
                    continue;
                }
            };
            let drops = simd.mul_add_i32(steps, offset, simd.splat_i32(0));
            (self.steps[half], self.drops[half]) = (both_halves(simd, steps), both_halves(simd, drops));
        }
    }

    #[inline(always)]
    fn put(&mut self, simd: S, group: usize, step: usize, codes: S::I32, _offset: u8) {
        let (steps, drops) = (self.steps[step / 4], self.drops[step / 4]);
        let [low, high] = match K::DROPS {
            0 => simd.scale_codes::<true>(codes, steps, drops),
            _ => simd.scale_codes::<false>(codes, steps, drops), // codes with minima have no offset
        };
        let [lows, highs] = &mut self.planes;
        simd.store_bytes(low, &mut lows[group].as_chunks_mut().0[step]);
        simd.store_bytes(high, &mut highs[group].as_chunks_mut().0[step]);
    }
}

/// The low half of each lane in both of them.
#[inline(always)]
fn both_halves<S: Simd>(simd: S, words: S::I32) -> S::I32 {
    simd.or_i32(simd.and_i32(words, simd.splat_i32(0xffff)), simd.shift_left(words, 16))
}
