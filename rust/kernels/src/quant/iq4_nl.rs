//! IQ4_NL: blocks of 32 weights, each one of 16 integers times a scale (half precision); nibbles as in Q4_0.

use super::Description;
use super::grouped::{Codes, Group, Grouped, Scales, blocks, nibbles, word};

pub(super) const DESCRIPTION: Description = Description::grouped("IQ4_NL", &FORMAT);

static FORMAT: Grouped = Grouped {
    codes: Codes::Book(&VALUES),
    scales: Scales::Half,
    factor: 1.0,
    blocks: blocks!(group, 32, 18),
};

/// What nibbles stand for: denser around zero, where most weights are. The format defines them.
pub(super) static VALUES: [i8; 16] =
    [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113];

fn group(block: &[u8], _index: usize) -> Group {
    Group::plain(word(block, 0), nibbles(&block[2..]))
}
