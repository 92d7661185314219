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
//! | Int4 | eight columns, offset by 8: four in the low nibbles, the next four in the high ones | the same |

mod activations;
mod buffer;
mod float;
mod integer;
mod output;
mod pack;
mod unpack;

#[cfg(test)]
pub(crate) use activations::round_ref;
pub(crate) use activations::{Activations, FloatTiles, IntegerTiles};
pub(crate) use float::FloatLinear;
pub(crate) use integer::IntegerLinear;
pub(crate) use output::Output;

use crate::simd::LANES;
use crate::{Format, KernelError, Pool};
use buffer::Buffer;
use std::ops::Range;

#[cfg(not(target_endian = "little"))]
compile_error!("panels are read as little-endian numbers");

/// Columns that share a scale, in layouts that have scales, and the unit of every kernel's loop.
pub(crate) const GROUP: usize = 32;

/// How the weights of a panel lie. See the [module](self).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Layout {
    F32,
    F16,
    Bf16,
    Int8,
    Int4,
}

impl Layout {
    /// The layout that computes with `format`.
    fn of(format: Format) -> Layout {
        match format {
            Format::F32 => Layout::F32,
            Format::F16 => Layout::F16,
            Format::Bf16 => Layout::Bf16,
            Format::Q8_0 => Layout::Int8,
            Format::Q4_0 => Layout::Int4,
            _ => Layout::F32, // exact values
        }
    }

    /// Minus the offset of weights that can be multiplied with activations of 8 bits; none for other layouts.
    pub(crate) const fn weight_offset(self) -> Option<i32> {
        match self {
            Layout::F32 | Layout::F16 | Layout::Bf16 => None,
            Layout::Int8 => Some(-128),
            Layout::Int4 => Some(-8),
        }
    }

    /// Bytes of scales per panel and group.
    const fn scale_bytes(self) -> usize {
        if self.weight_offset().is_some() { LANES * 2 } else { 0 }
    }

    /// Bytes of 32 columns of a panel.
    pub(crate) const fn group_bytes(self) -> usize {
        match self {
            Layout::F32 => GROUP * LANES * 4,
            Layout::F16 | Layout::Bf16 => GROUP * LANES * 2,
            Layout::Int8 => GROUP * LANES,
            Layout::Int4 => GROUP * LANES / 2,
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
    scales: Buffer,  // (panels, groups, 16) of f16 for integer layouts, else nothing
}

impl PackedMatrix {
    /// Packs a matrix of `columns` columns whose rows, each encoded in `format`, lie anywhere: callers may permute
    /// rows and concatenate matrices.
    ///
    /// # Errors
    /// When `columns` is no whole number of blocks, a row has another number of bytes than that takes, or memory is
    /// refused.
    pub fn pack(
        pool: &Pool,
        format: Format,
        columns: usize,
        rows: &[&[u8]],
    ) -> Result<PackedMatrix, KernelError> {
        let row_bytes = pack::check(format, columns, rows)?;
        let layout = Layout::of(format);
        let panels = rows.len().div_ceil(LANES);
        let groups = columns.div_ceil(GROUP);
        // The largest size is refused by the allocation, with its message.
        let size =
            |bytes| panels.checked_mul(groups).and_then(|n| n.checked_mul(bytes)).unwrap_or(usize::MAX);
        let mut matrix = PackedMatrix {
            format,
            layout,
            rows: rows.len(),
            columns,
            weights: Buffer::zeroed(size(layout.group_bytes()), "weights")?,
            scales: Buffer::zeroed(size(layout.scale_bytes()), "weight scales")?,
        };
        debug_assert!(rows.iter().all(|row| row.len() == row_bytes));
        pack::fill(pool, &mut matrix, rows);
        Ok(matrix)
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
        &self.weights.as_slice()[panels.start * bytes..panels.end * bytes]
    }

    /// The scales of some panels of an integer layout, as f16 bits: (panels, groups, 16).
    #[inline]
    pub(crate) fn scales(&self, panels: Range<usize>) -> &[[u16; LANES]] {
        let groups = self.groups();
        // SAFETY: any bits are `u16`s, and the buffer is aligned to cache lines.
        let (_, scales, _) = unsafe { self.scales.as_slice().align_to::<[u16; LANES]>() };
        &scales[panels.start * groups..panels.end * groups]
    }
}
