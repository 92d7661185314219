//! Q3_K: blocks of 256 weights of 3 bits: a plane of third bits (absent means minus 4), the lower two bits, and for each
//! 16 weights a 6-bit scale offset by 32, in units of the block's scale (half precision, at the end).

use super::Description;
use super::grouped::{Codes, Group, Grouped, Scales, blocks, eight_bytes, eights, fields, quarters, word};

pub(super) const DESCRIPTION: Description = Description::grouped("Q3_K", &FORMAT);

static FORMAT: Grouped = Grouped {
    codes: Codes::Nibbles(4),
    scales: Scales::Steps { halves: true },
    factor: 1.0,
    blocks: blocks!(group, 256, 110),
};

/// Scale `index` of 16 in 12 bytes: low nibbles of 8 bytes hold the low bits of the first eight, high nibbles those of
/// the others, and the last 4 bytes two high bits of each, four scales apart.
fn scale(scales: &[u8], index: usize) -> i8 {
    let low = scales[index % 8] >> (4 * (index / 8)) & 15;
    let high = scales[8 + index % 4] >> (2 * (index / 4)) & 3;
    (low | high << 4) as i8 - 32
}

fn group(block: &[u8], index: usize) -> Group {
    let third = |i: usize| fields(eight_bytes(block, 8 * i), index, 1);
    let codes = eights(|i| quarters(&block[32..], index, i) | third(i) << 2);
    let steps = [2 * index, 2 * index + 1].map(|at| scale(&block[96..], at));
    Group::scaled(word(block, 108), steps, codes)
}
