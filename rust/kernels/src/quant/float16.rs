//! F16: IEEE 754 half precision, little-endian; rounding to nearest even.

use super::{Description, Values};
use crate::Isa;
use half::f16;

pub(super) const DESCRIPTION: Description = Description {
    name: "F16",
    block_len: 1,
    block_bytes: 2,
    values: Values::By(dequantize),
    quantize: Some(quantize),
};

fn dequantize(bytes: &[u8], out: &mut [f32]) {
    for (out, bytes) in out.iter_mut().zip(bytes.as_chunks().0) {
        *out = f16::from_le_bytes(*bytes).to_f32();
    }
}

fn quantize(_isa: Isa, values: &[f32], out: &mut Vec<u8>) {
    out.extend(values.iter().flat_map(|&value| f16::from_f32(value).to_le_bytes()));
}

#[cfg(test)]
mod tests {
    #[test]
    fn rounding_and_limits() {
        let cases: [(f32, u16); 8] = [
            (1.0, 0x3c00),
            (1.0 + 1.0 / 2048.0, 0x3c00), // a tie, to even
            (1.0 + 3.0 / 2048.0, 0x3c02),
            (65504.0, 0x7bff),
            (65520.0, 0x7c00),         // rounds past the greatest finite value
            (-5.960_464_5e-8, 0x8001), // the smallest subnormal
            (2.0e-8, 0x0000),
            (f32::NEG_INFINITY, 0xfc00),
        ];
        for (value, bits) in cases {
            let mut bytes = Vec::new();
            super::quantize(crate::Isa::Scalar, &[value], &mut bytes);
            assert_eq!(bytes, bits.to_le_bytes(), "{value}");
        }
    }

    #[test]
    fn all_values_survive() {
        for bits in 0..=u16::MAX {
            let (mut value, mut bytes) = ([0.0], Vec::new());
            super::dequantize(&bits.to_le_bytes(), &mut value);
            super::quantize(crate::Isa::Scalar, &value, &mut bytes);
            assert!(value[0].is_nan() || bytes == bits.to_le_bytes(), "{bits:#x}");
        }
    }
}
