//! Where results go: a panel's 16 columns of some output rows.

use super::activations::Tiles;
use crate::simd::{LANES, Simd};
use crate::{RowsMut, SharedRows};

/// The output of a multiplication, (input rows, weight rows). Tasks have different panels, so different columns.
#[derive(Clone, Copy)]
pub(crate) struct Output<'a> {
    /// All of it.
    pub(crate) rows: SharedRows<'a>,
    /// The panel whose columns come first in these rows.
    pub(crate) first: usize,
    /// Added to every row.
    pub(crate) bias: Option<&'a [f32]>,
}

impl<'a> Output<'a> {
    /// All columns of some rows.
    pub(crate) fn whole(rows: RowsMut<'a>, bias: Option<&'a [f32]>) -> Output<'a> {
        Output { rows: rows.share(), first: 0, bias }
    }

    /// A panel's part of a row.
    #[inline(always)]
    #[allow(clippy::mut_from_ref)] // shared between tasks, see below
    fn part(&self, panel: usize, row: usize) -> &mut [f32] {
        let column = (panel - self.first) * LANES;
        let width = LANES.min(self.rows.width() - column);
        // SAFETY: no other task has this panel, and this one holds one such slice at a time.
        unsafe { self.rows.part_mut(row, column, width) }
    }

    /// Sums that `store` left with `last` false.
    #[inline(always)]
    pub(super) fn load<S: Simd, const T: usize>(
        &self,
        simd: S,
        panel: usize,
        tiles: Tiles,
        tile: usize,
    ) -> [S::F32; T] {
        let mut sums = [simd.splat(0.0); T];
        for (t, sum) in sums.iter_mut().enumerate().take(tiles.rows(tile)) {
            *sum = load_some(simd, self.part(panel, tiles.first(tile) + t));
        }
        sums
    }

    /// The sums of a panel with the rows of a tile; `last` adds the bias.
    #[inline(always)]
    pub(super) fn store<S: Simd, const T: usize>(
        &self,
        simd: S,
        panel: usize,
        tiles: Tiles,
        tile: usize,
        sums: &[S::F32; T],
        last: bool,
    ) {
        let (bias, first, rows) = (self.bias.filter(|_| last), tiles.first(tile), tiles.rows(tile));
        if rows == T {
            // The loop of a full tile has no branches.
            for (t, &sum) in sums.iter().enumerate() {
                self.store_row(simd, panel, first + t, sum, bias);
            }
        } else {
            for (t, &sum) in sums.iter().enumerate().take(rows) {
                self.store_row(simd, panel, first + t, sum, bias);
            }
        }
    }

    /// The sums of a panel with a row, plus the panel's part of `bias`.
    #[inline(always)]
    pub(super) fn store_row<S: Simd>(
        &self,
        simd: S,
        panel: usize,
        row: usize,
        sum: S::F32,
        bias: Option<&[f32]>,
    ) {
        let sum = match bias {
            Some(bias) => simd.add(sum, load_some(simd, &bias[panel * LANES..])),
            None => sum,
        };
        let out = self.part(panel, row);
        match out.first_chunk_mut() {
            Some(out) => simd.store(sum, out),
            None => simd.store_partial(sum, out),
        }
    }
}

/// The first 16 values, or what there is of them and zeros.
#[inline(always)]
fn load_some<S: Simd>(simd: S, values: &[f32]) -> S::F32 {
    match values.first_chunk() {
        Some(values) => simd.load(values),
        None => simd.load_partial(values),
    }
}
