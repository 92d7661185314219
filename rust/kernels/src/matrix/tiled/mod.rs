//! Panels times many rows by a matrix unit.
//!
//! The order of the work: some panels and tiles of rows, whose sums stay in the L2 cache; blocks of columns, so that a block of
//! all those rows stays there too; a panel or two, so that their block stays in the L1 cache; tiles. Rows of the output lie
//! pages apart and push each other out of the caches, so they are written once, when sums are complete.
//!
//! Integers are summed exactly, over a group or a span of them, and added in order, so [`ByteTiles`] and [`SpanTiles`] have the bits of the
//! kernels that multiply few rows without the unit. [`BfloatTiles`] has its own order of additions inside a group, and multiplies few rows too.

mod bfloat;
mod block;
mod integer;
mod scaled;
mod spans;
mod stream;

pub(crate) use bfloat::{BfloatTiles, PairLine, RoundTile};
pub(crate) use integer::ByteTiles;
pub(crate) use spans::SpanTiles;

use super::activations::Tiles;
use super::{Layout, Output, PackedMatrix};
use crate::quant::Scales;
use crate::simd::{Simd, TILE_ROWS, TileSums};
use std::cell::Cell;
use std::ops::Range;

/// Panels and tiles whose sums are kept together: 512 KB. As many panels meet a block of input that the L2 cache has read.
pub(crate) const PANELS: usize = 16;
const TILES: usize = 32;

/// Rows of several tiles.
pub(crate) const MANY_ROWS: usize = 2 * TILE_ROWS;

impl Layout {
    /// From how many rows on a matrix unit multiplies integers faster than vectors do, with the same bits. Measured at the shapes of a 1B
    /// Llama: `examples/matrix_unit_speed.rs`.
    pub(crate) fn tiled_rows(self) -> usize {
        match self {
            Layout::Coded(format) => match format.scales {
                Scales::Shared => 9,
                Scales::Steps { .. } | Scales::StepsDrops { .. } => 12,
                Scales::Half | Scales::Brain | Scales::HalfMinimum => MANY_ROWS,
            },
            Layout::Int4 => 22,
            Layout::Int8 | Layout::F32 | Layout::F16 | Layout::Bf16 => MANY_ROWS,
        }
    }
}

thread_local! {
    /// Memory for sums.
    static SUMS: Cell<Vec<TileSums<f32>>> = const { Cell::new(Vec::new()) };
}

/// A kernel that multiplies blocks.
trait BlockKernel<S: Simd> {
    /// Panels at a time.
    const PANELS: usize;
    /// Tiles at a time; the last ones may be fewer.
    const TILES: usize;
    /// Groups of columns in a block.
    fn groups(&self) -> usize;
    /// Prepares a block of a panel or a few.
    fn begin(&mut self, simd: S, block: &Block);
    /// Adds the products of that block with tiles to their sums, which lie as `at` says.
    fn multiply(&mut self, simd: S, block: &Block, tiles: Range<usize>, sums: &mut [TileSums<f32>]);
    /// What a panel's complete sum is multiplied with, if anything.
    #[inline(always)]
    fn finish(&self, _simd: S, _panel: usize, sum: S::F32) -> S::F32 {
        sum
    }
    /// Where, among the sums of `tiles` tiles, those of a panel with a tile are.
    fn at(panel: usize, tile: usize, tiles: usize) -> usize;
}

/// Where sums of a panel with a tile lie among those of `tiles` tiles: (pairs of panels, pairs of tiles, panels, tiles), where the
/// last pair of tiles may be one.
#[inline(always)]
fn by_pairs(panel: usize, tile: usize, tiles: usize) -> usize {
    let (pair, side) = (tile / 2 * 2, tiles.min(tile / 2 * 2 + 2) - tile / 2 * 2);
    panel / 2 * 2 * tiles + 2 * pair + panel % 2 * side + tile - pair
}

/// Some groups of some panels.
#[derive(Clone)]
struct Block {
    panels: Range<usize>,
    groups: Range<usize>,
}

/// What is multiplied, and where results go.
struct Work<'a> {
    weight: &'a PackedMatrix,
    tiles: Tiles,
    output: Output<'a>,
    panels: Range<usize>,
}

/// Parts of a range, each as long as said but for the last.
#[inline(always)]
fn parts(range: Range<usize>, len: usize) -> impl Iterator<Item = Range<usize>> {
    let end = range.end;
    range.step_by(len).map(move |start| start..end.min(start + len))
}

impl Work<'_> {
    /// Multiplies everything.
    #[inline(always)]
    fn run<S: Simd, K: BlockKernel<S>>(&self, simd: S, mut kernel: K) {
        let mut sums = SUMS.take();
        for panels in parts(self.panels.clone(), PANELS) {
            for tiles in parts(0..self.tiles.count(), TILES) {
                sums.clear();
                sums.resize(panels.len().next_multiple_of(K::PANELS) * tiles.len(), TileSums::default());
                self.multiply(simd, &mut kernel, &panels, &tiles, &mut sums);
                self.finish(simd, &kernel, &panels, &tiles, &sums);
            }
        }
        SUMS.set(sums);
    }

    /// The sums of some panels with some tiles.
    #[inline(always)]
    fn multiply<S: Simd, K: BlockKernel<S>>(
        &self,
        simd: S,
        kernel: &mut K,
        panels: &Range<usize>,
        tiles: &Range<usize>,
        sums: &mut [TileSums<f32>],
    ) {
        let turns = tiles.len().div_ceil(K::TILES);
        for groups in parts(0..self.weight.groups(), kernel.groups().max(1)) {
            for few in parts(panels.clone(), K::PANELS) {
                let at = K::at(few.start - panels.start, 0, tiles.len());
                let block = Block { panels: few, groups: groups.clone() };
                let next = self.following(&block, panels);
                kernel.begin(simd, &block);
                for (turn, some) in parts(tiles.clone(), K::TILES).enumerate() {
                    let own = K::at(0, turn * K::TILES, tiles.len());
                    kernel.multiply(simd, &block, some, &mut sums[at + own..]);
                    self.fetch(simd, &next, (turn, turns));
                }
            }
        }
    }

    /// The block after this one: of the next panels, or of the first ones with the next groups.
    #[inline(always)]
    fn following(&self, block: &Block, panels: &Range<usize>) -> Block {
        let (few, groups) = (&block.panels, &block.groups);
        match few.end < panels.end {
            true => Block { panels: few.end..panels.end.min(few.end + few.len()), groups: groups.clone() },
            false => Block {
                panels: panels.start..panels.end.min(panels.start + few.len()),
                groups: groups.end..self.weight.groups().min(groups.end + groups.len()),
            },
        }
    }

    /// Asks for a share of a block, the `share.0`th of `share.1`: other work goes on meanwhile.
    #[inline(always)]
    fn fetch<S: Simd>(&self, simd: S, block: &Block, share: (usize, usize)) {
        for panel in block.panels.clone() {
            let lines = self.block(panel, &block.groups).as_chunks::<64>().0;
            for line in &lines[lines.len() * share.0 / share.1..lines.len() * (share.0 + 1) / share.1] {
                simd.prefetch_later(line.as_ptr());
            }
        }
    }

    /// The weights of some groups of a panel.
    #[inline(always)]
    fn block(&self, panel: usize, groups: &Range<usize>) -> &[u8] {
        let bytes = self.weight.layout().group_bytes();
        &self.weight.weights(panel..panel + 1)[groups.start * bytes..groups.end * bytes]
    }

    /// Writes complete sums, row by row.
    #[inline(always)]
    fn finish<S: Simd, K: BlockKernel<S>>(
        &self,
        simd: S,
        kernel: &K,
        panels: &Range<usize>,
        tiles: &Range<usize>,
        sums: &[TileSums<f32>],
    ) {
        for tile in tiles.clone() {
            for row in 0..self.tiles.rows(tile) {
                for panel in panels.clone() {
                    let at = K::at(panel - panels.start, tile - tiles.start, tiles.len());
                    let sum = kernel.finish(simd, panel, simd.load(&sums[at].0[row]));
                    self.output.store_row(simd, panel, self.tiles.first(tile) + row, sum, self.output.bias);
                }
            }
        }
    }
}
