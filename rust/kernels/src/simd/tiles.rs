//! Matrix units: processors that multiply whole tiles in one instruction. [`MatrixUnit`] is how kernels use one; what its
//! instructions compute is written here without them, which is also what instruction sets do that have no such unit.

use super::{LANES, Simd};
use std::marker::PhantomData;

/// Greatest number of input rows in a tile.
pub const TILE_ROWS: usize = 16;

/// Bytes of a row of a tile of weights or sums.
pub(super) const LINE: usize = 64;

/// The shape of tiles: input is `rows` lines of `bytes` bytes, weights are `bytes / 4` lines of 64 bytes, sums `rows` lines.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TileShape {
    /// Input rows: 1..=16.
    pub rows: usize,
    /// Bytes of an input row: a multiple of 4, at most 64.
    pub bytes: usize,
}

impl TileShape {
    fn is_valid(self) -> bool {
        (1..=TILE_ROWS).contains(&self.rows)
            && (4..=LINE).contains(&self.bytes)
            && self.bytes.is_multiple_of(4)
    }
}

/// Sums for every input row and lane. Lines beyond the rows that there are keep what they held.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(64))]
pub struct TileSums<V>(pub [[V; LANES]; TILE_ROWS]);

impl<V: Copy + Default> Default for TileSums<V> {
    fn default() -> TileSums<V> {
        TileSums([[V::default(); LANES]; TILE_ROWS])
    }
}

/// This thread's matrix unit, prepared for tiles of one shape, until it is dropped. A thread prepares one at a time.
#[derive(Debug)]
pub struct MatrixUnit<S: Simd> {
    simd: S,
    shape: TileShape,
    thread: PhantomData<*const ()>, // the unit's state belongs to a thread: this must not move to another
}

impl<S: Simd> MatrixUnit<S> {
    /// Prepares it.
    ///
    /// # Panics
    /// When no tile has such a shape.
    #[inline(always)]
    pub fn new(simd: S, shape: TileShape) -> MatrixUnit<S> {
        assert!(shape.is_valid(), "no tile has {shape:?}");
        simd.start_tiles(shape);
        MatrixUnit { simd, shape, thread: PhantomData }
    }

    /// Exact sums of products of signed bytes with signed bytes, or unsigned ones in the first panel if `UNSIGNED`, over `steps` tiles of
    /// two panels with those of `T` tiles of input. An input tile is (steps, rows, bytes); a panel is (steps, bytes / 4, 16 lanes, 4). Sums are (2 panels, T).
    ///
    /// # Panics
    /// When one of them is too short, there is no step, or tiles are not of whole groups of 32 bytes.
    #[inline(always)]
    pub fn bytes<const T: usize, const UNSIGNED: bool>(
        &self,
        input: [&[[u8; 32]]; T],
        weights: [&[u8]; 2],
        steps: usize,
        sums: &mut [TileSums<i32>],
    ) {
        let TileShape { rows, bytes } = self.shape;
        let sums = sums.as_chunks_mut::<T>().0.first_chunk_mut().expect("sums of two panels");
        assert!(steps > 0 && bytes.is_multiple_of(32));
        assert!(input.iter().all(|tile| tile.len() >= steps * rows * (bytes / 32)));
        assert!(weights.iter().all(|panel| panel.len() >= steps * (bytes / 4 * LINE)));
        let input = input.map(|tile| tile.as_ptr().cast::<u8>());
        let weights = weights.map(<[u8]>::as_ptr);
        // SAFETY: the unit is prepared for this shape, and all that it reads exists.
        unsafe { self.simd.multiply_bytes::<T, UNSIGNED>(self.shape, input, weights, steps, sums) };
    }

    /// Adds to the sums of two panels with `T` tiles of input the products of `groups` groups of bfloat16. An input tile is
    /// (groups, rows, 64 bytes), a panel (groups, 16 lines, 16 lanes, 2); lines are 64 bytes, so tiles are of that many.
    ///
    /// # Panics
    /// When one of them is too short, there is no group, or tiles have less than 64 bytes. Sums are (2 panels, T).
    #[inline(always)]
    pub fn bf16<const T: usize>(
        &self,
        input: [&[[u32; LANES]]; T],
        weights: [&[u8]; 2],
        groups: usize,
        sums: &mut [TileSums<f32>],
    ) {
        let sums = sums.as_chunks_mut::<T>().0.first_chunk_mut().expect("sums of two panels");
        assert!(groups > 0 && self.shape.bytes == LINE);
        assert!(input.iter().all(|tile| tile.len() >= groups * self.shape.rows));
        assert!(weights.iter().all(|panel| panel.len() >= groups * TILE_ROWS * LINE));
        let (input, weights) = (input.map(|tile| tile.as_ptr().cast()), weights.map(<[u8]>::as_ptr));
        // SAFETY: the unit is prepared for this shape, and all that it reads exists.
        unsafe { self.simd.multiply_bf16::<T>(self.shape, input, weights, groups, sums) };
    }
}

impl<S: Simd> Drop for MatrixUnit<S> {
    #[inline(always)]
    fn drop(&mut self) {
        self.simd.stop_tiles();
    }
}

/// [`Simd::scale_codes`] where there is no matrix unit to multiply with the result.
#[inline(always)]
pub(super) fn scale_codes_ref<S: Simd, const DROP: bool>(
    simd: S,
    codes: S::I32,
    scales: S::I32,
    drops: S::I32,
) -> [S::I32; 2] {
    let of = |vector| {
        let mut lanes = [0; LANES];
        simd.store_i32(vector, &mut lanes);
        lanes
    };
    let (codes, scales, drops) = (of(codes), of(scales), of(drops));
    let (mut low, mut high) = ([0; LANES], [0; LANES]);
    for lane in 0..LANES {
        let drop = if DROP { drops[lane] as i16 } else { 0 };
        for (column, code) in codes[lane].to_le_bytes().into_iter().enumerate() {
            let product = i16::from(code).wrapping_mul(scales[lane] as i16).wrapping_sub(drop);
            low[lane] |= i32::from(product as u8) << (8 * column);
            high[lane] |= i32::from((product >> 8) as u8) << (8 * column);
        }
    }
    [simd.load_i32(&low), simd.load_i32(&high)]
}

/// [`Simd::multiply_bytes`] without a matrix unit.
///
/// # Safety
/// As there.
pub(super) unsafe fn multiply_bytes_ref<const T: usize, const UNSIGNED: bool>(
    shape: TileShape,
    input: [*const u8; T],
    weights: [*const u8; 2],
    steps: usize,
    sums: &mut [[TileSums<i32>; T]; 2],
) {
    for (unsigned, (sums, panel)) in [UNSIGNED, false].into_iter().zip(sums.iter_mut().zip(weights)) {
        for (sums, tile) in sums.iter_mut().zip(input) {
            for (row, sums) in sums.0.iter_mut().enumerate().take(shape.rows) {
                for (lane, sum) in sums.iter_mut().enumerate() {
                    let product = |(step, k): (usize, usize)| {
                        let input = (step * shape.rows + row) * shape.bytes + k;
                        let weight = (step * shape.bytes / 4 + k / 4) * LINE + lane * 4 + k % 4;
                        // SAFETY: the caller's promise.
                        let pair = unsafe { (*tile.add(input), *panel.add(weight)) };
                        let weight = if unsigned { i32::from(pair.1) } else { i32::from(pair.1 as i8) };
                        i32::from(pair.0 as i8) * weight
                    };
                    let columns = (0..steps).flat_map(|step| (0..shape.bytes).map(move |k| (step, k)));
                    *sum = columns.map(product).sum();
                }
            }
        }
    }
}

/// [`Simd::multiply_bf16`] without a matrix unit.
///
/// # Safety
/// As there.
pub(super) unsafe fn multiply_bf16_ref<const T: usize>(
    shape: TileShape,
    input: [*const u8; T],
    weights: [*const u8; 2],
    groups: usize,
    sums: &mut [[TileSums<f32>; T]; 2],
) {
    for (sums, panel) in sums.iter_mut().zip(weights) {
        for (sums, tile) in sums.iter_mut().zip(input) {
            for group in 0..groups {
                // SAFETY: the caller's promise.
                unsafe {
                    let tile = tile.add(group * shape.rows * LINE);
                    let panel = panel.add(group * TILE_ROWS * LINE);
                    for (row, sums) in sums.0.iter_mut().enumerate().take(shape.rows) {
                        let input = &*tile.add(row * LINE).cast::<[[u8; 4]; LANES]>();
                        for (lane, sum) in sums.iter_mut().enumerate() {
                            let weight = |k: usize| *panel.add(k * LINE + lane * 4).cast::<[u8; 4]>();
                            let pairs = input.iter().enumerate().map(|(k, input)| (*input, weight(k)));
                            *sum = add_group(*sum, pairs.map(|(a, b)| (pair(a), pair(b))));
                        }
                    }
                }
            }
        }
    }
}

/// Two bfloat16.
fn pair(bytes: [u8; 4]) -> (f32, f32) {
    let bits = u32::from_le_bytes(bytes);
    (f32::from_bits(bits << 16), f32::from_bits(bits & 0xffff_0000))
}

/// A sum plus the products of a group of pairs of bfloat16, as matrix units compute it: a chain of fused multiply-adds for the
/// even columns and one for the odd ones, added to each other, then to the sum; numbers below 2^-126 are zeros everywhere.
pub(crate) fn add_group(sum: f32, pairs: impl Iterator<Item = ((f32, f32), (f32, f32))>) -> f32 {
    let (mut even, mut odd) = (0.0, 0.0);
    for (input, weights) in pairs {
        even = flush(flush(input.0).mul_add(flush(weights.0), even));
        odd = flush(flush(input.1).mul_add(flush(weights.1), odd));
    }
    flush(flush(sum) + flush(even + odd))
}

/// A subnormal number's zero.
fn flush(value: f32) -> f32 {
    if value.is_subnormal() { 0.0_f32.copysign(value) } else { value }
}
