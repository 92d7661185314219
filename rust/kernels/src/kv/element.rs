//! The types of stored keys and values: how numbers are rounded, and how kernels read them.
//!
//! The 8-bit types keep a scale in f32 beside their numbers, made from the greatest magnitude that shares it. Rounding happens once, when a
//! row is written, and looks at that row and head alone, so what is stored never depends on neighbours or on when they were written.
//!
//! What shares a scale was measured on the bundled model (head_dim 64), as mean divergence from f32 in nats per token
//! (`benches/results/kv-divergence-tinylm*.json`):
//!
//! * int8 keys: 32 dimensions, 1.2e-4. One scale for the head gave 2.2e-4 and would save 3 % of the bytes: after rotation, a key has a few
//!   large dimensions, and they should take precision from few neighbours.
//! * int8 values: the head, 3.6e-5, well below what keys cost already.
//! * E4M3: the head, 3.2e-3. Without a scale it was 5.2e-3, and values beyond 448 would be cut.

use super::e4m3;
use crate::simd::{LANES, Simd};
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

/// How a key or a value is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum KvElement {
    /// 32-bit floating point: exact.
    F32,
    /// IEEE binary16, rounded to nearest even. Values beyond 65504 become infinite.
    F16,
    /// bfloat16, rounded to nearest even: the range of f32 with 8 significant bits.
    Bf16,
    /// Integers from -127 to 127 times a scale: one for each 32 dimensions of a key, one for each head of a value.
    Int8,
    /// OCP E4M3, rounded to nearest even, times a scale for each head: 4 significant bits over 17 powers of two.
    E4m3,
}

/// Applies a macro to the Rust type of an element: `with_element!(kv_element, E => expression of E)`.
macro_rules! with_element {
    ($element:expr, $type:ident => $body:expr) => {
        match $element {
            $crate::KvElement::F32 => {
                type $type = f32;
                $body
            }
            $crate::KvElement::F16 => {
                type $type = half::f16;
                $body
            }
            $crate::KvElement::Bf16 => {
                type $type = half::bf16;
                $body
            }
            $crate::KvElement::Int8 => {
                type $type = i8;
                $body
            }
            $crate::KvElement::E4m3 => {
                type $type = $crate::kv::E4m3;
                $body
            }
        }
    };
}
pub(crate) use with_element;

impl KvElement {
    /// Bytes of one element, without its share of a scale.
    pub fn bytes(self) -> usize {
        with_element!(self, E => size_of::<E>())
    }

    /// Scales of one key of `head_dim` dimensions.
    pub(super) fn key_scales(self, head_dim: usize) -> usize {
        with_element!(self, E => if E::SCALED { head_dim.div_ceil(E::KEY_GROUP) } else { 0 })
    }

    /// Scales of one value.
    pub(super) fn value_scales(self) -> usize {
        with_element!(self, E => usize::from(E::SCALED))
    }

    /// What a cache of this type gives back for one head of a key, computed one number at a time: the oracle of the kernels.
    pub fn stored_key_ref(self, key: &[f32]) -> Vec<f32> {
        with_element!(self, E => key.chunks(E::key_group(key.len())).flat_map(stored::<E>).collect())
    }

    /// The same for one head of a value.
    pub fn stored_value_ref(self, value: &[f32]) -> Vec<f32> {
        with_element!(self, E => stored::<E>(value))
    }
}

/// Numbers that share a scale, rounded and read again.
fn stored<E: Element>(values: &[f32]) -> Vec<f32> {
    let mut rounded = vec![E::default(); values.len()];
    let scale = E::encode(values, &mut rounded);
    rounded.iter().map(|element| element.decode() * scale).collect()
}

/// A stored type of keys and values.
pub(crate) trait Element: Copy + Default {
    /// Whether numbers are multiples of a scale that lies beside them.
    const SCALED: bool;
    /// Neighbouring dimensions of a key that share a scale.
    const KEY_GROUP: usize = usize::MAX;

    /// The same in a head of `head_dim` dimensions.
    fn key_group(head_dim: usize) -> usize {
        Self::KEY_GROUP.min(head_dim)
    }

    /// Rounds numbers that share a scale, and returns it (1 for types without).
    fn encode(from: &[f32], to: &mut [Self]) -> f32;

    /// The same by an instruction set, as many numbers in as out.
    #[inline(always)]
    fn round<S: Simd>(_: S, from: &[f32], to: &mut [Self]) -> f32 {
        Self::encode(from, to)
    }

    /// The number, to be multiplied by its scale.
    fn decode(self) -> f32;

    /// Sixteen neighbouring elements, each as [`Element::decode`] gives it.
    ///
    /// # Safety
    /// `from` is valid for reading 16 elements.
    unsafe fn load<S: Simd>(simd: S, from: *const Self) -> S::F32;
}

impl Element for f32 {
    const SCALED: bool = false;

    fn encode(from: &[f32], to: &mut [f32]) -> f32 {
        to.copy_from_slice(from);
        1.0
    }

    fn decode(self) -> f32 {
        self
    }

    #[inline(always)]
    unsafe fn load<S: Simd>(simd: S, from: *const f32) -> S::F32 {
        // SAFETY: the caller's promise.
        unsafe { simd.load_pointer(from) }
    }
}

impl Element for f16 {
    const SCALED: bool = false;

    fn encode(from: &[f32], to: &mut [f16]) -> f32 {
        to.convert_from_f32_slice(from);
        1.0
    }

    #[inline(always)]
    fn round<S: Simd>(simd: S, from: &[f32], to: &mut [f16]) -> f32 {
        round_words(simd, from, to.reinterpret_cast_mut(), |values, to| simd.store_f16(values, to))
    }

    fn decode(self) -> f32 {
        self.to_f32()
    }

    #[inline(always)]
    unsafe fn load<S: Simd>(simd: S, from: *const f16) -> S::F32 {
        // SAFETY: the caller's promise; f16 is 16 bits.
        simd.load_f16(unsafe { &*from.cast::<[u16; LANES]>() })
    }
}

impl Element for bf16 {
    const SCALED: bool = false;

    fn encode(from: &[f32], to: &mut [bf16]) -> f32 {
        to.convert_from_f32_slice(from);
        1.0
    }

    #[inline(always)]
    fn round<S: Simd>(simd: S, from: &[f32], to: &mut [bf16]) -> f32 {
        round_words(simd, from, to.reinterpret_cast_mut(), |values, to| simd.store_bf16(values, to))
    }

    fn decode(self) -> f32 {
        self.to_f32()
    }

    #[inline(always)]
    unsafe fn load<S: Simd>(simd: S, from: *const bf16) -> S::F32 {
        // SAFETY: the caller's promise; bf16 is 16 bits.
        simd.load_bf16(unsafe { &*from.cast::<[u16; LANES]>() })
    }
}

/// Rounds numbers to words, sixteen at a time; the scale is 1.
#[inline(always)]
fn round_words<S: Simd>(
    simd: S,
    from: &[f32],
    to: &mut [u16],
    store: impl Fn(S::F32, &mut [u16; LANES]),
) -> f32 {
    let ((from, last), (to, last_to)) = (from.as_chunks(), to.as_chunks_mut());
    from.iter().zip(to).for_each(|(from, to)| store(simd.load(from), to));
    if !last.is_empty() {
        let mut words = [0; LANES];
        store(simd.load_partial(last), &mut words);
        last_to.copy_from_slice(&words[..last.len()]);
    }
    1.0
}

/// The greatest magnitude; NaN if there is one.
fn greatest(values: &[f32]) -> f32 {
    let greater = |most: f32, value: &f32| {
        if most.is_nan() || value.abs() <= most { most } else { value.abs() }
    };
    values.iter().fold(0.0, greater)
}

impl Element for i8 {
    const SCALED: bool = true;
    const KEY_GROUP: usize = 32;

    fn encode(from: &[f32], to: &mut [i8]) -> f32 {
        let greatest = greatest(from);
        let inverse = if greatest > 0.0 { 127.0 / greatest } else { 0.0 };
        for (to, value) in to.iter_mut().zip(from) {
            *to = (value * inverse).round_ties_even().clamp(-127.0, 127.0) as i8;
        }
        greatest / 127.0
    }

    fn decode(self) -> f32 {
        f32::from(self)
    }

    #[inline(always)]
    unsafe fn load<S: Simd>(simd: S, from: *const i8) -> S::F32 {
        // SAFETY: the caller's promise.
        simd.to_f32(simd.load_i8(unsafe { &*from.cast::<[i8; LANES]>() }))
    }
}

/// Bits of OCP E4M3.
#[derive(Clone, Copy, Default)]
#[repr(transparent)]
pub(crate) struct E4m3(u8);

impl Element for E4m3 {
    const SCALED: bool = true;

    fn encode(from: &[f32], to: &mut [E4m3]) -> f32 {
        let greatest = greatest(from);
        let inverse = if greatest > 0.0 { e4m3::GREATEST / greatest } else { 0.0 };
        for (to, value) in to.iter_mut().zip(from) {
            *to = E4m3(e4m3::encode(value * inverse));
        }
        greatest / e4m3::GREATEST * e4m3::SHRINKAGE
    }

    fn decode(self) -> f32 {
        e4m3::decode(self.0) / e4m3::SHRINKAGE
    }

    #[inline(always)]
    unsafe fn load<S: Simd>(simd: S, from: *const E4m3) -> S::F32 {
        // SAFETY: the caller's promise; E4m3 is 8 bits.
        simd.load_e4m3(unsafe { &*from.cast::<[u8; LANES]>() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simd::{Isa, Kernel};
    use std::marker::PhantomData;

    struct Load<'a, E>(&'a [E; LANES]);

    impl<E: Element> Kernel for Load<'_, E> {
        type Output = [f32; LANES];
        #[inline(always)]
        fn run<S: Simd>(self, simd: S) -> [f32; LANES] {
            let mut lanes = [0.0; LANES];
            // SAFETY: 16 elements.
            simd.store(unsafe { E::load(simd, self.0.as_ptr()) }, &mut lanes);
            lanes
        }
    }

    /// Every byte of an 8-bit type, read as vectors on every instruction set and one by one.
    fn every_byte<E: Element>(make: impl Fn(u8) -> E) {
        for isa in Isa::available() {
            for first in (0..=255).step_by(LANES) {
                let elements: [E; LANES] = std::array::from_fn(|lane| make((first + lane) as u8));
                let expected = elements.map(E::decode);
                for (found, expected) in isa.dispatch(Load(&elements)).into_iter().zip(expected) {
                    let nan = expected.is_nan(); // two codes that are never stored
                    assert!(nan || found.to_bits() == expected.to_bits(), "{}: {expected}", isa.name());
                }
            }
        }
    }

    struct Round<'a, E>(&'a [f32], PhantomData<E>);

    impl<E: Element> Kernel for Round<'_, E> {
        type Output = Vec<f32>;
        #[inline(always)]
        fn run<S: Simd>(self, simd: S) -> Vec<f32> {
            let mut rounded = vec![E::default(); self.0.len()];
            let scale = E::round(simd, self.0, &mut rounded);
            rounded.iter().map(|element| element.decode() * scale).collect()
        }
    }

    #[test]
    fn instruction_sets_round_as_the_oracle_does() {
        let mut values: Vec<f32> = (0..83).map(|i| ((i * 37 % 101) as f32 - 50.0) * 1.7e-3).collect();
        let specials =
            [65519.0, 65520.0, 1e-8, 1e-40, f32::MAX, -0.0, 1.0 + 0.5f32.powi(11), 1.0 + 0.5f32.powi(8)];
        let bits = |values: &[f32]| values.iter().map(|value| value.to_bits()).collect::<Vec<_>>();
        let elements = [KvElement::F32, KvElement::F16, KvElement::Bf16, KvElement::Int8, KvElement::E4m3];
        for last in [&specials[..], &[f32::INFINITY, f32::NEG_INFINITY], &[f32::NAN]] {
            values.extend(last);
            for (isa, length) in
                Isa::available().into_iter().flat_map(|isa| [0, 1, 16, 31, values.len()].map(|n| (isa, n)))
            {
                for element in elements {
                    let values = &values[..length];
                    let found = with_element!(element, E => isa.dispatch(Round::<E>(values, PhantomData)));
                    assert_eq!(
                        bits(&found),
                        bits(&element.stored_value_ref(values)),
                        "{} {element:?}",
                        isa.name()
                    );
                }
            }
        }
    }

    #[test]
    fn vectors_of_bytes_are_what_the_oracle_says() {
        every_byte(|byte| byte as i8);
        every_byte(E4m3);
    }

    #[test]
    fn rounding_errs_by_half_a_step_at_most() {
        let values: Vec<f32> = (0..100).map(|i| ((i * 37 % 101) as f32 - 50.0) * 0.173).collect();
        for element in [KvElement::Int8, KvElement::E4m3] {
            for (stored, value) in element.stored_value_ref(&values).iter().zip(&values) {
                let most = 50.0 * 0.173;
                let step = if element == KvElement::Int8 { most / 127.0 } else { value.abs() / 8.0 };
                let least = most / 448.0 / 512.0; // half of E4M3's smallest number
                assert!((stored - value).abs() <= step * 0.5001 + least, "{element:?} {value} {stored}");
            }
        }
    }

    /// One large dimension takes precision from its own group alone.
    #[test]
    fn keys_in_int8_have_a_scale_for_each_group() {
        let mut key = vec![0.5; 70];
        key[33] = 1000.0;
        let stored = KvElement::Int8.stored_key_ref(&key);
        assert!(stored[..32].iter().chain(&stored[64..]).all(|value| (value - 0.5).abs() < 1e-6));
        assert_eq!((stored[32], stored[33]), (0.0, 1000.0));
        assert_eq!(KvElement::Int8.stored_value_ref(&key)[0], 0.0);
        let counts = [KvElement::Int8, KvElement::E4m3, KvElement::F16].map(|element| element.key_scales(70));
        assert_eq!(counts, [3, 1, 0]);
    }

    #[test]
    fn nothing_finite_is_made_of_what_is_not() {
        for element in [KvElement::Int8, KvElement::E4m3] {
            for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                for values in [[1.0, bad, 2.0], [bad, 1.0, 2.0], [1.0, 2.0, bad]] {
                    let stored = element.stored_value_ref(&values);
                    assert!(stored.iter().all(|value| value.is_nan() || value.is_infinite()), "{stored:?}");
                }
            }
            assert_eq!(element.stored_value_ref(&[0.0, -0.0]), [0.0, 0.0]);
            let tiny = element.stored_value_ref(&[1e-40, -1e-44]);
            assert!(tiny.iter().all(|value| value.abs() <= 1.1e-40), "{tiny:?}");
        }
    }
}
