//! INT4_G128: blocks of 128 weights, each `(nibble - 8) * scale`: scale (half precision), then 64 bytes, of which byte `i`
//! holds weight `2 i` in its low nibble and weight `2 i + 1` in its high one.
//!
//! GGUF has no such type; safetensors checkpoints in the format "pack-quantized" of compressed-tensors (num_bits 4,
//! group_size 128, symmetric) hold the same nibbles in this order, with the scales in a tensor of their own.

use super::fit::{self, Block};
use super::grouped::{Codes, GROUP, Group, Grouped, Scales, blocks, word};
use super::{Description, Values};

pub(super) const DESCRIPTION: Description = Description {
    name: "INT4_G128",
    block_len: LEN,
    block_bytes: BYTES,
    values: Values::Grouped(&FORMAT),
    quantize: Some(fit::blocks::<Nearest, LEN, BYTES>),
};

const LEN: usize = 128;
const BYTES: usize = 66;

static FORMAT: Grouped = Grouped {
    codes: Codes::Nibbles(8),
    scales: Scales::Shared,
    factor: 1.0,
    blocks: blocks!(group, LEN, BYTES),
};

fn group(block: &[u8], index: usize) -> Group {
    let bytes = &block[2 + index * GROUP / 2..][..GROUP / 2];
    let codes = std::array::from_fn(|i| bytes[i / 2] >> (4 * (i % 2)) & 15);
    Group::plain(word(block, 0), codes)
}

struct Nearest;

impl Block<LEN, BYTES> for Nearest {
    #[inline(always)]
    fn encode(values: &[f32; LEN]) -> [u8; BYTES] {
        let (scale, integers) = fit::nibbles(values);
        let mut block = [0; BYTES];
        block[..2].copy_from_slice(&scale.to_le_bytes());
        for (byte, pair) in block[2..].iter_mut().zip(integers.as_chunks::<2>().0) {
            *byte = (pair[0] + 8) as u8 | ((pair[1] + 8) as u8) << 4;
        }
        block
    }
}

#[cfg(test)]
mod tests {
    use crate::{Format, dequantize, quantize};

    #[test]
    fn a_block_by_hand() {
        let values: Vec<f32> = (0..128).map(|i| ((i % 16) as f32 - 8.0) * 0.5).collect();
        let mut bytes = Vec::new();
        quantize(Format::INT4_G128, &values, &mut bytes);
        assert_eq!(bytes[..6], [0x00, 0x38, 0x10, 0x32, 0x54, 0x76]); // 0.5; the first weight is in the low nibble
        let mut back = vec![0.0; 128];
        dequantize(Format::INT4_G128, &bytes, &mut back);
        assert_eq!(back, values);
    }
}
