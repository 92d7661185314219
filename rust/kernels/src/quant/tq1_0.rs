//! TQ1_0: blocks of 256 weights of -1, 0 or 1 times a scale (half precision, at the end). A byte holds five weights as the
//! digits of a fraction in base 3, rounded up to 256ths: times 3 to the power `k`, what exceeds a byte cut off, its
//! leading digit is weight `k`. Weights are 32 apart in the first 32 bytes, 16 apart in the next 16, and 4 apart in the
//! last 4, which hold four each.

use super::Description;
use super::grouped::{Codes, GROUP, Group, Grouped, Scales, blocks, word};

pub(super) const DESCRIPTION: Description = Description::grouped("TQ1_0", &FORMAT);

static FORMAT: Grouped =
    Grouped { codes: Codes::Nibbles(8), scales: Scales::Half, factor: 1.0, blocks: blocks!(group, 256, 54) };

/// Of 3.
const POWERS: [u8; 5] = [1, 3, 9, 27, 81];

fn group(block: &[u8], index: usize) -> Group {
    let (bytes, powers): ([u8; GROUP], [u8; GROUP]) = match index {
        0..5 => (std::array::from_fn(|i| block[i]), [POWERS[index]; GROUP]),
        5 | 6 => {
            let first = 2 * (index - 5);
            (std::array::from_fn(|i| block[32 + i % 16]), std::array::from_fn(|i| POWERS[first + i / 16]))
        }
        _ => {
            let last = |i: usize| if i < 16 { (32 + i, 4) } else { (48 + i % 4, (i - 16) / 4) };
            (std::array::from_fn(|i| block[last(i).0]), std::array::from_fn(|i| POWERS[last(i).1]))
        }
    };
    let digit = |i: usize| ((u16::from(bytes[i].wrapping_mul(powers[i])) * 3) >> 8) as u8;
    Group::plain(word(block, 52), std::array::from_fn(|i| digit(i) + 7))
}
