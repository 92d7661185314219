//! AVX-512 F, BW, DQ, VL and VNNI, also with AMX: one register holds all 16 lanes.

use super::tiles::{self, TileShape, TileSums};
use super::{Isa, Kernel, LANES, Simd, WeightSteps, amx, dot_bf16_in_two, four};
use core::arch::x86_64::*;

/// Token of AVX-512, with or without BF16 and AMX; only [`Avx512::detect`] makes one.
#[derive(Clone, Copy, Debug)]
pub struct Avx512<const BF16: bool, const AMX: bool>(());

/// An expression of AVX-512 intrinsics, in a method of the token.
macro_rules! hardware {
    ($($body:tt)*) => {{
        // SAFETY: `self` exists, so the instructions do; pointers come from references or the caller's promise.
        unsafe { $($body)* }
    }};
}

impl<const BF16: bool, const AMX: bool> Avx512<BF16, AMX> {
    /// The token, if this machine has the instructions.
    #[inline]
    pub fn detect() -> Option<Self> {
        let present = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx512vnni")
            && is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("f16c")
            && (!BF16 || is_x86_feature_detected!("avx512bf16"))
            && (!AMX || amx::is_available());
        present.then_some(Avx512(()))
    }
}

impl Avx512<false, false> {
    /// Runs `kernel` compiled for this instruction set.
    #[inline]
    pub fn enter<K: Kernel>(self, kernel: K) -> K::Output {
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
        fn inside<K: Kernel>(token: Avx512<false, false>, kernel: K) -> K::Output {
            kernel.run(token)
        }
        hardware!(inside(self, kernel))
    }
}

impl<const AMX: bool> Avx512<true, AMX> {
    /// Runs `kernel` compiled for this instruction set.
    #[inline]
    pub fn enter<K: Kernel>(self, kernel: K) -> K::Output {
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16,avx2,fma,f16c")]
        fn inside<K: Kernel, const AMX: bool>(token: Avx512<true, AMX>, kernel: K) -> K::Output {
            kernel.run(token)
        }
        hardware!(inside(self, kernel))
    }
}

impl<const BF16: bool, const AMX: bool> Avx512<BF16, AMX> {
    /// Rows `first`, `first + 4`, ..., one in each quarter of the register.
    #[inline(always)]
    fn every_fourth(self, rows: &[&[u8; 16]; LANES], first: usize) -> __m512i {
        hardware!({
            let quarters = _mm512_castsi128_si512(_mm_loadu_si128(rows[first].as_ptr().cast()));
            let quarters =
                _mm512_inserti32x4::<1>(quarters, _mm_loadu_si128(rows[first + 4].as_ptr().cast()));
            let quarters =
                _mm512_inserti32x4::<2>(quarters, _mm_loadu_si128(rows[first + 8].as_ptr().cast()));
            _mm512_inserti32x4::<3>(quarters, _mm_loadu_si128(rows[first + 12].as_ptr().cast()))
        })
    }
}

impl<const BF16: bool, const AMX: bool> Simd for Avx512<BF16, AMX> {
    type F32 = __m512;
    type I32 = __m512i;
    const ISA: Isa = match (BF16, AMX) {
        (_, true) => Isa::Amx,
        (true, false) => Isa::Avx512Bf16,
        (false, false) => Isa::Avx512,
    };
    const REGISTERS: usize = 32;

    #[inline(always)]
    fn splat(self, value: f32) -> __m512 {
        hardware!(_mm512_set1_ps(value))
    }
    #[inline(always)]
    fn load(self, values: &[f32; LANES]) -> __m512 {
        hardware!(_mm512_loadu_ps(values.as_ptr()))
    }
    #[inline(always)]
    unsafe fn load_pointer(self, values: *const f32) -> __m512 {
        hardware!(_mm512_loadu_ps(values))
    }
    #[inline(always)]
    fn load_f16(self, values: &[u16; LANES]) -> __m512 {
        hardware!(_mm512_cvtph_ps(_mm256_loadu_si256(values.as_ptr().cast())))
    }
    #[inline(always)]
    fn load_bf16(self, values: &[u16; LANES]) -> __m512 {
        let bits = self.load_u16(values);
        hardware!(_mm512_castsi512_ps(_mm512_slli_epi32::<16>(bits)))
    }
    #[inline(always)]
    fn load_e4m3(self, values: &[u8; LANES]) -> __m512 {
        hardware!({
            let words = _mm256_cvtepi8_epi16(_mm_loadu_si128(values.as_ptr().cast()));
            // The sign is in bit 14 as well now; that one goes.
            let half = _mm256_and_si256(_mm256_slli_epi16::<7>(words), _mm256_set1_epi16(!0x4000));
            _mm512_cvtph_ps(half)
        })
    }
    #[inline(always)]
    fn store(self, vector: __m512, values: &mut [f32; LANES]) {
        hardware!(_mm512_storeu_ps(values.as_mut_ptr(), vector))
    }
    #[inline(always)]
    fn store_f16(self, vector: __m512, values: &mut [u16; LANES]) {
        hardware!({
            let half = _mm512_cvtps_ph::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(vector);
            _mm256_storeu_si256(values.as_mut_ptr().cast(), half);
        })
    }

    #[inline(always)]
    fn add(self, a: __m512, b: __m512) -> __m512 {
        hardware!(_mm512_add_ps(a, b))
    }
    #[inline(always)]
    fn sub(self, a: __m512, b: __m512) -> __m512 {
        hardware!(_mm512_sub_ps(a, b))
    }
    #[inline(always)]
    fn mul(self, a: __m512, b: __m512) -> __m512 {
        hardware!(_mm512_mul_ps(a, b))
    }
    #[inline(always)]
    fn div(self, a: __m512, b: __m512) -> __m512 {
        hardware!(_mm512_div_ps(a, b))
    }
    #[inline(always)]
    fn mul_add(self, a: __m512, b: __m512, c: __m512) -> __m512 {
        hardware!(_mm512_fmadd_ps(a, b, c))
    }
    #[inline(always)]
    fn max(self, a: __m512, b: __m512) -> __m512 {
        hardware!(_mm512_max_ps(a, b))
    }
    #[inline(always)]
    fn min(self, a: __m512, b: __m512) -> __m512 {
        hardware!(_mm512_min_ps(a, b))
    }
    #[inline(always)]
    fn sqrt(self, a: __m512) -> __m512 {
        hardware!(_mm512_sqrt_ps(a))
    }
    #[inline(always)]
    fn round(self, a: __m512) -> __m512 {
        hardware!(_mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(a))
    }
    #[inline(always)]
    fn select_greater(self, a: __m512, b: __m512, yes: __m512, no: __m512) -> __m512 {
        hardware!(_mm512_mask_blend_ps(_mm512_cmp_ps_mask::<_CMP_GT_OQ>(a, b), no, yes))
    }
    #[inline(always)]
    fn reduce_sum(self, a: __m512) -> f32 {
        hardware!({
            let a = _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps::<1>(a));
            let a = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps::<1>(a));
            let a = _mm_add_ps(a, _mm_movehl_ps(a, a));
            _mm_cvtss_f32(_mm_add_ss(a, _mm_movehdup_ps(a)))
        })
    }
    #[inline(always)]
    fn reduce_max(self, a: __m512) -> f32 {
        hardware!({
            let a = _mm256_max_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps::<1>(a));
            let a = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps::<1>(a));
            let a = _mm_max_ps(a, _mm_movehl_ps(a, a));
            _mm_cvtss_f32(_mm_max_ss(a, _mm_movehdup_ps(a)))
        })
    }

    #[inline(always)]
    fn splat_i32(self, value: i32) -> __m512i {
        hardware!(_mm512_set1_epi32(value))
    }
    #[inline(always)]
    fn load_i32(self, values: &[i32; LANES]) -> __m512i {
        hardware!(_mm512_loadu_si512(values.as_ptr().cast()))
    }
    #[inline(always)]
    unsafe fn load_bytes(self, bytes: *const u8) -> __m512i {
        hardware!(_mm512_loadu_si512(bytes.cast()))
    }
    #[inline(always)]
    fn load_u16(self, values: &[u16; LANES]) -> __m512i {
        hardware!(_mm512_cvtepu16_epi32(_mm256_loadu_si256(values.as_ptr().cast())))
    }
    #[inline(always)]
    fn load_i8(self, values: &[i8; LANES]) -> __m512i {
        hardware!(_mm512_cvtepi8_epi32(_mm_loadu_si128(values.as_ptr().cast())))
    }
    #[inline(always)]
    fn store_i32(self, vector: __m512i, values: &mut [i32; LANES]) {
        hardware!(_mm512_storeu_si512(values.as_mut_ptr().cast(), vector))
    }
    #[inline(always)]
    fn transpose_words(self, rows: [&[u8; 16]; LANES]) -> [__m512i; 4] {
        let rows = [
            self.every_fourth(&rows, 0),
            self.every_fourth(&rows, 1),
            self.every_fourth(&rows, 2),
            self.every_fourth(&rows, 3),
        ];
        hardware!({
            let (low, high) =
                (_mm512_unpacklo_epi32(rows[0], rows[1]), _mm512_unpackhi_epi32(rows[0], rows[1]));
            let (more, most) =
                (_mm512_unpacklo_epi32(rows[2], rows[3]), _mm512_unpackhi_epi32(rows[2], rows[3]));
            [
                _mm512_unpacklo_epi64(low, more),
                _mm512_unpackhi_epi64(low, more),
                _mm512_unpacklo_epi64(high, most),
                _mm512_unpackhi_epi64(high, most),
            ]
        })
    }
    #[inline(always)]
    fn store_low_bytes(self, vector: __m512i, values: &mut [u8; LANES]) {
        hardware!(_mm_storeu_si128(values.as_mut_ptr().cast(), _mm512_cvtepi32_epi8(vector)))
    }
    #[inline(always)]
    fn add_i32(self, a: __m512i, b: __m512i) -> __m512i {
        hardware!(_mm512_add_epi32(a, b))
    }
    #[inline(always)]
    fn mul_add_i32(self, a: __m512i, b: __m512i, c: __m512i) -> __m512i {
        hardware!(_mm512_add_epi32(_mm512_mullo_epi32(a, b), c))
    }
    #[inline(always)]
    fn mul_add_i16(self, a: __m512i, b: __m512i, c: __m512i) -> __m512i {
        hardware!(_mm512_dpwssd_epi32(c, a, b))
    }
    #[inline(always)]
    fn sub_i32(self, a: __m512i, b: __m512i) -> __m512i {
        hardware!(_mm512_sub_epi32(a, b))
    }
    #[inline(always)]
    fn and_i32(self, a: __m512i, b: __m512i) -> __m512i {
        hardware!(_mm512_and_si512(a, b))
    }
    #[inline(always)]
    fn or_i32(self, a: __m512i, b: __m512i) -> __m512i {
        hardware!(_mm512_or_si512(a, b))
    }
    #[inline(always)]
    fn xor_i32(self, a: __m512i, b: __m512i) -> __m512i {
        hardware!(_mm512_xor_si512(a, b))
    }
    #[inline(always)]
    fn shift_left(self, a: __m512i, count: u32) -> __m512i {
        hardware!(_mm512_sllv_epi32(a, _mm512_set1_epi32(count as i32)))
    }
    #[inline(always)]
    fn shift_right(self, a: __m512i, count: u32) -> __m512i {
        hardware!(_mm512_srlv_epi32(a, _mm512_set1_epi32(count as i32)))
    }
    #[inline(always)]
    fn select_greater_i32(self, a: __m512i, b: __m512i, yes: __m512i, no: __m512i) -> __m512i {
        hardware!(_mm512_mask_blend_epi32(_mm512_cmpgt_epi32_mask(a, b), no, yes))
    }
    #[inline(always)]
    fn to_f32(self, a: __m512i) -> __m512 {
        hardware!(_mm512_cvtepi32_ps(a))
    }
    #[inline(always)]
    fn to_i32(self, a: __m512) -> __m512i {
        hardware!(_mm512_cvtps_epi32(a))
    }
    #[inline(always)]
    fn from_bits(self, a: __m512i) -> __m512 {
        hardware!(_mm512_castsi512_ps(a))
    }
    #[inline(always)]
    fn to_bits(self, a: __m512) -> __m512i {
        hardware!(_mm512_castps_si512(a))
    }
    #[inline(always)]
    fn max_i32(self, a: __m512i, b: __m512i) -> __m512i {
        hardware!(_mm512_max_epi32(a, b))
    }
    #[inline(always)]
    fn reduce_max_i32(self, a: __m512i) -> i32 {
        hardware!(_mm512_reduce_max_epi32(a))
    }
    #[inline(always)]
    fn reduce_sum_i32(self, a: __m512i) -> i32 {
        hardware!(_mm512_reduce_add_epi32(a))
    }

    #[inline(always)]
    fn dot_bytes<const T: usize>(
        self,
        weights: &[u8; 512],
        rows: &[[u8; 32]; T],
        offsets: &[i32; T],
    ) -> [__m512i; T] {
        let mut sums = [self.splat_i32(0); T];
        for t in 0..T {
            sums[t] = self.splat_i32(offsets[t]);
        }
        for (step, weights) in weights.as_chunks::<64>().0.iter().enumerate() {
            hardware!({
                let weights = _mm512_loadu_si512(weights.as_ptr().cast());
                for t in 0..T {
                    sums[t] = _mm512_dpbusd_epi32(sums[t], weights, _mm512_set1_epi32(four(&rows[t], step)));
                }
            });
        }
        sums
    }
    #[inline(always)]
    fn dot_bytes_of_two<const T: usize>(
        self,
        weights: [&[u8; 512]; 2],
        rows: &[[u8; 32]; T],
        offsets: &[i32; T],
    ) -> [[__m512i; T]; 2] {
        let mut sums = [[self.splat_i32(0); T]; 2];
        for t in 0..T {
            sums[0][t] = self.splat_i32(offsets[t]);
            sums[1][t] = sums[0][t];
        }
        for (step, (first, second)) in
            weights[0].chunks_exact(64).zip(weights[1].chunks_exact(64)).enumerate()
        {
            hardware!({
                let first = _mm512_loadu_si512(first.as_ptr().cast());
                let second = _mm512_loadu_si512(second.as_ptr().cast());
                for t in 0..T {
                    let four = _mm512_set1_epi32(four(&rows[t], step));
                    sums[0][t] = _mm512_dpbusd_epi32(sums[0][t], first, four);
                    sums[1][t] = _mm512_dpbusd_epi32(sums[1][t], second, four);
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
    ) -> [__m512i; T] {
        let mut sums = [self.splat_i32(0); T];
        for t in 0..T {
            sums[t] = self.splat_i32(offsets[t]);
        }
        for (step, weights) in weights.as_chunks::<64>().0.iter().enumerate() {
            hardware!({
                let (weights, mask) = (_mm512_loadu_si512(weights.as_ptr().cast()), _mm512_set1_epi8(15));
                let low = _mm512_and_si512(weights, mask);
                let high = _mm512_and_si512(_mm512_srli_epi32::<4>(weights), mask);
                for t in 0..T {
                    sums[t] = _mm512_dpbusd_epi32(sums[t], low, _mm512_set1_epi32(four(&rows[t], 2 * step)));
                    sums[t] =
                        _mm512_dpbusd_epi32(sums[t], high, _mm512_set1_epi32(four(&rows[t], 2 * step + 1)));
                }
            });
        }
        sums
    }

    #[inline(always)]
    fn dot_bf16(self, sums: __m512, weights: __m512i, pair: u32) -> __m512 {
        if BF16 {
            let pair = self.splat_i32(pair as i32);
            // SAFETY: the types hold the same 64 bytes.
            let bf16 = |words: __m512i| unsafe { core::mem::transmute::<__m512i, __m512bh>(words) };
            return hardware!(_mm512_dpbf16_ps(sums, bf16(weights), bf16(pair)));
        }
        dot_bf16_in_two(self, sums, weights, pair)
    }
    #[inline(always)]
    fn store_bytes(self, vector: __m512i, bytes: &mut [u8; 64]) {
        hardware!(_mm512_storeu_si512(bytes.as_mut_ptr().cast(), vector));
    }
    #[inline(always)]
    fn scale_codes<const DROP: bool>(self, codes: __m512i, scales: __m512i, drops: __m512i) -> [__m512i; 2] {
        hardware!({
            let evens = _mm512_set1_epi16(0xff);
            let mut even = _mm512_mullo_epi16(_mm512_and_si512(codes, evens), scales);
            let mut odd = _mm512_mullo_epi16(_mm512_srli_epi16::<8>(codes), scales);
            if DROP {
                (even, odd) = (_mm512_sub_epi16(even, drops), _mm512_sub_epi16(odd, drops));
            }
            const AND_OR: i32 = 0b11101010; // a & b | c
            const AND_NOT_OR: i32 = 0b10111010; // a & !b | c
            let low = _mm512_ternarylogic_epi32::<AND_OR>(even, evens, _mm512_slli_epi16::<8>(odd));
            let high = _mm512_ternarylogic_epi32::<AND_NOT_OR>(odd, evens, _mm512_srli_epi16::<8>(even));
            [low, high]
        })
    }
    #[inline(always)]
    fn dot_i16(self, sums: __m512i, weights: __m512i, pair: i32) -> __m512i {
        hardware!(_mm512_dpwssd_epi32(sums, weights, _mm512_set1_epi32(pair)))
    }
    #[inline(always)]
    fn dot<W: WeightSteps<Self>, const N: usize, const T: usize, const BITS: u32>(
        self,
        weights: &W,
        rows: &[[u8; 32]; T],
        first: usize,
        offsets: &[i32; T],
    ) -> [__m512i; T] {
        let mut sums = [self.splat_i32(0); T];
        for t in 0..T {
            sums[t] = self.splat_i32(offsets[t]);
        }
        for i in 0..N {
            let weights = weights.step(self, i);
            for t in 0..T {
                let four = self.splat_i32(four(&rows[t], first + i));
                sums[t] = hardware!(_mm512_dpbusd_epi32(sums[t], weights, four));
            }
        }
        sums
    }
    #[inline(always)]
    fn apart<K: Kernel>(self, kernel: K) -> K::Output {
        // One function for all that have these instructions.
        #[inline(never)]
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
        fn inside<K: Kernel>(token: Avx512<false, false>, kernel: K) -> K::Output {
            kernel.run(token)
        }
        hardware!(inside(Avx512(()), kernel))
    }
    #[inline(always)]
    fn lookup(self, table: &[u8; 16], indices: __m512i) -> __m512i {
        hardware!({
            let table = _mm512_broadcast_i32x4(_mm_loadu_si128(table.as_ptr().cast()));
            _mm512_shuffle_epi8(table, indices)
        })
    }

    #[inline(always)]
    fn prefetch(self, address: *const u8) {
        hardware!(_mm_prefetch::<_MM_HINT_T0>(address.cast()))
    }
    #[inline(always)]
    fn prefetch_later(self, address: *const u8) {
        super::prefetch_later(address);
    }

    #[inline(always)]
    fn start_tiles(self, shape: TileShape) {
        if AMX {
            hardware!(amx::configure(shape));
        }
    }
    #[inline(always)]
    fn stop_tiles(self) {
        if AMX {
            hardware!(amx::release());
        }
    }
    #[inline(always)]
    unsafe fn multiply_bytes<const T: usize, const UNSIGNED: bool>(
        self,
        shape: TileShape,
        input: [*const u8; T],
        weights: [*const u8; 2],
        steps: usize,
        sums: &mut [[TileSums<i32>; T]; 2],
    ) {
        match AMX {
            true => hardware!(amx::multiply_bytes::<T, UNSIGNED>(shape, input, weights, steps, sums)),
            false => {
                hardware!(tiles::multiply_bytes_ref::<T, UNSIGNED>(shape, input, weights, steps, sums));
            }
        }
    }
    #[inline(always)]
    unsafe fn multiply_bf16<const T: usize>(
        self,
        shape: TileShape,
        input: [*const u8; T],
        weights: [*const u8; 2],
        groups: usize,
        sums: &mut [[TileSums<f32>; T]; 2],
    ) {
        match AMX {
            true => hardware!(amx::multiply_bf16::<T>(shape, input, weights, groups, sums)),
            false => hardware!(tiles::multiply_bf16_ref(shape, input, weights, groups, sums)),
        }
    }
}
