//! Q5_0: blocks of 32 weights, each `(code - 16) * scale`: scale (half precision), the codes' fifth bits in 4 bytes, the
//! first weight's lowest, their other bits as in Q4_0.

use super::Description;
use super::grouped::{Codes, GROUP, Group, Grouped, Scales, nibbles, word};

pub(super) const DESCRIPTION: Description = Description::grouped("Q5_0", 32, 22, &FORMAT);

static FORMAT: Grouped = Grouped { codes: Codes::Five(16), scales: Scales::Half, factor: 1.0, group };

/// The codes in 4 bytes of fifth bits and 16 of nibbles.
pub(super) fn codes(bytes: &[u8]) -> [i8; GROUP] {
    let low = nibbles(&bytes[4..]);
    std::array::from_fn(|i| (low[i] | (bytes[i / 8] >> (i % 8) & 1) << 4) as i8)
}

fn group(block: &[u8], _index: usize) -> Group {
    Group::plain(word(block, 0), codes(&block[2..]).map(|code| code - 16))
}
