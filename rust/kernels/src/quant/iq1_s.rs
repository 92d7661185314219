//! IQ1_S: blocks of 256 weights: a scale (half precision), for each eight weights the low byte of an index into a grid of
//! -1, 0 and 1, and for each 32 weights 2 bytes: four times three high bits of the index, 3 bits of the scale `2 s + 1` in
//! units of the block's, and the sign of an eighth that is added to the grid. Kept as eight times grid and eighth.

use super::Description;
use super::grids::IQ1;
use super::grouped::{Codes, Group, Grouped, ONES, Scales, blocks, eights, word};

pub(super) const DESCRIPTION: Description = Description::grouped("IQ1_S", &FORMAT);

static FORMAT: Grouped = Grouped {
    codes: Codes::Book(&VALUES),
    scales: Scales::Steps { halves: false },
    factor: 0.125,
    blocks: blocks!(group, 256, 50),
};

/// Eight times a digit of the grid, plus or minus one; the others do not occur.
pub(super) static VALUES: [i8; 16] = [-9, -7, -1, 1, 7, 9, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];

/// An entry of the grid, with the eighth: eight codes.
#[inline(always)]
pub(super) fn shifted(index: usize, negative: bool) -> u64 {
    2 * IQ1.entry(index) + if negative { 0 } else { ONES }
}

fn group(block: &[u8], index: usize) -> Group {
    let more = word(block, 34 + 2 * index);
    let codes = eights(|i| {
        let low = usize::from(block[2 + 4 * index + i]);
        shifted(low | usize::from(more >> (3 * i) & 7) << 8, more >> 15 == 1)
    });
    let step = (2 * (more >> 12 & 7) + 1) as i8;
    Group::scaled(word(block, 0), [step; 2], codes)
}
