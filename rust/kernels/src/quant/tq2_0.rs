//! TQ2_0: blocks of 256 weights `(code - 1) * scale`, codes of 2 bits laid as in Q2_K, then the scale (half precision).

use super::Description;
use super::grouped::{Codes, Group, Grouped, ONES, Scales, blocks, eights, quarters, word};

pub(super) const DESCRIPTION: Description = Description::grouped("TQ2_0", &FORMAT);

static FORMAT: Grouped =
    Grouped { codes: Codes::Nibbles(8), scales: Scales::Half, factor: 1.0, blocks: blocks!(group, 256, 66) };

fn group(block: &[u8], index: usize) -> Group {
    Group::plain(word(block, 64), eights(|i| quarters(block, index, i) + 7 * ONES))
}
