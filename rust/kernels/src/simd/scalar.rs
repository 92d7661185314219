//! Portable code: the oracle of the others, and the fallback where none of them is present.

use super::{Isa, LANES, Simd, WeightSteps};

/// Token of the portable instruction set; anybody may have one.
#[derive(Clone, Copy, Debug)]
pub struct Scalar;

#[inline(always)]
fn map<T: Copy, U: Copy + Default>(a: [T; LANES], f: impl Fn(T) -> U) -> [U; LANES] {
    let mut out = [U::default(); LANES];
    for (out, a) in out.iter_mut().zip(a) {
        *out = f(a);
    }
    out
}

#[inline(always)]
fn zip<T: Copy + Default>(a: [T; LANES], b: [T; LANES], f: impl Fn(T, T) -> T) -> [T; LANES] {
    let mut out = [T::default(); LANES];
    for lane in 0..LANES {
        out[lane] = f(a[lane], b[lane]);
    }
    out
}

#[inline(always)]
fn tree<T: Copy>(mut a: [T; LANES], f: impl Fn(T, T) -> T) -> T {
    for half in [8, 4, 2, 1] {
        for lane in 0..half {
            a[lane] = f(a[lane], a[lane + half]);
        }
    }
    a[0]
}

fn greater(a: f32, b: f32) -> f32 {
    if a > b { a } else { b }
}

#[inline(always)]
fn dot4(weights: [i8; 4], activations: &[u8]) -> i32 {
    weights.iter().zip(activations).map(|(&weight, &value)| i32::from(weight) * i32::from(value as i8)).sum()
}

impl Simd for Scalar {
    type F32 = [f32; LANES];
    type I32 = [i32; LANES];
    const ISA: Isa = Isa::Scalar;
    const REGISTERS: usize = 8;

    #[inline(always)]
    fn splat(self, value: f32) -> Self::F32 {
        [value; LANES]
    }
    #[inline(always)]
    fn load(self, values: &[f32; LANES]) -> Self::F32 {
        *values
    }
    #[inline(always)]
    unsafe fn load_pointer(self, values: *const f32) -> Self::F32 {
        // SAFETY: the caller's promise.
        unsafe { values.cast::<[f32; LANES]>().read_unaligned() }
    }
    #[inline(always)]
    fn load_f16(self, values: &[u16; LANES]) -> Self::F32 {
        map(*values, |bits| half::f16::from_bits(bits).to_f32())
    }
    #[inline(always)]
    fn load_bf16(self, values: &[u16; LANES]) -> Self::F32 {
        map(*values, |bits| f32::from_bits(u32::from(bits) << 16))
    }
    #[inline(always)]
    fn load_e4m3(self, values: &[u8; LANES]) -> Self::F32 {
        map(*values, |bits| {
            let (sign, rest) = (u16::from(bits & 0x80), u16::from(bits & 0x7f));
            half::f16::from_bits(sign << 8 | rest << 7).to_f32()
        })
    }
    #[inline(always)]
    fn store(self, vector: Self::F32, values: &mut [f32; LANES]) {
        *values = vector;
    }
    #[inline(always)]
    fn store_f16(self, vector: Self::F32, values: &mut [u16; LANES]) {
        *values = map(vector, |value| half::f16::from_f32(value).to_bits());
    }

    #[inline(always)]
    fn add(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        zip(a, b, |a, b| a + b)
    }
    #[inline(always)]
    fn sub(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        zip(a, b, |a, b| a - b)
    }
    #[inline(always)]
    fn mul(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        zip(a, b, |a, b| a * b)
    }
    #[inline(always)]
    fn div(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        zip(a, b, |a, b| a / b)
    }
    #[inline(always)]
    fn mul_add(self, a: Self::F32, b: Self::F32, c: Self::F32) -> Self::F32 {
        let mut out = c;
        for lane in 0..LANES {
            out[lane] = a[lane].mul_add(b[lane], c[lane]);
        }
        out
    }
    #[inline(always)]
    fn max(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        zip(a, b, greater)
    }
    #[inline(always)]
    fn min(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        zip(a, b, |a, b| if a < b { a } else { b })
    }
    #[inline(always)]
    fn sqrt(self, a: Self::F32) -> Self::F32 {
        map(a, f32::sqrt)
    }
    #[inline(always)]
    fn round(self, a: Self::F32) -> Self::F32 {
        map(a, f32::round_ties_even)
    }
    #[inline(always)]
    fn select_greater(self, a: Self::F32, b: Self::F32, yes: Self::F32, no: Self::F32) -> Self::F32 {
        let mut out = no;
        for lane in 0..LANES {
            if a[lane] > b[lane] {
                out[lane] = yes[lane];
            }
        }
        out
    }
    #[inline(always)]
    fn reduce_sum(self, a: Self::F32) -> f32 {
        tree(a, |a, b| a + b)
    }
    #[inline(always)]
    fn reduce_max(self, a: Self::F32) -> f32 {
        tree(a, greater)
    }

    #[inline(always)]
    fn splat_i32(self, value: i32) -> Self::I32 {
        [value; LANES]
    }
    #[inline(always)]
    fn load_i32(self, values: &[i32; LANES]) -> Self::I32 {
        *values
    }
    #[inline(always)]
    unsafe fn load_bytes(self, bytes: *const u8) -> Self::I32 {
        // SAFETY: the caller's promise.
        unsafe { bytes.cast::<[i32; LANES]>().read_unaligned() }
    }
    #[inline(always)]
    fn load_u16(self, values: &[u16; LANES]) -> Self::I32 {
        map(*values, i32::from)
    }
    #[inline(always)]
    fn load_i8(self, values: &[i8; LANES]) -> Self::I32 {
        map(*values, i32::from)
    }
    #[inline(always)]
    fn store_i32(self, vector: Self::I32, values: &mut [i32; LANES]) {
        *values = vector;
    }
    #[inline(always)]
    fn store_low_bytes(self, vector: Self::I32, values: &mut [u8; LANES]) {
        *values = map(vector, |value| value as u8);
    }
    #[inline(always)]
    fn add_i32(self, a: Self::I32, b: Self::I32) -> Self::I32 {
        zip(a, b, i32::wrapping_add)
    }
    #[inline(always)]
    fn mul_add_i32(self, a: Self::I32, b: Self::I32, c: Self::I32) -> Self::I32 {
        zip(zip(a, b, i32::wrapping_mul), c, i32::wrapping_add)
    }
    #[inline(always)]
    fn mul_add_i16(self, a: Self::I32, b: Self::I32, c: Self::I32) -> Self::I32 {
        self.mul_add_i32(a, b.map(|number| i32::from(number as i16)), c)
    }
    #[inline(always)]
    fn sub_i32(self, a: Self::I32, b: Self::I32) -> Self::I32 {
        zip(a, b, i32::wrapping_sub)
    }
    #[inline(always)]
    fn and_i32(self, a: Self::I32, b: Self::I32) -> Self::I32 {
        zip(a, b, |a, b| a & b)
    }
    #[inline(always)]
    fn or_i32(self, a: Self::I32, b: Self::I32) -> Self::I32 {
        zip(a, b, |a, b| a | b)
    }
    #[inline(always)]
    fn xor_i32(self, a: Self::I32, b: Self::I32) -> Self::I32 {
        zip(a, b, |a, b| a ^ b)
    }
    #[inline(always)]
    fn shift_left(self, a: Self::I32, count: u32) -> Self::I32 {
        map(a, |a| a << count)
    }
    #[inline(always)]
    fn shift_right(self, a: Self::I32, count: u32) -> Self::I32 {
        map(a, |a| (a as u32 >> count) as i32)
    }
    #[inline(always)]
    fn select_greater_i32(self, a: Self::I32, b: Self::I32, yes: Self::I32, no: Self::I32) -> Self::I32 {
        let mut out = no;
        for lane in 0..LANES {
            if a[lane] > b[lane] {
                out[lane] = yes[lane];
            }
        }
        out
    }
    #[inline(always)]
    fn to_f32(self, a: Self::I32) -> Self::F32 {
        map(a, |a| a as f32)
    }
    #[inline(always)]
    fn to_i32(self, a: Self::F32) -> Self::I32 {
        map(a, |a| a.round_ties_even() as i32)
    }
    #[inline(always)]
    fn from_bits(self, a: Self::I32) -> Self::F32 {
        map(a, |a| f32::from_bits(a as u32))
    }
    #[inline(always)]
    fn to_bits(self, a: Self::F32) -> Self::I32 {
        map(a, |a| a.to_bits() as i32)
    }
    #[inline(always)]
    fn max_i32(self, a: Self::I32, b: Self::I32) -> Self::I32 {
        zip(a, b, i32::max)
    }
    #[inline(always)]
    fn reduce_max_i32(self, a: Self::I32) -> i32 {
        tree(a, i32::max)
    }
    #[inline(always)]
    fn reduce_sum_i32(self, a: Self::I32) -> i32 {
        tree(a, i32::wrapping_add)
    }

    #[inline(always)]
    fn dot_bytes<const T: usize>(
        self,
        weights: &[u8; 512],
        rows: &[[u8; 32]; T],
        _offsets: &[i32; T],
    ) -> [Self::I32; T] {
        rows.each_ref().map(|row| {
            let mut sums = [0; LANES];
            for (step, weights) in weights.as_chunks::<64>().0.iter().enumerate() {
                for (sum, weights) in sums.iter_mut().zip(weights.as_chunks::<4>().0) {
                    *sum += dot4(weights.map(|byte| (byte ^ 0x80) as i8), &row[step * 4..]);
                }
            }
            sums
        })
    }
    #[inline(always)]
    fn dot_nibbles<const T: usize>(
        self,
        weights: &[u8; 256],
        rows: &[[u8; 32]; T],
        _offsets: &[i32; T],
    ) -> [Self::I32; T] {
        rows.each_ref().map(|row| {
            let mut sums = [0; LANES];
            for (step, weights) in weights.as_chunks::<64>().0.iter().enumerate() {
                for (sum, weights) in sums.iter_mut().zip(weights.as_chunks::<4>().0) {
                    *sum += dot4(weights.map(|byte| (byte & 15) as i8 - 8), &row[step * 8..]);
                    *sum += dot4(weights.map(|byte| (byte >> 4) as i8 - 8), &row[step * 8 + 4..]);
                }
            }
            sums
        })
    }

    #[inline(always)]
    fn dot_i16(self, sums: Self::I32, weights: Self::I32, pair: i32) -> Self::I32 {
        let product = |weights: i32| {
            let low = i32::from(weights as i16) * i32::from(pair as i16);
            low.wrapping_add((weights >> 16) * (pair >> 16))
        };
        zip(sums, weights, |sum, weights| sum.wrapping_add(product(weights)))
    }
    #[inline(always)]
    fn dot<W: WeightSteps<Self>, const N: usize, const T: usize, const BITS: u32>(
        self,
        weights: &W,
        rows: &[[u8; 32]; T],
        first: usize,
        offsets: &[i32; T],
    ) -> [Self::I32; T] {
        let weights: [Self::I32; N] = weights.all(self);
        std::array::from_fn(|t| {
            let mut sums = [if BITS == 8 { 0 } else { offsets[t] }; LANES];
            for (i, weights) in weights.iter().enumerate() {
                for (sum, weights) in sums.iter_mut().zip(weights) {
                    let bytes = weights.to_le_bytes();
                    let signed = bytes.map(|byte| if BITS == 8 { byte ^ 0x80 } else { byte } as i8);
                    *sum += dot4(signed, &rows[t][(first + i) * 4..]);
                }
            }
            sums
        })
    }
    #[inline(always)]
    fn lookup(self, table: &[u8; 16], indices: Self::I32) -> Self::I32 {
        map(indices, |four| i32::from_le_bytes(four.to_le_bytes().map(|index| table[usize::from(index)])))
    }

    #[inline(always)]
    fn prefetch(self, _address: *const u8) {}
}
