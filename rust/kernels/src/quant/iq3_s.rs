//! IQ3_S: blocks of 256 weights: a scale (half precision), for each four weights the low byte of an index into a grid, then
//! its ninth bits, a byte of signs for each eight weights, and for each 32 weights 4 bits of the scale `2 s + 1` in units
//! of the block's.

use super::Description;
use super::grids::IQ3_S;
use super::grouped::{Codes, Group, Grouped, Scales, blocks, eights, word};

pub(super) const DESCRIPTION: Description = Description::grouped("IQ3_S", &FORMAT);

static FORMAT: Grouped = Grouped {
    codes: Codes::Book(&VALUES),
    scales: Scales::Steps { halves: false },
    factor: 1.0,
    blocks: blocks!(group, 256, 110),
};

/// What digits stand for, and the same negative.
static VALUES: [i8; 16] = [1, 3, 5, 7, 9, 11, 13, 15, -1, -3, -5, -7, -9, -11, -13, -15];

fn group(block: &[u8], index: usize) -> Group {
    let high = usize::from(block[66 + index]);
    let entry = |at: usize| usize::from(block[2 + 8 * index + at]) | (high >> at & 1) << 8;
    let codes = eights(|i| IQ3_S.fours::<3>([entry(2 * i), entry(2 * i + 1)], block[74 + 4 * index + i]));
    let step = 2 * (block[106 + index / 2] >> (4 * (index % 2)) & 15) + 1;
    Group::scaled(word(block, 0), [step as i8; 2], codes)
}
