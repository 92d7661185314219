//! Instruction sets. Kernels are written once, generic over [`Simd`]: 16 virtual lanes, however wide the registers.
//!
//! A value of a type that implements [`Simd`] is a token: it exists only where its instructions do, because only the
//! type's `detect` makes one. [`Isa::dispatch`] turns an [`Isa`] into its token inside a function compiled for that
//! instruction set; everything a kernel calls from there must be `#[inline(always)]`, or it falls back to baseline
//! code (and every vector operation becomes a call). That includes closures, which cannot be marked so: none may
//! compute with vectors.
//!
//! The same lane operations in the same order give the same bits on every instruction set: multiply-adds are fused
//! everywhere (the scalar set uses `f32::mul_add`), horizontal sums use one tree, conversions round to nearest even.

#[cfg(target_arch = "x86_64")]
mod amx;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod isa;
#[cfg(target_arch = "aarch64")]
mod neon;
mod scalar;
#[cfg(test)]
mod tests;
mod tiles;

#[cfg(target_arch = "x86_64")]
pub use avx2::Avx2;
#[cfg(target_arch = "x86_64")]
pub use avx512::Avx512;
pub use isa::Isa;
#[cfg(target_arch = "aarch64")]
pub use neon::Neon;
pub use scalar::Scalar;
#[cfg(test)]
pub(crate) use tiles::add_group;
pub use tiles::{MatrixUnit, TILE_ROWS, TileShape, TileSums};

/// Lanes of a virtual vector.
pub const LANES: usize = 16;

/// Asks for the cache line at `address`, which need not be valid, into a larger cache than the nearest one: outside of kernels, where no
/// instruction set is chosen.
#[inline(always)]
pub(crate) fn prefetch_later(address: *const u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: every such processor has the instruction, which does nothing that can be seen, whatever the address.
    unsafe {
        use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
        _mm_prefetch::<_MM_HINT_T1>(address.cast());
    }
    #[cfg(target_arch = "aarch64")]
    neon::prefetch(address);
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    let _ = address;
}

/// A computation that is generic over the instruction set. See [`Isa::dispatch`].
pub trait Kernel {
    /// What it returns.
    type Output;
    /// Whether it multiplies bytes. What does not is compiled once for all instruction sets that differ in nothing else.
    const MULTIPLIES_BYTES: bool = true;
    /// Computes. Implementations must be `#[inline(always)]`, and so must everything they call with `simd`.
    fn run<S: Simd>(self, simd: S) -> Self::Output;
}

/// Operations on vectors of 16 lanes.
///
/// Implementing it is a promise that the operations are sound wherever a value of the type exists.
pub trait Simd: Copy + Send + Sync + 'static {
    /// 16 lanes of `f32`.
    type F32: Copy;
    /// 16 lanes of `i32`, or 64 bytes.
    type I32: Copy;

    /// Which instruction set this is.
    const ISA: Isa;
    /// Vector registers in units of 16 lanes: kernels size their tiles by it.
    const REGISTERS: usize;

    /// All lanes `value`.
    fn splat(self, value: f32) -> Self::F32;
    /// Sixteen values.
    fn load(self, values: &[f32; LANES]) -> Self::F32;
    /// Sixteen values.
    ///
    /// # Safety
    /// `values` is valid for reading 16 values; alignment is free.
    unsafe fn load_pointer(self, values: *const f32) -> Self::F32;
    /// Sixteen half-precision values.
    fn load_f16(self, values: &[u16; LANES]) -> Self::F32;
    /// Sixteen bfloat16 values.
    fn load_bf16(self, values: &[u16; LANES]) -> Self::F32;
    /// Sixteen OCP E4M3 numbers (no NaN), each divided by 256.
    fn load_e4m3(self, values: &[u8; LANES]) -> Self::F32;
    /// Writes sixteen values.
    fn store(self, vector: Self::F32, values: &mut [f32; LANES]);
    /// Writes sixteen values rounded to half precision, to nearest even.
    fn store_f16(self, vector: Self::F32, values: &mut [u16; LANES]);
    /// Writes sixteen values rounded to bfloat16, to nearest even; a NaN stays one.
    #[inline(always)]
    fn store_bf16(self, vector: Self::F32, values: &mut [u16; LANES]) {
        let bits = self.to_bits(vector);
        let odd = self.and_i32(self.shift_right(bits, 16), self.splat_i32(1));
        let rounded = self.add_i32(self.add_i32(bits, self.splat_i32(0x7fff)), odd);
        let quiet = self.or_i32(bits, self.splat_i32(0x40_0000));
        let magnitude = self.and_i32(bits, self.splat_i32(0x7fff_ffff));
        let chosen = self.select_greater_i32(magnitude, self.splat_i32(0x7f80_0000), quiet, rounded);
        let mut words = [0_i32; LANES];
        self.store_i32(chosen, &mut words);
        for (value, word) in values.iter_mut().zip(words) {
            *value = (word as u32 >> 16) as u16;
        }
    }
    /// Up to sixteen values; the lanes after them are 0.
    #[inline(always)]
    fn load_partial(self, values: &[f32]) -> Self::F32 {
        let mut lanes = [0.0; LANES];
        lanes[..values.len()].copy_from_slice(values);
        self.load(&lanes)
    }
    /// Writes the first `values.len()` lanes, at most sixteen.
    #[inline(always)]
    fn store_partial(self, vector: Self::F32, values: &mut [f32]) {
        let mut lanes = [0.0; LANES];
        self.store(vector, &mut lanes);
        values.copy_from_slice(&lanes[..values.len()]);
    }

    /// `a + b`.
    fn add(self, a: Self::F32, b: Self::F32) -> Self::F32;
    /// `a - b`.
    fn sub(self, a: Self::F32, b: Self::F32) -> Self::F32;
    /// `a * b`.
    fn mul(self, a: Self::F32, b: Self::F32) -> Self::F32;
    /// `a / b`.
    fn div(self, a: Self::F32, b: Self::F32) -> Self::F32;
    /// `a * b + c`, rounded once.
    fn mul_add(self, a: Self::F32, b: Self::F32, c: Self::F32) -> Self::F32;
    /// `a > b ? a : b` (so `b` when either is NaN).
    fn max(self, a: Self::F32, b: Self::F32) -> Self::F32;
    /// `a < b ? a : b` (so `b` when either is NaN).
    fn min(self, a: Self::F32, b: Self::F32) -> Self::F32;
    /// Square root.
    fn sqrt(self, a: Self::F32) -> Self::F32;
    /// Nearest integer, ties to even.
    fn round(self, a: Self::F32) -> Self::F32;
    /// Magnitude.
    #[inline(always)]
    fn abs(self, a: Self::F32) -> Self::F32 {
        self.from_bits(self.and_i32(self.to_bits(a), self.splat_i32(0x7fff_ffff)))
    }
    /// Per lane `a > b ? yes : no` (so `no` when either is NaN).
    fn select_greater(self, a: Self::F32, b: Self::F32, yes: Self::F32, no: Self::F32) -> Self::F32;
    /// Sum of the lanes: halves are added until one lane is left (lane `i` with lane `i + 8`, then 4, 2, 1).
    fn reduce_sum(self, a: Self::F32) -> f32;
    /// Greatest lane, by the same tree of [`Simd::max`].
    fn reduce_max(self, a: Self::F32) -> f32;

    /// All lanes `value`.
    fn splat_i32(self, value: i32) -> Self::I32;
    /// Sixteen values.
    fn load_i32(self, values: &[i32; LANES]) -> Self::I32;
    /// 64 bytes.
    ///
    /// # Safety
    /// `bytes` is valid for reading 64 bytes; alignment is free.
    unsafe fn load_bytes(self, bytes: *const u8) -> Self::I32;
    /// Sixteen unsigned 16-bit values.
    fn load_u16(self, values: &[u16; LANES]) -> Self::I32;
    /// Sixteen signed 8-bit values.
    fn load_i8(self, values: &[i8; LANES]) -> Self::I32;
    /// Writes sixteen values.
    fn store_i32(self, vector: Self::I32, values: &mut [i32; LANES]);
    /// Writes 64 bytes.
    #[inline(always)]
    fn store_bytes(self, vector: Self::I32, bytes: &mut [u8; 64]) {
        let mut lanes = [0; LANES];
        self.store_i32(vector, &mut lanes);
        for (bytes, lane) in bytes.as_chunks_mut::<4>().0.iter_mut().zip(lanes) {
            *bytes = lane.to_le_bytes();
        }
    }
    /// Word `i` of each of sixteen rows, a row to a lane, in vector `i`.
    #[inline(always)]
    fn transpose_words(self, rows: [&[u8; 16]; LANES]) -> [Self::I32; 4] {
        let mut lanes = [[0; LANES]; 4];
        for (lane, row) in rows.iter().enumerate() {
            for (lanes, word) in lanes.iter_mut().zip(row.as_chunks::<4>().0) {
                lanes[lane] = i32::from_le_bytes(*word);
            }
        }
        [
            self.load_i32(&lanes[0]),
            self.load_i32(&lanes[1]),
            self.load_i32(&lanes[2]),
            self.load_i32(&lanes[3]),
        ]
    }
    /// Writes the low byte of each lane.
    fn store_low_bytes(self, vector: Self::I32, values: &mut [u8; LANES]);
    /// `a + b`, wrapping.
    fn add_i32(self, a: Self::I32, b: Self::I32) -> Self::I32;
    /// `a * b + c`, wrapping.
    fn mul_add_i32(self, a: Self::I32, b: Self::I32, c: Self::I32) -> Self::I32;
    /// The same for lanes of `a` that fit 16 bits, and lanes of `b` whose low 16 bits are a signed number and whose others are zeros.
    fn mul_add_i16(self, a: Self::I32, b: Self::I32, c: Self::I32) -> Self::I32;
    /// `a - b`, wrapping.
    fn sub_i32(self, a: Self::I32, b: Self::I32) -> Self::I32;
    /// Bitwise and.
    fn and_i32(self, a: Self::I32, b: Self::I32) -> Self::I32;
    /// Bitwise or.
    fn or_i32(self, a: Self::I32, b: Self::I32) -> Self::I32;
    /// Bitwise exclusive or.
    fn xor_i32(self, a: Self::I32, b: Self::I32) -> Self::I32;
    /// Every lane shifted left by `count` < 32 bits.
    fn shift_left(self, a: Self::I32, count: u32) -> Self::I32;
    /// Every lane shifted right by `count` < 32 bits, zeros coming in.
    fn shift_right(self, a: Self::I32, count: u32) -> Self::I32;
    /// Per lane `a > b ? yes : no`.
    fn select_greater_i32(self, a: Self::I32, b: Self::I32, yes: Self::I32, no: Self::I32) -> Self::I32;
    /// The nearest `f32` of every lane.
    fn to_f32(self, a: Self::I32) -> Self::F32;
    /// The nearest integer of every lane, ties to even; for lanes within the range of `i32` only.
    fn to_i32(self, a: Self::F32) -> Self::I32;
    /// The lanes' bits as `f32`.
    #[allow(clippy::wrong_self_convention)] // `self` is the token
    fn from_bits(self, a: Self::I32) -> Self::F32;
    /// The lanes' bits.
    fn to_bits(self, a: Self::F32) -> Self::I32;
    /// The greater of both.
    fn max_i32(self, a: Self::I32, b: Self::I32) -> Self::I32;
    /// Greatest lane.
    fn reduce_max_i32(self, a: Self::I32) -> i32;
    /// Sum of the lanes, wrapping.
    fn reduce_sum_i32(self, a: Self::I32) -> i32;

    /// Exact sums of products of 32 weights per lane with the 32 activations of each of `T` rows.
    ///
    /// Weights are bytes offset by 128 (0 stands for -128), a lane's four to 4 bytes, 16 lanes after each other, 8 times.
    /// Activations are signed bytes in -127..=127, `offsets` -128 times the sum of a row's.
    fn dot_bytes<const T: usize>(
        self,
        weights: &[u8; 512],
        rows: &[[u8; 32]; T],
        offsets: &[i32; T],
    ) -> [Self::I32; T];
    /// The same of two panels: where loads are what is scarce, each activation is loaded once for both.
    #[inline(always)]
    fn dot_bytes_of_two<const T: usize>(
        self,
        weights: [&[u8; 512]; 2],
        rows: &[[u8; 32]; T],
        offsets: &[i32; T],
    ) -> [[Self::I32; T]; 2] {
        [self.dot_bytes(weights[0], rows, offsets), self.dot_bytes(weights[1], rows, offsets)]
    }
    /// As [`Simd::dot_bytes`], with weights of 4 bits offset by 8: 64 bytes hold four per lane in the low halves of bytes, and the
    /// next four in the high halves; `offsets` are -8 times the sum of a row's activations.
    fn dot_nibbles<const T: usize>(
        self,
        weights: &[u8; 256],
        rows: &[[u8; 32]; T],
        offsets: &[i32; T],
    ) -> [Self::I32; T];

    /// Adds to each lane of `sums` the products of its pair of bfloat16 weights with a pair of activations, those of the high halves
    /// first; each addition is rounded. Hardware that has an instruction for it takes magnitudes below 2^-126 for zeros.
    #[inline(always)]
    fn dot_bf16(self, sums: Self::F32, weights: Self::I32, pair: u32) -> Self::F32 {
        dot_bf16_in_two(self, sums, weights, pair)
    }

    /// The four bytes of each lane times its scale, minus `drops` if `DROP`, as the low bytes, unsigned, and the high ones, signed, of
    /// `256 * high + low`. Both halves of a lane of `scales` and of `drops` are the same 16 bits, and results are within 16 bits.
    #[inline(always)]
    fn scale_codes<const DROP: bool>(
        self,
        codes: Self::I32,
        scales: Self::I32,
        drops: Self::I32,
    ) -> [Self::I32; 2] {
        tiles::scale_codes_ref::<_, DROP>(self, codes, scales, drops)
    }

    /// Adds to each lane of `sums` the products of its pair of signed 16-bit integers with those of `pair`, exactly.
    fn dot_i16(self, sums: Self::I32, weights: Self::I32, pair: i32) -> Self::I32;

    /// Exact sums of products of the bytes of `N` steps of `weights`, four per lane and vector, with as many activations of each of `T`
    /// rows, from the four at `first` on. `N` is 4 or 8, and `first` a multiple of 4.
    ///
    /// `BITS` is 4, 5 or 6: bytes are unsigned numbers of so many bits, and sums begin with `offsets`; or 8: bytes are offset
    /// by 128 (0 stands for -128, which does not occur), and `offsets` are -128 times the sum of the activations, which are
    /// signed bytes in -127..=127.
    fn dot<W: WeightSteps<Self>, const N: usize, const T: usize, const BITS: u32>(
        self,
        weights: &W,
        rows: &[[u8; 32]; T],
        first: usize,
        offsets: &[i32; T],
    ) -> [Self::I32; T];
    /// Runs a kernel that multiplies bytes, in a function of its own where one function with several of them would have too few registers.
    #[inline(always)]
    fn apart<K: Kernel>(self, kernel: K) -> K::Output {
        kernel.run(self)
    }
    /// Replaces every byte, all of them below 16, by that of the table.
    fn lookup(self, table: &[u8; 16], indices: Self::I32) -> Self::I32;

    /// Asks for the cache line at `address`, which need not be valid.
    fn prefetch(self, address: *const u8);
    /// The same, but into a larger cache than the nearest one, where the processor can.
    #[inline(always)]
    fn prefetch_later(self, address: *const u8) {
        self.prefetch(address);
    }

    /// Prepares this thread's matrix unit for tiles of this shape, if there is one. For [`MatrixUnit`], as what follows.
    #[inline(always)]
    fn start_tiles(self, _shape: TileShape) {}
    /// Gives the matrix unit back.
    #[inline(always)]
    fn stop_tiles(self) {}
    /// See [`MatrixUnit::bytes`].
    ///
    /// # Safety
    /// The matrix unit is prepared for this shape, and so much input and weights can be read; there is a step.
    #[inline(always)]
    unsafe fn multiply_bytes<const T: usize, const UNSIGNED: bool>(
        self,
        shape: TileShape,
        input: [*const u8; T],
        weights: [*const u8; 2],
        steps: usize,
        sums: &mut [[TileSums<i32>; T]; 2],
    ) {
        // SAFETY: the caller's promise.
        unsafe { tiles::multiply_bytes_ref::<T, UNSIGNED>(shape, input, weights, steps, sums) }
    }
    /// See [`MatrixUnit::bf16`].
    ///
    /// # Safety
    /// The same; the shape's lines have 64 bytes, and there is a group.
    #[inline(always)]
    unsafe fn multiply_bf16<const T: usize>(
        self,
        shape: TileShape,
        input: [*const u8; T],
        weights: [*const u8; 2],
        groups: usize,
        sums: &mut [[TileSums<f32>; T]; 2],
    ) {
        // SAFETY: the caller's promise.
        unsafe { tiles::multiply_bf16_ref(shape, input, weights, groups, sums) }
    }
}

/// What [`Simd::dot`] multiplies: vectors of weights of four columns, made where they are used.
pub trait WeightSteps<S: Simd> {
    /// One of them.
    fn step(&self, simd: S, index: usize) -> S::I32;

    /// The first `N` of them.
    #[inline(always)]
    fn all<const N: usize>(&self, simd: S) -> [S::I32; N] {
        let mut all = [simd.splat_i32(0); N];
        for (index, step) in all.iter_mut().enumerate() {
            *step = self.step(simd, index);
        }
        all
    }
}

/// Made before.
impl<S: Simd, const N: usize> WeightSteps<S> for [S::I32; N] {
    #[inline(always)]
    fn step(&self, _simd: S, index: usize) -> S::I32 {
        self[index]
    }
}

/// [`Simd::dot_bf16`] for lack of an instruction.
#[inline(always)]
fn dot_bf16_in_two<S: Simd>(simd: S, sums: S::F32, weights: S::I32, pair: u32) -> S::F32 {
    let high = simd.from_bits(simd.and_i32(weights, simd.splat_i32(0xffff_0000_u32 as i32)));
    let low = simd.from_bits(simd.shift_left(weights, 16));
    let sums = simd.mul_add(high, simd.splat(f32::from_bits(pair & 0xffff_0000)), sums);
    simd.mul_add(low, simd.splat(f32::from_bits(pair << 16)), sums)
}

/// Four activations as one number, to be broadcast.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
#[inline(always)]
fn four(row: &[u8; 32], index: usize) -> i32 {
    i32::from_le_bytes(row.as_chunks::<4>().0[index])
}
