//! F32: IEEE 754 single precision, little-endian.

use super::{Description, Values};
use crate::Isa;

pub(super) const DESCRIPTION: Description = Description {
    name: "F32",
    block_len: 1,
    block_bytes: 4,
    values: Values::By(dequantize),
    quantize: Some(quantize),
};

fn dequantize(bytes: &[u8], out: &mut [f32]) {
    for (out, bytes) in out.iter_mut().zip(bytes.as_chunks().0) {
        *out = f32::from_le_bytes(*bytes);
    }
}

fn quantize(_isa: Isa, values: &[f32], out: &mut Vec<u8>) {
    out.extend(values.iter().flat_map(|value| value.to_le_bytes()));
}

#[cfg(test)]
mod tests {
    #[test]
    fn bits_are_kept() {
        let values = [1.0, -0.0, f32::MIN_POSITIVE / 8.0, f32::INFINITY, f32::from_bits(0x7fa0_0001)];
        let (mut bytes, mut out) = (Vec::new(), [0.0; 5]);
        super::quantize(crate::Isa::Scalar, &values, &mut bytes);
        super::dequantize(&bytes, &mut out);
        assert_eq!(out.map(f32::to_bits), values.map(f32::to_bits));
    }
}
