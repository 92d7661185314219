//! What most quantized formats have in common: a weight is a small integer times the scale of its group, plus perhaps
//! the group's minimum. A format's file tells how its blocks spell that; dequantization and packing follow from it.
//!
//! The integers of every format here but three take at most 16 values, so that a weight is a code of 4 bits for the
//! kernels too, however a file stores it. Even the grids of the IQ formats do: a grid of eight weights is eight codes.

use half::{bf16, f16};

/// Weights that share a scale, at most: a group's halves may have their own. Also the unit of every kernel's loop over columns.
pub(crate) const GROUP: usize = 32;

/// 32 weights: weight `i` is `integers[i] * scale`, plus the minimum where the format has one, and both are those of
/// half `i / 16`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Group {
    /// The integers.
    pub(crate) integers: [i8; GROUP],
    /// Bits of a half-precision number (bfloat16 for `Scales::Brain`) that the steps count in.
    pub(crate) scale: u16,
    /// Half-precision bits of what the drops count in.
    pub(crate) minimum: u16,
    /// The scale of each half in units of `scale`.
    pub(crate) steps: [i8; 2],
    /// The minimum of each half in units of `minimum`.
    pub(crate) drops: [i8; 2],
}

impl Group {
    /// Whole scale, no minimum.
    pub(crate) fn plain(scale: u16, integers: [i8; GROUP]) -> Group {
        Group { integers, scale, minimum: 0, steps: [1; 2], drops: [1; 2] }
    }

    /// Scales of the halves, of a format without a minimum.
    pub(crate) fn scaled(scale: u16, steps: [i8; 2], integers: [i8; GROUP]) -> Group {
        Group { integers, scale, minimum: 0, steps, drops: [0; 2] }
    }
}

/// How the integers become unsigned codes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Codes {
    /// 4 bits, the code is the integer plus this.
    Nibbles(i8),
    /// 5 bits.
    Five(i8),
    /// 6 bits.
    Six(i8),
    /// 4 bits that index these integers, none of them -128.
    Book(&'static [i8; 16]),
}

/// Where scales and minima come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Scales {
    /// A half-precision scale per group.
    Half,
    /// A half-precision scale per four groups.
    Shared,
    /// A bfloat16 scale per group.
    Brain,
    /// A half-precision scale and minimum per group.
    HalfMinimum,
    /// Steps of a half-precision scale per 256 weights; one step per half of a group, or one for both.
    Steps { halves: bool },
    /// The same, minus drops of a half-precision minimum.
    StepsDrops { halves: bool },
}

impl Scales {
    /// Whether the halves of a group have their own.
    pub(crate) const fn has_halves(self) -> bool {
        matches!(self, Scales::Steps { halves: true } | Scales::StepsDrops { halves: true })
    }

    /// Whether groups have minima.
    pub(crate) const fn has_minima(self) -> bool {
        matches!(self, Scales::HalfMinimum | Scales::StepsDrops { .. })
    }
}

/// A format of groups.
#[derive(Debug)]
pub(crate) struct Grouped {
    pub(crate) codes: Codes,
    pub(crate) scales: Scales,
    /// A power of two that scales are multiplied with.
    pub(crate) factor: f32,
    /// The group of this index in a block.
    pub(crate) group: fn(&[u8], usize) -> Group,
}

impl Grouped {
    /// The scale of each half of a group.
    pub(crate) fn scales_of(&self, group: &Group) -> [f32; 2] {
        let unit = match self.scales {
            Scales::Brain => bf16::from_bits(group.scale).to_f32(),
            _ => f16::from_bits(group.scale).to_f32(),
        };
        group.steps.map(|step| unit * self.factor * f32::from(step))
    }

    /// The minimum of each half of a group, 0 for formats that have none.
    pub(crate) fn minima_of(&self, group: &Group) -> [f32; 2] {
        let unit = f16::from_bits(group.minimum).to_f32();
        match self.scales {
            Scales::HalfMinimum => [unit; 2],
            Scales::StepsDrops { .. } => group.drops.map(|drop| unit * -f32::from(drop)),
            _ => [0.0; 2],
        }
    }

    /// The exact values of whole blocks. The products are exact, so it is no matter how they are added.
    pub(super) fn dequantize(&self, block_len: usize, block_bytes: usize, bytes: &[u8], out: &mut [f32]) {
        let groups = block_len / GROUP;
        for (index, out) in out.as_chunks_mut::<GROUP>().0.iter_mut().enumerate() {
            let block = &bytes[index / groups * block_bytes..][..block_bytes];
            let group = (self.group)(block, index % groups);
            let (scales, minima) = (self.scales_of(&group), self.minima_of(&group));
            for (i, (out, integer)) in out.iter_mut().zip(group.integers).enumerate() {
                let product = scales[i / 16] * f32::from(integer);
                *out = if self.scales.has_minima() { product + minima[i / 16] } else { product };
            }
        }
    }
}

/// The little-endian number at byte `at`.
pub(super) fn word(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

/// 32 nibbles in 16 bytes: the low halves first, then the high ones.
pub(super) fn nibbles(bytes: &[u8]) -> [u8; GROUP] {
    let bytes = &bytes[..16];
    std::array::from_fn(|i| if i < 16 { bytes[i] & 15 } else { bytes[i - 16] >> 4 })
}

/// Those of group `index` where 32 bytes hold a group in their low halves, and the next in the high ones.
pub(super) fn paired_nibbles(bytes: &[u8], index: usize) -> [u8; GROUP] {
    let (bytes, shift) = (&bytes[index / 2 * GROUP..][..GROUP], 4 * (index % 2));
    std::array::from_fn(|i| bytes[i] >> shift & 15)
}

/// 2-bit numbers of group `index` where 32 bytes hold four groups, the first in the lowest bits.
pub(super) fn quarters(bytes: &[u8], index: usize) -> [u8; GROUP] {
    let (bytes, shift) = (&bytes[index / 4 * GROUP..][..GROUP], 2 * (index % 4));
    std::array::from_fn(|i| bytes[i] >> shift & 3)
}
