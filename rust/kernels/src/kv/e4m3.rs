//! E4M3 of the OCP 8-bit floating point specification: sign, 4 bits of exponent with bias 7, 3 bits of mantissa; no infinities, and one
//! NaN for each sign.
//!
//! Shifted left by 7 bits, exponent and mantissa are those of a half-precision number 256 times as small (the biases differ by 8),
//! subnormal ones included. So vectors are read by a shift, a mask and the conversion from half precision that instruction sets have, and the 256
//! is part of the scale. The two NaNs, which would not survive that, are never stored: see [`encode`].

/// The greatest finite number.
pub(super) const GREATEST: f32 = 448.0;

/// How many times smaller the numbers are that [`crate::simd::Simd::load_e4m3`] gives.
pub(super) const SHRINKAGE: f32 = 256.0;

/// The nearest number, ties to even; beyond the greatest that one, and 0 for NaN (whose scale is NaN already).
pub(super) fn encode(value: f32) -> u8 {
    let sign = if value.is_sign_negative() { 0x80 } else { 0 };
    let magnitude = value.abs().min(GREATEST);
    if value.is_nan() {
        return 0;
    }
    // In units of the last place: 2^-9 below the smallest normal number, 2^-6.
    let exponent = ((magnitude.to_bits() >> 23) as i32 - 127).max(-6);
    let unit = f32::from_bits(((exponent - 3 + 127) as u32) << 23);
    let steps = (magnitude / unit).round_ties_even() as u8; // up to 16: then it is the next power of two
    // A normal number has 8 to 16 steps, of which 8 are the hidden bit; a carry goes on into the exponent.
    sign | (((exponent + 6) as u8) * 8 + steps)
}

/// The number that these bits of E4M3 stand for.
pub fn decode(bits: u8) -> f32 {
    let (exponent, mantissa) = (i32::from(bits >> 3 & 15), f32::from(bits & 7));
    let magnitude = match exponent {
        0 => mantissa / 512.0,
        15 if bits & 7 == 7 => f32::NAN,
        _ => (1.0 + mantissa / 8.0) * (exponent as f32 - 7.0).exp2(),
    };
    if bits & 0x80 == 0 { magnitude } else { -magnitude }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_by_hand() {
        for (bits, value) in [
            (0x00, 0.0),
            (0x01, 1.0 / 512.0),
            (0x07, 7.0 / 512.0),
            (0x08, 1.0 / 64.0),
            (0x38, 1.0),
            (0x39, 1.125),
            (0xb8, -1.0),
            (0x7e, 448.0),
            (0xfe, -448.0),
        ] {
            assert_eq!(decode(bits), value);
            assert_eq!(encode(value), bits, "{value}");
        }
        assert!(decode(0x7f).is_nan() && decode(0xff).is_nan());
        assert_eq!((encode(1e9), encode(-1e9), encode(f32::NAN)), (0x7e, 0xfe, 0));
        assert_eq!((encode(-0.0), encode(1e-30), encode(f32::from_bits(1))), (0x80, 0, 0));
    }

    #[test]
    fn every_number_and_every_tie() {
        for bits in 0..0x7f_u8 {
            let (low, high) = (decode(bits), decode((bits + 1).min(0x7e)));
            assert_eq!((encode(low), encode(-low)), (bits, bits | 0x80));
            let tie = (low + high) / 2.0;
            let even = if bits % 2 == 0 { bits } else { (bits + 1).min(0x7e) };
            assert_eq!(encode(tie), even, "{tie}");
            if bits < 0x7e {
                assert_eq!(encode(tie.next_down()), bits);
                assert_eq!(encode(tie.next_up()), bits + 1);
            }
        }
    }
}
