//! Panels of bfloat16 times activations rounded to bfloat16.

use super::super::{GROUP, Output, PackedMatrix, RowTiles};
use super::{Block, BlockKernel, Work, by_pairs};
use crate::Rows;
use crate::simd::{Kernel, LANES, MatrixUnit, Simd, TileShape, TileSums};
use std::ops::Range;

/// Groups in a block when several tiles use it: 16 KB of two panels, and as much of two tiles of input.
const BLOCK: usize = 8;

/// 32 columns of a row as bfloat16: a line of a tile.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C, align(64))]
pub(crate) struct PairLine([u32; LANES]);

/// The lines of a tile of rows: (groups, width).
pub(crate) struct RoundTile<'a> {
    /// All rows.
    pub(crate) input: Rows<'a>,
    /// Those of the tile.
    pub(crate) rows: Range<usize>,
    /// Rows of the tile, those of zeros included.
    pub(crate) width: usize,
    /// Where lines go.
    pub(crate) lines: &'a mut [PairLine],
}

impl Kernel for RoundTile<'_> {
    type Output = ();
    const MULTIPLIES_BYTES: bool = false;

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let rows = self.rows.len();
        for (lane, row) in self.rows.enumerate() {
            let (groups, rest) = self.input.row(row).as_chunks::<GROUP>();
            let mut lines = self.lines.iter_mut().skip(lane).step_by(self.width);
            for (values, line) in groups.iter().zip(lines.by_ref()) {
                *line = round_group(simd, values);
            }
            if let Some(line) = lines.next() {
                let mut values = [0.0; GROUP];
                values[..rest.len()].copy_from_slice(rest);
                *line = round_group(simd, &values);
            }
        }
        for lane in rows..self.width {
            self.lines.iter_mut().skip(lane).step_by(self.width).for_each(|line| *line = PairLine::default());
        }
    }
}

#[inline(always)]
fn round_group<S: Simd>(simd: S, values: &[f32; GROUP]) -> PairLine {
    let mut halves = [[0; LANES]; 2];
    for (half, values) in halves.iter_mut().zip(values.as_chunks::<LANES>().0) {
        simd.store_bf16(simd.load(values), half);
    }
    let mut line = PairLine::default();
    for (word, pair) in line.0.iter_mut().zip(halves.as_flattened().as_chunks::<2>().0) {
        *word = u32::from(pair[0]) | u32::from(pair[1]) << 16;
    }
    line
}

/// Some panels times all tiles.
pub(crate) struct BfloatTiles<'a> {
    /// The weights, in the layout Bf16.
    pub(crate) weight: &'a PackedMatrix,
    /// The input rows.
    pub(crate) input: RowTiles<'a, PairLine>,
    /// Where results go.
    pub(crate) output: Output<'a>,
    /// Which panels.
    pub(crate) panels: Range<usize>,
}

impl Kernel for BfloatTiles<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let (weight, input) = (self.weight, self.input);
        let unit = MatrixUnit::new(simd, TileShape { rows: input.tiles.width(0), bytes: 2 * GROUP });
        let work = Work { weight, tiles: input.tiles, output: self.output, panels: self.panels };
        work.run(simd, Multiply { unit, weight, input });
    }
}

/// The kernel: two panels by two tiles, or by one.
struct Multiply<'a, S: Simd> {
    unit: MatrixUnit<S>,
    weight: &'a PackedMatrix,
    input: RowTiles<'a, PairLine>,
}

impl<S: Simd> BlockKernel<S> for Multiply<'_, S> {
    const PANELS: usize = 2;
    const TILES: usize = 2;

    #[inline(always)]
    fn groups(&self) -> usize {
        // The kernel of one tile streams weights.
        if self.input.tiles.count() == 1 { self.weight.groups() } else { BLOCK }
    }

    #[inline(always)]
    fn begin(&mut self, _simd: S, _block: &Block) {}

    #[inline(always)]
    fn multiply(&mut self, _simd: S, block: &Block, tiles: Range<usize>, sums: &mut [TileSums<f32>]) {
        match tiles.len() {
            1 => self.part(block, [tiles.start], sums),
            _ => self.part(block, [tiles.start, tiles.start + 1], sums),
        }
    }

    #[inline(always)]
    fn at(panel: usize, tile: usize, tiles: usize) -> usize {
        by_pairs(panel, tile, tiles)
    }
}

impl<S: Simd> Multiply<'_, S> {
    /// A block of two panels by `T` tiles. A panel alone is multiplied twice.
    #[inline(always)]
    fn part<const T: usize>(&self, block: &Block, tiles: [usize; T], sums: &mut [TileSums<f32>]) {
        let (bytes, groups) = (self.weight.layout().group_bytes(), &block.groups);
        let panel =
            |panel: usize| &self.weight.weights(panel..panel + 1)[groups.start * bytes..groups.end * bytes];
        let weights = [panel(block.panels.start), panel(block.panels.end - 1)];
        let width = self.input.tiles.width(0);
        let input = tiles.map(|tile| words(&self.input.tile(tile)[groups.start * width..]));
        self.unit.bf16::<T>(input, weights, groups.len(), sums);
    }
}

/// The lines' words.
fn words(lines: &[PairLine]) -> &[[u32; LANES]] {
    // SAFETY: a line is these words and nothing else.
    unsafe { lines.align_to::<[u32; LANES]>() }.1
}
