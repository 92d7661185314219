//! Weights in compute layouts. Formats are many, layouts are few.
//!
//! A *panel* interleaves 16 output rows, so that a vector holds one lane per output row: sums over the columns run
//! sequentially in every lane, weights stream once and activations are broadcast. Missing rows of the last panel are
//! zeros, and so are missing columns of the last *group* of 32. What a panel holds, column by column:
//!
//! | layout | 64 bytes hold | beside them |
//! |---|---|---|
//! | F32 | one column | |
//! | F16 | two columns, one after the other | |
//! | Bf16 | two columns: low halves the even one, high halves the odd one | |
//! | Int8 | four columns, offset by 128, a lane's four side by side | a half-precision scale per row and 32 columns |
//! | Int4 | eight columns, offset by 8: four in the low nibbles, the next four in the high ones | the same, then a unit per row, see `integer` |
//! | Coded | 32 columns in 256 to 384 bytes, see `coded` | scales and minima as the format has them |

mod activations;
mod ahead;
mod bfloat;
mod blocks;
mod buffer;
mod coded;
mod float;
mod integer;
mod interleave;
mod late;
mod output;
mod pack;
mod paired;
mod round;
mod tiled;
mod unpack;

#[cfg(test)]
pub(crate) use activations::round_ref;
pub(crate) use activations::{Activations, IntegerTiles, Rounding, RowTiles, Tiles, Totals};
pub(crate) use bfloat::{BfloatLinear, Pair};
pub(crate) use coded::CodedLinear;
pub(crate) use float::FloatLinear;
pub(crate) use integer::IntegerLinear;
pub use late::{RowSource, Windows};
pub(crate) use output::Output;
pub use pack::RowHolder;
pub(crate) use paired::{PAIRED_ROWS, PairedLinear};
pub use round::round_rows;
pub(crate) use tiled::{BfloatTiles, ByteTiles, MANY_ROWS, PANELS, PairLine, SpanTiles};

pub(crate) use crate::quant::GROUP;
use crate::quant::Grouped;
use crate::simd::LANES;
use crate::{Context, Format, KernelError};
use buffer::Buffer;
use late::Late;
use std::ops::Range;

#[cfg(not(target_endian = "little"))]
compile_error!("panels are read as little-endian numbers");

/// How the weights of a panel lie. See the [module](self).
#[derive(Clone, Copy, Debug)]
pub(crate) enum Layout {
    F32,
    F16,
    Bf16,
    Int8,
    Int4,
    Coded(&'static Grouped),
}

impl Layout {
    /// The layout that computes with `format`.
    pub(crate) fn of(format: Format) -> Layout {
        if let Some(grouped) = format.as_grouped() {
            return Layout::Coded(grouped);
        }
        match format {
            Format::F32 => Layout::F32,
            Format::F16 => Layout::F16,
            Format::Bf16 => Layout::Bf16,
            Format::Q8_0 => Layout::Int8,
            Format::Q4_0 => Layout::Int4,
            _ => unreachable!("{} has neither groups nor a layout", format.name()),
        }
    }

    /// What a layout of integers wants beside activations of 8 bits; none for layouts without integers.
    pub(crate) fn rounding(self) -> Option<Rounding> {
        let whole =
            |weight_offset, span| Some(Rounding { weight_offset, span, halves: false, totals: Totals::None });
        match self {
            Layout::F32 | Layout::F16 | Layout::Bf16 => None,
            Layout::Int8 => whole(-128, 1),
            Layout::Int4 => whole(-8, integer::INT4_SPAN),
            // Kernels load no offsets beside minima.
            Layout::Coded(format) => Some(Rounding {
                weight_offset: coded::offset(format.codes),
                span: coded::span(format.scales),
                halves: format.scales.has_halves(),
                totals: match format.scales {
                    scales if scales.has_drops() => Totals::Pairs,
                    scales if scales.has_minima() => Totals::Floats,
                    _ => Totals::None,
                },
            }),
        }
    }

    /// What units of scales are multiplied with.
    pub(crate) const fn scale_factor(self) -> f32 {
        match self {
            Layout::Coded(format) => format.factor,
            _ => 1.0,
        }
    }

    /// Bytes of a panel's scales, given its groups.
    fn scale_bytes(self, groups: usize) -> Option<usize> {
        match self {
            Layout::F32 | Layout::F16 | Layout::Bf16 => Some(0),
            Layout::Int8 => groups.checked_mul(2 * LANES),
            Layout::Int4 => groups.checked_mul(2 * LANES)?.checked_add(4 * LANES),
            Layout::Coded(format) => groups.checked_mul(coded::scale_bytes(format.scales)),
        }
    }

    /// Bytes of 32 columns of a panel.
    pub(crate) const fn group_bytes(self) -> usize {
        match self {
            Layout::F32 => GROUP * LANES * 4,
            Layout::F16 | Layout::Bf16 => GROUP * LANES * 2,
            Layout::Int8 => GROUP * LANES,
            Layout::Int4 => GROUP * LANES / 2,
            Layout::Coded(format) => coded::group_bytes(format.codes),
        }
    }
}

/// A weight matrix (rows, columns) in a compute layout.
#[derive(Debug)]
pub struct PackedMatrix {
    format: Format,
    layout: Layout,
    rows: usize,
    columns: usize,
    weights: Buffer, // (panels, panel_bytes)
    scales: Buffer, // of each panel: (groups, 16) of f16 for Int8 and Int4, records for Coded, else nothing; and 16 f32 for Int4
    first: usize,   // of the panels that it has
    late: Option<Late>,
}

impl PackedMatrix {
    /// Packs a matrix of `columns` columns whose rows, each encoded in `format`, lie anywhere: callers may permute
    /// rows and concatenate matrices. `holder` is told of each piece of them; `()` where they are in memory anyway.
    ///
    /// # Errors
    /// When `columns` is no whole number of blocks, a row has another number of bytes than that takes, or memory is
    /// refused.
    pub fn pack(
        context: &Context,
        format: Format,
        columns: usize,
        rows: &[&[u8]],
        holder: &dyn RowHolder,
    ) -> Result<PackedMatrix, KernelError> {
        pack::check(format, columns, rows)?;
        let mut matrix = PackedMatrix::empty(format, columns, rows.len())?;
        pack::fill(context, &mut matrix, rows, None, holder);
        Ok(matrix)
    }

    /// The version of the compute layouts: to be raised whenever any of them lays the same weights otherwise.
    pub const LAYOUT_VERSION: u32 = 2;

    /// What it holds, weights and scales: bytes that the same format, sizes and [`PackedMatrix::LAYOUT_VERSION`] give a meaning.
    pub fn parts(&self) -> [&[u8]; 2] {
        [self.weights.as_slice(), self.scales.as_slice()]
    }

    /// The same, to be filled with what [`PackedMatrix::parts`] gave.
    pub fn parts_mut(&mut self) -> [&mut [u8]; 2] {
        [self.weights.as_mut_slice(), self.scales.as_mut_slice()]
    }

    /// Memory for a matrix in `format`, all zeros: to be filled through [`PackedMatrix::parts_mut`].
    ///
    /// # Errors
    /// When memory is refused.
    pub fn empty(format: Format, columns: usize, rows: usize) -> Result<PackedMatrix, KernelError> {
        let layout = Layout::of(format);
        let panels = rows.div_ceil(LANES);
        let groups = columns.div_ceil(GROUP);
        // The largest size is refused by the allocation, with its message.
        let size =
            |panel: Option<usize>| panel.and_then(|bytes| bytes.checked_mul(panels)).unwrap_or(usize::MAX);
        Ok(PackedMatrix {
            format,
            layout,
            rows,
            columns,
            weights: Buffer::zeroed(size(groups.checked_mul(layout.group_bytes())), "weights")?,
            scales: Buffer::zeroed(size(layout.scale_bytes(groups)), "weight scales")?,
            first: 0,
            late: None,
        })
    }

    /// Number of output rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Number of columns: the width of input rows.
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// Bytes of memory that it takes.
    pub fn bytes(&self) -> usize {
        self.weights.as_slice().len() + self.scales.as_slice().len()
    }

    /// The format its rows came in.
    pub fn format(&self) -> Format {
        self.format
    }

    pub(crate) fn layout(&self) -> Layout {
        self.layout
    }

    /// Panels of 16 rows.
    pub(crate) fn panels(&self) -> usize {
        self.rows.div_ceil(LANES)
    }

    /// Groups of 32 columns per panel.
    pub(crate) fn groups(&self) -> usize {
        self.columns.div_ceil(GROUP)
    }

    /// The weights of some panels.
    #[inline]
    pub(crate) fn weights(&self, panels: Range<usize>) -> &[u8] {
        let bytes = self.groups() * self.layout.group_bytes();
        &self.weights.as_slice()[(panels.start - self.first) * bytes..(panels.end - self.first) * bytes]
    }

    /// Bytes of a panel's scales.
    fn panel_scale_bytes(&self) -> usize {
        self.layout.scale_bytes(self.groups()).unwrap_or_default() // it was allocated
    }

    /// The scales of a panel, whatever they are.
    #[inline]
    pub(crate) fn scale_bytes(&self, panel: usize) -> &[u8] {
        let bytes = self.panel_scale_bytes();
        &self.scales.as_slice()[(panel - self.first) * bytes..][..bytes]
    }

    /// The scales of a panel in Int8 or Int4, as f16 bits: (groups, 16).
    #[inline]
    pub(crate) fn scales(&self, panel: usize) -> &[[u16; LANES]] {
        // SAFETY: any bits are `u16`s, and the buffer is aligned to cache lines.
        let (_, scales, _) = unsafe { self.scale_bytes(panel).align_to::<[u16; LANES]>() };
        &scales[..self.groups()]
    }

    /// What the scales of a panel's rows in Int4 are counted in.
    #[inline]
    pub(crate) fn units(&self, panel: usize) -> &[f32; LANES] {
        let units = &self.scale_bytes(panel)[self.groups() * 2 * LANES..];
        // SAFETY: any bits are `f32`s, and groups of scales are half lines of an aligned buffer.
        &unsafe { units.align_to::<[f32; LANES]>() }.1[0]
    }
}
