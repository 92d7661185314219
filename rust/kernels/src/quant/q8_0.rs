//! Q8_0: blocks of 32 weights, each `quant * scale`, with quants in -127..=127 (a file may also hold -128).

use super::fit::{self, Block};
use super::{Description, Values};
use half::f16;

pub(super) const DESCRIPTION: Description = Description {
    name: "Q8_0",
    block_len: LEN,
    block_bytes: BYTES,
    values: Values::By(dequantize),
    quantize: Some(fit::blocks::<Nearest, LEN, BYTES>),
};

const LEN: usize = 32;
const BYTES: usize = 34;

/// A block, as it lies in a file.
#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) struct BlockQ8_0 {
    /// Half-precision scale, little-endian.
    pub(crate) scale: [u8; 2],
    /// Signed bytes.
    pub(crate) quants: [u8; 32],
}

const _: () = assert!(size_of::<BlockQ8_0>() == DESCRIPTION.block_bytes);

impl BlockQ8_0 {
    /// The block in these bytes.
    #[inline]
    pub(crate) fn from_bytes(bytes: &[u8; 34]) -> BlockQ8_0 {
        let (mut scale, mut quants) = ([0; 2], [0; 32]);
        scale.copy_from_slice(&bytes[..2]);
        quants.copy_from_slice(&bytes[2..]);
        BlockQ8_0 { scale, quants }
    }
}

fn dequantize(bytes: &[u8], out: &mut [f32]) {
    for (out, bytes) in out.as_chunks_mut::<32>().0.iter_mut().zip(bytes.as_chunks().0) {
        let block = BlockQ8_0::from_bytes(bytes);
        let scale = f16::from_le_bytes(block.scale).to_f32();
        for (out, quant) in out.iter_mut().zip(block.quants) {
            *out = f32::from(quant as i8) * scale;
        }
    }
}

/// The scale makes the greatest magnitude 127; ties round away from zero.
struct Nearest;

impl Block<LEN, BYTES> for Nearest {
    #[inline(always)]
    fn encode(values: &[f32; LEN]) -> [u8; BYTES] {
        let greatest = values.iter().fold(0.0_f32, |greatest, value| greatest.max(value.abs()));
        let scale = greatest / 127.0;
        let inverse = if scale == 0.0 { 0.0 } else { 1.0 / scale };
        let mut block = [0; BYTES];
        block[..2].copy_from_slice(&f16::from_f32(scale).to_le_bytes());
        for (byte, value) in block[2..].iter_mut().zip(values) {
            *byte = (value * inverse).round() as i8 as u8;
        }
        block
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quant::{hash, sample_values};

    #[test]
    fn a_block_by_hand() {
        let mut values = [0.0; 32];
        values[..4].copy_from_slice(&[127.0, -127.0, 2.5, -0.5]);
        assert_eq!(Nearest::encode(&values)[..7], [0x00, 0x3c, 127, 129, 3, 255, 0]); // ties away from zero
        assert_eq!(Nearest::encode(&[0.0; 32]), [0; 34]);
    }

    #[test]
    fn equals_the_reference_implementation() {
        let values = sample_values(32 * 1000);
        let mut bytes = Vec::new();
        crate::quantize(crate::Format::Q8_0, &values, &mut bytes);
        assert_eq!(hash(&bytes), EXPECTED_BYTES);
        let mut out = vec![0.0; values.len()];
        dequantize(&bytes, &mut out);
        let out: Vec<u8> = out.iter().flat_map(|value| value.to_le_bytes()).collect();
        assert_eq!(hash(&out), EXPECTED_VALUES);
    }

    /// Hashes of what gguf-py's `quants.quantize` and `quants.dequantize` make of the same values.
    const EXPECTED_BYTES: u64 = 0x9bd3_6a71_a6fc_3adc;
    const EXPECTED_VALUES: u64 = 0xcb4b_37ae_55c1_f924;
}
