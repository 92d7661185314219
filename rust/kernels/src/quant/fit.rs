//! Rounding a group of weights to small integers with the scale that leaves the least squared error.
//!
//! The usual scale makes the weight of greatest magnitude the greatest integer. Most groups come closer with a smaller one
//! that cuts that weight off and serves the many better, so scales around it are tried; each one's integers tell by least
//! squares what scale suits them best.
//!
//! Everything is plain arithmetic on 16 lanes without fused operations: instruction sets change its speed, never a bit.

use crate::Isa;
use crate::simd::{Kernel, LANES, Simd};
use half::f16;
use std::ops::Range;

/// A format's quantizer of one block.
pub(super) trait Block<const LEN: usize, const BYTES: usize> {
    /// The block whose values are nearest to these.
    fn encode(values: &[f32; LEN]) -> [u8; BYTES];
}

/// Appends blocks, compiled for an instruction set. Values beyond the last whole block are left out.
pub(super) fn blocks<B: Block<LEN, BYTES>, const LEN: usize, const BYTES: usize>(
    isa: Isa,
    values: &[f32],
    out: &mut Vec<u8>,
) {
    isa.dispatch(Blocks::<B, LEN, BYTES> { values, out, block: std::marker::PhantomData });
}

struct Blocks<'a, B, const LEN: usize, const BYTES: usize> {
    values: &'a [f32],
    out: &'a mut Vec<u8>,
    block: std::marker::PhantomData<B>,
}

impl<B: Block<LEN, BYTES>, const LEN: usize, const BYTES: usize> Kernel for Blocks<'_, B, LEN, BYTES> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, _simd: S) {
        for values in self.values.as_chunks::<LEN>().0 {
            self.out.extend_from_slice(&B::encode(values));
        }
    }
}

/// Integers of some bits, from -`HALF` to `HALF` - 1, and how their scale is sought.
pub(super) struct Fit<const HALF: i32> {
    /// Scales that are tried: -`HALF` stands for the greatest magnitude times `HALF` over this, in eighths.
    tried: Range<i32>,
    /// From one that is tried to the next.
    step: usize,
    /// How often the integers of the best scale may then suit yet another one.
    again: usize,
}

/// Of 4 bits.
pub(super) const NIBBLES: Fit<8> = Fit { tried: 56..92, step: 1, again: 2 };

/// Of 6 bits, where there is less to find: a quarter of the error of the usual scale, most of it with few.
pub(super) const SIXES: Fit<32> = Fit { tried: 240..280, step: 4, again: 0 };

impl<const HALF: i32> Fit<HALF> {
    /// The scale, perhaps negative, of the integers whose products with it are nearest to the values; 0 where all are.
    #[inline(always)]
    pub(super) fn scale<const LEN: usize>(&self, values: &[f32; LEN]) -> f32 {
        let greatest = greatest(values);
        if greatest == 0.0 {
            return 0.0;
        }
        let (mut best, mut best_gain) = (greatest / -(HALF as f32), 0.0);
        for eighths in self.tried.clone().step_by(self.step) {
            let (scale, gain) = least_squares::<LEN, HALF>(values, eighths as f32 / -8.0 / greatest);
            if gain > best_gain {
                (best, best_gain) = (scale, gain);
            }
        }
        for _ in 0..self.again {
            (best, _) = least_squares::<LEN, HALF>(values, 1.0 / best);
        }
        best
    }
}

/// The value of greatest magnitude, the first among equals.
#[inline(always)]
pub(super) fn greatest(values: &[f32]) -> f32 {
    values.iter().fold(0.0_f32, |most, &value| if value.abs() > most.abs() { value } else { most })
}

/// A scale as half precision holds it: the greatest number where it is beyond.
#[inline(always)]
pub(super) fn half(scale: f32) -> f16 {
    f16::from_f32(scale.clamp(f16::MIN.to_f32(), f16::MAX.to_f32()))
}

/// The integers of a scale.
#[inline(always)]
pub(super) fn integers<const LEN: usize, const HALF: i32>(values: &[f32; LEN], scale: f32) -> [i8; LEN] {
    let inverse = if scale == 0.0 { 0.0 } else { 1.0 / scale };
    values.map(|value| integer::<HALF>(value * inverse) as i8)
}

/// A scale, perhaps negative, and integers from -8 to 7 whose products with it are near the values.
#[inline(always)]
pub(super) fn nibbles<const LEN: usize>(values: &[f32; LEN]) -> (f16, [i8; LEN]) {
    let scale = half(NIBBLES.scale(values));
    (scale, integers::<LEN, 8>(values, scale.to_f32()))
}

/// The nearest integer from -`HALF` to `HALF` - 1: adding 1.5 * 2^23 leaves no room for a fraction.
#[inline(always)]
fn integer<const HALF: i32>(value: f32) -> f32 {
    const NO_FRACTION: f32 = 12_582_912.0;
    let (least, most) = (-HALF as f32, (HALF - 1) as f32);
    let low = if value < least { least } else { value };
    let bounded = if low > most { most } else { low };
    (bounded + NO_FRACTION) - NO_FRACTION
}

/// The best scale of the integers that `inverse` makes, and by how much it lowers the sum of squares.
#[inline(always)]
fn least_squares<const LEN: usize, const HALF: i32>(values: &[f32; LEN], inverse: f32) -> (f32, f32) {
    let (mut products, mut squares) = ([0.0_f32; LANES], [0.0_f32; LANES]);
    for values in values.as_chunks::<LANES>().0 {
        for lane in 0..LANES {
            let integer = integer::<HALF>(values[lane] * inverse);
            products[lane] += values[lane] * integer;
            squares[lane] += integer * integer;
        }
    }
    let (products, squares) = (sum(products), sum(squares));
    if squares > 0.0 { (products / squares, products * products / squares) } else { (0.0, 0.0) }
}

#[inline(always)]
fn sum(lanes: [f32; LANES]) -> f32 {
    let eight: [f32; 8] = std::array::from_fn(|lane| lanes[lane] + lanes[lane + 8]);
    let four: [f32; 4] = std::array::from_fn(|lane| eight[lane] + eight[lane + 4]);
    (four[0] + four[2]) + (four[1] + four[3])
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::quant::sample_values;

    /// Sum of squared errors of a group rounded with this scale, in double precision: the oracle.
    fn error(values: &[f32], scale: f32) -> f64 {
        let one = |value: &f32| {
            let (value, scale) = (f64::from(*value), f64::from(scale));
            let integer = if scale == 0.0 { 0.0 } else { (value / scale).round().clamp(-8.0, 7.0) };
            (value - integer * scale).powi(2)
        };
        values.iter().map(one).sum()
    }

    /// Sums of four uniform numbers: nearly normal.
    pub(in super::super) fn bell(count: usize) -> Vec<f32> {
        let uniform = sample_values(4 * count);
        let mut state = 7_u32;
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 24) as f32 - 0.5
        };
        uniform.chunks(4).map(|_| next() + next() + next() + next()).collect()
    }

    fn compare<const LEN: usize>(values: &[f32]) -> (f64, f64, f64) {
        let (mut own, mut usual, mut least) = (0.0, 0.0, 0.0);
        for group in values.as_chunks::<LEN>().0 {
            let (scale, integers) = nibbles(group);
            let found: f64 = (group.iter().zip(integers))
                .map(|(value, integer)| {
                    (f64::from(*value) - f64::from(scale.to_f32()) * f64::from(integer)).powi(2)
                })
                .sum();
            assert!(found <= error(group, scale.to_f32()) * (1.0 + 1e-6), "not the nearest integers");
            let most = group
                .iter()
                .fold(0.0_f32, |most, &value| if value.abs() > most.abs() { value } else { most });
            // Every half-precision scale between half and 1.2 of the usual one, of either sign.
            let steps = 2000;
            let tried = (0..steps).flat_map(|step| {
                let scale = most / 8.0 * (0.5 + 0.7 * step as f32 / steps as f32);
                [scale, -scale].map(|scale| error(group, f16::from_f32(scale).to_f32()))
            });
            own += found;
            usual += error(group, f16::from_f32(most / -8.0).to_f32());
            least += tried.fold(f64::INFINITY, f64::min);
        }
        (own, usual, least)
    }

    #[test]
    fn nearly_the_least_error_and_less_than_the_usual_one() {
        for (values, most) in [(bell(128 * 40), 1.03), (sample_values(128 * 40), 1.06)] {
            for (own, usual, least) in [compare::<32>(&values), compare::<128>(&values)] {
                assert!(own <= usual * 0.95, "{own} of {usual}");
                assert!(own <= least * most, "{own} of {least}");
            }
        }
    }

    #[test]
    fn unusual_groups() {
        for value in [0.0, 1e-30, -3.5, 65504.0, 1e-7] {
            let (scale, integers) = nibbles(&[value; 32]);
            let back = scale.to_f32() * f32::from(integers[31]);
            assert!((back - value).abs() <= value.abs() * 1e-3 + 1e-7, "{value} {back}");
        }
        let mut lone = [0.0; 32];
        lone[5] = -0.75;
        let (scale, integers) = nibbles(&lone);
        assert!((scale.to_f32() * f32::from(integers[5]) + 0.75).abs() < 1e-3);
        assert_eq!(integers.iter().filter(|&&integer| integer != 0).count(), 1);
        assert!(nibbles(&[f32::MAX; 32]).0.is_finite());
    }

    #[test]
    fn every_instruction_set_gives_the_same_bits() {
        let mut values = sample_values(128 * 50);
        values.extend(bell(128 * 50));
        for &format in crate::Format::ALL {
            if format.is_writable() {
                let mut expected = Vec::new();
                crate::quantize(format, &values, &mut expected);
                for isa in Isa::available() {
                    let mut found = Vec::new();
                    crate::quantize_with(isa, format, &values, &mut found);
                    assert!(found == expected, "{format:?} {isa:?}");
                }
            }
        }
    }
}
