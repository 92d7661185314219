//! Blocks taken apart: integers in one row, scales in another, as checkpoints in the format "pack-quantized" of compressed-tensors
//! have them. An integer is stored as unsigned, offset by half its range; 4-bit ones lie two to a byte, the first in the low half,
//! so that a little-endian word of 32 bits holds eight.

use crate::Format;

/// A format whose blocks can be taken apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PackedFormat {
    /// The format of whole blocks.
    pub format: Format,
    /// Bits of an integer.
    pub bits: usize,
    /// Integers that share a scale.
    pub group: usize,
}

impl PackedFormat {
    /// All of them.
    pub const ALL: &'static [PackedFormat] = &[
        PackedFormat { format: Format::Q8_0, bits: 8, group: 32 },
        PackedFormat { format: Format::Q4_0, bits: 4, group: 32 },
        PackedFormat { format: Format::INT4_G128, bits: 4, group: 128 },
    ];

    /// That of whole blocks.
    pub fn of(format: Format) -> Option<PackedFormat> {
        PackedFormat::ALL.iter().copied().find(|packed| packed.format == format)
    }

    /// Bytes of a group's integers.
    pub const fn group_bytes(self) -> usize {
        self.group * self.bits / 8
    }

    /// Appends the blocks of packed integers and of their scales (half precision, little-endian).
    ///
    /// # Panics
    /// When there are not as many scales as groups.
    pub fn join(self, integers: &[u8], scales: &[[u8; 2]], blocks: &mut Vec<u8>) {
        assert_eq!(integers.len(), scales.len() * self.group_bytes(), "bytes of {} groups", scales.len());
        for (integers, scale) in integers.chunks_exact(self.group_bytes()).zip(scales) {
            blocks.extend(scale);
            match self.format {
                Format::Q8_0 => blocks.extend(integers.iter().map(|byte| byte ^ 0x80)),
                // Halves of 16 weights instead of pairs.
                Format::Q4_0 => {
                    blocks.extend((0..16).map(|i| nibble(integers, i) | nibble(integers, i + 16) << 4))
                }
                _ => blocks.extend(integers),
            }
        }
    }

    /// Appends the packed integers and the scales of whole blocks: what [`PackedFormat::join`] undoes.
    pub fn split(self, blocks: &[u8], integers: &mut Vec<u8>, scales: &mut Vec<u8>) {
        for block in blocks.chunks_exact(self.format.block_bytes()) {
            let (scale, own) = block.split_at(2);
            scales.extend(scale);
            match self.format {
                Format::Q8_0 => integers.extend(own.iter().map(|byte| byte ^ 0x80)),
                Format::Q4_0 => {
                    integers.extend((0..16).map(|i| half(own, 2 * i) | half(own, 2 * i + 1) << 4))
                }
                _ => integers.extend(own),
            }
        }
    }
}

/// Number `i` of nibbles that lie in pairs.
fn nibble(bytes: &[u8], i: usize) -> u8 {
    bytes[i / 2] >> (4 * (i % 2)) & 15
}

/// Number `i` of 32 nibbles that lie in halves.
fn half(bytes: &[u8], i: usize) -> u8 {
    bytes[i % 16] >> (4 * (i / 16)) & 15
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dequantize;
    use crate::quant::sample_rows;

    #[test]
    fn blocks_are_taken_apart_and_put_together() {
        for &packed in PackedFormat::ALL {
            let row = sample_rows(packed.format, 1, 384).remove(0);
            let (mut integers, mut scales, mut joined) = (Vec::new(), Vec::new(), Vec::new());
            packed.split(&row, &mut integers, &mut scales);
            assert_eq!(scales.len(), 384 / packed.group * 2);
            packed.join(&integers, scales.as_chunks().0, &mut joined);
            assert!(joined == row, "{packed:?}");
            // The oracle: integers as the format's definition counts them, from the lowest bit of words of 32 bits.
            let mut values = vec![0.0; 384];
            dequantize(packed.format, &row, &mut values);
            let words = integers.as_chunks::<4>().0;
            for (column, value) in values.iter().enumerate() {
                let (bit, mask) = (column * packed.bits, (1 << packed.bits) - 1);
                let unsigned = u32::from_le_bytes(words[bit / 32]) >> (bit % 32) & mask;
                let integer = unsigned as i32 - (1 << (packed.bits - 1));
                let scale = half::f16::from_le_bytes(scales.as_chunks().0[column / packed.group]).to_f32();
                assert_eq!(scale * integer as f32, *value, "{packed:?} column {column}");
            }
        }
    }
}
