//! Q4_K: blocks of 256 weights of 4 bits: a scale and a minimum (half precision), and for each 32 weights a 6-bit scale
//! and minimum in units of those. Weight `code * scale - minimum`.

use super::Description;
use super::grouped::{Codes, Group, Grouped, Scales, blocks, eights, paired_nibbles, word};

pub(super) const DESCRIPTION: Description = Description::grouped("Q4_K", &FORMAT);

static FORMAT: Grouped = Grouped {
    codes: Codes::Nibbles(0),
    scales: Scales::StepsDrops { halves: false },
    factor: 1.0,
    blocks: blocks!(group, 256, 144, 16, 0),
};

/// Scale and minimum `index` of 8 in 12 bytes: the first four scales fill 6 bits of 4 bytes, the first four minima those
/// of the next 4; the others have their low bits in the halves of the last 4 bytes, and their two high bits in what the
/// first ones left over.
#[inline(always)]
pub(super) fn scale_and_minimum(bytes: &[u8], index: usize) -> (i8, i8) {
    let at = index % 4;
    let (scale, minimum) = match index < 4 {
        true => (bytes[at] & 63, bytes[4 + at] & 63),
        false => (bytes[8 + at] & 15 | bytes[at] >> 6 << 4, bytes[8 + at] >> 4 | bytes[4 + at] >> 6 << 4),
    };
    (scale as i8, minimum as i8)
}

#[inline(always)]
fn group(block: &[u8], index: usize) -> Group {
    let (step, drop) = scale_and_minimum(&block[4..], index);
    Group {
        codes: eights(|i| paired_nibbles(&block[16..], index, i)),
        scale: word(block, 0),
        minimum: word(block, 2),
        steps: [step; 2],
        drops: [drop; 2],
    }
}
