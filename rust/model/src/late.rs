//! Weights that are packed later: their rows are read from the checkpoint's files when a step needs them, until there is time to
//! pack them. They are read, not mapped: a file that is cut short meanwhile is an error, and not the end of the process.

use std::borrow::Cow;
use std::fs::File;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};
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
    /// Why rows could not be read.
    failed: OnceLock<String>,
}

impl LateFiles {
    /// Of a checkpoint whose files are mapped: none are.
    pub fn new(checkpoint: &Checkpoint) -> Arc<LateFiles> {
        let mapped =
            checkpoint.files().iter().filter_map(|file| Some((file.mapped()?.clone(), file.modified())));
        let (path, files) = (checkpoint.path().to_owned(), mapped.collect());
        Arc::new(LateFiles { path, files, windows: Arc::default(), failed: OnceLock::new() })
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

    /// Whether everything that was read up to now can be believed.
    ///
    /// # Errors
    /// A file that could not be read, or was changed since it was opened.
    pub fn check(&self) -> Result<(), ModelError> {
        let modified = |file: &File| file.metadata().ok().and_then(|metadata| metadata.modified().ok());
        if self.files.iter().any(|(file, before)| modified(file) != *before) {
            let _ = self.failed.set("it was changed".to_owned()); // what failed first is told
        }
        match self.failed.get() {
            None => Ok(()),
            Some(reason) => Err(ModelError::Unread { path: self.path.clone(), reason: reason.clone() }),
        }
    }
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
}

impl RowSource for LateRows {
    fn read(&self, rows: Range<usize>, out: &mut [u8]) {
        let mut run = self.runs.partition_point(|run| run.first <= rows.start).saturating_sub(1);
        let (mut row, mut rest) = (rows.start, out);
        while row < rows.end {
            let next = self.runs.get(run + 1).map_or(rows.end, |next| next.first.min(rows.end));
            let (own, after) = rest.split_at_mut((next - row) * self.row_bytes);
            let from = &self.runs[run];
            if let Err(error) = read_at(&from.file, own, from.place(row, self.row_bytes)) {
                let _ = self.files.failed.set(error.to_string()); // what failed first is told
            }
            (row, rest, run) = (next, after, run + 1);
        }
    }
}

#[cfg(unix)]
fn read_at(file: &File, out: &mut [u8], offset: u64) -> std::io::Result<()> {
    std::os::unix::fs::FileExt::read_exact_at(file, out, offset).map_err(|error| match error.kind() {
        std::io::ErrorKind::UnexpectedEof => std::io::Error::other("it was cut short"),
        _ => error,
    })
}

#[cfg(not(unix))]
fn read_at(_: &File, _: &mut [u8], _: u64) -> std::io::Result<()> {
    Err(std::io::ErrorKind::Unsupported.into()) // `FileBytes::mapped` gives no file there
}
