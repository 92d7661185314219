//! IQ3_XXS: blocks of 256 weights: a scale (half precision), for each four weights a byte that indexes a grid, then for
//! each 32 weights 4 bytes: four times seven signs and, in the upper 4 bits, the scale `(s + 1/2) / 2` in units of the
//! block's.

use super::Description;
use super::grids::{IQ3_XXS, even_signs};
use super::grouped::{Codes, Group, Grouped, Scales, blocks, eights, word};

pub(super) const DESCRIPTION: Description = Description::grouped("IQ3_XXS", &FORMAT);

static FORMAT: Grouped = Grouped {
    codes: Codes::Book(&VALUES),
    scales: Scales::Steps { halves: false },
    factor: 0.25,
    blocks: blocks!(group, 256, 98),
};

/// What digits stand for, and the same negative.
static VALUES: [i8; 16] = [4, 12, 20, 28, 36, 44, 52, 62, -4, -12, -20, -28, -36, -44, -52, -62];

fn group(block: &[u8], index: usize) -> Group {
    let at = 66 + 4 * index;
    let signs = u32::from_le_bytes([block[at], block[at + 1], block[at + 2], block[at + 3]]);
    let codes = eights(|i| {
        let entries = [0, 1].map(|k| usize::from(block[2 + 8 * index + 2 * i + k]));
        IQ3_XXS.fours::<3>(entries, even_signs((signs >> (7 * i) & 127) as u8))
    });
    let step = (2 * (signs >> 28) + 1) as i8;
    Group::scaled(word(block, 0), [step; 2], codes)
}
