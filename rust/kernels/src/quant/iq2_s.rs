//! IQ2_S: blocks of 256 weights: a scale (half precision), for each eight weights the low byte of an index into a grid, a
//! byte of signs, and two high bits of the index; scales as in IQ2_XS.

use super::Description;
use super::grids::{IQ2_S, PAIR_BOOK};
use super::grouped::{Codes, Group, Grouped, Scales, blocks, eights, word};

pub(super) const DESCRIPTION: Description = Description::grouped("IQ2_S", &FORMAT);

static FORMAT: Grouped = Grouped {
    codes: Codes::Book(&PAIR_BOOK),
    scales: Scales::Steps { halves: true },
    factor: 0.125,
    blocks: blocks!(group, 256, 82),
};

fn group(block: &[u8], index: usize) -> Group {
    let high = usize::from(block[66 + index]);
    let codes = eights(|i| {
        let low = usize::from(block[2 + 4 * index + i]);
        IQ2_S.eight::<2>(low | (high >> (2 * i) & 3) << 8, block[34 + 4 * index + i])
    });
    let scales = block[74 + index];
    let steps = [scales & 15, scales >> 4].map(|scale| (2 * scale + 1) as i8);
    Group::scaled(word(block, 0), steps, codes)
}
