//! Q4_1: blocks of 32 weights, each `nibble * scale + minimum`: scale, minimum (half precision), nibbles as in Q4_0.

use super::Description;
use super::grouped::{Codes, Group, Grouped, Scales, blocks, nibbles, word};

pub(super) const DESCRIPTION: Description = Description::grouped("Q4_1", &FORMAT);

static FORMAT: Grouped = Grouped {
    codes: Codes::Nibbles(0),
    scales: Scales::HalfMinimum,
    factor: 1.0,
    blocks: blocks!(group, 32, 20),
};

fn group(block: &[u8], _index: usize) -> Group {
    Group { minimum: word(block, 2), ..Group::plain(word(block, 0), nibbles(&block[4..])) }
}
