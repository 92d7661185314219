//! Q6_K: blocks of 256 weights of 6 bits offset by 32: lower nibbles, upper pairs of bits, a signed byte of scale for each
//! 16 weights, in units of the block's scale (half precision, at the end).

use super::fit::{self, Block};
use super::grouped::{Codes, Group, Grouped, Scales, blocks, eight_bytes, eights, fields, quarters, word};
use super::{Description, Values};
use half::f16;

pub(super) const DESCRIPTION: Description = Description {
    name: "Q6_K",
    block_len: LEN,
    block_bytes: BYTES,
    values: Values::Grouped(&FORMAT),
    quantize: Some(fit::blocks::<Nearest, LEN, BYTES>),
};

const LEN: usize = 256;
const BYTES: usize = 210;

static FORMAT: Grouped = Grouped {
    codes: Codes::Six(32),
    scales: Scales::Steps { halves: true },
    factor: 1.0,
    blocks: blocks!(group, LEN, BYTES, 0, 128),
};

#[inline(always)]
fn group(block: &[u8], index: usize) -> Group {
    // 64 bytes hold two groups in their low halves and the next two in the high ones.
    let nibbles =
        |i: usize| fields(eight_bytes(block, index / 4 * 64 + index % 2 * 32 + 8 * i), index % 4 / 2 * 4, 4);
    let codes = eights(|i| nibbles(i) | quarters(&block[128..], index, i) << 4);
    let steps = [2 * index, 2 * index + 1].map(|at| block[192 + at] as i8);
    Group::scaled(word(block, 208), steps, codes)
}

/// Each 16 weights have the step that is nearest to their own best scale; the unit makes the step of greatest magnitude -128.
struct Nearest;

impl Block<LEN, BYTES> for Nearest {
    #[inline(always)]
    fn encode(values: &[f32; LEN]) -> [u8; BYTES] {
        let halves = values.as_chunks::<16>().0;
        let mut scales = [0.0; 16];
        for (scale, values) in scales.iter_mut().zip(halves) {
            *scale = fit::SIXES.scale(values);
        }
        let unit = unit(fit::greatest(&scales));
        let inverse = if unit.to_f32() == 0.0 { 0.0 } else { 1.0 / unit.to_f32() };
        let mut block = [0; BYTES];
        block[208..].copy_from_slice(&unit.to_le_bytes());
        for (half, (values, scale)) in halves.iter().zip(scales).enumerate() {
            let step = (scale * inverse).round().clamp(-128.0, 127.0);
            block[192 + half] = step as i8 as u8;
            // Four groups of 32 share 64 bytes of nibbles and 32 of pairs: see `group`.
            let (quarter, group, first) = (half / 8, half / 2 % 4, half % 2 * 16);
            for (at, integer) in fit::integers::<16, 32>(values, unit.to_f32() * step).into_iter().enumerate()
            {
                let code = (integer + 32) as u8;
                block[quarter * 64 + group % 2 * 32 + first + at] |= (code & 15) << (group / 2 * 4);
                block[128 + quarter * 32 + first + at] |= code >> 4 << (2 * group);
            }
        }
        block
    }
}

/// The unit that makes this scale -128 steps, or a little less: rounded away from zero, which matters where half precision has few digits.
#[inline(always)]
fn unit(greatest: f32) -> f16 {
    let unit = fit::half(greatest / -128.0);
    let short = unit.to_f32().abs() * 128.0 < greatest.abs() && unit.to_f32().abs() < f16::MAX.to_f32();
    if short { f16::from_bits(unit.to_bits() + 1) } else { unit }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quant::fit::tests::bell;
    use crate::{Format, dequantize, quant::sample_values, quantize};

    fn rounded(values: &[f32]) -> Vec<f32> {
        let (mut bytes, mut back) = (Vec::new(), vec![0.0; values.len()]);
        quantize(Format::Q6_K, values, &mut bytes);
        dequantize(Format::Q6_K, &bytes, &mut back);
        back
    }

    /// Sum of squared errors over the sum of squares, in double precision.
    fn error(values: &[f32], back: &[f32]) -> f64 {
        let square = |value: f64| value * value;
        let errors: f64 = values.iter().zip(back).map(|(a, b)| square(f64::from(*a) - f64::from(*b))).sum();
        errors / values.iter().map(|value| square(f64::from(*value))).sum::<f64>()
    }

    #[test]
    fn what_six_bits_hold_comes_back() {
        // Integers times a step of each 16 times a unit: -32 is in each, and -128 among the steps.
        let values: Vec<f32> = (0..512)
            .map(|i| {
                let (integer, step) = (
                    (i * 37 % 64) as f32 - 32.0,
                    if i / 16 % 16 == 3 { -128.0 } else { (i / 16 + 40) as f32 },
                );
                let integer = if i % 16 == 5 { -32.0 } else { integer };
                integer * step * 0.0625
            })
            .collect();
        assert_eq!(rounded(&values), values);
    }

    #[test]
    fn errors_are_those_of_six_bits_and_below_the_usual_scale() {
        for (values, most) in [(bell(256 * 40), 3.3e-4), (sample_values(256 * 40), 6e-4)] {
            let found = error(&values, &rounded(&values));
            // The usual scale makes the greatest magnitude of 16 weights -32.
            let usual: Vec<f32> = (values.as_chunks::<16>().0.iter())
                .flat_map(|values| {
                    let scale = fit::greatest(values) / -32.0;
                    fit::integers::<16, 32>(values, scale).map(|integer| f32::from(integer) * scale)
                })
                .collect();
            assert!(
                found < most && found < 0.95 * error(&values, &usual),
                "{found} of {}",
                error(&values, &usual)
            );
        }
    }

    #[test]
    fn unusual_blocks() {
        assert_eq!(rounded(&[0.0; 256]), [0.0; 256]);
        for value in [65504.0_f32, -3.5, 1e-3, 1e-4, f32::MAX, 1e-30] {
            let back = rounded(&[value; 256]);
            assert!(back.iter().all(|back| back.is_finite()), "{value}");
            let near = (back[255] - value).abs() <= value.abs() * 2e-2 || value == f32::MAX || value < 1e-6;
            assert!(near, "{value} {}", back[255]);
        }
        let mut lone = [0.0; 256];
        lone[77] = -0.75;
        let back = rounded(&lone);
        assert!((back[77] + 0.75).abs() < 1e-3 && back.iter().filter(|value| **value != 0.0).count() == 1);
    }
}
