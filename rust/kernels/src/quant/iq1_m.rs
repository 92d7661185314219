//! IQ1_M: blocks of 256 weights with the grid of IQ1_S: for each eight weights the low byte of the index, then 4 bits: three
//! high ones and the sign of the eighth; for each 16 weights 3 bits of the scale `2 s + 1`, four in 2 bytes, whose upper
//! 4 bits together are the block's scale (half precision).

use super::Description;
use super::grouped::{Codes, Group, Grouped, Scales, blocks, eights, word};
use super::iq1_s::{VALUES, shifted};

pub(super) const DESCRIPTION: Description = Description::grouped("IQ1_M", &FORMAT);

static FORMAT: Grouped = Grouped {
    codes: Codes::Book(&VALUES),
    scales: Scales::Steps { halves: true },
    factor: 0.125,
    blocks: blocks!(group, 256, 56),
};

fn group(block: &[u8], index: usize) -> Group {
    let codes = eights(|i| {
        let more = block[32 + 2 * index + i / 2] >> (4 * (i % 2));
        shifted(usize::from(block[4 * index + i]) | usize::from(more & 7) << 8, more & 8 != 0)
    });
    let scale = (0..4).fold(0, |scale, i| scale | word(block, 48 + 2 * i) >> 12 << (4 * i));
    let step = |at: usize| (2 * (word(block, 48 + at / 4 * 2) >> (3 * (at % 4)) & 7) + 1) as i8;
    let steps = [step(2 * index), step(2 * index + 1)];
    Group::scaled(scale, steps, codes)
}
