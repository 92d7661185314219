//! Q2_K: blocks of 256 weights of 2 bits. Each 16 have a byte: a scale in its low half and a minimum in its high one,
//! in units of the block's scale and minimum (half precision, at the end). Weight `code * scale - minimum`.

use super::Description;
use super::grouped::{Codes, Group, Grouped, Scales, blocks, eights, quarters, word};

pub(super) const DESCRIPTION: Description = Description::grouped("Q2_K", &FORMAT);

static FORMAT: Grouped = Grouped {
    codes: Codes::Nibbles(0),
    scales: Scales::StepsDrops { halves: true },
    factor: 1.0,
    blocks: blocks!(group, 256, 84),
};

fn group(block: &[u8], index: usize) -> Group {
    let scales = [block[2 * index], block[2 * index + 1]];
    Group {
        codes: eights(|i| quarters(&block[16..], index, i)),
        scale: word(block, 80),
        minimum: word(block, 82),
        steps: scales.map(|byte| (byte & 15) as i8),
        drops: scales.map(|byte| (byte >> 4) as i8),
    }
}
