//! IQ2_XXS: blocks of 256 weights: a scale (half precision), and for each 32 weights four bytes that index a grid of
//! eights and four bytes that hold four times seven signs and, in the upper 4 bits, the scale `(s + 1/2) / 4` in units of
//! the block's.

use super::Description;
use super::grids::{IQ2_XXS, PAIR_BOOK, even_signs};
use super::grouped::{Codes, Group, Grouped, Scales, blocks, eights, word};

pub(super) const DESCRIPTION: Description = Description::grouped("IQ2_XXS", &FORMAT);

static FORMAT: Grouped = Grouped {
    codes: Codes::Book(&PAIR_BOOK),
    scales: Scales::Steps { halves: false },
    factor: 0.125,
    blocks: blocks!(group, 256, 66),
};

fn group(block: &[u8], index: usize) -> Group {
    let bytes = &block[2 + 8 * index..][..8];
    let signs = u32::from_le_bytes([bytes[4], bytes[5], bytes[6], bytes[7]]);
    let codes =
        eights(|i| IQ2_XXS.eight::<2>(usize::from(bytes[i]), even_signs((signs >> (7 * i) & 127) as u8)));
    let step = (2 * (signs >> 28) + 1) as i8;
    Group::scaled(word(block, 0), [step; 2], codes)
}
