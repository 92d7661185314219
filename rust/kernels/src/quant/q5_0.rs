//! Q5_0: blocks of 32 weights, each `(code - 16) * scale`: scale (half precision), the codes' fifth bits in 4 bytes, the
//! first weight's lowest, their other bits as in Q4_0.

use super::Description;
use super::grouped::{Codes, GROUP, Group, Grouped, Scales, blocks, eight_nibbles, eights, spread, word};

pub(super) const DESCRIPTION: Description = Description::grouped("Q5_0", &FORMAT);

static FORMAT: Grouped =
    Grouped { codes: Codes::Five(16), scales: Scales::Half, factor: 1.0, blocks: blocks!(group, 32, 22) };

/// The codes in 4 bytes of fifth bits and 16 of nibbles.
#[inline(always)]
pub(super) fn codes(bytes: &[u8]) -> [u8; GROUP] {
    eights(|i| eight_nibbles(&bytes[4..], i) | spread(bytes[i]) << 4)
}

fn group(block: &[u8], _index: usize) -> Group {
    Group::plain(word(block, 0), codes(&block[2..]))
}
