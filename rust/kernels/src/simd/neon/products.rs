//! Exact products of bytes on NEON.
//!
//! A panel suits this: 64 bytes are four columns of 16 rows, so a register holds four rows' four bytes, as `sdot` and `usdot` by a lane of
//! activations want them, and one `zip` of two steps makes the two rows of eight columns that `usmmla` wants. Instructions of the compiled
//! inner loop for a group of 32 columns of a panel, all of them counted (multiplications in brackets); no NEON machine has measured them:
//!
//! | | level 0 | DotProd | I8MM |
//! |---|---|---|---|
//! | Int8, 1 row: 512 products | 211 (64 `smlal`) | 125 (32 `sdot`) | 93 (32 `usdot`) |
//! | Int8, 4 rows: 2048 products | | 360 (128 `sdot`) | 287 (64 `usmmla`) |
//! | Int4, 1 row | 184 (64 `smlal`) | 109 (32 `sdot`) | 109 (32 `usdot`) |
//! | Int4, 4 rows | | 347 (128 `sdot`) | |
//!
//! So one row reads 544 bytes of Int8 in about 100 instructions, which keeps up with memory at two instructions a cycle. Tiles of 8 rows were
//! tried with I8MM, half a panel at a time: the 32 registers of sums in `f32` are spilled then, and 673 instructions for 4096 products are
//! more than twice those of 4 rows.

use super::super::{Simd, four};
use super::{I32, Neon, load_16};
use core::arch::aarch64::*;
use core::arch::asm;

/// Adds to each lane of `sums` the products of its four signed weights with the activations in lane `lane` of 16 bytes.
#[inline(always)]
fn sdot(sums: int32x4_t, weights: uint8x16_t, activations: uint8x16_t, lane: usize) -> int32x4_t {
    let (w, a) = (weights, activations);
    match lane {
        0 => one!("sdot {out:v}.4s, {w:v}.16b, {a:v}.4b[0]", inout sums, w = w, a = a),
        1 => one!("sdot {out:v}.4s, {w:v}.16b, {a:v}.4b[1]", inout sums, w = w, a = a),
        2 => one!("sdot {out:v}.4s, {w:v}.16b, {a:v}.4b[2]", inout sums, w = w, a = a),
        _ => one!("sdot {out:v}.4s, {w:v}.16b, {a:v}.4b[3]", inout sums, w = w, a = a),
    }
}

/// The same with unsigned weights.
#[inline(always)]
fn usdot(sums: int32x4_t, weights: uint8x16_t, activations: uint8x16_t, lane: usize) -> int32x4_t {
    let (w, a) = (weights, activations);
    match lane {
        0 => one!("usdot {out:v}.4s, {w:v}.16b, {a:v}.4b[0]", inout sums, w = w, a = a),
        1 => one!("usdot {out:v}.4s, {w:v}.16b, {a:v}.4b[1]", inout sums, w = w, a = a),
        2 => one!("usdot {out:v}.4s, {w:v}.16b, {a:v}.4b[2]", inout sums, w = w, a = a),
        _ => one!("usdot {out:v}.4s, {w:v}.16b, {a:v}.4b[3]", inout sums, w = w, a = a),
    }
}

/// Adds the products of two rows of eight unsigned weights with two rows of eight activations: lanes are weights' row 0 with the
/// activations' rows 0 and 1, then weights' row 1 with them.
#[inline(always)]
fn usmmla(sums: int32x4_t, weights: uint8x16_t, activations: uint8x16_t) -> int32x4_t {
    one!("usmmla {out:v}.4s, {w:v}.16b, {a:v}.16b", inout sums, w = weights, a = activations)
}

/// Products of the second eight bytes of both. (Intrinsics are compiled to an instruction that moves the bytes and `smull`, if the second
/// operand's halves are the same.)
#[inline(always)]
fn smull2(a: int8x16_t, b: int8x16_t) -> int16x8_t {
    one!("smull2 {out:v}.8h, {a:v}.16b, {b:v}.16b", int16x8_t, a = a, b = b)
}

/// The same, added to `sums`.
#[inline(always)]
fn smlal2(sums: int16x8_t, a: int8x16_t, b: int8x16_t) -> int16x8_t {
    one!("smlal2 {out:v}.8h, {a:v}.16b, {b:v}.16b", inout sums, a = a, b = b)
}

/// Weights of a group, as bytes: each register holds four for each of four lanes.
pub(super) trait Weights<const N: usize> {
    /// Those of step `step` < `N` for register `index`.
    fn get(&self, step: usize, index: usize) -> uint8x16_t;
}

/// Bytes in memory.
pub(super) struct Bytes<'a>(pub(super) &'a [u8; 512]);
/// Nibbles in memory.
pub(super) struct Nibbles<'a>(pub(super) &'a [u8; 256]);
/// Bytes in registers.
pub(super) struct Unpacked<'a, const N: usize>(pub(super) &'a [I32; N]);

impl Weights<8> for Bytes<'_> {
    #[inline(always)]
    fn get(&self, step: usize, index: usize) -> uint8x16_t {
        load_16(&self.0[step * 64 + index * 16..])
    }
}

impl Weights<8> for Nibbles<'_> {
    #[inline(always)]
    fn get(&self, step: usize, index: usize) -> uint8x16_t {
        let pair = load_16(&self.0[step / 2 * 64 + index * 16..]);
        hardware!(if step.is_multiple_of(2) { vandq_u8(pair, vdupq_n_u8(15)) } else { vshrq_n_u8::<4>(pair) })
    }
}

impl<const N: usize> Weights<N> for Unpacked<'_, N> {
    #[inline(always)]
    fn get(&self, step: usize, index: usize) -> uint8x16_t {
        hardware!(vreinterpretq_u8_s32(self.0[step][index]))
    }
}

#[allow(clippy::needless_range_loop)] // indices say which of several arrays' elements meet
impl<const LEVEL: u8> Neon<LEVEL> {
    /// [`Simd::dot`] of weights wherever they are.
    #[inline(always)]
    pub(super) fn products<W: Weights<N>, const N: usize, const T: usize, const BITS: u32>(
        self,
        weights: &W,
        rows: &[[u8; 32]; T],
        first: usize,
        offsets: &[i32; T],
    ) -> [I32; T] {
        const { assert!(N == 4 || N == 8) }
        assert!(first.is_multiple_of(4));
        if T > 4 {
            // No tile has so many rows: their sums would not fit the registers.
            return self.by_single_rows::<W, N, T, BITS>(weights, rows, first, offsets);
        }
        if LEVEL == 0 {
            self.by_words::<W, N, T, BITS>(weights, rows, first, offsets)
        } else if LEVEL == 2 && T.is_multiple_of(2) {
            self.by_pairs_of_rows::<W, N, T>(weights, rows, first, offsets)
        } else {
            self.by_fours::<W, N, T, BITS>(weights, rows, first, offsets)
        }
    }

    #[inline(always)]
    fn by_single_rows<W: Weights<N>, const N: usize, const T: usize, const BITS: u32>(
        self,
        weights: &W,
        rows: &[[u8; 32]; T],
        first: usize,
        offsets: &[i32; T],
    ) -> [I32; T] {
        let mut out = [self.splat_i32(0); T];
        for t in 0..T {
            let (row, offset) = ([rows[t]], [offsets[t]]);
            [out[t]] = if LEVEL == 0 {
                self.by_words::<W, N, 1, BITS>(weights, &row, first, &offset)
            } else {
                self.by_fours::<W, N, 1, BITS>(weights, &row, first, &offset)
            };
        }
        out
    }

    /// With DotProd, or I8MM: four columns at a time.
    #[inline(always)]
    fn by_fours<W: Weights<N>, const N: usize, const T: usize, const BITS: u32>(
        self,
        weights: &W,
        rows: &[[u8; 32]; T],
        first: usize,
        offsets: &[i32; T],
    ) -> [I32; T] {
        hardware!({
            // Without I8MM there are no products of unsigned weights with signed activations; the former are made signed.
            let signed = BITS == 8 && LEVEL < 2;
            let mut sums = [[vdupq_n_s32(0); 4]; T];
            for t in 0..T {
                sums[t] = [vdupq_n_s32(if signed { 0 } else { offsets[t] }); 4];
            }
            unrolled!(four in [0 4] {
                unrolled!(lane in [0 1 2 3] {
                    for index in 0..if four < N { 4 } else { 0 } {
                        let weights = weights.get(four + lane, index);
                        let weights = if signed { veorq_u8(weights, vdupq_n_u8(0x80)) } else { weights };
                        for t in 0..T {
                            let row = load_16(&rows[t][(first + four) * 4..]);
                            sums[t][index] = if LEVEL < 2 {
                                sdot(sums[t][index], weights, row, lane)
                            } else {
                                usdot(sums[t][index], weights, row, lane)
                            };
                        }
                    }
                });
            });
            sums
        })
    }

    /// With I8MM: eight columns of two rows at a time.
    #[inline(always)]
    fn by_pairs_of_rows<W: Weights<N>, const N: usize, const T: usize>(
        self,
        weights: &W,
        rows: &[[u8; 32]; T],
        first: usize,
        offsets: &[i32; T],
    ) -> [I32; T] {
        hardware!({
            // Of each pair of rows with each pair of lanes.
            let mut sums = [[[vdupq_n_s32(0); 2]; 4]; T];
            unrolled!(step in [0 2 4 6] {
                for index in 0..if step < N { 4 } else { 0 } {
                    let (even, odd) = (weights.get(step, index), weights.get(step + 1, index));
                    let (low, high) = eight_of_lanes(even, odd);
                    for t in 0..T / 2 {
                        let pair = eight_columns(&rows[2 * t], &rows[2 * t + 1], first + step / 4 * 4, step % 4);
                        sums[t][index][0] = usmmla(sums[t][index][0], low, pair);
                        sums[t][index][1] = usmmla(sums[t][index][1], high, pair);
                    }
                }
            });
            let mut out = [[vdupq_n_s32(0); 4]; T];
            for t in 0..T / 2 {
                let offsets = [vdupq_n_s32(offsets[2 * t]), vdupq_n_s32(offsets[2 * t + 1])];
                for index in 0..4 {
                    let [low, high] = sums[t][index];
                    out[2 * t][index] = vaddq_s32(vuzp1q_s32(low, high), offsets[0]);
                    out[2 * t + 1][index] = vaddq_s32(vuzp2q_s32(low, high), offsets[1]);
                }
            }
            out
        })
    }

    /// Without DotProd: as many products as fit 16 bits are added there, two columns apart; then two neighbours to 32 bits.
    #[inline(always)]
    fn by_words<W: Weights<N>, const N: usize, const T: usize, const BITS: u32>(
        self,
        weights: &W,
        rows: &[[u8; 32]; T],
        first: usize,
        offsets: &[i32; T],
    ) -> [I32; T] {
        hardware!({
            // 2 * 128 * 127, 4 * 63 * 127 and 8 * 31 * 127 are below 2^15.
            let span = match BITS {
                8 => 2,
                6 => 4,
                _ => 8,
            };
            let zero = vdupq_n_s16(0);
            let mut sums = [[[vdupq_n_s32(0); 2]; 4]; T];
            unrolled!(begin in [0 2] {
                // Else all activations are kept for the other half, in registers that do not exist.
                std::sync::atomic::compiler_fence(std::sync::atomic::Ordering::SeqCst);
                let mut words = [[[zero; 2]; 4]; T];
                unrolled!(step in [0 1 2 3 4 5 6 7] {
                    for index in begin..if step < N { begin + 2 } else { begin } {
                        let weights = weights.get(step, index);
                        let weights = if BITS == 8 { veorq_u8(weights, vdupq_n_u8(0x80)) } else { weights };
                        let weights = vreinterpretq_s8_u8(weights);
                        for t in 0..T {
                            let four = vdupq_n_s32(four(&rows[t], first + step));
                            let four = vreinterpretq_s8_s32(four);
                            let [low, high] = words[t][index];
                            words[t][index] = if step.is_multiple_of(span) {
                                let low = vmull_s8(vget_low_s8(weights), vget_low_s8(four));
                                [low, smull2(weights, four)]
                            } else {
                                let low = vmlal_s8(low, vget_low_s8(weights), vget_low_s8(four));
                                [low, smlal2(high, weights, four)]
                            };
                            if (step + 1).is_multiple_of(span) || step + 1 == N {
                                for half in 0..2 {
                                    let sum = sums[t][index][half];
                                    sums[t][index][half] = vpadalq_s16(sum, words[t][index][half]);
                                }
                            }
                        }
                    }
                });
            });
            let mut out = [[vdupq_n_s32(0); 4]; T];
            for t in 0..T {
                let offset = vdupq_n_s32(if BITS == 8 { 0 } else { offsets[t] });
                for index in 0..4 {
                    out[t][index] = vaddq_s32(vpaddq_s32(sums[t][index][0], sums[t][index][1]), offset);
                }
            }
            out
        })
    }
}

/// Eight columns of two rows, those of the first and then those of the second: the 16 bytes from four times `four` on hold them, in their
/// low half if `half` is 0.
#[inline(always)]
fn eight_columns(first: &[u8; 32], second: &[u8; 32], four: usize, half: usize) -> uint8x16_t {
    hardware!({
        let (first, second) = (load_16(&first[four * 4..]), load_16(&second[four * 4..]));
        let (first, second) = (vreinterpretq_u64_u8(first), vreinterpretq_u64_u8(second));
        let pair = if half == 0 { vzip1q_u64(first, second) } else { vzip2q_u64(first, second) };
        vreinterpretq_u8_u64(pair)
    })
}

/// Four columns of four lanes and the next four columns, as eight columns of two lanes and of the next two.
#[inline(always)]
fn eight_of_lanes(even: uint8x16_t, odd: uint8x16_t) -> (uint8x16_t, uint8x16_t) {
    hardware!({
        let (even, odd) = (vreinterpretq_u32_u8(even), vreinterpretq_u32_u8(odd));
        (vreinterpretq_u8_u32(vzip1q_u32(even, odd)), vreinterpretq_u8_u32(vzip2q_u32(even, odd)))
    })
}
