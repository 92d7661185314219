//! Q6_K: blocks of 256 weights of 6 bits offset by 32: lower nibbles, upper pairs of bits, a signed byte of scale for each
//! 16 weights, in units of the block's scale (half precision, at the end).

use super::Description;
use super::grouped::{Codes, Group, Grouped, Scales, blocks, eight_bytes, eights, fields, quarters, word};

pub(super) const DESCRIPTION: Description = Description::grouped("Q6_K", &FORMAT);

static FORMAT: Grouped = Grouped {
    codes: Codes::Six(32),
    scales: Scales::Steps { halves: true },
    factor: 1.0,
    blocks: blocks!(group, 256, 210),
};

fn group(block: &[u8], index: usize) -> Group {
    // 64 bytes hold two groups in their low halves and the next two in the high ones.
    let nibbles =
        |i: usize| fields(eight_bytes(block, index / 4 * 64 + index % 2 * 32 + 8 * i), index % 4 / 2 * 4, 4);
    let codes = eights(|i| nibbles(i) | quarters(&block[128..], index, i) << 4);
    let steps = [2 * index, 2 * index + 1].map(|at| block[192 + at] as i8);
    Group::scaled(word(block, 208), steps, codes)
}
