//! What most quantized formats have in common: a weight is a small integer times the scale of its group, plus perhaps
//! the group's minimum. A format's file tells how its blocks spell that; dequantization and packing follow from it.
//!
//! The integers of every format here but three take at most 16 values, so that a weight is a code of 4 bits for the
//! kernels too, however a file stores it. Even the grids of the IQ formats do: a grid of eight weights is eight codes.

use half::{bf16, f16};

/// Weights that share a scale, at most: a group's halves may have their own. Also the unit of every kernel's loop over columns.
pub(crate) const GROUP: usize = 32;

/// 32 weights: weight `i` is the integer of `codes[i]` times the scale, plus the minimum where the format has one, and both are those of
/// half `i / 16`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Group {
    /// The integers, as the format's [`Codes`].
    pub(crate) codes: [u8; GROUP],
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
    /// Room for one.
    pub(crate) const EMPTY: Group = Group::plain(0, [0; GROUP]);

    /// Whole scale, no minimum.
    #[inline(always)]
    pub(crate) const fn plain(scale: u16, codes: [u8; GROUP]) -> Group {
        Group { codes, scale, minimum: 0, steps: [1; 2], drops: [1; 2] }
    }

    /// Scales of the halves, of a format without a minimum.
    #[inline(always)]
    pub(crate) fn scaled(scale: u16, steps: [i8; 2], codes: [u8; GROUP]) -> Group {
        Group { codes, scale, minimum: 0, steps, drops: [0; 2] }
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

impl Codes {
    /// The integer of a code.
    #[inline(always)]
    pub(crate) fn integer(self, code: u8) -> i8 {
        match self {
            Codes::Nibbles(offset) | Codes::Five(offset) | Codes::Six(offset) => code as i8 - offset,
            Codes::Book(integers) => integers[usize::from(code)],
        }
    }
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

    /// Whether these are counted in steps that a record's groups share.
    pub(crate) const fn has_drops(self) -> bool {
        matches!(self, Scales::StepsDrops { .. })
    }
}

/// A format of groups.
#[derive(Debug)]
pub(crate) struct Grouped {
    pub(crate) codes: Codes,
    pub(crate) scales: Scales,
    /// A power of two that scales are multiplied with.
    pub(crate) factor: f32,
    pub(crate) blocks: Blocks,
}

/// Blocks of a format: see [`blocks`].
#[derive(Debug)]
pub(crate) struct Blocks {
    /// Weights of one.
    pub(crate) len: usize,
    /// Bytes of one.
    pub(crate) bytes: usize,
    /// Writes the groups of whole blocks.
    pub(crate) groups: fn(&[u8], &mut [Group]),
    /// Where the bits of codes are, if they lie as in K-quants of 4, 5 and 6 bits.
    pub(crate) planes: Option<Planes>,
}

/// The bits of the eight groups of a block. Each 32 bytes of nibbles hold a group in their low halves and another one in the high ones:
/// the next group, or with two upper bits the one after that.
#[derive(Debug)]
pub(crate) struct Planes {
    /// Where the nibbles begin.
    pub(crate) nibbles: usize,
    /// Where the upper bits begin: 32 bytes with a bit for each of the eight groups, or two times 32 with two bits for each of four.
    pub(crate) upper: usize,
    /// Writes scales and minima of a block's groups.
    pub(crate) scales: fn(&[u8], &mut [Group; 8]),
}

/// Blocks of so many weights and bytes, from a function that gives the group of an index in a block, and perhaps where [`Planes`] begin. It becomes part of one loop: called for
/// each group through a pointer, it was what packing waited for.
macro_rules! blocks {
    ($group:ident, $len:expr, $bytes:expr) => {
        super::grouped::Blocks { planes: None, ..super::grouped::blocks!($group, $len, $bytes, 0, 0) }
    };
    ($group:ident, $len:expr, $bytes:expr, $nibbles:expr, $upper:expr) => {
        super::grouped::Blocks {
            len: $len,
            bytes: $bytes,
            groups: |bytes, groups| {
                let all = bytes.as_chunks::<{ $bytes }>().0.iter();
                for (block, own) in all.zip(groups.as_chunks_mut::<{ $len / super::grouped::GROUP }>().0) {
                    for (index, slot) in own.iter_mut().enumerate() {
                        *slot = $group(block, index);
                    }
                }
            },
            planes: Some(super::grouped::Planes {
                nibbles: $nibbles,
                upper: $upper,
                scales: |block, groups| {
                    for (index, slot) in groups.iter_mut().enumerate() {
                        // The codes are not looked at, so compilers leave them out.
                        *slot = super::grouped::Group { codes: slot.codes, ..$group(block, index) };
                    }
                },
            }),
        }
    };
}
pub(super) use blocks;

impl Grouped {
    /// What a group's scales are counted in, or its scale.
    pub(crate) fn unit_of(&self, group: &Group) -> f32 {
        let unit = match self.scales {
            Scales::Brain => bf16::from_bits(group.scale).to_f32(),
            _ => f16::from_bits(group.scale).to_f32(),
        };
        unit * self.factor
    }

    /// The scale of each half of a group.
    pub(crate) fn scales_of(&self, group: &Group) -> [f32; 2] {
        group.steps.map(|step| self.unit_of(group) * f32::from(step))
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
    pub(super) fn dequantize(&self, bytes: &[u8], out: &mut [f32]) {
        let mut groups = [Group::EMPTY; MOST_GROUPS];
        let groups = &mut groups[..self.blocks.len / GROUP];
        for (bytes, out) in bytes.chunks_exact(self.blocks.bytes).zip(out.chunks_exact_mut(self.blocks.len)) {
            (self.blocks.groups)(bytes, groups);
            for (group, out) in groups.iter().zip(out.as_chunks_mut::<GROUP>().0) {
                let (scales, minima) = (self.scales_of(group), self.minima_of(group));
                for (i, (out, &code)) in out.iter_mut().zip(&group.codes).enumerate() {
                    let product = scales[i / 16] * f32::from(self.codes.integer(code));
                    *out = if self.scales.has_minima() { product + minima[i / 16] } else { product };
                }
            }
        }
    }
}

/// Groups in a block, at most.
const MOST_GROUPS: usize = 8;

/// A 1 in each byte.
pub(super) const ONES: u64 = 0x0101_0101_0101_0101;

/// Bit `i` as byte `i`, 0 or 1.
#[inline(always)]
pub(super) fn spread(bits: u8) -> u64 {
    // Byte i keeps bit i; adding 127 carries it, wherever it is, to the byte's highest one.
    let own = u64::from(bits).wrapping_mul(ONES) & 0x8040_2010_0804_0201;
    (own + 0x7f * ONES) >> 7 & ONES
}

/// Four times eight codes, the first one lowest.
#[inline(always)]
pub(super) fn eights(eight: impl Fn(usize) -> u64) -> [u8; GROUP] {
    let mut codes = [0; GROUP];
    for (i, codes) in codes.as_chunks_mut::<8>().0.iter_mut().enumerate() {
        *codes = eight(i).to_le_bytes();
    }
    codes
}

/// The little-endian number at byte `at`.
#[inline(always)]
pub(super) fn word(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

/// Eight bytes from byte `at` on.
#[inline(always)]
pub(super) fn eight_bytes(bytes: &[u8], at: usize) -> u64 {
    bytes[at..].first_chunk().map_or(0, |eight| u64::from_le_bytes(*eight))
}

/// The low `bits` bits of each of eight bytes, after `shift` others.
#[inline(always)]
pub(super) fn fields(bytes: u64, shift: usize, bits: u32) -> u64 {
    (bytes >> shift) & (ONES * ((1 << bits) - 1))
}

/// Nibbles `8 i` to `8 i + 7` of 32 in 16 bytes: the low halves first, then the high ones.
#[inline(always)]
pub(super) fn eight_nibbles(bytes: &[u8], i: usize) -> u64 {
    fields(eight_bytes(bytes, i % 2 * 8), i / 2 * 4, 4)
}

/// All of them.
#[inline(always)]
pub(super) fn nibbles(bytes: &[u8]) -> [u8; GROUP] {
    eights(|i| eight_nibbles(bytes, i))
}

/// Eight of group `index` where 32 bytes hold a group in their low halves, and the next in the high ones.
#[inline(always)]
pub(super) fn paired_nibbles(bytes: &[u8], index: usize, i: usize) -> u64 {
    fields(eight_bytes(bytes, index / 2 * GROUP + 8 * i), index % 2 * 4, 4)
}

/// Eight 2-bit numbers of group `index` where 32 bytes hold four groups, the first in the lowest bits.
#[inline(always)]
pub(super) fn quarters(bytes: &[u8], index: usize, i: usize) -> u64 {
    fields(eight_bytes(bytes, index / 4 * GROUP + 8 * i), index % 4 * 2, 2)
}
