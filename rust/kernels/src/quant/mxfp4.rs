//! MXFP4: blocks of 32 weights, each a 4-bit float (a sign, two bits of exponent, one of mantissa) times a power of two in
//! one byte; nibbles as in Q4_0. Kept as twice the float, an integer, times half the power.

use super::Description;
use super::grouped::{Codes, Group, Grouped, Scales, blocks, nibbles};

pub(super) const DESCRIPTION: Description = Description::grouped("MXFP4", &FORMAT);

static FORMAT: Grouped = Grouped {
    codes: Codes::Book(&VALUES),
    scales: Scales::Brain,
    factor: 1.0,
    blocks: blocks!(group, 32, 17),
};

/// Twice 0, 0.5, 1, 1.5, 2, 3, 4, 6, and the same negative (minus zero is 0 here).
static VALUES: [i8; 16] = [0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12];

fn group(block: &[u8], _index: usize) -> Group {
    // 2^(exponent - 128) as bfloat16; the smallest two are subnormal.
    let scale = match block[0] {
        small @ 0..2 => 0x20 << small,
        exponent => (u16::from(exponent) - 1) << 7,
    };
    Group::plain(scale, nibbles(&block[1..]))
}
