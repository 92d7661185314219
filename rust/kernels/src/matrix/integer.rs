//! Integer panels times 8-bit activations: exact sums in `i32` inside a group of 32 columns, groups added in `f32`, in
//! the order of the columns, over a span of groups that share a scale of activations, and these likewise.

use super::activations::IntegerTile;
use super::ahead::{AHEAD, NextPanel};
use super::blocks::{Block, blocks};
use super::{GROUP, IntegerTiles, Layout, Output, PackedMatrix};
use crate::simd::{Kernel, LANES, Simd};
use std::ops::Range;

/// Groups of Int4 that share a scale of activations: an eighth less to add, and errors far below those of weights of 4 bits
/// (`benches/quality.py`).
pub(super) const INT4_SPAN: usize = 4;

/// A layout's exact sums.
trait IntegerLayout<const BYTES: usize>: Copy {
    /// Groups that share a scale of activations.
    const SPAN: usize;
    /// The sums of products of a group with `T` rows.
    fn group<S: Simd, const T: usize>(
        simd: S,
        weights: &[u8; BYTES],
        rows: &[[u8; GROUP]; T],
        offsets: &[i32; T],
    ) -> [S::I32; T];
}

#[derive(Clone, Copy)]
struct Int8;
#[derive(Clone, Copy)]
struct Int4;

impl IntegerLayout<512> for Int8 {
    const SPAN: usize = 1;
    #[inline(always)]
    fn group<S: Simd, const T: usize>(
        simd: S,
        weights: &[u8; 512],
        rows: &[[u8; GROUP]; T],
        offsets: &[i32; T],
    ) -> [S::I32; T] {
        simd.dot_bytes(weights, rows, offsets)
    }
}

impl IntegerLayout<256> for Int4 {
    const SPAN: usize = INT4_SPAN;
    #[inline(always)]
    fn group<S: Simd, const T: usize>(
        simd: S,
        weights: &[u8; 256],
        rows: &[[u8; GROUP]; T],
        offsets: &[i32; T],
    ) -> [S::I32; T] {
        simd.dot_nibbles(weights, rows, offsets)
    }
}

/// Some panels times all tiles.
pub(crate) struct IntegerLinear<'a> {
    /// The weights, in an integer layout.
    pub(crate) weight: &'a PackedMatrix,
    /// The input rows.
    pub(crate) input: IntegerTiles<'a>,
    /// Where results go.
    pub(crate) output: Output<'a>,
    /// Which panels.
    pub(crate) panels: Range<usize>,
}

impl Kernel for IntegerLinear<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        match self.weight.layout() {
            Layout::Int8 => self.panels::<S, Int8, 512>(simd),
            Layout::Int4 => self.panels::<S, Int4, 256>(simd),
            Layout::F32 | Layout::F16 | Layout::Bf16 | Layout::Coded(_) => {
                unreachable!("a layout of another kernel")
            }
        }
    }
}

impl IntegerLinear<'_> {
    #[inline(always)]
    fn panels<S: Simd, L: IntegerLayout<BYTES>, const BYTES: usize>(&self, simd: S) {
        let (panel_bytes, row_bytes) = (self.weight.groups() * BYTES, self.weight.columns());
        for Block { panels, tiles, again } in
            blocks(self.panels.clone(), panel_bytes, self.input.tiles, row_bytes)
        {
            let (first, count) = (tiles.start, if again { 1 } else { tiles.len() });
            for panel in panels {
                for tile in tiles.clone() {
                    let turn = (tile - first, count);
                    match self.input.tiles.width(tile) {
                        1 => self.tile::<S, L, BYTES, 1, false, true>(simd, panel, tile, turn),
                        2 => self.tile::<S, L, BYTES, 2, false, true>(simd, panel, tile, turn),
                        4 => self.tile::<S, L, BYTES, 4, false, true>(simd, panel, tile, turn),
                        _ if again => self.tile::<S, L, BYTES, 8, false, false>(simd, panel, tile, turn),
                        _ if count == 1 => self.tile::<S, L, BYTES, 8, false, true>(simd, panel, tile, turn),
                        _ if tile > first => {
                            self.tile::<S, L, BYTES, 8, true, false>(simd, panel, tile, turn);
                        }
                        _ => self.tile::<S, L, BYTES, 8, true, true>(simd, panel, tile, turn),
                    }
                }
            }
        }
    }

    #[inline(always)]
    fn tile<
        S: Simd,
        L: IntegerLayout<BYTES>,
        const BYTES: usize,
        const T: usize,
        const SEVERAL: bool,
        const FETCH: bool,
    >(
        &self,
        simd: S,
        panel: usize,
        tile: usize,
        (turn, turns): (usize, usize),
    ) {
        let weights = self.weight.weights(panel..panel + 1);
        let scales = self.weight.scales(panel..panel + 1);
        let input = self.input.tile(tile);
        let next = NextPanel::<SEVERAL>::new(weights, scales.len().div_ceil(L::SPAN), turn, turns);
        let sums = match const { L::SPAN } {
            1 => multiply::<S, L, BYTES, T, SEVERAL, FETCH>(simd, weights, scales, input, next),
            INT4_SPAN => multiply_spans::<S, L, BYTES, T, SEVERAL, FETCH>(simd, weights, scales, input, next),
            _ => unreachable!("no layout has such spans"),
        };
        self.output.store(simd, panel, self.input.tiles, tile, &sums, true);
    }
}

/// The sums of a panel with `T` rows, of which every group has a scale. `weights` is (groups, `BYTES`).
#[inline(always)]
fn multiply<
    S: Simd,
    L: IntegerLayout<BYTES>,
    const BYTES: usize,
    const T: usize,
    const SEVERAL: bool,
    const FETCH: bool,
>(
    simd: S,
    weights: &[u8],
    scales: &[[u16; LANES]],
    tile: IntegerTile<'_>,
    next: NextPanel<SEVERAL>,
) -> [S::F32; T] {
    let mut sums = [simd.splat(0.0); T];
    let rows = tile.bytes.as_chunks::<T>().0.iter().zip(tile.offsets.as_chunks::<T>().0);
    let rows = rows.zip(tile.scales.as_chunks::<T>().0);
    let weights = weights.as_chunks::<BYTES>().0.iter().zip(scales);
    for (turn, ((weights, scale), ((bytes, offsets), row_scales))) in weights.zip(rows).enumerate() {
        next.fetch(simd, turn);
        let (exact, scale) = group::<S, L, BYTES, T, FETCH>(simd, weights, scale, bytes, offsets);
        for t in 0..T {
            let inner = simd.mul(simd.to_f32(exact[t]), scale);
            sums[t] = simd.mul_add(inner, simd.splat(row_scales[t]), sums[t]);
        }
    }
    sums
}

/// The same where the groups of a span, [`INT4_SPAN`], share the rows' scales. (With spans of one group it costs 3 to 5 % more than [`multiply`].)
#[inline(always)]
fn multiply_spans<
    S: Simd,
    L: IntegerLayout<BYTES>,
    const BYTES: usize,
    const T: usize,
    const SEVERAL: bool,
    const FETCH: bool,
>(
    simd: S,
    weights: &[u8],
    scales: &[[u16; LANES]],
    tile: IntegerTile<'_>,
    next: NextPanel<SEVERAL>,
) -> [S::F32; T] {
    let mut sums = [simd.splat(0.0); T];
    let (weights, rest) = weights.as_chunks::<BYTES>().0.as_chunks::<INT4_SPAN>();
    let (scales, rest_scales) = scales.as_chunks::<INT4_SPAN>();
    let (bytes, rest_bytes) = tile.bytes.as_chunks::<T>().0.as_chunks::<INT4_SPAN>();
    let (offsets, rest_offsets) = tile.offsets.as_chunks::<T>().0.as_chunks::<INT4_SPAN>();
    let row_scales = tile.scales.as_chunks::<T>().0;
    let spans = weights.iter().zip(scales).zip(bytes).zip(offsets).zip(row_scales);
    for (turn, ((((weights, scales), bytes), offsets), row_scales)) in spans.enumerate() {
        next.fetch(simd, turn);
        add_span::<S, L, BYTES, T, FETCH>(simd, weights, scales, bytes, offsets, row_scales, &mut sums);
    }
    if let Some(row_scales) = row_scales.get(weights.len()) {
        add_span::<S, L, BYTES, T, FETCH>(
            simd,
            rest,
            rest_scales,
            rest_bytes,
            rest_offsets,
            row_scales,
            &mut sums,
        );
    }
    sums
}

/// Adds the sums of a span of groups.
#[inline(always)]
fn add_span<S: Simd, L: IntegerLayout<BYTES>, const BYTES: usize, const T: usize, const FETCH: bool>(
    simd: S,
    weights: &[[u8; BYTES]],
    scales: &[[u16; LANES]],
    rows: &[[[u8; GROUP]; T]],
    offsets: &[[i32; T]],
    row_scales: &[f32; T],
    sums: &mut [S::F32; T],
) {
    let mut inner = [simd.splat(0.0); T];
    for (((weights, scale), rows), offsets) in weights.iter().zip(scales).zip(rows).zip(offsets) {
        let (exact, scale) = group::<S, L, BYTES, T, FETCH>(simd, weights, scale, rows, offsets);
        for t in 0..T {
            inner[t] = simd.mul_add(simd.to_f32(exact[t]), scale, inner[t]);
        }
    }
    for t in 0..T {
        sums[t] = simd.mul_add(inner[t], simd.splat(row_scales[t]), sums[t]);
    }
}

/// The exact sums of a group with `T` rows, and its scales.
#[inline(always)]
fn group<S: Simd, L: IntegerLayout<BYTES>, const BYTES: usize, const T: usize, const FETCH: bool>(
    simd: S,
    weights: &[u8; BYTES],
    scale: &[u16; LANES],
    rows: &[[u8; GROUP]; T],
    offsets: &[i32; T],
) -> ([S::I32; T], S::F32) {
    if FETCH {
        for line in 0..BYTES / 64 {
            simd.prefetch(weights.as_ptr().wrapping_add(AHEAD + line * 64));
        }
        simd.prefetch(std::ptr::from_ref(scale).wrapping_add(AHEAD / BYTES).cast());
    }
    let exact = L::group(simd, weights, rows, offsets);
    (exact, simd.load_f16(scale))
}
