//! Panels times `f32` activations: weights are unpacked exactly.

use super::ahead::AHEAD;
use super::{GROUP, Layout, Output, PackedMatrix, RowTiles, coded};
use crate::quant::Grouped;
use crate::simd::{Kernel, LANES, Simd};
use std::marker::PhantomData;
use std::ops::Range;

/// Greatest number of columns in 64 bytes.
const STEP: usize = 8;

/// Groups that are unpacked at a time when many tiles will use them: 16 KB.
const BLOCK: usize = 8;

/// From how many tiles on integers are unpacked once for all of them. (16-bit weights unpack so fast that this loses.)
const UNPACK_TILES: usize = 3;

/// A layout's way to `f32`.
trait FloatLayout: Copy {
    /// Columns in 64 bytes.
    const COLUMNS: usize;
    /// The columns in 64 bytes, followed by copies.
    ///
    /// # Safety
    /// `weights` is valid for reading 64 bytes.
    unsafe fn unpack<S: Simd>(simd: S, weights: *const u8, scale: S::F32) -> [S::F32; STEP];
    /// Whether the layout has scales.
    const SCALED: bool = false;
}

#[derive(Clone, Copy)]
struct F32;
#[derive(Clone, Copy)]
struct F16;
#[derive(Clone, Copy)]
struct Bf16;
#[derive(Clone, Copy)]
struct Int8;
#[derive(Clone, Copy)]
struct Int4;

impl FloatLayout for F32 {
    const COLUMNS: usize = 1;
    #[inline(always)]
    unsafe fn unpack<S: Simd>(simd: S, weights: *const u8, _scale: S::F32) -> [S::F32; STEP] {
        // SAFETY: the caller's promise.
        [unsafe { simd.load_pointer(weights.cast()) }; STEP]
    }
}

impl FloatLayout for F16 {
    const COLUMNS: usize = 2;
    #[inline(always)]
    unsafe fn unpack<S: Simd>(simd: S, weights: *const u8, _scale: S::F32) -> [S::F32; STEP] {
        // SAFETY: the caller's promise; `[u16; 16]` is 32 bytes, and panels are aligned.
        let (first, second) =
            unsafe { (&*weights.cast::<[u16; LANES]>(), &*weights.add(32).cast::<[u16; LANES]>()) };
        let mut out = [simd.load_f16(first); STEP];
        out[1] = simd.load_f16(second);
        out
    }
}

impl FloatLayout for Bf16 {
    const COLUMNS: usize = 2;
    #[inline(always)]
    unsafe fn unpack<S: Simd>(simd: S, weights: *const u8, _scale: S::F32) -> [S::F32; STEP] {
        // SAFETY: the caller's promise.
        let pair = unsafe { simd.load_bytes(weights) };
        let mut out = [simd.from_bits(simd.shift_left(pair, 16)); STEP];
        out[1] = simd.from_bits(simd.and_i32(pair, simd.splat_i32(0xffff_0000_u32 as i32)));
        out
    }
}

impl FloatLayout for Int8 {
    const COLUMNS: usize = 4;
    const SCALED: bool = true;
    #[inline(always)]
    unsafe fn unpack<S: Simd>(simd: S, weights: *const u8, scale: S::F32) -> [S::F32; STEP] {
        // SAFETY: the caller's promise.
        let bytes = unsafe { simd.load_bytes(weights) };
        let mut out = [scale; STEP];
        for (i, out) in out.iter_mut().enumerate().take(4) {
            let byte = simd.and_i32(simd.shift_right(bytes, 8 * i as u32), simd.splat_i32(255));
            *out = simd.mul(simd.to_f32(simd.sub_i32(byte, simd.splat_i32(128))), scale);
        }
        out
    }
}

impl FloatLayout for Int4 {
    const COLUMNS: usize = 8;
    const SCALED: bool = true;
    #[inline(always)]
    unsafe fn unpack<S: Simd>(simd: S, weights: *const u8, scale: S::F32) -> [S::F32; STEP] {
        // SAFETY: the caller's promise.
        let bytes = unsafe { simd.load_bytes(weights) };
        let mut out = [scale; STEP];
        for (i, out) in out.iter_mut().enumerate() {
            let shift = 8 * (i % 4) + 4 * (i / 4);
            let nibble = simd.and_i32(simd.shift_right(bytes, shift as u32), simd.splat_i32(15));
            *out = simd.mul(simd.to_f32(simd.sub_i32(nibble, simd.splat_i32(8))), scale);
        }
        out
    }
}

/// A layout's way to blocks of `f32`.
trait BlockLayout: Copy {
    /// Unpacks some groups of a panel: (columns, 16).
    fn unpack_block<S: Simd>(
        self,
        simd: S,
        weight: &PackedMatrix,
        panel: usize,
        block: Range<usize>,
        values: &mut [[f32; LANES]; BLOCK * GROUP],
    );
}

impl BlockLayout for &Grouped {
    #[inline(always)]
    fn unpack_block<S: Simd>(
        self,
        simd: S,
        weight: &PackedMatrix,
        panel: usize,
        block: Range<usize>,
        values: &mut [[f32; LANES]; BLOCK * GROUP],
    ) {
        coded::unpack_groups(simd, self, weight, panel, block, values);
    }
}

/// Some panels times all tiles.
pub(crate) struct FloatLinear<'a> {
    /// The weights.
    pub(crate) weight: &'a PackedMatrix,
    /// The input rows.
    pub(crate) input: RowTiles<'a, f32>,
    /// Where results go.
    pub(crate) output: Output<'a>,
    /// Which panels.
    pub(crate) panels: Range<usize>,
}

impl Kernel for FloatLinear<'_> {
    type Output = ();
    const MULTIPLIES_BYTES: bool = false;

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        match self.weight.layout() {
            Layout::F32 => self.tiles::<S, F32>(simd),
            Layout::F16 => self.tiles::<S, F16>(simd),
            Layout::Bf16 => self.tiles::<S, Bf16>(simd),
            Layout::Int8 => self.choose::<S, Int8>(simd),
            Layout::Int4 => self.choose::<S, Int4>(simd),
            Layout::Coded(format) => self.unpacked(simd, format),
        }
    }
}

impl FloatLinear<'_> {
    /// Of the two ways that compute the same, the faster one.
    #[inline(always)]
    fn choose<S: Simd, L: FloatLayout>(&self, simd: S) {
        if self.input.tiles.count() >= UNPACK_TILES {
            self.unpacked(simd, PhantomData::<L>)
        } else {
            self.tiles::<S, L>(simd)
        }
    }

    /// Every panel by every tile, unpacking as it goes. Few rows take several panels at once, because a sum is a chain
    /// of dependent multiply-adds.
    #[inline(always)]
    fn tiles<S: Simd, L: FloatLayout>(&self, simd: S) {
        let mut panel = self.panels.start;
        let few = self.input.tiles.count() == 1;
        while panel < self.panels.end {
            let left = self.panels.end - panel;
            match self.input.tiles.width(0) {
                1 if few && left >= 4 => panel += self.panel_tiles::<S, L, 1, 4>(simd, panel),
                2 if few && left >= 2 => panel += self.panel_tiles::<S, L, 2, 2>(simd, panel),
                _ => panel += self.any_width::<S, L>(simd, panel),
            }
        }
    }

    #[inline(always)]
    fn any_width<S: Simd, L: FloatLayout>(&self, simd: S, panel: usize) -> usize {
        for tile in 0..self.input.tiles.count() {
            match self.input.tiles.width(tile) {
                1 => self.whole::<S, L, 1, 1>(simd, panel, tile),
                2 => self.whole::<S, L, 2, 1>(simd, panel, tile),
                4 => self.whole::<S, L, 4, 1>(simd, panel, tile),
                _ => self.whole::<S, L, 8, 1>(simd, panel, tile),
            }
        }
        1
    }

    #[inline(always)]
    fn panel_tiles<S: Simd, L: FloatLayout, const T: usize, const P: usize>(
        &self,
        simd: S,
        panel: usize,
    ) -> usize {
        self.whole::<S, L, T, P>(simd, panel, 0);
        P
    }

    /// `P` panels by one tile of `T` rows, over all columns.
    #[inline(always)]
    fn whole<S: Simd, L: FloatLayout, const T: usize, const P: usize>(
        &self,
        simd: S,
        panel: usize,
        tile: usize,
    ) {
        let groups = self.weight.groups();
        let weights = self.weight.weights(panel..panel + P);
        let mut scales: [&[[u16; LANES]]; P] = [&[]; P];
        if L::SCALED {
            for (p, scales) in scales.iter_mut().enumerate() {
                *scales = self.weight.scales(panel + p);
            }
        }
        let mut sums = [[simd.splat(0.0); T]; P];
        multiply::<S, L, T, P>(simd, weights, &scales, groups, self.input.tile(tile), &mut sums);
        for (p, sums) in sums.iter().enumerate() {
            self.output.store(simd, panel + p, self.input.tiles, tile, sums, true);
        }
    }

    /// Unpacks a block of columns of a panel, multiplies it with every tile, keeping sums in the output between
    /// blocks.
    #[inline(always)]
    fn unpacked<S: Simd>(&self, simd: S, layout: impl BlockLayout) {
        let groups = self.weight.groups();
        for panel in self.panels.clone() {
            for first in (0..groups).step_by(BLOCK) {
                let block = first..groups.min(first + BLOCK);
                let mut values = [[0.0; LANES]; BLOCK * GROUP];
                layout.unpack_block(simd, self.weight, panel, block.clone(), &mut values);
                for tile in 0..self.input.tiles.count() {
                    match self.input.tiles.width(tile) {
                        1 => self.part::<S, 1>(simd, panel, tile, block.clone(), &values),
                        2 => self.part::<S, 2>(simd, panel, tile, block.clone(), &values),
                        4 => self.part::<S, 4>(simd, panel, tile, block.clone(), &values),
                        _ => self.part::<S, 8>(simd, panel, tile, block.clone(), &values),
                    }
                }
            }
        }
    }

    /// An unpacked block of a panel by one tile.
    #[inline(always)]
    fn part<S: Simd, const T: usize>(
        &self,
        simd: S,
        panel: usize,
        tile: usize,
        block: Range<usize>,
        values: &[[f32; LANES]; BLOCK * GROUP],
    ) {
        let mut sums = [[simd.splat(0.0); T]];
        if block.start > 0 {
            sums[0] = self.output.load(simd, panel, self.input.tiles, tile);
        }
        let input = &self.input.tile(tile)[block.start * GROUP * T..block.end * GROUP * T];
        let weights = values[..block.len() * GROUP].as_flattened();
        // SAFETY: any `f32` is four bytes.
        let weights = unsafe { weights.align_to::<u8>() }.1;
        multiply::<S, F32, T, 1>(simd, weights, &[&[]], block.len(), input, &mut sums);
        let last = block.end == self.weight.groups();
        self.output.store(simd, panel, self.input.tiles, tile, &sums[0], last);
    }
}

/// Adds the products of `groups` groups of columns to `sums`. `weights` is (P, groups, group bytes), `scales`
/// (P, groups, 16) where the layout has them, `input` (columns, T).
#[inline(always)]
#[allow(clippy::needless_range_loop)] // indices say which of several arrays' elements meet
fn multiply<S: Simd, L: FloatLayout, const T: usize, const P: usize>(
    simd: S,
    weights: &[u8],
    scales: &[&[[u16; LANES]]; P],
    groups: usize,
    input: &[f32],
    sums: &mut [[S::F32; T]; P],
) {
    let steps = GROUP / L::COLUMNS;
    let panel_bytes = groups * steps * 64;
    assert!(weights.len() >= P * panel_bytes && input.len() >= groups * GROUP * T);
    assert!(!L::SCALED || scales.iter().all(|scales| scales.len() >= groups));
    for group in 0..groups {
        let mut scale = [simd.splat(0.0); P];
        if L::SCALED {
            for (p, scale) in scale.iter_mut().enumerate() {
                *scale = simd.load_f16(&scales[p][group]);
                simd.prefetch(scales[p].as_ptr().wrapping_add(group + AHEAD / 256).cast());
            }
        }
        for step in 0..steps {
            let mut unpacked = [[simd.splat(0.0); STEP]; P];
            for (p, unpacked) in unpacked.iter_mut().enumerate() {
                let at = p * panel_bytes + (group * steps + step) * 64;
                simd.prefetch(weights.as_ptr().wrapping_add(at + AHEAD));
                // SAFETY: checked above.
                *unpacked = unsafe { L::unpack(simd, weights.as_ptr().add(at), scale[p]) };
            }
            for i in 0..L::COLUMNS {
                for t in 0..T {
                    let at = ((group * steps + step) * L::COLUMNS + i) * T + t;
                    // SAFETY: checked above.
                    let value = simd.splat(unsafe { *input.get_unchecked(at) });
                    for p in 0..P {
                        sums[p][t] = simd.mul_add(unpacked[p][i], value, sums[p][t]);
                    }
                }
            }
        }
    }
}

impl<L: FloatLayout> BlockLayout for PhantomData<L> {
    #[inline(always)]
    fn unpack_block<S: Simd>(
        self,
        simd: S,
        weight: &PackedMatrix,
        panel: usize,
        block: Range<usize>,
        values: &mut [[f32; LANES]; BLOCK * GROUP],
    ) {
        let group_bytes = weight.layout().group_bytes();
        let weights = &weight.weights(panel..panel + 1)[block.start * group_bytes..block.end * group_bytes];
        for (group, weights) in weights.chunks_exact(group_bytes).enumerate() {
            let scale = match L::SCALED {
                true => simd.load_f16(&weight.scales(panel)[block.start + group]),
                false => simd.splat(0.0),
            };
            for (step, weights) in weights.chunks_exact(64).enumerate() {
                // SAFETY: these are 64 bytes.
                let unpacked = unsafe { L::unpack(simd, weights.as_ptr(), scale) };
                for i in 0..L::COLUMNS {
                    simd.store(unpacked[i], &mut values[group * GROUP + step * L::COLUMNS + i]);
                }
            }
        }
    }
}
