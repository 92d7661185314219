//! Q4_1: blocks of 32 weights, each `nibble * scale + minimum`: scale, minimum (half precision), nibbles as in Q4_0.

use super::Description;
use super::grouped::{Codes, Group, Grouped, Scales, nibbles, word};

pub(super) const DESCRIPTION: Description = Description::grouped("Q4_1", 32, 20, &FORMAT);

static FORMAT: Grouped =
    Grouped { codes: Codes::Nibbles(0), scales: Scales::HalfMinimum, factor: 1.0, group };

fn group(block: &[u8], _index: usize) -> Group {
    let integers = nibbles(&block[4..]).map(|nibble| nibble as i8);
    Group { minimum: word(block, 2), ..Group::plain(word(block, 0), integers) }
}
