//! TQ2_0: blocks of 256 weights `(code - 1) * scale`, codes of 2 bits laid as in Q2_K, then the scale (half precision).

use super::Description;
use super::grouped::{Codes, Group, Grouped, Scales, quarters, word};

pub(super) const DESCRIPTION: Description = Description::grouped("TQ2_0", 256, 66, &FORMAT);

static FORMAT: Grouped = Grouped { codes: Codes::Nibbles(8), scales: Scales::Half, factor: 1.0, group };

fn group(block: &[u8], index: usize) -> Group {
    Group::plain(word(block, 64), quarters(block, index).map(|code| code as i8 - 1))
}
