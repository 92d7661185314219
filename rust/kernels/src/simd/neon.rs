//! NEON: four registers hold the 16 lanes. Beside what every aarch64 has there are two levels, of machines that multiply bytes four
//! (DotProd, from Armv8.2 on) or eight at a time (I8MM, from Armv8.6 on).
//!
//! What Rust has no stable intrinsics for is one instruction in `one!` each, so that the compiler still chooses registers and order.

use super::{Isa, Kernel, LANES, Simd, WeightSteps};
use core::arch::aarch64::*;
use core::arch::asm;

/// Token of NEON; `LEVEL` is 0, 1 with DotProd, or 2 with I8MM too. Only [`Neon::detect`] makes one.
#[derive(Clone, Copy, Debug)]
pub struct Neon<const LEVEL: u8>(());

/// Lanes 0..4, 4..8, 8..12 and 12..16.
type F32 = [float32x4_t; 4];
/// Lanes 0..4, 4..8, 8..12 and 12..16.
type I32 = [int32x4_t; 4];

/// An expression of NEON intrinsics.
macro_rules! hardware {
    ($($body:tt)*) => {{
        // SAFETY: every aarch64 machine has NEON; pointers come from references or the caller's promise.
        unsafe { $($body)* }
    }};
}

/// An array of an expression's values for the four registers.
macro_rules! each {
    ($i:ident => $value:expr) => {
        hardware!([
            {
                let $i = 0;
                $value
            },
            {
                let $i = 1;
                $value
            },
            {
                let $i = 2;
                $value
            },
            {
                let $i = 3;
                $value
            },
        ])
    };
}

/// A block once for each number: what the compiler might keep a loop, with indices that are unknown then.
macro_rules! unrolled {
    ($i:ident in [$($n:literal)*] $body:block) => {
        $({
            let $i: usize = $n;
            $body
        })*
    };
}

/// One instruction that computes a register from others: `one!("template", type of the result, operands)`; or one that changes a register:
/// `one!("template", inout result, operands)`. Templates call the result `out`.
macro_rules! one {
    ($template:expr, inout $out:ident $(, $name:ident = $value:expr)*) => {{
        let mut out = $out;
        // SAFETY: the instruction reads and writes registers alone; the token or the architecture tells that it exists.
        unsafe {
            asm!($template, out = inout(vreg) out, $($name = in(vreg) $value,)*
                options(pure, nomem, nostack, preserves_flags));
        }
        out
    }};
    ($template:expr, $type:ty $(, $name:ident = $value:expr)*) => {{
        let out: $type;
        // SAFETY: as above.
        unsafe {
            asm!($template, out = lateout(vreg) out, $($name = in(vreg) $value,)*
                options(pure, nomem, nostack, preserves_flags));
        }
        out
    }};
}

mod products;

use products::{Bytes, Nibbles, Unpacked};

macro_rules! level {
    ($level:literal, $features:literal) => {
        impl Neon<$level> {
            /// Runs `kernel` compiled for this instruction set.
            #[inline]
            pub fn enter<K: Kernel>(self, kernel: K) -> K::Output {
                #[target_feature(enable = $features)]
                fn inside<K: Kernel>(token: Neon<$level>, kernel: K) -> K::Output {
                    kernel.run(token)
                }
                // SAFETY: the token exists, so the instructions do.
                unsafe { inside(self, kernel) }
            }
        }
    };
}

level!(0, "neon");
level!(1, "neon,dotprod");
level!(2, "neon,dotprod,i8mm");

/// Four half-precision numbers.
#[inline(always)]
fn widen(half: uint16x4_t) -> float32x4_t {
    one!("fcvtl {out:v}.4s, {half:v}.4h", float32x4_t, half = half)
}

/// The second four of eight half-precision numbers.
#[inline(always)]
fn widen_second(half: uint16x8_t) -> float32x4_t {
    one!("fcvtl2 {out:v}.4s, {half:v}.8h", float32x4_t, half = half)
}

/// Four numbers rounded to half precision.
#[inline(always)]
fn narrow(a: float32x4_t) -> uint16x4_t {
    one!("fcvtn {out:v}.4h, {a:v}.4s", uint16x4_t, a = a)
}

/// Per lane `a > b ? a : b`.
#[inline(always)]
fn greater(a: float32x4_t, b: float32x4_t) -> float32x4_t {
    hardware!(vbslq_f32(vcgtq_f32(a, b), a, b))
}

/// The first 16 bytes.
#[inline(always)]
fn load_16(bytes: &[u8]) -> uint8x16_t {
    assert!(bytes.len() >= 16);
    hardware!(vld1q_u8(bytes.as_ptr()))
}

impl<const LEVEL: u8> Neon<LEVEL> {
    /// The token, if this machine has the instructions.
    #[inline]
    pub fn detect() -> Option<Self> {
        let present = std::arch::is_aarch64_feature_detected!("neon")
            && (LEVEL < 1 || std::arch::is_aarch64_feature_detected!("dotprod"))
            && (LEVEL < 2 || std::arch::is_aarch64_feature_detected!("i8mm"));
        present.then_some(Neon(()))
    }
}

impl<const LEVEL: u8> Simd for Neon<LEVEL> {
    type F32 = F32;
    type I32 = I32;
    const ISA: Isa = match LEVEL {
        0 => Isa::Neon,
        1 => Isa::NeonDotprod,
        _ => Isa::NeonI8mm,
    };
    const REGISTERS: usize = 8;

    #[inline(always)]
    fn splat(self, value: f32) -> F32 {
        hardware!([vdupq_n_f32(value); 4])
    }
    #[inline(always)]
    fn load(self, values: &[f32; LANES]) -> F32 {
        // SAFETY: there are 16.
        unsafe { self.load_pointer(values.as_ptr()) }
    }
    #[inline(always)]
    unsafe fn load_pointer(self, values: *const f32) -> F32 {
        each!(i => vld1q_f32(values.add(4 * i)))
    }
    #[inline(always)]
    fn load_f16(self, values: &[u16; LANES]) -> F32 {
        hardware!({
            let (low, high) = (vld1q_u16(values.as_ptr()), vld1q_u16(values.as_ptr().add(8)));
            [widen(vget_low_u16(low)), widen_second(low), widen(vget_low_u16(high)), widen_second(high)]
        })
    }
    #[inline(always)]
    fn load_bf16(self, values: &[u16; LANES]) -> F32 {
        hardware!({
            let (low, high) = (vld1q_u16(values.as_ptr()), vld1q_u16(values.as_ptr().add(8)));
            [
                vreinterpretq_f32_u32(vshll_n_u16::<16>(vget_low_u16(low))),
                vreinterpretq_f32_u32(vshll_high_n_u16::<16>(low)),
                vreinterpretq_f32_u32(vshll_n_u16::<16>(vget_low_u16(high))),
                vreinterpretq_f32_u32(vshll_high_n_u16::<16>(high)),
            ]
        })
    }
    #[inline(always)]
    fn load_e4m3(self, values: &[u8; LANES]) -> F32 {
        hardware!({
            let bytes = vld1q_s8(values.as_ptr().cast());
            // The sign is in bit 14 as well then; that one goes.
            let mask = vdupq_n_s16(!0x4000);
            let low = vandq_s16(vshll_n_s8::<7>(vget_low_s8(bytes)), mask);
            let high = vandq_s16(vshll_high_n_s8::<7>(bytes), mask);
            let (low, high) = (vreinterpretq_u16_s16(low), vreinterpretq_u16_s16(high));
            [widen(vget_low_u16(low)), widen_second(low), widen(vget_low_u16(high)), widen_second(high)]
        })
    }
    #[inline(always)]
    fn store(self, vector: F32, values: &mut [f32; LANES]) {
        hardware!({
            for (i, part) in vector.into_iter().enumerate() {
                vst1q_f32(values.as_mut_ptr().add(4 * i), part)
            }
        })
    }
    #[inline(always)]
    fn store_f16(self, vector: F32, values: &mut [u16; LANES]) {
        hardware!({
            for (i, part) in vector.into_iter().enumerate() {
                vst1_u16(values.as_mut_ptr().add(4 * i), narrow(part))
            }
        })
    }

    #[inline(always)]
    fn add(self, a: F32, b: F32) -> F32 {
        each!(i => vaddq_f32(a[i], b[i]))
    }
    #[inline(always)]
    fn sub(self, a: F32, b: F32) -> F32 {
        each!(i => vsubq_f32(a[i], b[i]))
    }
    #[inline(always)]
    fn mul(self, a: F32, b: F32) -> F32 {
        each!(i => vmulq_f32(a[i], b[i]))
    }
    #[inline(always)]
    fn div(self, a: F32, b: F32) -> F32 {
        each!(i => vdivq_f32(a[i], b[i]))
    }
    #[inline(always)]
    fn mul_add(self, a: F32, b: F32, c: F32) -> F32 {
        each!(i => vfmaq_f32(c[i], a[i], b[i]))
    }
    #[inline(always)]
    fn max(self, a: F32, b: F32) -> F32 {
        [greater(a[0], b[0]), greater(a[1], b[1]), greater(a[2], b[2]), greater(a[3], b[3])]
    }
    #[inline(always)]
    fn min(self, a: F32, b: F32) -> F32 {
        each!(i => vbslq_f32(vcltq_f32(a[i], b[i]), a[i], b[i]))
    }
    #[inline(always)]
    fn sqrt(self, a: F32) -> F32 {
        each!(i => vsqrtq_f32(a[i]))
    }
    #[inline(always)]
    fn round(self, a: F32) -> F32 {
        each!(i => vrndnq_f32(a[i]))
    }
    #[inline(always)]
    fn abs(self, a: F32) -> F32 {
        each!(i => vabsq_f32(a[i]))
    }
    #[inline(always)]
    fn select_greater(self, a: F32, b: F32, yes: F32, no: F32) -> F32 {
        each!(i => vbslq_f32(vcgtq_f32(a[i], b[i]), yes[i], no[i]))
    }
    #[inline(always)]
    fn reduce_sum(self, a: F32) -> f32 {
        hardware!({
            let sums = vaddq_f32(vaddq_f32(a[0], a[2]), vaddq_f32(a[1], a[3]));
            let pair = vadd_f32(vget_low_f32(sums), vget_high_f32(sums));
            vget_lane_f32::<0>(pair) + vget_lane_f32::<1>(pair)
        })
    }
    #[inline(always)]
    fn reduce_max(self, a: F32) -> f32 {
        hardware!({
            let four = greater(greater(a[0], a[2]), greater(a[1], a[3]));
            let two = greater(four, vextq_f32::<2>(four, four));
            vgetq_lane_f32::<0>(greater(two, vdupq_laneq_f32::<1>(two)))
        })
    }

    #[inline(always)]
    fn splat_i32(self, value: i32) -> I32 {
        hardware!([vdupq_n_s32(value); 4])
    }
    #[inline(always)]
    fn load_i32(self, values: &[i32; LANES]) -> I32 {
        // SAFETY: 16 values are 64 bytes.
        unsafe { self.load_bytes(values.as_ptr().cast()) }
    }
    #[inline(always)]
    unsafe fn load_bytes(self, bytes: *const u8) -> I32 {
        each!(i => vreinterpretq_s32_u8(vld1q_u8(bytes.add(16 * i))))
    }
    #[inline(always)]
    fn load_u16(self, values: &[u16; LANES]) -> I32 {
        each!(i => vreinterpretq_s32_u32(vmovl_u16(vld1_u16(values.as_ptr().add(4 * i)))))
    }
    #[inline(always)]
    fn load_i8(self, values: &[i8; LANES]) -> I32 {
        hardware!({
            let bytes = vld1q_s8(values.as_ptr());
            let (low, high) = (vmovl_s8(vget_low_s8(bytes)), vmovl_high_s8(bytes));
            [
                vmovl_s16(vget_low_s16(low)),
                vmovl_high_s16(low),
                vmovl_s16(vget_low_s16(high)),
                vmovl_high_s16(high),
            ]
        })
    }
    #[inline(always)]
    fn store_i32(self, vector: I32, values: &mut [i32; LANES]) {
        hardware!({
            for (i, part) in vector.into_iter().enumerate() {
                vst1q_s32(values.as_mut_ptr().add(4 * i), part)
            }
        })
    }
    #[inline(always)]
    fn store_low_bytes(self, vector: I32, values: &mut [u8; LANES]) {
        let bytes = each!(i => vreinterpretq_u8_s32(vector[i]));
        hardware!({
            let (low, high) = (vuzp1q_u8(bytes[0], bytes[1]), vuzp1q_u8(bytes[2], bytes[3]));
            vst1q_u8(values.as_mut_ptr(), vuzp1q_u8(low, high));
        })
    }
    #[inline(always)]
    fn add_i32(self, a: I32, b: I32) -> I32 {
        each!(i => vaddq_s32(a[i], b[i]))
    }
    #[inline(always)]
    fn mul_add_i32(self, a: I32, b: I32, c: I32) -> I32 {
        each!(i => vmlaq_s32(c[i], a[i], b[i]))
    }
    #[inline(always)]
    fn mul_add_i16(self, a: I32, b: I32, c: I32) -> I32 {
        each!(i => vmlal_s16(c[i], vmovn_s32(a[i]), vmovn_s32(b[i])))
    }
    #[inline(always)]
    fn sub_i32(self, a: I32, b: I32) -> I32 {
        each!(i => vsubq_s32(a[i], b[i]))
    }
    #[inline(always)]
    fn and_i32(self, a: I32, b: I32) -> I32 {
        each!(i => vandq_s32(a[i], b[i]))
    }
    #[inline(always)]
    fn or_i32(self, a: I32, b: I32) -> I32 {
        each!(i => vorrq_s32(a[i], b[i]))
    }
    #[inline(always)]
    fn xor_i32(self, a: I32, b: I32) -> I32 {
        each!(i => veorq_s32(a[i], b[i]))
    }
    #[inline(always)]
    fn shift_left(self, a: I32, count: u32) -> I32 {
        each!(i => vshlq_s32(a[i], vdupq_n_s32(count as i32)))
    }
    #[inline(always)]
    fn shift_right(self, a: I32, count: u32) -> I32 {
        let count = -(count as i32);
        each!(i => vreinterpretq_s32_u32(vshlq_u32(vreinterpretq_u32_s32(a[i]), vdupq_n_s32(count))))
    }
    #[inline(always)]
    fn select_greater_i32(self, a: I32, b: I32, yes: I32, no: I32) -> I32 {
        each!(i => vbslq_s32(vcgtq_s32(a[i], b[i]), yes[i], no[i]))
    }
    #[inline(always)]
    fn to_f32(self, a: I32) -> F32 {
        each!(i => vcvtq_f32_s32(a[i]))
    }
    #[inline(always)]
    fn to_i32(self, a: F32) -> I32 {
        each!(i => vcvtnq_s32_f32(a[i]))
    }
    #[inline(always)]
    fn from_bits(self, a: I32) -> F32 {
        each!(i => vreinterpretq_f32_s32(a[i]))
    }
    #[inline(always)]
    fn to_bits(self, a: F32) -> I32 {
        each!(i => vreinterpretq_s32_f32(a[i]))
    }
    #[inline(always)]
    fn max_i32(self, a: I32, b: I32) -> I32 {
        each!(i => vmaxq_s32(a[i], b[i]))
    }
    #[inline(always)]
    fn reduce_max_i32(self, a: I32) -> i32 {
        hardware!(vmaxvq_s32(vmaxq_s32(vmaxq_s32(a[0], a[1]), vmaxq_s32(a[2], a[3]))))
    }
    #[inline(always)]
    fn reduce_sum_i32(self, a: I32) -> i32 {
        hardware!(vaddvq_s32(vaddq_s32(vaddq_s32(a[0], a[1]), vaddq_s32(a[2], a[3]))))
    }

    #[inline(always)]
    fn dot_bytes<const T: usize>(
        self,
        weights: &[u8; 512],
        rows: &[[u8; 32]; T],
        offsets: &[i32; T],
    ) -> [I32; T] {
        self.products::<Bytes<'_>, 8, T, 8>(&Bytes(weights), rows, 0, offsets)
    }
    #[inline(always)]
    fn dot_nibbles<const T: usize>(
        self,
        weights: &[u8; 256],
        rows: &[[u8; 32]; T],
        offsets: &[i32; T],
    ) -> [I32; T] {
        self.products::<Nibbles<'_>, 8, T, 4>(&Nibbles(weights), rows, 0, offsets)
    }
    #[inline(always)]
    fn dot_i16(self, sums: I32, weights: I32, pair: i32) -> I32 {
        each!(i => {
            let low = vmlal_s16(sums[i], vmovn_s32(weights[i]), vdup_n_s16(pair as i16));
            vmlal_s16(low, vshrn_n_s32::<16>(weights[i]), vdup_n_s16((pair >> 16) as i16))
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
        self.products::<Unpacked<'_, N>, N, T, BITS>(&Unpacked(&weights.all(self)), rows, first, offsets)
    }
    #[inline(always)]
    fn lookup(self, table: &[u8; 16], indices: I32) -> I32 {
        let table = load_16(table);
        each!(i => vreinterpretq_s32_u8(vqtbl1q_u8(table, vreinterpretq_u8_s32(indices[i]))))
    }

    #[inline(always)]
    fn prefetch(self, address: *const u8) {
        prefetch(address);
    }
}

/// Asks for a cache line, without a token: every aarch64 machine has the instruction.
#[inline(always)]
pub(super) fn prefetch(address: *const u8) {
    // SAFETY: a prefetch does nothing that can be seen, whatever the address.
    unsafe {
        asm!("prfm pldl1keep, [{address}]", address = in(reg) address.addr(),
            options(nomem, nostack, preserves_flags));
    }
}
