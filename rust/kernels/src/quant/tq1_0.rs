//! TQ1_0: blocks of 256 weights of -1, 0 or 1 times a scale (half precision, at the end). A byte holds five weights as the
//! digits of a fraction in base 3, rounded up to 256ths: times 3 to the power `k`, what exceeds a byte cut off, its
//! leading digit is weight `k`. Weights are 32 apart in the first 32 bytes, 16 apart in the next 16, and 4 apart in the
//! last 4, which hold four each.

use super::Description;
use super::grouped::{Codes, GROUP, Group, Grouped, Scales, word};

pub(super) const DESCRIPTION: Description = Description::grouped("TQ1_0", 256, 54, &FORMAT);

static FORMAT: Grouped = Grouped { codes: Codes::Nibbles(8), scales: Scales::Half, factor: 1.0, group };

fn group(block: &[u8], index: usize) -> Group {
    let digit = |at: usize| {
        let (byte, power) = match at {
            0..160 => (at % 32, at / 32),
            160..240 => (32 + at % 16, (at - 160) / 16),
            _ => (48 + at % 4, (at - 240) / 4),
        };
        let fraction = (0..power).fold(block[byte], |fraction, _| fraction.wrapping_mul(3));
        ((u16::from(fraction) * 3) >> 8) as i8 - 1
    };
    Group::plain(word(block, 52), std::array::from_fn(|i| digit(index * GROUP + i)))
}
