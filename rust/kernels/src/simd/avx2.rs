//! AVX2, FMA and F16C: two registers hold the 16 lanes.

use super::{Isa, Kernel, LANES, Simd, WeightSteps, four};
use core::arch::x86_64::*;

/// Token of AVX2, FMA and F16C; only [`Avx2::detect`] makes one.
#[derive(Clone, Copy, Debug)]
pub struct Avx2(());

/// Lanes 0..8 and 8..16.
type F32 = (__m256, __m256);
/// Lanes 0..8 and 8..16.
type I32 = (__m256i, __m256i);

/// An expression of AVX2, FMA and F16C intrinsics, in a method of the token.
macro_rules! hardware {
    ($($body:tt)*) => {{
        // SAFETY: `self` exists, so the instructions do; pointers come from references or the caller's promise.
        unsafe { $($body)* }
    }};
}

impl Avx2 {
    /// The token, if this machine has the instructions.
    #[inline]
    pub fn detect() -> Option<Avx2> {
        let present = is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("f16c");
        present.then_some(Avx2(()))
    }

    /// Runs `kernel` compiled for this instruction set.
    #[inline]
    pub fn enter<K: Kernel>(self, kernel: K) -> K::Output {
        #[target_feature(enable = "avx2,fma,f16c")]
        fn inside<K: Kernel>(token: Avx2, kernel: K) -> K::Output {
            kernel.run(token)
        }
        hardware!(inside(self, kernel))
    }

    /// Word `i` of each of eight rows in vector `i`.
    #[inline(always)]
    fn transpose_eight(self, rows: &[&[u8; 16]; LANES], first: usize) -> [__m256i; 4] {
        hardware!({
            let mut halves = [_mm256_setzero_si256(); 4];
            for (half, rows) in halves.iter_mut().zip(rows[first..].windows(5)) {
                let low = _mm256_castsi128_si256(_mm_loadu_si128(rows[0].as_ptr().cast()));
                *half = _mm256_inserti128_si256::<1>(low, _mm_loadu_si128(rows[4].as_ptr().cast()));
            }
            let [a, b, c, d] = halves;
            let (low, high) = (_mm256_unpacklo_epi32(a, b), _mm256_unpackhi_epi32(a, b));
            let (more, most) = (_mm256_unpacklo_epi32(c, d), _mm256_unpackhi_epi32(c, d));
            [
                _mm256_unpacklo_epi64(low, more),
                _mm256_unpackhi_epi64(low, more),
                _mm256_unpacklo_epi64(high, most),
                _mm256_unpackhi_epi64(high, most),
            ]
        })
    }

    /// Per 32-bit lane the sum of four products of signed weights, of which the magnitudes are also given, with
    /// activations.
    #[inline(always)]
    fn byte_products(self, weights: __m256i, magnitudes: __m256i, activations: __m256i) -> __m256i {
        hardware!({
            // |w| <= 128 and |a| <= 127, so a sum of two products, at most 32512, fits 16 bits.
            let pairs = _mm256_maddubs_epi16(magnitudes, _mm256_sign_epi8(activations, weights));
            _mm256_madd_epi16(pairs, _mm256_set1_epi16(1))
        })
    }

    /// Per 32-bit lane the sum of four products of weights offset by 128 with activations.
    #[inline(always)]
    fn offset_products(self, weights: I32, activations: i32) -> I32 {
        hardware!({
            let (flip, four) = (_mm256_set1_epi8(-128), _mm256_set1_epi32(activations));
            let (low, high) = (_mm256_xor_si256(weights.0, flip), _mm256_xor_si256(weights.1, flip));
            (
                self.byte_products(low, _mm256_abs_epi8(low), four),
                self.byte_products(high, _mm256_abs_epi8(high), four),
            )
        })
    }

    /// Adds sums of two products of unsigned weights with activations to 16-bit lanes.
    #[inline(always)]
    fn add_pairs(self, pairs: I32, weights: I32, activations: i32) -> I32 {
        hardware!({
            let four = _mm256_set1_epi32(activations);
            (
                _mm256_add_epi16(pairs.0, _mm256_maddubs_epi16(weights.0, four)),
                _mm256_add_epi16(pairs.1, _mm256_maddubs_epi16(weights.1, four)),
            )
        })
    }

    /// Sums of neighbouring 16-bit lanes.
    #[inline(always)]
    fn join_pairs(self, pairs: I32) -> I32 {
        hardware!({
            let ones = _mm256_set1_epi16(1);
            (_mm256_madd_epi16(pairs.0, ones), _mm256_madd_epi16(pairs.1, ones))
        })
    }

    /// [`Simd::dot_nibbles`] of the 8 lanes that begin at byte `at` of each 64. Both halves at once would need more
    /// registers than there are.
    #[inline(always)]
    fn half_nibbles<const T: usize>(
        self,
        weights: &[u8; 256],
        at: usize,
        rows: &[[u8; 32]; T],
        offsets: &[i32; T],
    ) -> [__m256i; T] {
        hardware!({
            let (mask, ones) = (_mm256_set1_epi8(15), _mm256_set1_epi16(1));
            let mut nibbles = [mask; 8];
            for step in 0..4 {
                let weights = _mm256_loadu_si256(weights.as_ptr().add(step * 64 + at).cast());
                nibbles[2 * step] = _mm256_and_si256(weights, mask);
                nibbles[2 * step + 1] = _mm256_and_si256(_mm256_srli_epi32::<4>(weights), mask);
            }
            let mut out = [mask; T];
            for t in 0..T {
                // Eight times two products of at most 15 * 127 stay below 2^15.
                let mut sum = _mm256_maddubs_epi16(nibbles[0], _mm256_set1_epi32(four(&rows[t], 0)));
                for (i, &nibbles) in nibbles.iter().enumerate().skip(1) {
                    let products = _mm256_maddubs_epi16(nibbles, _mm256_set1_epi32(four(&rows[t], i)));
                    sum = _mm256_add_epi16(sum, products);
                }
                out[t] = _mm256_add_epi32(_mm256_madd_epi16(sum, ones), _mm256_set1_epi32(offsets[t]));
            }
            out
        })
    }
}

impl Simd for Avx2 {
    type F32 = F32;
    type I32 = I32;
    const ISA: Isa = Isa::Avx2;
    const REGISTERS: usize = 8;

    #[inline(always)]
    fn splat(self, value: f32) -> F32 {
        hardware!((_mm256_set1_ps(value), _mm256_set1_ps(value)))
    }
    #[inline(always)]
    fn load(self, values: &[f32; LANES]) -> F32 {
        hardware!((_mm256_loadu_ps(values.as_ptr()), _mm256_loadu_ps(values.as_ptr().add(8))))
    }
    #[inline(always)]
    unsafe fn load_pointer(self, values: *const f32) -> F32 {
        hardware!((_mm256_loadu_ps(values), _mm256_loadu_ps(values.add(8))))
    }
    #[inline(always)]
    fn load_f16(self, values: &[u16; LANES]) -> F32 {
        let pointer = values.as_ptr();
        hardware!((
            _mm256_cvtph_ps(_mm_loadu_si128(pointer.cast())),
            _mm256_cvtph_ps(_mm_loadu_si128(pointer.add(8).cast()))
        ))
    }
    #[inline(always)]
    fn load_bf16(self, values: &[u16; LANES]) -> F32 {
        let bits = self.load_u16(values);
        self.from_bits(self.shift_left(bits, 16))
    }
    #[inline(always)]
    fn load_e4m3(self, values: &[u8; LANES]) -> F32 {
        hardware!({
            let words = _mm256_cvtepi8_epi16(_mm_loadu_si128(values.as_ptr().cast()));
            // The sign is in bit 14 as well now; that one goes.
            let half = _mm256_and_si256(_mm256_slli_epi16::<7>(words), _mm256_set1_epi16(!0x4000));
            (
                _mm256_cvtph_ps(_mm256_castsi256_si128(half)),
                _mm256_cvtph_ps(_mm256_extracti128_si256::<1>(half)),
            )
        })
    }
    #[inline(always)]
    fn store(self, vector: F32, values: &mut [f32; LANES]) {
        hardware!({
            _mm256_storeu_ps(values.as_mut_ptr(), vector.0);
            _mm256_storeu_ps(values.as_mut_ptr().add(8), vector.1);
        })
    }
    #[inline(always)]
    fn store_f16(self, vector: F32, values: &mut [u16; LANES]) {
        let pointer = values.as_mut_ptr();
        hardware!({
            _mm_storeu_si128(pointer.cast(), _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(vector.0));
            _mm_storeu_si128(pointer.add(8).cast(), _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(vector.1));
        })
    }

    #[inline(always)]
    fn add(self, a: F32, b: F32) -> F32 {
        hardware!((_mm256_add_ps(a.0, b.0), _mm256_add_ps(a.1, b.1)))
    }
    #[inline(always)]
    fn sub(self, a: F32, b: F32) -> F32 {
        hardware!((_mm256_sub_ps(a.0, b.0), _mm256_sub_ps(a.1, b.1)))
    }
    #[inline(always)]
    fn mul(self, a: F32, b: F32) -> F32 {
        hardware!((_mm256_mul_ps(a.0, b.0), _mm256_mul_ps(a.1, b.1)))
    }
    #[inline(always)]
    fn div(self, a: F32, b: F32) -> F32 {
        hardware!((_mm256_div_ps(a.0, b.0), _mm256_div_ps(a.1, b.1)))
    }
    #[inline(always)]
    fn mul_add(self, a: F32, b: F32, c: F32) -> F32 {
        hardware!((_mm256_fmadd_ps(a.0, b.0, c.0), _mm256_fmadd_ps(a.1, b.1, c.1)))
    }
    #[inline(always)]
    fn max(self, a: F32, b: F32) -> F32 {
        hardware!((_mm256_max_ps(a.0, b.0), _mm256_max_ps(a.1, b.1)))
    }
    #[inline(always)]
    fn min(self, a: F32, b: F32) -> F32 {
        hardware!((_mm256_min_ps(a.0, b.0), _mm256_min_ps(a.1, b.1)))
    }
    #[inline(always)]
    fn sqrt(self, a: F32) -> F32 {
        hardware!((_mm256_sqrt_ps(a.0), _mm256_sqrt_ps(a.1)))
    }
    #[inline(always)]
    fn round(self, a: F32) -> F32 {
        const MODE: i32 = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
        hardware!((_mm256_round_ps::<MODE>(a.0), _mm256_round_ps::<MODE>(a.1)))
    }
    #[inline(always)]
    fn select_greater(self, a: F32, b: F32, yes: F32, no: F32) -> F32 {
        hardware!((
            _mm256_blendv_ps(no.0, yes.0, _mm256_cmp_ps::<_CMP_GT_OQ>(a.0, b.0)),
            _mm256_blendv_ps(no.1, yes.1, _mm256_cmp_ps::<_CMP_GT_OQ>(a.1, b.1))
        ))
    }
    #[inline(always)]
    fn reduce_sum(self, a: F32) -> f32 {
        hardware!({
            let a = _mm256_add_ps(a.0, a.1);
            let a = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps::<1>(a));
            let a = _mm_add_ps(a, _mm_movehl_ps(a, a));
            _mm_cvtss_f32(_mm_add_ss(a, _mm_movehdup_ps(a)))
        })
    }
    #[inline(always)]
    fn reduce_max(self, a: F32) -> f32 {
        hardware!({
            let a = _mm256_max_ps(a.0, a.1);
            let a = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps::<1>(a));
            let a = _mm_max_ps(a, _mm_movehl_ps(a, a));
            _mm_cvtss_f32(_mm_max_ss(a, _mm_movehdup_ps(a)))
        })
    }

    #[inline(always)]
    fn splat_i32(self, value: i32) -> I32 {
        hardware!((_mm256_set1_epi32(value), _mm256_set1_epi32(value)))
    }
    #[inline(always)]
    fn load_i32(self, values: &[i32; LANES]) -> I32 {
        // SAFETY: 16 values are 64 bytes.
        unsafe { self.load_bytes(values.as_ptr().cast()) }
    }
    #[inline(always)]
    unsafe fn load_bytes(self, bytes: *const u8) -> I32 {
        hardware!((_mm256_loadu_si256(bytes.cast()), _mm256_loadu_si256(bytes.add(32).cast())))
    }
    #[inline(always)]
    fn load_u16(self, values: &[u16; LANES]) -> I32 {
        let pointer = values.as_ptr();
        hardware!((
            _mm256_cvtepu16_epi32(_mm_loadu_si128(pointer.cast())),
            _mm256_cvtepu16_epi32(_mm_loadu_si128(pointer.add(8).cast()))
        ))
    }
    #[inline(always)]
    fn load_i8(self, values: &[i8; LANES]) -> I32 {
        hardware!({
            let bytes = _mm_loadu_si128(values.as_ptr().cast());
            (_mm256_cvtepi8_epi32(bytes), _mm256_cvtepi8_epi32(_mm_unpackhi_epi64(bytes, bytes)))
        })
    }
    #[inline(always)]
    fn store_i32(self, vector: I32, values: &mut [i32; LANES]) {
        hardware!({
            _mm256_storeu_si256(values.as_mut_ptr().cast(), vector.0);
            _mm256_storeu_si256(values.as_mut_ptr().add(8).cast(), vector.1);
        })
    }
    #[inline(always)]
    fn transpose_words(self, rows: [&[u8; 16]; LANES]) -> [I32; 4] {
        let (low, high) = (self.transpose_eight(&rows, 0), self.transpose_eight(&rows, 8));
        [(low[0], high[0]), (low[1], high[1]), (low[2], high[2]), (low[3], high[3])]
    }
    #[inline(always)]
    fn store_low_bytes(self, vector: I32, values: &mut [u8; LANES]) {
        let mut lanes = [0_i32; LANES];
        self.store_i32(vector, &mut lanes);
        for (value, lane) in values.iter_mut().zip(lanes) {
            *value = lane as u8;
        }
    }
    #[inline(always)]
    fn add_i32(self, a: I32, b: I32) -> I32 {
        hardware!((_mm256_add_epi32(a.0, b.0), _mm256_add_epi32(a.1, b.1)))
    }
    #[inline(always)]
    fn mul_add_i32(self, a: I32, b: I32, c: I32) -> I32 {
        let products = hardware!((_mm256_mullo_epi32(a.0, b.0), _mm256_mullo_epi32(a.1, b.1)));
        self.add_i32(products, c)
    }
    #[inline(always)]
    fn mul_add_i16(self, a: I32, b: I32, c: I32) -> I32 {
        let products = hardware!((_mm256_madd_epi16(a.0, b.0), _mm256_madd_epi16(a.1, b.1)));
        self.add_i32(products, c)
    }
    #[inline(always)]
    fn sub_i32(self, a: I32, b: I32) -> I32 {
        hardware!((_mm256_sub_epi32(a.0, b.0), _mm256_sub_epi32(a.1, b.1)))
    }
    #[inline(always)]
    fn and_i32(self, a: I32, b: I32) -> I32 {
        hardware!((_mm256_and_si256(a.0, b.0), _mm256_and_si256(a.1, b.1)))
    }
    #[inline(always)]
    fn or_i32(self, a: I32, b: I32) -> I32 {
        hardware!((_mm256_or_si256(a.0, b.0), _mm256_or_si256(a.1, b.1)))
    }
    #[inline(always)]
    fn xor_i32(self, a: I32, b: I32) -> I32 {
        hardware!((_mm256_xor_si256(a.0, b.0), _mm256_xor_si256(a.1, b.1)))
    }
    #[inline(always)]
    fn shift_left(self, a: I32, count: u32) -> I32 {
        hardware!({
            let count = _mm256_set1_epi32(count as i32);
            (_mm256_sllv_epi32(a.0, count), _mm256_sllv_epi32(a.1, count))
        })
    }
    #[inline(always)]
    fn shift_right(self, a: I32, count: u32) -> I32 {
        hardware!({
            let count = _mm256_set1_epi32(count as i32);
            (_mm256_srlv_epi32(a.0, count), _mm256_srlv_epi32(a.1, count))
        })
    }
    #[inline(always)]
    fn select_greater_i32(self, a: I32, b: I32, yes: I32, no: I32) -> I32 {
        hardware!((
            _mm256_blendv_epi8(no.0, yes.0, _mm256_cmpgt_epi32(a.0, b.0)),
            _mm256_blendv_epi8(no.1, yes.1, _mm256_cmpgt_epi32(a.1, b.1))
        ))
    }
    #[inline(always)]
    fn to_f32(self, a: I32) -> F32 {
        hardware!((_mm256_cvtepi32_ps(a.0), _mm256_cvtepi32_ps(a.1)))
    }
    #[inline(always)]
    fn to_i32(self, a: F32) -> I32 {
        hardware!((_mm256_cvtps_epi32(a.0), _mm256_cvtps_epi32(a.1)))
    }
    #[inline(always)]
    fn from_bits(self, a: I32) -> F32 {
        hardware!((_mm256_castsi256_ps(a.0), _mm256_castsi256_ps(a.1)))
    }
    #[inline(always)]
    fn to_bits(self, a: F32) -> I32 {
        hardware!((_mm256_castps_si256(a.0), _mm256_castps_si256(a.1)))
    }
    #[inline(always)]
    fn max_i32(self, a: I32, b: I32) -> I32 {
        hardware!((_mm256_max_epi32(a.0, b.0), _mm256_max_epi32(a.1, b.1)))
    }
    #[inline(always)]
    fn reduce_max_i32(self, a: I32) -> i32 {
        hardware!({
            let a = _mm256_max_epi32(a.0, a.1);
            let a = _mm_max_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256::<1>(a));
            let a = _mm_max_epi32(a, _mm_unpackhi_epi64(a, a));
            _mm_cvtsi128_si32(_mm_max_epi32(a, _mm_shuffle_epi32::<1>(a)))
        })
    }
    #[inline(always)]
    fn reduce_sum_i32(self, a: I32) -> i32 {
        hardware!({
            let a = _mm256_add_epi32(a.0, a.1);
            let a = _mm_add_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256::<1>(a));
            let a = _mm_add_epi32(a, _mm_unpackhi_epi64(a, a));
            _mm_cvtsi128_si32(_mm_add_epi32(a, _mm_shuffle_epi32::<1>(a)))
        })
    }

    #[inline(always)]
    fn dot_bytes<const T: usize>(
        self,
        weights: &[u8; 512],
        rows: &[[u8; 32]; T],
        _offsets: &[i32; T],
    ) -> [I32; T] {
        let mut sums = [self.splat_i32(0); T];
        for (step, weights) in weights.as_chunks::<64>().0.iter().enumerate() {
            hardware!({
                let flip = _mm256_set1_epi8(-128);
                let low = _mm256_xor_si256(_mm256_loadu_si256(weights.as_ptr().cast()), flip);
                let high = _mm256_xor_si256(_mm256_loadu_si256(weights.as_ptr().add(32).cast()), flip);
                let (low_size, high_size) = (_mm256_abs_epi8(low), _mm256_abs_epi8(high));
                for t in 0..T {
                    let four = _mm256_set1_epi32(four(&rows[t], step));
                    sums[t].0 = _mm256_add_epi32(sums[t].0, self.byte_products(low, low_size, four));
                    sums[t].1 = _mm256_add_epi32(sums[t].1, self.byte_products(high, high_size, four));
                }
            });
        }
        sums
    }
    #[inline(always)]
    fn dot_nibbles<const T: usize>(
        self,
        weights: &[u8; 256],
        rows: &[[u8; 32]; T],
        offsets: &[i32; T],
    ) -> [I32; T] {
        let low = self.half_nibbles(weights, 0, rows, offsets);
        // Else all activations are kept for the other half, in registers that do not exist.
        std::sync::atomic::compiler_fence(std::sync::atomic::Ordering::SeqCst);
        let high = self.half_nibbles(weights, 32, rows, offsets);
        let mut sums = [self.splat_i32(0); T];
        for t in 0..T {
            sums[t] = (low[t], high[t]);
        }
        sums
    }

    #[inline(always)]
    fn dot_i16(self, sums: I32, weights: I32, pair: i32) -> I32 {
        hardware!({
            let pair = _mm256_set1_epi32(pair);
            let (low, high) = (_mm256_madd_epi16(weights.0, pair), _mm256_madd_epi16(weights.1, pair));
            (_mm256_add_epi32(sums.0, low), _mm256_add_epi32(sums.1, high))
        })
    }
    #[inline(always)]
    fn dot<W: WeightSteps<Self>, const N: usize, const T: usize, const BITS: u32>(
        self,
        weights: &W,
        rows: &[[u8; 32]; T],
        first: usize,
        offsets: &[i32; T],
    ) -> [I32; T] {
        let weights: [I32; N] = weights.all(self);
        let mut sums = [self.splat_i32(0); T];
        for t in 0..T {
            if BITS == 8 {
                for (i, &weights) in weights.iter().enumerate() {
                    let four = four(&rows[t], first + i);
                    sums[t] = self.add_i32(sums[t], self.offset_products(weights, four));
                }
            } else {
                sums[t] = self.splat_i32(offsets[t]);
                // As many products as stay below 2^15: 2 * 127 times 8 * 15, 4 * 31 or 2 * 63.
                let span = if BITS == 4 { 8 } else { 4 >> (BITS - 5) };
                for (chunk, weights) in weights.chunks(span).enumerate() {
                    let mut pairs = self.splat_i32(0);
                    for (i, &weights) in weights.iter().enumerate() {
                        pairs = self.add_pairs(pairs, weights, four(&rows[t], first + chunk * span + i));
                    }
                    sums[t] = self.add_i32(sums[t], self.join_pairs(pairs));
                }
            }
        }
        sums
    }
    #[inline(always)]
    fn lookup(self, table: &[u8; 16], indices: I32) -> I32 {
        hardware!({
            let table = _mm256_broadcastsi128_si256(_mm_loadu_si128(table.as_ptr().cast()));
            (_mm256_shuffle_epi8(table, indices.0), _mm256_shuffle_epi8(table, indices.1))
        })
    }

    #[inline(always)]
    fn prefetch(self, address: *const u8) {
        hardware!(_mm_prefetch::<_MM_HINT_T0>(address.cast()))
    }
}
