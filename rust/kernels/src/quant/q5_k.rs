//! Q5_K: as Q4_K, with a plane of fifth bits before the nibbles: bit `g` of its 32 bytes belongs to group `g`.

use super::Description;
use super::grouped::{
    Codes, Group, Grouped, Scales, blocks, eight_bytes, eights, fields, paired_nibbles, word,
};
use super::q4_k::scale_and_minimum;

pub(super) const DESCRIPTION: Description = Description::grouped("Q5_K", &FORMAT);

static FORMAT: Grouped = Grouped {
    codes: Codes::Five(0),
    scales: Scales::StepsDrops { halves: false },
    factor: 1.0,
    blocks: blocks!(group, 256, 176, 48, 16),
};

#[inline(always)]
fn group(block: &[u8], index: usize) -> Group {
    let (step, drop) = scale_and_minimum(&block[4..], index);
    let fifth = |i: usize| fields(eight_bytes(block, 16 + 8 * i), index, 1);
    Group {
        codes: eights(|i| paired_nibbles(&block[48..], index, i) | fifth(i) << 4),
        scale: word(block, 0),
        minimum: word(block, 2),
        steps: [step; 2],
        drops: [drop; 2],
    }
}
