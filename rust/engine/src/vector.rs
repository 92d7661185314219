//! Passes over a whole row of logits, written so that the compiler vectorizes them: independent lanes, no branch.
//!
//! A vocabulary has up to 260,000 entries and every generated token needs a few passes, so the library's scalar `exp` alone would cost
//! milliseconds. All sums have a fixed order: results do not depend on the machine's vector width.

const LANES: usize = 16;

/// Whether no entry is NaN or +inf.
pub(crate) fn all_below_infinity(row: &[f32]) -> bool {
    let (chunks, rest) = row.as_chunks::<LANES>();
    let mut other = [0_u32; LANES]; // with booleans it takes more than twice as long
    for chunk in chunks {
        for (lane, &value) in other.iter_mut().zip(chunk) {
            *lane |= if value < f32::INFINITY { 0 } else { u32::MAX };
        }
    }
    other.iter().all(|&lane| lane == 0) && rest.iter().all(|&value| value < f32::INFINITY)
}

/// The largest entry of a row without NaN; -inf for an empty one.
pub(crate) fn maximum(row: &[f32]) -> f32 {
    let (chunks, rest) = row.as_chunks::<LANES>();
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let larger = |a: f32, b: f32| if a > b { a } else { b };
    for chunk in chunks {
        for (lane, &value) in lanes.iter_mut().zip(chunk) {
            *lane = larger(value, *lane);
        }
    }
    lanes.iter().chain(rest).copied().fold(f32::NEG_INFINITY, larger)
}

/// The largest entry and the first place that has it, of a row that is read once; none where an entry is NaN or +inf, or the row is empty.
pub(crate) fn first_maximum(row: &[f32]) -> Option<(usize, f32)> {
    const BLOCK: usize = 1024;
    let (mut best, mut largest) = (0, f32::NEG_INFINITY);
    for (block, values) in row.chunks(BLOCK).enumerate() {
        if !all_below_infinity(values) {
            return None;
        }
        let own = maximum(values);
        if own > largest {
            (best, largest) = (block * BLOCK, own);
        }
    }
    let place = row.get(best..)?.iter().position(|&value| value == largest)?;
    Some((best + place, largest))
}

/// Replaces `weights` by exp((logit - largest) * scale), where `largest` is the row's maximum and finite, `scale` > 0 and finite.
pub(crate) fn exponentials(row: &[f32], largest: f32, scale: f32, weights: &mut Vec<f32>) {
    weights.clear();
    weights.extend(row.iter().map(|&logit| exp((logit - largest) * scale)));
}

/// Sum of non-negative entries in 64 bits.
pub(crate) fn sum(weights: &[f32]) -> f64 {
    let (chunks, rest) = weights.as_chunks::<LANES>();
    let mut lanes = [0.0; LANES];
    for chunk in chunks {
        for (lane, &value) in lanes.iter_mut().zip(chunk) {
            *lane += f64::from(value);
        }
    }
    lanes.iter().sum::<f64>() + rest.iter().map(|&value| f64::from(value)).sum::<f64>()
}

/// e to a power of at most 0, to about 1e-7 relative; 0 below -87, where single precision ends.
///
/// Cody and Waite's reduction to |r| <= ln(2)/2 and the Taylor polynomial of degree 7 (remainder 5e-9), without fused operations, so
/// that every machine gets the same bits.
fn exp(x: f32) -> f32 {
    const ROUND: f32 = 12_582_912.0; // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
    const LN2_HIGH: f32 = 0.693_359_4; // nine bits, so that its multiples are exact
    const LN2_LOW: f32 = -2.121_944_4e-4;
    let clamped = if x < -87.0 { -87.0 } else { x };
    let shifted = clamped * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = (clamped - n * LN2_HIGH) - n * LN2_LOW;
    let series = r * (1.0 / 5040.0) + 1.0 / 720.0;
    let series = series * r + 1.0 / 120.0;
    let series = series * r + 1.0 / 24.0;
    let series = series * r + 1.0 / 6.0;
    let series = series * r + 0.5;
    let series = series * r * r + r + 1.0;
    let exponent = shifted.to_bits().wrapping_sub(ROUND.to_bits()).wrapping_add(127);
    let value = series * f32::from_bits(exponent << 23);
    if x < -87.0 { 0.0 } else { value }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_exact_to_single_precision() {
        let mut worst = 0.0f64;
        for step in 0..=870_000 {
            let x = -(step as f32) * 1e-4;
            let exact = f64::from(x).exp();
            worst = worst.max((f64::from(exp(x)) - exact).abs() / exact);
        }
        assert!(worst < 2.5e-7, "{worst}");
        assert_eq!((exp(0.0), exp(-0.0), exp(-87.1), exp(f32::NEG_INFINITY)), (1.0, 1.0, 0.0, 0.0));
    }

    #[test]
    fn passes_cover_lanes_and_rest() {
        for length in [0, 1, 15, 16, 17, 100, 2500] {
            let row: Vec<f32> = (0..length).map(|i| ((i * 37) % 101) as f32 - 50.0).collect();
            assert_eq!(maximum(&row), row.iter().copied().fold(f32::NEG_INFINITY, f32::max));
            assert_eq!(sum(&row), row.iter().map(|&value| f64::from(value)).sum::<f64>());
            assert!(all_below_infinity(&row));
            let first = row.iter().position(|&value| value == maximum(&row));
            assert_eq!(first_maximum(&row), first.map(|place| (place, maximum(&row))));
            for place in 0..length {
                for bad in [f32::NAN, f32::INFINITY] {
                    let mut row = row.clone();
                    row[place] = bad;
                    assert!(!all_below_infinity(&row));
                    assert_eq!(first_maximum(&row), None);
                }
            }
        }
        assert!(all_below_infinity(&[f32::NEG_INFINITY]));
        assert_eq!(first_maximum(&[f32::NEG_INFINITY; 2]), Some((0, f32::NEG_INFINITY)));
    }
}
