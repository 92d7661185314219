//! Codes of a panel as the bytes that kernels multiply.

use super::group_bytes;
use crate::quant::Codes;
use crate::simd::{Simd, WeightSteps};
use std::marker::PhantomData;

/// How codes become bytes that [`Simd::dot`] multiplies.
pub(in super::super) trait Unpack: Copy {
    /// Bytes of 32 columns of a panel.
    const BYTES: usize;
    /// Bits of those bytes, as [`Simd::dot`] counts them.
    const BITS: u32;
    /// A step of four columns.
    fn step<S: Simd>(simd: S, weights: &[u8], step: usize, table: &[u8; 16]) -> S::I32;
}

/// The steps of 32 columns of a panel, from `first` on, as `U` unpacks them.
pub(in super::super) struct Unpacked<'a, U> {
    weights: &'a [u8],
    table: &'a [u8; 16],
    first: usize,
    kind: PhantomData<U>,
}

impl<'a, U: Unpack> Unpacked<'a, U> {
    /// `weights` are `U::BYTES`.
    #[inline(always)]
    pub(in super::super) fn new(weights: &'a [u8], table: &'a [u8; 16], first: usize) -> Unpacked<'a, U> {
        debug_assert_eq!(weights.len(), U::BYTES);
        Unpacked { weights, table, first, kind: PhantomData }
    }
}

impl<S: Simd, U: Unpack> WeightSteps<S> for Unpacked<'_, U> {
    #[inline(always)]
    fn step(&self, simd: S, index: usize) -> S::I32 {
        U::step(simd, self.weights, self.first + index, self.table)
    }
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
pub(in super::super) fn line<S: Simd>(simd: S, weights: &[u8], index: usize) -> S::I32 {
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
    fn step<S: Simd>(simd: S, weights: &[u8], step: usize, _table: &[u8; 16]) -> S::I32 {
        low(simd, weights, step)
    }
}

impl Unpack for Five {
    const BYTES: usize = group_bytes(Codes::Five(0));
    const BITS: u32 = 5;
    #[inline(always)]
    fn step<S: Simd>(simd: S, weights: &[u8], step: usize, _table: &[u8; 16]) -> S::I32 {
        let upper = upper(simd, line(simd, weights, 4), step, 0x1010_1010);
        simd.or_i32(low(simd, weights, step), upper)
    }
}

impl Unpack for Six {
    const BYTES: usize = group_bytes(Codes::Six(0));
    const BITS: u32 = 6;
    #[inline(always)]
    fn step<S: Simd>(simd: S, weights: &[u8], step: usize, _table: &[u8; 16]) -> S::I32 {
        let upper = upper(simd, line(simd, weights, 4 + step / 4), step % 4 * 2, 0x3030_3030);
        simd.or_i32(low(simd, weights, step), upper)
    }
}

impl Unpack for Book {
    const BYTES: usize = group_bytes(Codes::Nibbles(0));
    const BITS: u32 = 8;
    #[inline(always)]
    fn step<S: Simd>(simd: S, weights: &[u8], step: usize, table: &[u8; 16]) -> S::I32 {
        simd.lookup(table, low(simd, weights, step))
    }
}
