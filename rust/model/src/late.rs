//! Weights that are packed later: their rows are read from the checkpoint's files when a step needs them, until there is time to
//! pack them. They are read, not mapped: a file that is cut short meanwhile is an error, and not the end of the process. Of a file that
//! is on the disk alone the system reads ahead, best where threads read near each other and in order. (A thread that reads all
//! matrices in order before they are needed, whether others wait for it or not, gained nothing more: 0.97 to 1.15 of the time; nor
//! did `POSIX_FADV_SEQUENTIAL`, 0.96 to 1.11. Asked by `POSIX_FADV_WILLNEED`, a virtual disk gave 1.3 to 2.1 GB/s, of the 3 that it can.)

use std::borrow::Cow;
use std::fs::File;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::SystemTime;

use infer_kernels::{PackedMatrix, RowSource, Windows};

use crate::ModelError;
use crate::checkpoint::Checkpoint;
use crate::program::MatrixKey;
use crate::weights::{Matrix, Source, Table};

/// What matrices of a model that are packed later share.
#[derive(Debug)]
pub(crate) struct LateFiles {
    path: PathBuf,
    files: Vec<(Arc<File>, Option<SystemTime>)>,
    windows: Arc<Windows>,
    /// Memory for rows that are read with those between them.
    spare: Mutex<Vec<Vec<u8>>>,
    /// Why rows could not be read.
    failed: OnceLock<String>,
}

impl LateFiles {
    /// Of a checkpoint whose files are mapped: none are.
    pub fn new(checkpoint: &Checkpoint) -> Arc<LateFiles> {
        let (path, files) = (checkpoint.path().to_owned(), mapped_files(checkpoint));
        let (windows, spare, failed) = Default::default();
        Arc::new(LateFiles { path, files, windows, spare, failed })
    }

    /// A matrix of rows of mapped files as they are there, if all of its rows are such.
    pub fn matrix(
        self: &Arc<Self>,
        checkpoint: &Checkpoint,
        key: &MatrixKey,
        sources: &[Source<'_>],
    ) -> Result<Option<PackedMatrix>, ModelError> {
        let Some(Table { format, .. }) = sources.first().map(|source| &source.table) else { return Ok(None) };
        let places = sources.iter().map(|source| Some((place(checkpoint, &source.table)?, source)));
        let Some(places) = places.collect::<Option<Vec<_>>>() else { return Ok(None) };
        let row_bytes = sources[0].table.row_bytes();
        let offsets = places.iter().flat_map(|((file, start), source)| {
            source.rows.iter().map(move |row| (*file, (start + row * row_bytes) as u64))
        });
        let rows = self.rows(row_bytes, offsets);
        let count = sources.iter().map(Source::outputs).sum();
        Ok(Some(PackedMatrix::later(*format, key.columns, count, Arc::new(rows), &self.windows)?))
    }

    /// The rows of a table, if it is in a mapped file as it is.
    pub fn table(self: &Arc<Self>, checkpoint: &Checkpoint, table: &Table<'_>) -> Option<LateRows> {
        let (file, start) = place(checkpoint, table)?;
        (!table.bytes.is_empty()).then(|| self.rows(table.row_bytes(), std::iter::once((file, start as u64))))
    }

    /// Rows from where each lies; those after the last one follow it.
    fn rows<'a>(
        self: &Arc<Self>,
        row_bytes: usize,
        offsets: impl Iterator<Item = (&'a Arc<File>, u64)>,
    ) -> LateRows {
        let mut runs: Vec<Run> = Vec::new();
        for (first, (file, offset)) in offsets.enumerate() {
            match runs.last() {
                Some(last) if Arc::ptr_eq(&last.file, file) && last.place(first, row_bytes) == offset => {}
                _ => runs.push(Run { first, file: Arc::clone(file), offset }),
            }
        }
        LateRows { runs, row_bytes, files: Arc::clone(self) }
    }

    fn read(&self, file: &File, out: &mut [u8], offset: u64) {
        if let Err(error) = read_at(file, out, offset) {
            let _ = self.failed.set(error.to_string()); // what failed first is told
        }
    }

    /// Whether everything that was read up to now can be believed.
    ///
    /// # Errors
    /// A file that could not be read, or was changed since it was opened.
    pub fn check(&self) -> Result<(), ModelError> {
        if is_changed(&self.files) {
            let _ = self.failed.set("it was changed".to_owned()); // what failed first is told
        }
        match self.failed.get() {
            None => Ok(()),
            Some(reason) => Err(ModelError::Unread { path: self.path.clone(), reason: reason.clone() }),
        }
    }
}

/// A checkpoint's mapped files, and when each was changed last.
pub(crate) fn mapped_files(checkpoint: &Checkpoint) -> Vec<(Arc<File>, Option<SystemTime>)> {
    let files = checkpoint.files().iter();
    files.filter_map(|file| Some((file.mapped()?.clone(), file.modified()))).collect()
}

/// Whether one of these was changed since.
pub(crate) fn is_changed(files: &[(Arc<File>, Option<SystemTime>)]) -> bool {
    let modified = |file: &File| file.metadata().ok().and_then(|metadata| metadata.modified().ok());
    files.iter().any(|(file, before)| modified(file) != *before)
}

/// Where a tensor's rows begin in a mapped file, if they are there as they are.
fn place<'a>(checkpoint: &'a Checkpoint, table: &Table<'_>) -> Option<(&'a Arc<File>, usize)> {
    let Cow::Borrowed(bytes) = table.bytes else { return None };
    if table.scaled.is_some() {
        return None;
    }
    let (file, range) = checkpoint.place(bytes)?;
    Some((file.mapped()?, range.start))
}

/// Which weights of a model are still to be packed.
#[derive(Debug)]
pub(crate) struct LateWeights {
    pub files: Arc<LateFiles>,
    /// The numbers of matrices; the next one is the last.
    pub left: Vec<usize>,
}

impl LateWeights {
    /// Those of `matrices`, and perhaps tables; none if there are none.
    pub fn of(files: Arc<LateFiles>, matrices: &[Option<Matrix>], tables: bool) -> Option<Self> {
        let late = |index: &usize| matrices[*index].as_ref().is_some_and(|matrix| matrix.packed.is_late());
        let left: Vec<usize> = (0..matrices.len()).rev().filter(late).collect();
        (tables || !left.is_empty()).then_some(Self { files, left })
    }
}

/// Rows of a matrix that lie one after the other in a file.
#[derive(Debug)]
struct Run {
    /// The first one's number in the matrix.
    first: usize,
    file: Arc<File>,
    offset: u64,
}

impl Run {
    /// Where a row is if it belongs to it.
    fn place(&self, row: usize, row_bytes: usize) -> u64 {
        self.offset + ((row - self.first) * row_bytes) as u64
    }
}

/// Rows in files.
#[derive(Debug)]
pub(crate) struct LateRows {
    runs: Vec<Run>,
    row_bytes: usize,
    files: Arc<LateFiles>,
}

impl LateRows {
    pub fn row_bytes(&self) -> usize {
        self.row_bytes
    }

    /// Where some rows are: in which file and where there, and how many bytes that lie one after the other.
    fn pieces(&self, rows: Range<usize>) -> impl Iterator<Item = (&Arc<File>, u64, usize)> {
        let first = self.runs.partition_point(|run| run.first <= rows.start).saturating_sub(1);
        let ends = self.runs[first..].iter().skip(1).map(|run| run.first).chain(std::iter::once(rows.end));
        let runs = self.runs[first..].iter().zip(ends).take_while(move |(run, _)| run.first < rows.end);
        runs.map(move |(run, end)| {
            let (row, end) = (run.first.max(rows.start), end.min(rows.end));
            (&run.file, run.place(row, self.row_bytes), (end - row) * self.row_bytes)
        })
    }

    /// The part of a file that some rows lie in, where they are many pieces and little else lies between them: one read is then faster.
    fn span(&self, rows: Range<usize>) -> Option<(&Arc<File>, Range<u64>)> {
        let (file, mut start, length) = self.pieces(rows.clone()).next()?;
        let (mut end, mut pieces, mut bytes) = (start + length as u64, 0, 0);
        for (other, offset, length) in self.pieces(rows) {
            if !Arc::ptr_eq(file, other) {
                return None;
            }
            (start, end) = (start.min(offset), end.max(offset + length as u64));
            (pieces, bytes) = (pieces + 1, bytes + length as u64);
        }
        (pieces >= MANY && end - start <= 2 * bytes).then_some((file, start..end))
    }
}

/// So many pieces are read together.
const MANY: usize = 4;

impl RowSource for LateRows {
    fn read(&self, rows: Range<usize>, out: &mut [u8]) {
        let mut rest = out;
        let mut next = |length| rest.split_off_mut(..length).unwrap_or_default();
        let Some((file, span)) = self.span(rows.clone()) else {
            for (file, offset, length) in self.pieces(rows) {
                self.files.read(file, next(length), offset);
            }
            return;
        };
        let spare = || self.files.spare.lock().unwrap_or_else(PoisonError::into_inner);
        let mut all = spare().pop().unwrap_or_default();
        let length = (span.end - span.start) as usize;
        if all.len() < length {
            all.resize(length, 0);
        }
        self.files.read(file, &mut all[..length], span.start);
        for (_, offset, length) in self.pieces(rows) {
            let start = (offset - span.start) as usize;
            next(length).copy_from_slice(&all[start..start + length]);
        }
        spare().push(all);
    }
}

#[cfg(unix)]
pub(crate) fn read_at(file: &File, out: &mut [u8], offset: u64) -> std::io::Result<()> {
    std::os::unix::fs::FileExt::read_exact_at(file, out, offset).map_err(|error| match error.kind() {
        std::io::ErrorKind::UnexpectedEof => std::io::Error::other("it was cut short"),
        _ => error,
    })
}

#[cfg(not(unix))]
pub(crate) fn read_at(_: &File, _: &mut [u8], _: u64) -> std::io::Result<()> {
    Err(std::io::ErrorKind::Unsupported.into()) // `FileBytes::mapped` gives no file there
}
