//! Matrices whose rows are still where they came from. A product packs each panel that it comes to into memory that stays in a
//! thread's cache, and forgets it again: the same panels by the same kernels give the same bits, and a model answers before its
//! weights are packed. Writing panels to fresh memory is what packing spends most of its time on: a first token of a Q8_0 file
//! comes after half the time.

use super::PackedMatrix;
use super::buffer::Buffer;
use super::pack::{fill_by, fill_panels};
use crate::simd::LANES;
use crate::{Context, Format, Isa, KernelError};
use std::fmt::Debug;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

/// Whoever has the rows of a matrix that is packed later.
pub trait RowSource: Debug + Send + Sync {
    /// Fills `out` with the bytes of some rows, one after the other. A source that cannot leaves `out` as it is, and its owner
    /// must not believe what is computed from then on: numbers, but any.
    fn read(&self, rows: Range<usize>, out: &mut [u8]);
}

/// Memory for panels that are packed for one use, lent to a thread at a time; one for all matrices of a model.
#[derive(Debug, Default)]
pub struct Windows(Mutex<Vec<Window>>);

#[derive(Debug, Default)]
struct Window {
    rows: Vec<u8>,
    weights: Option<Buffer>,
    scales: Option<Buffer>,
}

/// Bytes of rows in a window, about: with their panels they stay in the second cache.
const WINDOW: usize = 256 << 10;

/// Where the rows of a matrix are.
#[derive(Debug)]
pub(super) struct Late {
    source: Arc<dyn RowSource>,
    windows: Arc<Windows>,
    row_bytes: usize,
}

impl Windows {
    fn with<R>(&self, body: impl FnOnce(&mut Window) -> R) -> R {
        let free = || self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut window = free().pop().unwrap_or_default();
        let result = body(&mut window);
        free().push(window);
        result
    }
}

impl Window {
    /// The bytes of some rows.
    fn read(&mut self, late: &Late, rows: Range<usize>) -> &[u8] {
        let bytes = rows.len() * late.row_bytes;
        if self.rows.len() < bytes {
            self.rows.resize(bytes, 0);
        }
        late.source.read(rows, &mut self.rows[..bytes]);
        &self.rows[..bytes]
    }
}

/// Zeros in memory that is there already, if it is enough.
fn zeroed(memory: Option<Buffer>, bytes: usize, what: &'static str) -> Result<Buffer, KernelError> {
    match memory {
        Some(mut buffer) if buffer.as_slice().len() >= bytes => {
            buffer.as_mut_slice()[..bytes].fill(0);
            Ok(buffer)
        }
        _ => Buffer::zeroed(bytes, what),
    }
}

impl PackedMatrix {
    /// A matrix whose rows `source` has, to be packed by [`PackedMatrix::pack_late`]; until then products read them from there.
    /// Its memory is set aside at once, and taken when it is packed.
    ///
    /// # Errors
    /// When `columns` is no whole number of blocks, or memory is refused.
    pub fn later(
        format: Format,
        columns: usize,
        rows: usize,
        source: Arc<dyn RowSource>,
        windows: &Arc<Windows>,
    ) -> Result<PackedMatrix, KernelError> {
        let row_bytes = super::pack::check(format, columns, &[])?;
        let mut matrix = PackedMatrix::empty(format, columns, rows)?;
        matrix.late = Some(Late { source, windows: Arc::clone(windows), row_bytes });
        Ok(matrix)
    }

    /// Packs it if that was put off.
    pub fn pack_late(&mut self, context: &Context) {
        let Some(late) = self.late.take() else { return };
        let rows = self.rows;
        fill_by(context, self, (rows, late.row_bytes), None, |rows, pack| {
            late.windows.with(|window| {
                let bytes = window.read(&late, rows);
                pack(&bytes.chunks_exact(late.row_bytes).collect::<Vec<_>>());
            });
        });
    }

    /// Whether its rows are still to be packed.
    pub fn is_late(&self) -> bool {
        self.late.is_some()
    }

    /// Gives some panels to `body`, of this matrix or, while they are not packed, of its likeness that has no others.
    pub(crate) fn with_panels(
        &self,
        isa: Isa,
        panels: Range<usize>,
        body: impl Fn(&PackedMatrix, Range<usize>),
    ) {
        let Some(late) = &self.late else { return body(self, panels) };
        let count = (WINDOW / (LANES * late.row_bytes).max(1)).max(1);
        for first in panels.clone().step_by(count) {
            let part = first..panels.end.min(first + count);
            late.windows.with(|window| self.with_window(isa, late, window, part, &body));
        }
    }

    fn with_window(
        &self,
        isa: Isa,
        late: &Late,
        window: &mut Window,
        panels: Range<usize>,
        body: impl Fn(&PackedMatrix, Range<usize>),
    ) {
        let groups = panels.len() * self.groups();
        let scale_bytes = panels.len() * self.panel_scale_bytes();
        let (weights, scales) = (window.weights.take(), window.scales.take());
        let lacking = |error: KernelError| panic!("{error}"); // as for a `Vec`, there is no going on without it
        let weights = zeroed(weights, groups * self.layout.group_bytes(), "a panel").unwrap_or_else(lacking);
        let scales = zeroed(scales, scale_bytes, "its scales").unwrap_or_else(lacking);
        let rows = panels.start * LANES..self.rows.min(panels.end * LANES);
        let bytes = window.read(late, rows);
        let rows: Vec<&[u8]> = bytes.chunks_exact(late.row_bytes.max(1)).collect();
        let Self { format, layout, rows: outputs, columns, .. } = *self;
        let first = panels.start;
        let mut part =
            PackedMatrix { format, layout, rows: outputs, columns, weights, scales, first, late: None };
        fill_panels(isa, &mut part, panels.len(), &rows);
        body(&part, panels);
        (window.weights, window.scales) = (Some(part.weights), Some(part.scales));
    }

    /// The bytes of one row as they came, where it is not packed.
    pub(super) fn late_row(&self, row: usize) -> Option<Vec<u8>> {
        let late = self.late.as_ref()?;
        let mut bytes = vec![0; late.row_bytes];
        late.source.read(row..row + 1, &mut bytes);
        Some(bytes)
    }
}
