//! Q4_0: blocks of 32 weights, each `(nibble - 8) * scale`. Byte `i` holds weight `i` in its low nibble and weight
//! `i + 16` in its high one.

use super::fit::{self, Block};
use super::{Description, Values};
use half::f16;

pub(super) const DESCRIPTION: Description = Description {
    name: "Q4_0",
    block_len: LEN,
    block_bytes: BYTES,
    values: Values::By(dequantize),
    quantize: Some(fit::blocks::<Nearest, LEN, BYTES>),
};

const LEN: usize = 32;
const BYTES: usize = 18;

/// A block, as it lies in a file.
#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) struct BlockQ4_0 {
    /// Half-precision scale, little-endian.
    pub(crate) scale: [u8; 2],
    /// Two weights each.
    pub(crate) quants: [u8; 16],
}

const _: () = assert!(size_of::<BlockQ4_0>() == DESCRIPTION.block_bytes);

impl BlockQ4_0 {
    /// The block in these bytes.
    #[inline]
    pub(crate) fn from_bytes(bytes: &[u8; 18]) -> BlockQ4_0 {
        let (mut scale, mut quants) = ([0; 2], [0; 16]);
        scale.copy_from_slice(&bytes[..2]);
        quants.copy_from_slice(&bytes[2..]);
        BlockQ4_0 { scale, quants }
    }

    /// The 32 nibbles, in the order of the weights.
    #[inline]
    pub(crate) fn nibbles(&self) -> [u8; 32] {
        std::array::from_fn(|i| if i < 16 { self.quants[i] & 15 } else { self.quants[i - 16] >> 4 })
    }
}

fn dequantize(bytes: &[u8], out: &mut [f32]) {
    for (out, bytes) in out.as_chunks_mut::<32>().0.iter_mut().zip(bytes.as_chunks().0) {
        let block = BlockQ4_0::from_bytes(bytes);
        let scale = f16::from_le_bytes(block.scale).to_f32();
        for (out, nibble) in out.iter_mut().zip(block.nibbles()) {
            *out = (f32::from(nibble) - 8.0) * scale;
        }
    }
}

struct Nearest;

impl Block<LEN, BYTES> for Nearest {
    #[inline(always)]
    fn encode(values: &[f32; LEN]) -> [u8; BYTES] {
        let (scale, integers) = fit::nibbles(values);
        pack(scale, integers.map(|integer| (integer + 8) as u8))
    }
}

#[inline(always)]
fn pack(scale: f16, nibbles: [u8; LEN]) -> [u8; BYTES] {
    let mut block = [0; BYTES];
    block[..2].copy_from_slice(&scale.to_le_bytes());
    for i in 0..LEN / 2 {
        block[2 + i] = nibbles[i] | nibbles[i + LEN / 2] << 4;
    }
    block
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quant::{hash, sample_values};

    /// ggml's quantizer: the scale makes the value of greatest magnitude exactly -8.
    fn usual(values: &[f32; LEN]) -> [u8; BYTES] {
        let greatest =
            values.iter().fold(0.0_f32, |most, &value| if most.abs() < value.abs() { value } else { most });
        let scale = greatest / -8.0;
        let inverse = if scale == 0.0 { 0.0 } else { 1.0 / scale };
        pack(f16::from_f32(scale), values.map(|value| ((value * inverse + 8.5) as i8).min(15) as u8))
    }

    #[test]
    fn a_block_by_hand() {
        let mut values = [0.0; 32];
        values[..3].copy_from_slice(&[-8.0, 7.0, 1.0]);
        values[16] = -3.0;
        let bytes = Nearest::encode(&values);
        assert_eq!(bytes[..6], [0x00, 0x3c, 0x50, 0x8f, 0x89, 0x88]);
        let mut out = [0.0; 32];
        dequantize(&bytes, &mut out);
        assert_eq!(out, values);
    }

    #[test]
    fn equals_the_reference_implementation() {
        let values = sample_values(32 * 1000);
        let bytes: Vec<u8> = values.as_chunks().0.iter().flat_map(usual).collect();
        assert_eq!(hash(&bytes), EXPECTED_BYTES);
        let mut out = vec![0.0; values.len()];
        dequantize(&bytes, &mut out);
        let out: Vec<u8> = out.iter().flat_map(|value| value.to_le_bytes()).collect();
        assert_eq!(hash(&out), EXPECTED_VALUES);
    }

    /// Hashes of what gguf-py's `quants.quantize` and `quants.dequantize` make of the same values.
    const EXPECTED_BYTES: u64 = 0x8b73_c075_1726_ac62;
    const EXPECTED_VALUES: u64 = 0xbf0a_d2aa_9f8e_ae76;
}
