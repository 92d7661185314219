//! BF16: the upper half of IEEE 754 single precision, little-endian; rounding to nearest even.

use super::{Description, Values};
use crate::Isa;
use half::bf16;

pub(super) const DESCRIPTION: Description = Description {
    name: "BF16",
    block_len: 1,
    block_bytes: 2,
    values: Values::By(dequantize),
    quantize: Some(quantize),
};

fn dequantize(bytes: &[u8], out: &mut [f32]) {
    for (out, bytes) in out.iter_mut().zip(bytes.as_chunks().0) {
        *out = bf16::from_le_bytes(*bytes).to_f32();
    }
}

fn quantize(_isa: Isa, values: &[f32], out: &mut Vec<u8>) {
    out.extend(values.iter().flat_map(|&value| bf16::from_f32(value).to_le_bytes()));
}

#[cfg(test)]
mod tests {
    #[test]
    fn rounding_and_limits() {
        let cases = [
            (1.0 + 1.0 / 256.0, 0x3f80_u16),
            (1.0 + 3.0 / 256.0, 0x3f82),
            (f32::MAX, 0x7f80),
            (-0.0, 0x8000),
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
