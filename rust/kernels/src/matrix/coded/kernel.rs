//! Coded panels times 8-bit activations. A record's sum, times the activations' scale, is added in `f32` to those of the records before.
//!
//! A record of one group: the exact sum of its products times its scale, plus its minimum times the sum of activations. A record of several
//! groups that share a scale: their exact sum times that. One whose groups or halves have scales counted in steps of a unit: their exact sums
//! times their steps are added, in `f32` in the order of the columns, or exactly (`exact`), and then multiplied with the unit; minima, in a unit
//! of their own, are added exactly. (A matrix unit adds the groups of a record itself: `tiled/spans.rs`. Without one, adding exactly would take
//! a multiplication of 32-bit integers, which competes with those of bytes: 8 to 16 rows of Q6_K 10 to 20 % slower.)

use super::super::blocks::blocks;
use super::super::{IntegerTiles, Layout, Output, PackedMatrix};
use super::record::Record;
use super::unpack::{Book, Five, Nibbles, Six, Unpack};
use super::{span, table};
use crate::quant::{Codes, Scales};
use crate::simd::{Kernel, Simd};
use std::marker::PhantomData;
use std::ops::Range;

/// A kind of scales, known when a kernel is compiled.
pub(super) trait Kind: Copy {
    const SCALES: Scales;
    /// Groups in a record.
    const SPAN: usize = span(Self::SCALES);
}

macro_rules! kinds {
    ($($name:ident = $scales:expr;)*) => {
        $(
            #[derive(Clone, Copy)]
            struct $name;
            impl Kind for $name {
                const SCALES: Scales = $scales;
            }
        )*
    };
}

kinds! {
    Half = Scales::Half;
    Shared = Scales::Shared;
    Brain = Scales::Brain;
    HalfMinimum = Scales::HalfMinimum;
    Steps = Scales::Steps { halves: false };
    HalfSteps = Scales::Steps { halves: true };
    StepsDrops = Scales::StepsDrops { halves: false };
    HalfStepsDrops = Scales::StepsDrops { halves: true };
}

/// Some panels times all tiles.
pub(crate) struct CodedLinear<'a> {
    /// The weights, coded.
    pub(crate) weight: &'a PackedMatrix,
    /// The input rows.
    pub(crate) input: IntegerTiles<'a>,
    /// Where results go.
    pub(crate) output: Output<'a>,
    /// Which panels.
    pub(crate) panels: Range<usize>,
    /// Whether sums times steps are added exactly, as a matrix unit does: where there is one, few rows have the same bits so.
    pub(crate) exact: bool,
}

impl Kernel for CodedLinear<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Layout::Coded(format) = self.weight.layout() else { unreachable!("a layout without codes") };
        let table = &table(format.codes);
        let (halves, steps) = (Scales::Steps { halves: true }, Scales::Steps { halves: false });
        match (format.codes, format.scales) {
            (Codes::Nibbles(_), Scales::Half) => self.panels::<S, Nibbles, Half>(simd, table),
            (Codes::Nibbles(_), Scales::Shared) => self.panels::<S, Nibbles, Shared>(simd, table),
            (Codes::Nibbles(_), Scales::HalfMinimum) => self.panels::<S, Nibbles, HalfMinimum>(simd, table),
            (Codes::Nibbles(_), Scales::StepsDrops { halves: false }) => {
                self.panels::<S, Nibbles, StepsDrops>(simd, table);
            }
            (Codes::Nibbles(_), Scales::StepsDrops { halves: true }) => {
                self.panels::<S, Nibbles, HalfStepsDrops>(simd, table);
            }
            (Codes::Nibbles(_), scales) if scales == halves => {
                self.panels::<S, Nibbles, HalfSteps>(simd, table);
            }
            (Codes::Five(_), Scales::Half) => self.panels::<S, Five, Half>(simd, table),
            (Codes::Five(_), Scales::HalfMinimum) => self.panels::<S, Five, HalfMinimum>(simd, table),
            (Codes::Five(_), Scales::StepsDrops { halves: false }) => {
                self.panels::<S, Five, StepsDrops>(simd, table);
            }
            (Codes::Six(_), scales) if scales == halves => self.panels::<S, Six, HalfSteps>(simd, table),
            (Codes::Book(_), Scales::Half) => self.panels::<S, Book, Half>(simd, table),
            (Codes::Book(_), Scales::Brain) => self.panels::<S, Book, Brain>(simd, table),
            (Codes::Book(_), scales) if scales == halves => self.panels::<S, Book, HalfSteps>(simd, table),
            (Codes::Book(_), scales) if scales == steps => self.panels::<S, Book, Steps>(simd, table),
            (codes, scales) => unreachable!("no format has {codes:?} and {scales:?}"),
        }
    }
}

impl CodedLinear<'_> {
    #[inline(always)]
    fn panels<S: Simd, U: Unpack, K: Kind>(&self, simd: S, table: &[u8; 16]) {
        let (panel_bytes, row_bytes) = (self.weight.groups() * U::BYTES, self.weight.columns());
        for block in blocks(self.panels.clone(), panel_bytes, self.input.tiles, row_bytes) {
            for panel in block.panels {
                for tile in block.tiles.clone() {
                    match self.input.tiles.width(tile) {
                        1 => simd.apart(Meeting::<U, K, 1, true>::new(self, panel, tile, table)),
                        2 => simd.apart(Meeting::<U, K, 2, true>::new(self, panel, tile, table)),
                        4 => simd.apart(Meeting::<U, K, 4, true>::new(self, panel, tile, table)),
                        _ if block.again || tile > block.tiles.start => {
                            simd.apart(Meeting::<U, K, 8, false>::new(self, panel, tile, table))
                        }
                        _ => simd.apart(Meeting::<U, K, 8, true>::new(self, panel, tile, table)),
                    }
                }
            }
        }
    }
}

/// A panel and a tile of `T` rows; with `FETCH` memory is asked for what comes next.
struct Meeting<'a, U, K, const T: usize, const FETCH: bool> {
    linear: &'a CodedLinear<'a>,
    panel: usize,
    tile: usize,
    table: &'a [u8; 16],
    kinds: PhantomData<(U, K)>,
}

impl<'a, U, K, const T: usize, const FETCH: bool> Meeting<'a, U, K, T, FETCH> {
    #[inline(always)]
    fn new(linear: &'a CodedLinear<'a>, panel: usize, tile: usize, table: &'a [u8; 16]) -> Self {
        Meeting { linear, panel, tile, table, kinds: PhantomData }
    }
}

impl<U: Unpack, K: Kind, const T: usize, const FETCH: bool> Kernel for Meeting<'_, U, K, T, FETCH> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Meeting { linear, panel, tile, table, .. } = self;
        let sums = multiply::<S, U, K, T, FETCH>(simd, linear, panel, tile, table);
        linear.output.store(simd, panel, linear.input.tiles, tile, &sums, true);
    }
}

/// The sums of a panel with `T` rows.
#[inline(always)]
fn multiply<S: Simd, U: Unpack, K: Kind, const T: usize, const FETCH: bool>(
    simd: S,
    linear: &CodedLinear<'_>,
    panel: usize,
    tile: usize,
    table: &[u8; 16],
) -> [S::F32; T] {
    let (weight, tile) = (linear.weight, linear.input.tile(tile));
    let weights = weight.weights(panel..panel + 1);
    let record = Record::<S, U, K> {
        simd,
        scales: weight.scale_bytes(panel),
        factor: weight.layout().scale_factor(),
        exact: linear.exact,
        table,
        kinds: PhantomData,
    };
    let mut sums = [simd.splat(0.0); T];
    let row_scales = tile.scales.as_chunks::<T>().0;
    for ((index, weights), row_scales) in weights.chunks_exact(K::SPAN * U::BYTES).enumerate().zip(row_scales)
    {
        if FETCH && (K::SCALES.has_halves() || K::SCALES.has_drops()) {
            record.fetch(index);
        }
        let inner = match K::SCALES {
            Scales::Shared => record.multiply_shared::<T, FETCH>(index, weights, tile),
            Scales::Steps { .. } | Scales::StepsDrops { .. } => {
                record.multiply_steps::<T, FETCH>(index, weights, tile)
            }
            _ => record.multiply::<T, FETCH>(index, weights, tile),
        };
        for t in 0..T {
            sums[t] = simd.mul_add(inner[t], simd.splat(row_scales[t]), sums[t]);
        }
    }
    sums
}
