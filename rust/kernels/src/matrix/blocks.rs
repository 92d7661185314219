//! In which order panels meet tiles: blocks of both that stay in the L2 cache together, so that many rows are not read from farther away
//! for every panel, nor the weights for every tile. (bfloat16, which takes twice the arithmetic for its bytes, gains nothing by it.)

use super::activations::Tiles;
use std::ops::Range;

/// Bytes of weights of a block, and of rows: together half of the L2 cache of a core.
const WEIGHT_BYTES: usize = 192 << 10;
const ROW_BYTES: usize = 256 << 10;

/// Panels that meet tiles.
pub(super) struct Block {
    pub(super) panels: Range<usize>,
    pub(super) tiles: Range<usize>,
    /// Whether a block before it took the same panels from memory.
    pub(super) again: bool,
}

/// Blocks in which each panel meets each tile once, given the bytes of a panel and those of a row in a tile. (512 rows of Q4_0: 3 to 6 %,
/// of other formats up to 3.)
pub(super) fn blocks(
    panels: Range<usize>,
    panel_bytes: usize,
    tiles: Tiles,
    row_bytes: usize,
) -> impl Iterator<Item = Block> {
    let width = (WEIGHT_BYTES / panel_bytes.max(1)).max(1);
    let height = (ROW_BYTES / row_bytes.max(1) / tiles.width(0)).max(1);
    let count = tiles.count();
    panels.clone().step_by(width).flat_map(move |panel| {
        let panels = panel..panels.end.min(panel + width);
        (0..count).step_by(height).map(move |tile| Block {
            panels: panels.clone(),
            tiles: tile..count.min(tile + height),
            again: tile > 0,
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Isa;

    #[test]
    fn every_panel_meets_every_tile_once() {
        for (panels, panel_bytes, rows, row_bytes) in [
            (0..1, 0, 1, 0),
            (5..6, 1 << 20, 700, 1 << 20),
            (3..11, 70_000, 512, 8192),
            (8..24, 36_864, 129, 2048),
        ] {
            let tiles = Tiles::new(Isa::Scalar, rows);
            let all = blocks(panels.clone(), panel_bytes, tiles, row_bytes);
            let mut met: Vec<_> = all
                .flat_map(|block| {
                    block.panels.flat_map(move |panel| block.tiles.clone().map(move |tile| (panel, tile)))
                })
                .collect();
            met.sort_unstable();
            let expected: Vec<_> =
                panels.flat_map(|panel| (0..tiles.count()).map(move |tile| (panel, tile))).collect();
            assert_eq!(met, expected);
        }
    }

    #[test]
    fn panels_and_rows_of_a_block_fit_a_cache() {
        let tiles = Tiles::new(Isa::Scalar, 512);
        let all: Vec<_> = blocks(0..8, 40_000, tiles, 2048).collect();
        assert_eq!(all.len(), 2 * 4);
        for (index, block) in all.iter().enumerate() {
            assert_eq!(
                (block.panels.len(), block.tiles.len() * tiles.width(0), block.again),
                (4, 128, index % 4 > 0)
            );
        }
    }
}
