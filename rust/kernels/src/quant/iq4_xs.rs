//! IQ4_XS: blocks of 256 weights with the integers of IQ4_NL: a scale (half precision), and for each 32 weights a 6-bit
//! scale offset by 32 in units of it: two high bits each in 2 bytes, then low nibbles in 4 bytes.

use super::Description;
use super::grouped::{Codes, Group, Grouped, Scales, blocks, nibbles, word};
use super::iq4_nl::VALUES;

pub(super) const DESCRIPTION: Description = Description::grouped("IQ4_XS", &FORMAT);

static FORMAT: Grouped = Grouped {
    codes: Codes::Book(&VALUES),
    scales: Scales::Steps { halves: false },
    factor: 1.0,
    blocks: blocks!(group, 256, 136),
};

fn group(block: &[u8], index: usize) -> Group {
    let low = block[4 + index / 2] >> (4 * (index % 2)) & 15;
    let high = (word(block, 2) >> (2 * index) & 3) as u8;
    Group::scaled(word(block, 0), [(low | high << 4) as i8 - 32; 2], nibbles(&block[8 + 16 * index..]))
}
