//! Integer panels times 8-bit activations: exact sums in `i32` inside a group of 32 columns, groups added in `f32`, in
//! the order of the columns, over a span of groups that share a scale of activations, and these likewise.

use super::activations::IntegerTile;
use super::ahead::{AHEAD, NextPanel};
use super::blocks::{Turn, blocks};
use super::coded::{Bytes, Nibbles, Unpacked};
use super::{GROUP, IntegerTiles, Layout, Output, PackedMatrix};
use crate::simd::{Kernel, LANES, Simd};
use std::marker::PhantomData;
use std::ops::Range;

/// Groups of Int4 that share a scale of activations: an eighth less to add, and errors far below those of weights of 4 bits
/// (`benches/quality.py`).
pub(super) const INT4_SPAN: usize = 4;

/// A layout's exact sums.
trait IntegerLayout<const BYTES: usize>: Copy {
    /// Groups that share a scale of activations.
    const SPAN: usize;
    /// From how many rows on two panels are multiplied at once. (Fewer wait for memory, which gives one stream more than two.)
    const TWO_FROM: usize;
    /// The sums of products of a group of `P` panels with `T` rows.
    fn group<S: Simd, const P: usize, const T: usize>(
        simd: S,
        weights: [&[u8; BYTES]; P],
        rows: &[[u8; GROUP]; T],
        offsets: &[i32; T],
    ) -> [[S::I32; T]; P];
}

#[derive(Clone, Copy)]
struct Int8;
#[derive(Clone, Copy)]
struct Int4;

impl IntegerLayout<512> for Int8 {
    const SPAN: usize = 1;
    const TWO_FROM: usize = 6;
    #[inline(always)]
    fn group<S: Simd, const P: usize, const T: usize>(
        simd: S,
        weights: [&[u8; 512]; P],
        rows: &[[u8; GROUP]; T],
        offsets: &[i32; T],
    ) -> [[S::I32; T]; P] {
        if P == 1 {
            return [simd.dot_bytes(weights[0], rows, offsets); P];
        }
        let steps = weights.map(|weights| Unpacked::<Bytes>::new(weights, &[0; 16], 0));
        simd.dot_panels::<_, 8, P, T, 8>(&steps, rows, 0, offsets)
    }
}

impl IntegerLayout<256> for Int4 {
    const SPAN: usize = INT4_SPAN;
    const TWO_FROM: usize = 4;
    #[inline(always)]
    fn group<S: Simd, const P: usize, const T: usize>(
        simd: S,
        weights: [&[u8; 256]; P],
        rows: &[[u8; GROUP]; T],
        offsets: &[i32; T],
    ) -> [[S::I32; T]; P] {
        if P == 1 {
            return [simd.dot_nibbles(weights[0], rows, offsets); P];
        }
        let steps = weights.map(|weights| Unpacked::<Nibbles>::new(weights, &[0; 16], 0));
        simd.dot_panels::<_, 8, P, T, 4>(&steps, rows, 0, offsets)
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
        for block in blocks(self.panels.clone(), panel_bytes, self.input.tiles, row_bytes) {
            let mut panel = block.panels.start;
            while panel < block.panels.end {
                let panels = panel..block.panels.end.min(panel + if S::SHARES_LOADS { 2 } else { 1 });
                for tile in block.tiles.clone() {
                    self.meet::<S, L, BYTES>(simd, panels.clone(), tile, block.turn(tile));
                }
                panel = panels.end;
            }
        }
    }

    /// One or two panels, by a tile.
    #[inline(always)]
    fn meet<S: Simd, L: IntegerLayout<BYTES>, const BYTES: usize>(
        &self,
        simd: S,
        panels: Range<usize>,
        tile: usize,
        turn: Turn,
    ) {
        let width = self.input.tiles.width(tile);
        let narrow = width < 4 || width == 4 && turn.count == 1 && L::TWO_FROM > 4;
        if S::SHARES_LOADS && !narrow {
            match width {
                4 => simd.apart(Meeting::<L, BYTES, 2, 4, 4>::new(self, panels, tile, turn)),
                6 => simd.apart(Meeting::<L, BYTES, 2, 6, 6>::new(self, panels, tile, turn)),
                _ => simd.apart(Meeting::<L, BYTES, 2, 8, 4>::new(self, panels, tile, turn)),
            }
        } else {
            for panel in panels {
                match width {
                    1 => simd.apart(Meeting::<L, BYTES, 1, 1, 1>::new(self, panel..panel + 1, tile, turn)),
                    2 => simd.apart(Meeting::<L, BYTES, 1, 2, 2>::new(self, panel..panel + 1, tile, turn)),
                    _ => simd.apart(Meeting::<L, BYTES, 1, 4, 4>::new(self, panel..panel + 1, tile, turn)),
                }
            }
        }
    }
}

/// `P` panels, of which the last may be missing, and a tile of `T` rows, `PART` of them at a time.
struct Meeting<'a, L, const BYTES: usize, const P: usize, const T: usize, const PART: usize> {
    linear: &'a IntegerLinear<'a>,
    panels: Range<usize>,
    tile: usize,
    turn: Turn,
    layout: PhantomData<L>,
}

impl<'a, L, const BYTES: usize, const P: usize, const T: usize, const PART: usize>
    Meeting<'a, L, BYTES, P, T, PART>
{
    #[inline(always)]
    fn new(linear: &'a IntegerLinear<'a>, panels: Range<usize>, tile: usize, turn: Turn) -> Self {
        Meeting { linear, panels, tile, turn, layout: PhantomData }
    }
}

impl<L: IntegerLayout<BYTES>, const BYTES: usize, const P: usize, const T: usize, const PART: usize> Kernel
    for Meeting<'_, L, BYTES, P, T, PART>
{
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Meeting { linear, panels, tile, turn, .. } = self;
        let weights = Panels::<BYTES, P>::new(linear.weight, panels.clone());
        let bytes = linear.weight.weights(panels.clone());
        let next = NextPanel::new(bytes, weights.groups.div_ceil(L::SPAN), turn);
        let input = linear.input.tile(tile);
        let sums = match const { L::SPAN } {
            1 => multiply::<S, L, BYTES, P, T, PART>(simd, weights, input, next),
            _ => multiply_spans::<S, L, BYTES, P, T, PART>(simd, weights, input, next),
        };
        for (panel, sums) in panels.zip(&sums) {
            linear.output.store(simd, panel, linear.input.tiles, tile, sums, true);
        }
    }
}

/// Weights and scales of panels side by side.
#[derive(Clone, Copy)]
struct Panels<'a, const BYTES: usize, const P: usize> {
    groups: usize,
    weights: [&'a [[u8; BYTES]]; P],
    scales: [&'a [[u16; LANES]]; P],
}

impl<'a, const BYTES: usize, const P: usize> Panels<'a, BYTES, P> {
    #[inline(always)]
    fn new(weight: &'a PackedMatrix, panels: Range<usize>) -> Self {
        let (mut weights, mut scales) = ([&[] as &[[u8; BYTES]]; P], [&[] as &[[u16; LANES]]; P]);
        for p in 0..P {
            let panel = panels.start + p.min(panels.len() - 1);
            weights[p] = weight.weights(panel..panel + 1).as_chunks().0;
            scales[p] = &weight.scales(panel..panel + 1)[..weights[p].len()];
        }
        Panels { groups: weights[0].len(), weights, scales }
    }

    /// A group's weights and scales; later ones are asked for. The end of a panel is followed by what comes after the last of them.
    #[inline(always)]
    fn group<S: Simd>(&self, simd: S, group: usize) -> ([&'a [u8; BYTES]; P], [S::F32; P]) {
        let (mut weights, mut scales) = ([&self.weights[0][group]; P], [simd.splat(0.0); P]);
        let skip = if (self.groups - group) * BYTES <= AHEAD { (P - 1) * self.groups } else { 0 };
        for p in 0..P {
            weights[p] = &self.weights[p][group];
            let scale = &self.scales[p][group];
            let ahead = weights[p].as_ptr().wrapping_add(AHEAD + skip * BYTES);
            for line in 0..BYTES / 64 {
                simd.prefetch(ahead.wrapping_add(line * 64));
            }
            simd.prefetch(std::ptr::from_ref(scale).wrapping_add(AHEAD / BYTES + skip).cast());
            scales[p] = simd.load_f16(scale);
        }
        (weights, scales)
    }
}

/// The sums of panels with `T` rows, of which every group has a scale.
#[inline(always)]
#[allow(clippy::needless_range_loop)] // indices say which of several arrays' elements meet
fn multiply<
    S: Simd,
    L: IntegerLayout<BYTES>,
    const BYTES: usize,
    const P: usize,
    const T: usize,
    const PART: usize,
>(
    simd: S,
    panels: Panels<'_, BYTES, P>,
    tile: IntegerTile<'_>,
    next: NextPanel,
) -> [[S::F32; T]; P] {
    let mut sums = [[simd.splat(0.0); T]; P];
    let rows = tile.bytes.as_chunks::<T>().0.iter().zip(tile.offsets.as_chunks::<T>().0);
    let rows = rows.zip(tile.scales.as_chunks::<T>().0);
    for (group, ((bytes, offsets), row_scales)) in (0..panels.groups).zip(rows) {
        if P > 1 {
            next.fetch(simd, group);
        }
        let (weights, scales) = panels.group(simd, group);
        let parts = bytes.as_chunks::<PART>().0.iter().zip(offsets.as_chunks::<PART>().0);
        for (part, (bytes, offsets)) in parts.enumerate() {
            let exact = L::group::<S, P, PART>(simd, weights, bytes, offsets);
            for t in 0..PART {
                let at = part * PART + t;
                let row_scale = simd.splat(row_scales[at]);
                for p in 0..P {
                    let inner = simd.mul(simd.to_f32(exact[p][t]), scales[p]);
                    sums[p][at] = simd.mul_add(inner, row_scale, sums[p][at]);
                }
            }
        }
    }
    sums
}

/// The same where the groups of a span share the rows' scales. (With spans of one group it costs 3 to 5 % more than [`multiply`].)
#[inline(always)]
#[allow(clippy::needless_range_loop)]
fn multiply_spans<
    S: Simd,
    L: IntegerLayout<BYTES>,
    const BYTES: usize,
    const P: usize,
    const T: usize,
    const PART: usize,
>(
    simd: S,
    panels: Panels<'_, BYTES, P>,
    tile: IntegerTile<'_>,
    next: NextPanel,
) -> [[S::F32; T]; P] {
    let (span, mut sums) = (const { L::SPAN }, [[simd.splat(0.0); T]; P]);
    let rows = tile.bytes.as_chunks::<T>().0.chunks(span).zip(tile.offsets.as_chunks::<T>().0.chunks(span));
    let rows = rows.zip(tile.scales.as_chunks::<T>().0);
    for (turn, ((bytes, offsets), row_scales)) in rows.enumerate() {
        if P > 1 {
            next.fetch(simd, turn);
        }
        let mut inner = [[simd.splat(0.0); T]; P];
        for (group, (bytes, offsets)) in (turn * span..panels.groups).zip(bytes.iter().zip(offsets)) {
            let (weights, scales) = panels.group(simd, group);
            let parts = bytes.as_chunks::<PART>().0.iter().zip(offsets.as_chunks::<PART>().0);
            for (part, (bytes, offsets)) in parts.enumerate() {
                let exact = L::group::<S, P, PART>(simd, weights, bytes, offsets);
                for t in 0..PART {
                    for p in 0..P {
                        let at = part * PART + t;
                        inner[p][at] = simd.mul_add(simd.to_f32(exact[p][t]), scales[p], inner[p][at]);
                    }
                }
            }
        }
        for t in 0..T {
            let row_scale = simd.splat(row_scales[t]);
            for p in 0..P {
                sums[p][t] = simd.mul_add(inner[p][t], row_scale, sums[p][t]);
            }
        }
    }
    sums
}
