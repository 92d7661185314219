//! Q5_1: blocks of 32 weights, each `code * scale + minimum`: scale, minimum (half precision), codes as in Q5_0.

use super::Description;
use super::grouped::{Codes, Group, Grouped, Scales, blocks, word};
use super::q5_0::codes;

pub(super) const DESCRIPTION: Description = Description::grouped("Q5_1", &FORMAT);

static FORMAT: Grouped = Grouped {
    codes: Codes::Five(0),
    scales: Scales::HalfMinimum,
    factor: 1.0,
    blocks: blocks!(group, 32, 24),
};

fn group(block: &[u8], _index: usize) -> Group {
    Group { minimum: word(block, 2), ..Group::plain(word(block, 0), codes(&block[4..])) }
}
