//! IQ2_XS: blocks of 256 weights: a scale (half precision), for each eight weights 2 bytes (9 bits that index a grid and
//! seven signs), and for each 16 weights 4 bits of the scale `(s + 1/2) / 4` in units of the block's.

use super::Description;
use super::grids::{IQ2_XS, PAIR_BOOK, even_signs};
use super::grouped::{Codes, Group, Grouped, Scales, blocks, eights, word};

pub(super) const DESCRIPTION: Description = Description::grouped("IQ2_XS", &FORMAT);

static FORMAT: Grouped = Grouped {
    codes: Codes::Book(&PAIR_BOOK),
    scales: Scales::Steps { halves: true },
    factor: 0.125,
    blocks: blocks!(group, 256, 74),
};

fn group(block: &[u8], index: usize) -> Group {
    let codes = eights(|i| {
        let entry = word(block, 2 + 8 * index + 2 * i);
        IQ2_XS.eight::<2>(usize::from(entry & 511), even_signs((entry >> 9) as u8))
    });
    let scales = block[66 + index];
    let steps = [scales & 15, scales >> 4].map(|scale| (2 * scale + 1) as i8);
    Group::scaled(word(block, 0), steps, codes)
}
