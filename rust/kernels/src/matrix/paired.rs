//! Int8 panels, two at a time, times tiles of many rows. Where a processor multiplies bytes as fast as it loads them (Zen 5 has two of
//! each in a cycle), one panel waits for its activations: with two, each is loaded once for both. Sums are those of `integer`, bit for bit.
//! (512 rows of Q8_0 on Zen 5: 10 to 12 % more, a whole prompt 4 to 7 %. Up to 16 rows wait for memory, which gives one stream of weights more
//! than two; and panels of Int4, whose weights are a quarter of the loads, gained nothing in whole prompts. Alone in a loop of assembly,
//! from the nearest cache, six rows and two of those take 58 cycles a group where eight rows and one take 44, 0.91 and 0.81 TOP/s of the
//! core's 1.10; but as a kernel, spans of groups in assembly too, 0.84 and 0.83 with 48 rows, and less than one with 16 rows from memory.)

use super::activations::IntegerTile;
use super::ahead::{AHEAD, NextPanel};
use super::blocks::{Block, blocks};
use super::{IntegerTiles, Output, PackedMatrix};
use crate::simd::{Kernel, LANES, Simd};
use std::ops::Range;

/// Bytes of a group of a panel.
const BYTES: usize = 512;

/// From how many rows on.
pub(crate) const PAIRED_ROWS: usize = 17;

/// Some panels, all of Int8, times all tiles, which are [`Tiles::for_two_panels`](super::Tiles::for_two_panels).
pub(crate) struct PairedLinear<'a> {
    /// The weights.
    pub(crate) weight: &'a PackedMatrix,
    /// The input rows.
    pub(crate) input: IntegerTiles<'a>,
    /// Where results go.
    pub(crate) output: Output<'a>,
    /// Which panels.
    pub(crate) panels: Range<usize>,
}

impl Kernel for PairedLinear<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let (panel_bytes, row_bytes) = (self.weight.groups() * BYTES, self.weight.columns());
        // What a block calls panels are pairs of them here.
        let pairs = 0..self.panels.len().div_ceil(2);
        for Block { panels: pairs, tiles, again } in
            blocks(pairs, 2 * panel_bytes, self.input.tiles, row_bytes)
        {
            for pair in pairs {
                let first = self.panels.start + 2 * pair;
                let panels = first..self.panels.end.min(first + 2);
                for tile in tiles.clone() {
                    let turns = if again { 0 } else { self.weight.groups() };
                    let weights = self.weight.weights(panels.clone());
                    let next = NextPanel::new(weights, turns, tile - tiles.start, tiles.len());
                    let panels = panels.clone();
                    match self.input.tiles.width(tile) {
                        4 => simd.apart(Meeting::<4, 4, true> { linear: &self, panels, tile, next }),
                        6 if again || tile > tiles.start => {
                            simd.apart(Meeting::<6, 6, false> { linear: &self, panels, tile, next })
                        }
                        6 => simd.apart(Meeting::<6, 6, true> { linear: &self, panels, tile, next }),
                        8 => simd.apart(Meeting::<8, 4, true> { linear: &self, panels, tile, next }),
                        _ => unreachable!("a tile of other rows"),
                    }
                }
            }
        }
    }
}

/// Two panels, of which the second may be missing, and a tile of `T` rows, `PART` of them at a time; with `FETCH` memory is asked for what
/// comes next.
struct Meeting<'a, const T: usize, const PART: usize, const FETCH: bool> {
    linear: &'a PairedLinear<'a>,
    panels: Range<usize>,
    tile: usize,
    next: NextPanel<true>,
}

impl<const T: usize, const PART: usize, const FETCH: bool> Kernel for Meeting<'_, T, PART, FETCH> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Meeting { linear, panels, tile, next } = self;
        let weights = Panels::new(linear.weight, panels.clone());
        let sums = multiply::<S, T, PART, FETCH>(simd, weights, linear.input.tile(tile), next);
        for (panel, sums) in panels.zip(&sums) {
            linear.output.store(simd, panel, linear.input.tiles, tile, sums, true);
        }
    }
}

/// Weights and scales of both.
#[derive(Clone, Copy)]
struct Panels<'a> {
    groups: usize,
    weights: [&'a [[u8; BYTES]]; 2],
    scales: [&'a [[u16; LANES]]; 2],
}

impl<'a> Panels<'a> {
    #[inline(always)]
    fn new(weight: &'a PackedMatrix, panels: Range<usize>) -> Self {
        let (mut weights, mut scales) = ([&[] as &[[u8; BYTES]]; 2], [&[] as &[[u16; LANES]]; 2]);
        for p in 0..2 {
            let panel = panels.start + p.min(panels.len() - 1);
            weights[p] = weight.weights(panel..panel + 1).as_chunks().0;
            scales[p] = &weight.scales(panel)[..weights[p].len()];
        }
        Panels { groups: weights[0].len(), weights, scales }
    }

    /// A group's weights and scales; with `FETCH` later ones are asked for. The end of a panel is followed by the next two.
    #[inline(always)]
    fn group<S: Simd, const FETCH: bool>(
        &self,
        simd: S,
        group: usize,
    ) -> ([&'a [u8; BYTES]; 2], [S::F32; 2]) {
        let (mut weights, mut scales) = ([&self.weights[0][group]; 2], [simd.splat(0.0); 2]);
        let skip = if (self.groups - group) * BYTES <= AHEAD { self.groups } else { 0 };
        for p in 0..2 {
            weights[p] = &self.weights[p][group];
            let scale = &self.scales[p][group];
            if FETCH {
                let ahead = weights[p].as_ptr().wrapping_add(AHEAD + skip * BYTES);
                for line in 0..BYTES / 64 {
                    simd.prefetch(ahead.wrapping_add(line * 64));
                }
                simd.prefetch(std::ptr::from_ref(scale).wrapping_add(AHEAD / BYTES + skip).cast());
            }
            scales[p] = simd.load_f16(scale);
        }
        (weights, scales)
    }
}

/// The sums of both with `T` rows.
#[inline(always)]
#[allow(clippy::needless_range_loop)] // indices say which of several arrays' elements meet
fn multiply<S: Simd, const T: usize, const PART: usize, const FETCH: bool>(
    simd: S,
    panels: Panels<'_>,
    tile: IntegerTile<'_>,
    next: NextPanel<true>,
) -> [[S::F32; T]; 2] {
    let mut sums = [[simd.splat(0.0); T]; 2];
    let rows = tile.bytes.as_chunks::<T>().0.iter().zip(tile.offsets.as_chunks::<T>().0);
    let rows = rows.zip(tile.scales.as_chunks::<T>().0);
    for (group, ((bytes, offsets), row_scales)) in (0..panels.groups).zip(rows) {
        next.fetch(simd, group);
        let (weights, scales) = panels.group::<S, FETCH>(simd, group);
        let parts = bytes.as_chunks::<PART>().0.iter().zip(offsets.as_chunks::<PART>().0);
        for (part, (bytes, offsets)) in parts.enumerate() {
            let exact = simd.dot_bytes_of_two(weights, bytes, offsets);
            for t in 0..PART {
                let at = part * PART + t;
                let row_scale = simd.splat(row_scales[at]);
                for p in 0..2 {
                    let inner = simd.mul(simd.to_f32(exact[p][t]), scales[p]);
                    sums[p][at] = simd.mul_add(inner, row_scale, sums[p][at]);
                }
            }
        }
    }
    sums
}
