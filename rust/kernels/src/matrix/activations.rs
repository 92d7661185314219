//! Input rows as the kernels want them: *tiles* of a few rows, interleaved.
//!
//! With plain rows, thousands of bytes apart, the rows of a tile fall into the same few sets of the L1 cache and evict
//! each other; a tile is read front to back. How rows are cut into tiles changes no result: every sum is computed in
//! its own lane, in the order of the columns.

use super::GROUP;
use super::bfloat::Pair;
use super::buffer::Growing;
use super::tiled::{PairLine, RoundTile};
use crate::rows::SharedSlice;
use crate::simd::TILE_ROWS;
use crate::{Context, Isa, Rows};

mod quantize;
#[cfg(test)]
mod tests;

use quantize::QuantizeTile;
#[cfg(test)]
pub(crate) use quantize::round_ref;

/// How rows are cut: full tiles, then one of the least power of two of rows that holds the rest, or a full one; or, where few rows are
/// left, one that is wider than full. Rows that the last one has too many are zeros.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Tiles {
    rows: usize,
    full: usize,
    least: usize, // widths of the last tile
    most: usize,
    pairs: bool, // two groups of a row of bytes lie side by side, before the next row's
}

impl Tiles {
    /// Tiles for `rows` rows, of as many rows as the instruction set's registers can accumulate at once.
    pub(crate) fn new(isa: Isa, rows: usize) -> Tiles {
        let full = if isa >= Isa::Avx512 { 8 } else { 4 };
        Tiles { rows, full, least: 1, most: full, pairs: false }
    }

    /// Tiles of six rows for [`PairedLinear`](super::PairedLinear), so that registers hold the sums of both panels; the last one of four, six
    /// or eight. (A last tile of two rows would take as long as 20 rows.)
    pub(crate) fn for_two_panels(rows: usize) -> Tiles {
        Tiles { rows, full: 6, least: 4, most: 8, pairs: false }
    }

    /// Tiles for a matrix unit, all of 16 rows: of bytes, one group's after the other's, or `pairs` of them side by side, for a unit that
    /// adds both.
    pub(crate) fn full(rows: usize, pairs: bool) -> Tiles {
        Tiles { rows, full: TILE_ROWS, least: TILE_ROWS, most: TILE_ROWS, pairs }
    }

    /// Whether they are [`Tiles::full`].
    fn are_full(self) -> bool {
        self.full == TILE_ROWS
    }

    /// Tiles for a matrix unit, all of one width.
    pub(crate) fn alike(rows: usize) -> Tiles {
        let full = rows.next_power_of_two().min(TILE_ROWS);
        Tiles { rows, full, least: full, most: full, pairs: false }
    }

    /// Number of tiles.
    pub(crate) fn count(self) -> usize {
        let (whole, rest) = (self.rows / self.full, self.rows % self.full);
        if rest == 0 || whole > 0 && self.full + rest <= self.most { whole } else { whole + 1 }
    }

    /// First row of a tile.
    pub(crate) fn first(self, tile: usize) -> usize {
        tile * self.full
    }

    /// Rows of a tile that exist.
    pub(crate) fn rows(self, tile: usize) -> usize {
        if tile + 1 < self.count() { self.full } else { self.rows - self.first(tile) }
    }

    /// Rows of a tile, those of zeros included.
    pub(crate) fn width(self, tile: usize) -> usize {
        match self.rows(tile) {
            rows if rows > self.full => self.most,
            rows => rows.next_power_of_two().min(self.full).max(self.least),
        }
    }

    /// Where the bytes of a group and row lie in a tile of so many rows, in groups.
    #[inline(always)]
    fn at(self, width: usize, group: usize, row: usize) -> usize {
        match self.pairs {
            true => (group / 2 * width + row) * 2 + group % 2,
            false => group * width + row,
        }
    }

    /// Groups of bytes of a row: of an odd number side by side the last one has a companion of any bytes.
    fn byte_groups(self, groups: usize) -> usize {
        if self.pairs { groups.next_multiple_of(2) } else { groups }
    }

    /// Rows of all tiles, those of zeros included.
    fn padded_rows(self) -> usize {
        match self.count() {
            0 => 0,
            count => (count - 1) * self.full + self.width(count - 1),
        }
    }
}

/// Bytes between the tiles of a matrix unit. Tiles of a power of two of bytes would have their lines of the same columns in a few
/// sets of the L2 cache, more of them than these hold.
const GAP: usize = 5 << 10;

/// Tiles of values that stand for one column or a few: (tiles, depth, rows of the tile).
#[derive(Clone, Copy)]
pub(crate) struct RowTiles<'a, V> {
    /// How rows are cut.
    pub(crate) tiles: Tiles,
    /// Values of a row: those of whole groups.
    depth: usize,
    /// Values between tiles.
    gap: usize,
    values: &'a [V],
}

impl<'a, V> RowTiles<'a, V> {
    /// The values of a tile: (depth, width).
    #[inline(always)]
    pub(crate) fn tile(&self, tile: usize) -> &'a [V] {
        let start = self.tiles.first(tile) * self.depth + tile * self.gap;
        &self.values[start..][..self.tiles.width(tile) * self.depth]
    }
}

/// What a row is laid out as.
pub(super) trait Value: Copy + Default + Send + Sync {
    /// Columns that a value stands for.
    const COLUMNS: usize;
    /// The values of a row.
    fn of(row: &[f32]) -> impl Iterator<Item = Self>;
}

impl Value for f32 {
    const COLUMNS: usize = 1;
    fn of(row: &[f32]) -> impl Iterator<Item = f32> {
        row.iter().copied()
    }
}

/// What a layout of integers wants beside 8-bit activations.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Rounding {
    /// What sums of bytes are multiplied with: what must be added to the layout's bytes to make them integers.
    pub(crate) weight_offset: i32,
    /// Groups that share a scale of activations: as many as share one of weights, or what its scales are counted in; four in
    /// Q4_0. The last ones of a row may be fewer.
    pub(crate) span: usize,
    /// One sum for each half of a group, instead of one for both.
    pub(crate) halves: bool,
    /// Sums of the activations as well, if the layout has minima.
    pub(crate) totals: Totals,
}

/// How sums of activations are wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Totals {
    /// Not at all.
    None,
    /// Each by itself, to be multiplied with minima.
    Floats,
    /// Two parts in one number, 16 bits each and the first one in the low half, to be multiplied with the steps that minima are counted in.
    Pairs,
}

impl Rounding {
    /// Sums per group.
    fn parts(self) -> usize {
        if self.halves { 2 } else { 1 }
    }
}

/// Tiles of 8-bit integers.
#[derive(Clone, Copy)]
pub(crate) struct IntegerTiles<'a> {
    /// How rows are cut.
    pub(crate) tiles: Tiles,
    groups: usize,
    byte_groups: usize,
    spans: usize,
    gap: usize, // groups of bytes between tiles
    bytes: &'a [[u8; GROUP]],
    scales: &'a [f32],
    offsets: &'a [i32],
    totals: &'a [f32],
    total_pairs: &'a [i32],
    pub(crate) rounding: Rounding,
}

/// One of them. Everything is (groups, width of the tile); bytes of pairs are (pairs of groups, width, 2).
#[derive(Clone, Copy)]
pub(crate) struct IntegerTile<'a> {
    /// The values: an activation is its byte times its scale.
    pub(crate) bytes: &'a [[u8; GROUP]],
    /// Scales of every row and span of groups: (spans, width).
    pub(crate) scales: &'a [f32],
    /// Sums of the bytes of every row and group, times what the layout asked for: (groups, parts, width). Not for a matrix unit.
    pub(crate) offsets: &'a [i32],
    /// Sums of the bytes, if the layout asked for them, else nothing: (groups, parts, width).
    pub(crate) totals: &'a [f32],
    /// The same of pairs of parts: (pairs, width).
    pub(crate) total_pairs: &'a [i32],
}

impl<'a> IntegerTiles<'a> {
    /// A tile.
    #[inline(always)]
    pub(crate) fn tile(&self, tile: usize) -> IntegerTile<'a> {
        let (start, len) = (self.tiles.first(tile) * self.groups, self.tiles.width(tile) * self.groups);
        let parts = self.rounding.parts();
        let (mut totals, mut pairs) = (0..0, 0..0);
        match self.rounding.totals {
            Totals::None => (),
            Totals::Floats => totals = start * parts..(start + len) * parts,
            Totals::Pairs => pairs = start * parts / 2..(start + len) * parts / 2,
        }
        IntegerTile {
            bytes: &self.bytes[self.tiles.first(tile) * self.byte_groups + tile * self.gap..]
                [..self.tiles.width(tile) * self.byte_groups],
            scales: &self.scales[self.tiles.first(tile) * self.spans..]
                [..self.tiles.width(tile) * self.spans],
            offsets: &self.offsets[start * parts..][..len * parts],
            totals: &self.totals[totals],
            total_pairs: &self.total_pairs[pairs],
        }
    }
}

/// Memory for tiles.
#[derive(Debug, Default)]
pub(crate) struct Activations {
    values: Vec<f32>,
    pairs: Vec<Pair>,
    lines: Growing,
    bytes: Growing,
    scales: Vec<f32>,
    offsets: Vec<i32>,
    totals: Vec<f32>,
    total_pairs: Vec<i32>,
}

fn at_least<T: Copy + Default>(vector: &mut Vec<T>, len: usize) -> &mut [T] {
    if vector.len() < len {
        vector.resize(len, T::default());
    }
    &mut vector[..len]
}

impl Activations {
    /// The rows as tiles of `f32`.
    pub(crate) fn interleave(&mut self, context: &Context, input: Rows<'_>) -> RowTiles<'_, f32> {
        side_by_side(&mut self.values, context, input)
    }

    /// The rows as tiles of pairs of bfloat16.
    pub(crate) fn pair(&mut self, context: &Context, input: Rows<'_>) -> RowTiles<'_, Pair> {
        side_by_side(&mut self.pairs, context, input)
    }

    /// The rows as tiles of lines of bfloat16.
    pub(crate) fn pair_lines(&mut self, context: &Context, input: Rows<'_>) -> RowTiles<'_, PairLine> {
        let tiles = Tiles::alike(input.rows());
        let depth = input.width().div_ceil(GROUP);
        let gap = GAP / size_of::<PairLine>();
        let len = tiles.padded_rows() * depth + tiles.count() * gap;
        // SAFETY: a line is plain numbers, and the memory is aligned to cache lines.
        let all = unsafe { self.lines.at_least(len * size_of::<PairLine>()).align_to_mut::<PairLine>() }.1;
        let shared = SharedSlice::new(&mut *all);
        context.pool.run(tiles.count(), |tile| {
            let width = tiles.width(tile);
            // SAFETY: tiles are disjoint.
            let lines = unsafe { shared.part_mut(tiles.first(tile) * depth + tile * gap, width * depth) };
            let rows = tiles.first(tile)..tiles.first(tile) + tiles.rows(tile);
            context.isa.dispatch(RoundTile { input, rows, width, lines });
        });
        RowTiles { tiles, depth, gap, values: all }
    }

    /// The rows as tiles of 8-bit integers, with the sums that the layout wants.
    pub(crate) fn quantize(
        &mut self,
        context: &Context,
        input: Rows<'_>,
        rounding: Rounding,
        tiles: Tiles,
    ) -> IntegerTiles<'_> {
        let groups = input.width() / GROUP;
        let spans = groups.div_ceil(rounding.span);
        let (len, byte_groups) = (tiles.padded_rows() * groups, tiles.byte_groups(groups));
        let gap = if tiles.are_full() { GAP / GROUP } else { 0 };
        let all_bytes =
            self.bytes.at_least((tiles.padded_rows() * byte_groups + tiles.count() * gap) * GROUP);
        let all_bytes = all_bytes.as_chunks_mut().0;
        let bytes = SharedSlice::new(&mut *all_bytes);
        let scales = SharedSlice::new(at_least(&mut self.scales, tiles.padded_rows() * spans));
        let parts = rounding.parts();
        let offsets = SharedSlice::new(at_least(&mut self.offsets, len * parts));
        let (floats, halves) = match rounding.totals {
            Totals::None => (0, 0),
            Totals::Floats => (parts, 0),
            Totals::Pairs => (0, parts),
        };
        let totals = SharedSlice::new(at_least(&mut self.totals, len * floats));
        let total_pairs = SharedSlice::new(at_least(&mut self.total_pairs, len * halves / 2));
        context.pool.run(tiles.count(), |tile| {
            let (start, len) = (tiles.first(tile) * groups, tiles.width(tile) * groups);
            // SAFETY: tiles are disjoint.
            let bytes = unsafe {
                bytes.part_mut(tiles.first(tile) * byte_groups + tile * gap, tiles.width(tile) * byte_groups)
            };
            // SAFETY: the same.
            let scales = unsafe { scales.part_mut(tiles.first(tile) * spans, tiles.width(tile) * spans) };
            // SAFETY: the same.
            let (offsets, totals) = unsafe {
                (offsets.part_mut(start * parts, len * parts), totals.part_mut(start * floats, len * floats))
            };
            // SAFETY: the same.
            let total_pairs = unsafe { total_pairs.part_mut(start * halves / 2, len * halves / 2) };
            let kernel =
                QuantizeTile { input, tiles, tile, rounding, bytes, scales, offsets, totals, total_pairs };
            context.isa.dispatch(kernel);
        });
        let (scales, offsets, totals, total_pairs) =
            (&self.scales, &self.offsets, &self.totals, &self.total_pairs);
        IntegerTiles {
            tiles,
            groups,
            byte_groups,
            spans,
            gap,
            bytes: all_bytes,
            scales,
            offsets,
            totals,
            total_pairs,
            rounding,
        }
    }
}

/// Cuts rows into tiles; columns that are missing in the last group are zeros.
fn side_by_side<'a, V: Value>(memory: &'a mut Vec<V>, context: &Context, input: Rows<'_>) -> RowTiles<'a, V> {
    let tiles = Tiles::new(context.isa, input.rows());
    let depth = input.width().div_ceil(GROUP) * GROUP / V::COLUMNS;
    let shared = SharedSlice::new(at_least(memory, tiles.padded_rows() * depth));
    context.pool.run(tiles.count(), |tile| {
        let width = tiles.width(tile);
        // SAFETY: tiles are disjoint.
        let values = unsafe { shared.part_mut(tiles.first(tile) * depth, width * depth) };
        match width {
            1 => interleave::<V, 1>(input, tiles, tile, values),
            2 => interleave::<V, 2>(input, tiles, tile, values),
            4 => interleave::<V, 4>(input, tiles, tile, values),
            _ => interleave::<V, 8>(input, tiles, tile, values),
        }
    });
    RowTiles { tiles, depth, gap: 0, values: memory }
}

fn interleave<V: Value, const WIDTH: usize>(input: Rows<'_>, tiles: Tiles, tile: usize, values: &mut [V]) {
    let values = values.as_chunks_mut::<WIDTH>().0;
    for lane in 0..WIDTH {
        let row = if lane < tiles.rows(tile) { input.row(tiles.first(tile) + lane) } else { &[] };
        let mut slots = values.iter_mut();
        for (value, slot) in V::of(row).zip(slots.by_ref()) {
            slot[lane] = value;
        }
        slots.for_each(|slot| slot[lane] = V::default());
    }
}
