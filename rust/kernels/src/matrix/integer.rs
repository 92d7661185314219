//! Integer panels times 8-bit activations.
//!
//! Int8: exact sums in `i32` inside a group of 32 columns, groups added in `f32` in the order of the columns.
//!
//! Int4: four groups share a scale of activations and are added exactly as well, their own scales rounded to integers, up to [`STEPS`], of a
//! unit that each row has for itself. Spans are added in `f32` in the order of the columns, and a row's sum is multiplied with its unit. So one
//! instruction adds a group's sum to those before, where a conversion and a multiply-add did, and a matrix unit adds the groups of a span
//! itself (`tiled/spans.rs`). Rounding weights to 4 bits has erred a million times as much, squared, as rounding their scales to 12 bits of the
//! greatest of the row does.

use super::activations::IntegerTile;
use super::ahead::{AHEAD, NextPanel};
use super::blocks::{Block, blocks};
use super::{GROUP, IntegerTiles, Layout, Output, PackedMatrix};
use crate::simd::{Kernel, LANES, Simd};
use std::ops::Range;

/// Groups of Int4 that share a scale of activations: an eighth less to add, and errors far below those of weights of 4 bits
/// (`benches/quality.py`).
pub(super) const INT4_SPAN: usize = 4;

/// Steps that the greatest scale of a row of Int4 is counted in: times any integer of 4 bits they fit 16 bits.
pub(super) const STEPS: f32 = 4064.0;

/// One over the units of rows, or 0 of rows whose scales are all zeros or not all finite.
#[inline(always)]
pub(super) fn inverse<S: Simd>(simd: S, units: S::F32) -> S::F32 {
    let zero = simd.splat(0.0);
    simd.select_greater(units, zero, simd.div(simd.splat(1.0), units), zero)
}

/// Half-precision scales of rows as multiples of their units: 16 bits with signs, zeros above.
#[inline(always)]
pub(super) fn steps<S: Simd>(simd: S, scales: &[u16; LANES], inverse: S::F32) -> S::I32 {
    let steps = simd.to_i32(simd.mul(simd.load_f16(scales), inverse));
    simd.and_i32(steps, simd.splat_i32(0xffff))
}

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
        let scales = self.weight.scales(panel);
        let input = self.input.tile(tile);
        let next = NextPanel::<SEVERAL>::new(weights, scales.len().div_ceil(L::SPAN), turn, turns);
        let sums = match const { L::SPAN } {
            1 => multiply::<S, L, BYTES, T, SEVERAL, FETCH>(simd, weights, scales, input, next),
            INT4_SPAN => {
                let units = simd.load(self.weight.units(panel));
                multiply_spans::<S, L, BYTES, T, SEVERAL, FETCH>(simd, weights, (scales, units), input, next)
            }
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
        let exact = group::<S, L, BYTES, T, FETCH>(simd, weights, scale, bytes, offsets);
        let scale = simd.load_f16(scale);
        for t in 0..T {
            let inner = simd.mul(simd.to_f32(exact[t]), scale);
            sums[t] = simd.mul_add(inner, simd.splat(row_scales[t]), sums[t]);
        }
    }
    sums
}

/// The same where the groups of a span, [`INT4_SPAN`], share the rows' scales, and their own are counted in units.
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
    (scales, units): (&[[u16; LANES]], S::F32),
    tile: IntegerTile<'_>,
    next: NextPanel<SEVERAL>,
) -> [S::F32; T] {
    let mut sums = [simd.splat(0.0); T];
    let inverse = inverse(simd, units);
    let (weights, rest) = weights.as_chunks::<BYTES>().0.as_chunks::<INT4_SPAN>();
    let (scales, rest_scales) = scales.as_chunks::<INT4_SPAN>();
    let (bytes, rest_bytes) = tile.bytes.as_chunks::<T>().0.as_chunks::<INT4_SPAN>();
    let (offsets, rest_offsets) = tile.offsets.as_chunks::<T>().0.as_chunks::<INT4_SPAN>();
    let row_scales = tile.scales.as_chunks::<T>().0;
    let spans = weights.iter().zip(scales).zip(bytes).zip(offsets).zip(row_scales);
    for (turn, ((((weights, scales), bytes), offsets), row_scales)) in spans.enumerate() {
        next.fetch(simd, turn);
        let scales = (&scales[..], inverse);
        add_span::<S, L, BYTES, T, FETCH>(simd, weights, scales, bytes, offsets, row_scales, &mut sums);
    }
    if let Some(row_scales) = row_scales.get(weights.len()) {
        let scales = (rest_scales, inverse);
        add_span::<S, L, BYTES, T, FETCH>(
            simd,
            rest,
            scales,
            rest_bytes,
            rest_offsets,
            row_scales,
            &mut sums,
        );
    }
    for sum in &mut sums {
        *sum = simd.mul(*sum, units);
    }
    sums
}

/// Adds the sums of a span of groups, in units.
#[inline(always)]
fn add_span<S: Simd, L: IntegerLayout<BYTES>, const BYTES: usize, const T: usize, const FETCH: bool>(
    simd: S,
    weights: &[[u8; BYTES]],
    (scales, inverse): (&[[u16; LANES]], S::F32),
    rows: &[[[u8; GROUP]; T]],
    offsets: &[[i32; T]],
    row_scales: &[f32; T],
    sums: &mut [S::F32; T],
) {
    let mut exact = [simd.splat_i32(0); T];
    for (((weights, scales), rows), offsets) in weights.iter().zip(scales).zip(rows).zip(offsets) {
        let own = group::<S, L, BYTES, T, FETCH>(simd, weights, scales, rows, offsets);
        let steps = steps(simd, scales, inverse);
        for t in 0..T {
            exact[t] = simd.mul_add_i16(own[t], steps, exact[t]);
        }
    }
    for t in 0..T {
        sums[t] = simd.mul_add(simd.to_f32(exact[t]), simd.splat(row_scales[t]), sums[t]);
    }
}

/// The exact sums of a group with `T` rows.
#[inline(always)]
fn group<S: Simd, L: IntegerLayout<BYTES>, const BYTES: usize, const T: usize, const FETCH: bool>(
    simd: S,
    weights: &[u8; BYTES],
    scale: &[u16; LANES],
    rows: &[[u8; GROUP]; T],
    offsets: &[i32; T],
) -> [S::I32; T] {
    if FETCH {
        for line in 0..BYTES / 64 {
            simd.prefetch(weights.as_ptr().wrapping_add(AHEAD + line * 64));
        }
        simd.prefetch(std::ptr::from_ref(scale).wrapping_add(AHEAD / BYTES).cast());
    }
    L::group(simd, weights, rows, offsets)
}

#[cfg(test)]
mod tests {
    use super::STEPS;
    use crate::{
        Context, Format, Isa, PackedMatrix, Pool, Precision, Rows, RowsMut, Scratch, dequantize, linear,
    };
    use half::f16;

    const COLUMNS: usize = 160; // a span of four groups, and one of one

    /// A row of Q4_0 whose blocks have these scales and all codes.
    fn row(scales: [f32; 5]) -> Vec<u8> {
        let codes: [u8; 16] = std::array::from_fn(|i| (i * 37 + 11) as u8);
        let block = |scale: f32| f16::from_f32(scale).to_le_bytes().into_iter().chain(codes);
        scales.into_iter().flat_map(block).collect()
    }

    /// Products with integers up to 127, which activations of 8 bits hold exactly.
    fn products(isa: Isa, rows: &[Vec<u8>], inputs: &[f32]) -> Vec<f32> {
        let context = Context { isa, pool: Pool::shared(1).expect("a thread") };
        let slices: Vec<&[u8]> = rows.iter().map(Vec::as_slice).collect();
        let matrix = PackedMatrix::pack(&context, Format::Q4_0, COLUMNS, &slices, &()).expect("packs");
        let count = inputs.len() / COLUMNS;
        let mut out = vec![0.0; count * rows.len()];
        let input = Rows::new(inputs, count, COLUMNS, COLUMNS);
        let output = RowsMut::new(&mut out, count, rows.len(), rows.len());
        linear(&context, &matrix, input, output, None, Precision::Auto, &mut Scratch::default());
        out
    }

    #[test]
    fn scales_of_any_size_are_rounded_to_steps_of_the_greatest() {
        let tiny = f16::from_bits(1).to_f32();
        let rows = [
            row([0.5, 0.25, -0.125, 0.75, 0.3]),
            row([65504.0, tiny, -tiny, 1.0, -65504.0]),
            row([tiny, -tiny, 0.0, tiny, tiny]),
            row([0.0; 5]),
            row([f32::INFINITY, 1.0, 1.0, 1.0, 1.0]),
            row([1.0, 1.0, f32::NAN, 1.0, 1.0]),
        ];
        for count in [1, 8, 40] {
            let value = |i: usize| if i.is_multiple_of(32) { 127.0 } else { (i * 7919 % 255) as f32 - 127.0 };
            let inputs: Vec<f32> = (0..count * COLUMNS).map(value).collect();
            for isa in Isa::available() {
                let got = products(isa, &rows, &inputs);
                for (input, got) in inputs.chunks(COLUMNS).zip(got.chunks(rows.len())) {
                    for (row, &got) in rows[..4].iter().zip(got) {
                        let mut weights = vec![0.0; COLUMNS];
                        dequantize(Format::Q4_0, row, &mut weights);
                        let terms = weights.iter().zip(input);
                        let sum: f64 = terms.map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
                        // Half a step of each of eight times an activation of each column.
                        let scales = row.chunks(18).map(|block| f16::from_le_bytes([block[0], block[1]]));
                        let greatest =
                            scales.fold(0.0, |greatest: f32, scale| greatest.max(scale.to_f32().abs()));
                        let values: f32 = input.iter().map(|value| value.abs()).sum();
                        let bound = f64::from(greatest / STEPS / 2.0 * 8.0 * values) + sum.abs() * 1e-6;
                        assert!((f64::from(got) - sum).abs() <= bound, "{isa:?} {count}: {got}, not {sum}");
                    }
                    assert!(got[4..].iter().all(|value| !value.is_finite()), "{isa:?} {count}: {got:?}");
                }
            }
        }
    }
}
