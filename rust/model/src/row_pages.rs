//! The pages of rows that are packed: mapped piece by piece when their turn comes, and let go of afterwards, so that hardly any
//! weight is in memory twice. (Mapped one by one as they are touched, and let go of a matrix at a time, Q8_0 took 1.3 times as long.)

use std::ops::Range;

use infer_kernels::RowHolder;

use crate::checkpoint::Checkpoint;
use crate::file_bytes::FileBytes;

impl RowHolder for Checkpoint {
    fn begin(&self, rows: &[&[u8]]) {
        if let Some((file, part)) = span(self, rows) {
            file.map(&part);
        }
    }

    fn end(&self, rows: &[&[u8]]) {
        if let Some((file, part)) = span(self, rows) {
            file.release(&part);
        }
    }
}

/// From the first row to the last one, if they are in a file, and little else lies between them.
fn span<'a>(checkpoint: &'a Checkpoint, rows: &[&[u8]]) -> Option<(&'a FileBytes, Range<usize>)> {
    let first = rows.iter().min_by_key(|row| row.as_ptr())?;
    let last = rows.iter().max_by_key(|row| row.as_ptr())?;
    let (file, part) = checkpoint.place(first)?;
    let end = part.start + (last.as_ptr().addr() + last.len() - first.as_ptr().addr());
    let wanted: usize = rows.iter().map(|row| row.len()).sum();
    (end <= file.bytes().len() && end - part.start <= 2 * wanted).then_some((file, part.start..end))
}
