//! Integer panels times 8-bit activations: exact sums in `i32` inside a group of 32 columns, groups added in `f32`, in
//! the order of the columns.

use super::float::{AHEAD, partial_load};
use super::activations::IntegerTile;
use super::{GROUP, IntegerTiles, Layout, PackedMatrix};
use crate::SharedRows;
use crate::simd::{Kernel, LANES, Simd};
use std::ops::Range;

/// A layout's exact sums.
trait IntegerLayout: Copy {
    /// Bytes of a group of a panel.
    const BYTES: usize;
    /// The sums of products of a group with `T` rows.
    ///
    /// # Safety
    /// `weights` is valid for reading `BYTES` bytes.
    unsafe fn group<S: Simd, const T: usize>(
        simd: S,
        weights: *const u8,
        bytes: &[[i8; GROUP]; T],
        totals: &[i32; T],
    ) -> [S::I32; T];
}

#[derive(Clone, Copy)]
struct Int8;
#[derive(Clone, Copy)]
struct Int4;

/// Four activations in every lane.
#[inline(always)]
fn broadcast<S: Simd>(simd: S, bytes: &[i8; GROUP], four: usize) -> S::I32 {
    let bytes = bytes.as_chunks::<4>().0[four];
    simd.splat_i32(i32::from_le_bytes(bytes.map(|byte| byte as u8)))
}

impl IntegerLayout for Int8 {
    const BYTES: usize = 512;
    #[inline(always)]
    unsafe fn group<S: Simd, const T: usize>(
        simd: S,
        weights: *const u8,
        bytes: &[[i8; GROUP]; T],
        totals: &[i32; T],
    ) -> [S::I32; T] {
        let mut sums = totals.map(|total| simd.byte_start(total));
        for step in 0..8 {
            simd.prefetch(weights.wrapping_add(step * 64 + AHEAD));
            // SAFETY: the caller's promise.
            let four = unsafe { simd.load_bytes(weights.add(step * 64)) };
            for t in 0..T {
                sums[t] = simd.byte_dot(sums[t], four, broadcast(simd, &bytes[t], step));
            }
        }
        sums
    }
}

impl IntegerLayout for Int4 {
    const BYTES: usize = 256;
    #[inline(always)]
    unsafe fn group<S: Simd, const T: usize>(
        simd: S,
        weights: *const u8,
        bytes: &[[i8; GROUP]; T],
        totals: &[i32; T],
    ) -> [S::I32; T] {
        let mut sums = [simd.nibble_zero(); T];
        let mask = simd.splat_i32(0x0f0f_0f0f);
        for step in 0..4 {
            simd.prefetch(weights.wrapping_add(step * 64 + AHEAD));
            // SAFETY: the caller's promise.
            let eight = unsafe { simd.load_bytes(weights.add(step * 64)) };
            let low = simd.and_i32(eight, mask);
            let high = simd.and_i32(simd.shift_right(eight, 4), mask);
            for t in 0..T {
                sums[t] = simd.nibble_dot(sums[t], low, broadcast(simd, &bytes[t], 2 * step));
                sums[t] = simd.nibble_dot(sums[t], high, broadcast(simd, &bytes[t], 2 * step + 1));
            }
        }
        let mut out = [simd.splat_i32(0); T];
        for t in 0..T {
            out[t] = simd.nibble_finish(sums[t], -8 * totals[t]);
        }
        out
    }
}

/// Some panels times all tiles.
pub(crate) struct IntegerLinear<'a> {
    /// The weights, in an integer layout.
    pub(crate) weight: &'a PackedMatrix,
    /// The input rows.
    pub(crate) input: IntegerTiles<'a>,
    /// Where results go: (input rows, weight rows). These panels' columns of it are this task's own.
    pub(crate) output: SharedRows<'a>,
    /// Added to every result.
    pub(crate) bias: Option<&'a [f32]>,
    /// Which panels.
    pub(crate) panels: Range<usize>,
}

impl Kernel for IntegerLinear<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        match self.weight.layout() {
            Layout::Int8 => self.panels::<S, Int8>(simd),
            Layout::Int4 => self.panels::<S, Int4>(simd),
            Layout::F32 | Layout::F16 | Layout::Bf16 => unreachable!("a layout without integers"),
        }
    }
}

impl IntegerLinear<'_> {
    #[inline(always)]
    fn panels<S: Simd, L: IntegerLayout>(&self, simd: S) {
        for panel in self.panels.clone() {
            for tile in 0..self.input.tiles.count() {
                match self.input.tiles.width(tile) {
                    1 => self.tile::<S, L, 1>(simd, panel, tile),
                    2 => self.tile::<S, L, 2>(simd, panel, tile),
                    4 => self.tile::<S, L, 4>(simd, panel, tile),
                    _ => self.tile::<S, L, 8>(simd, panel, tile),
                }
            }
        }
    }

    #[inline(always)]
    fn tile<S: Simd, L: IntegerLayout, const T: usize>(&self, simd: S, panel: usize, tile: usize) {
        let weights = self.weight.weights(panel..panel + 1);
        let scales = self.weight.scales(panel..panel + 1);
        let sums = multiply::<S, L, T>(simd, weights, scales, self.input.tile(tile));
        let first = self.input.tiles.first(tile);
        let bias = self.bias.map(|bias| partial_load(simd, &bias[panel * LANES..]));
        let width = LANES.min(self.weight.rows() - panel * LANES);
        for (t, &sum) in sums.iter().enumerate().take(self.input.tiles.rows(tile)) {
            let sum = bias.map_or(sum, |bias| simd.add(sum, bias));
            // SAFETY: no other task has this panel, and this one holds one such slice at a time.
            let out = unsafe { self.output.part_mut(first + t, panel * LANES, width) };
            match out.first_chunk_mut() {
                Some(out) => simd.store(sum, out),
                None => simd.store_partial(sum, out),
            }
        }
    }
}

/// The sums of a panel with `T` rows. `weights` is (groups, group bytes).
#[inline(always)]
fn multiply<S: Simd, L: IntegerLayout, const T: usize>(
    simd: S,
    weights: &[u8],
    scales: &[[u16; LANES]],
    tile: IntegerTile<'_>,
) -> [S::F32; T] {
    let mut sums = [simd.splat(0.0); T];
    let rows = tile.bytes.as_chunks::<T>().0.iter().zip(tile.totals.as_chunks::<T>().0);
    let rows = rows.zip(tile.scales.as_chunks::<T>().0);
    for ((weights, scale), ((bytes, totals), row_scales)) in weights.chunks_exact(L::BYTES).zip(scales).zip(rows) {
        // SAFETY: a chunk has that many bytes.
        let exact = unsafe { L::group(simd, weights.as_ptr(), bytes, totals) };
        simd.prefetch(std::ptr::from_ref(scale).wrapping_add(AHEAD / L::BYTES).cast());
        let scale = simd.load_f16(scale);
        for t in 0..T {
            let scale = simd.mul(scale, simd.splat(row_scales[t]));
            sums[t] = simd.mul_add(simd.to_f32(exact[t]), scale, sums[t]);
        }
    }
    sums
}
