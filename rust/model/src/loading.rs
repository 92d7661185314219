//! Weights in memory: packed from the checkpoint, or read as an earlier load packed them.

use std::cmp::Reverse;
use std::fs;
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use infer_kernels::{Context, Format, PackedMatrix, Pool, Precision, RowSource, dequantize};

use crate::late::LateRows;
use crate::packed_cache::{PackedCache, PackedCacheUse, Unusable};
use crate::program::MatrixKey;
use crate::step::Role;
use crate::weights::{Loader, Matrix};
use crate::{ModelError, ModelSpec, Program, fingerprint};

/// Rows that are looked up: embeddings and learned positions.
pub(crate) enum LookupTable {
    /// As the checkpoint stores them.
    Stored { format: Format, row_bytes: usize, bytes: Vec<u8> },
    /// The same, still in its file.
    Late { format: Format, rows: usize, source: LateRows },
    /// The rows of a matrix that is multiplied as well: a tied head.
    Packed { matrix: usize },
}

impl LookupTable {
    /// Writes a row's values.
    pub fn row(&self, matrices: &[Option<Matrix>], row: usize, out: &mut [f32]) {
        match self {
            Self::Stored { format, row_bytes, bytes } => {
                dequantize(*format, &bytes[row * row_bytes..(row + 1) * row_bytes], out);
            }
            Self::Late { format, source, .. } => {
                let mut bytes = vec![0; source.row_bytes()];
                source.read(row..row + 1, &mut bytes);
                dequantize(*format, &bytes, out);
            }
            Self::Packed { matrix } => {
                if let Some(matrix) = &matrices[*matrix] {
                    matrix.packed.unpack_row(row, out);
                }
            }
        }
    }

    /// Bytes that it takes beside the matrices.
    pub fn bytes(&self) -> usize {
        match self {
            Self::Stored { bytes, .. } => bytes.len(),
            Self::Late { rows, source, .. } => rows * source.row_bytes(),
            Self::Packed { .. } => 0,
        }
    }

    /// Whether it is still in its file.
    pub fn is_late(&self) -> bool {
        matches!(self, Self::Late { .. })
    }

    /// Reads it if it is.
    pub fn read_late(&mut self, pool: &Pool) {
        let Self::Late { format, rows, source } = self else { return };
        let row_bytes = source.row_bytes();
        let mut bytes = vec![0; *rows * row_bytes];
        let count = (PIECE / row_bytes.max(1)).max(1);
        let pieces: Vec<_> = bytes.chunks_mut((count * row_bytes).max(1)).map(Mutex::new).collect();
        pool.run(pieces.len(), |index| {
            let mut piece = pieces[index].lock().unwrap_or_else(PoisonError::into_inner);
            let first = index * count;
            source.read(first..first + piece.len() / row_bytes, &mut piece);
        });
        drop(pieces);
        *self = Self::Stored { format: *format, row_bytes, bytes };
    }
}

/// Bytes of a table that a thread reads at a time.
const PIECE: usize = 1 << 20;

/// The weights that are packed, and the embedding.
pub(crate) struct Weights {
    pub matrices: Vec<Option<Matrix>>,
    pub embedding: LookupTable,
}

/// What came of the folder for packed weights, and what its user should know.
pub(crate) type CacheNews = (PackedCacheUse, Option<String>);

impl Weights {
    /// Reads them from the folder for packed weights if they are there, and puts them there if not.
    pub fn load(
        loader: &Loader<'_>,
        program: &Program,
        context: &Context,
        folder: Option<&Path>,
    ) -> Result<(Weights, CacheNews), ModelError> {
        let Some(folder) = folder else {
            return Ok((Self::pack(loader, program, context)?, (PackedCacheUse::Off, None)));
        };
        let cache = PackedCache::new(folder, &name(loader), identity(loader, program, context)?);
        let told = |what: &dyn std::fmt::Display| {
            Some(format!("packed_cache_dir: {}: {what}; weights were packed again", cache.path().display()))
        };
        let mut empty = Self::outline(loader, program)?;
        let warning = match cache.read(&context.pool, empty.parts_mut()) {
            Ok(()) => return Ok((empty, (PackedCacheUse::Read, None))),
            Err(Unusable::Absent) => None,
            Err(Unusable::Broken(reason)) => told(&reason),
        };
        drop(empty);
        let weights = Self::pack(loader, program, context)?;
        match cache.write(&context.pool, &weights.parts()) {
            Ok(()) => Ok((weights, (PackedCacheUse::Written, warning))),
            Err(error) => Ok((weights, (PackedCacheUse::Failed, told(&error)))),
        }
    }

    fn pack(loader: &Loader<'_>, program: &Program, context: &Context) -> Result<Weights, ModelError> {
        let matrix = |key: &MatrixKey| match key.parts.is_empty() {
            true => Ok(None),
            false => loader.matrix(key, context).map(Some),
        };
        // The largest first: while it is packed it may be in memory twice, beside nothing else.
        let mut order: Vec<usize> = (0..program.matrices.len()).collect();
        order.sort_by_key(|&index| Reverse(program.matrices[index].weights()));
        let mut matrices: Vec<Option<Matrix>> = program.matrices.iter().map(|_| None).collect();
        for index in order {
            matrices[index] = matrix(&program.matrices[index])?;
        }
        let embedding = match tied_head(loader.spec, program) {
            Some(matrix) => LookupTable::Packed { matrix },
            None => LookupTable::load(loader, context, Role::Embedding, loader.spec.vocabulary)?,
        };
        Ok(Weights { matrices, embedding })
    }

    /// Memory for them, with biases, which are read from the checkpoint in any case.
    fn outline(loader: &Loader<'_>, program: &Program) -> Result<Weights, ModelError> {
        let matrix = |key: &MatrixKey| {
            if key.parts.is_empty() {
                return Ok(None);
            }
            let (format, bias) = loader.outline(key)?;
            let packed = PackedMatrix::empty(format, key.columns, key.rows.iter().sum())?;
            Ok(Some(Matrix { packed, bias }))
        };
        let matrices = program.matrices.iter().map(matrix).collect::<Result<_, ModelError>>()?;
        let embedding = match tied_head(loader.spec, program) {
            Some(matrix) => LookupTable::Packed { matrix },
            None => LookupTable::outline(loader, Role::Embedding, loader.spec.vocabulary)?,
        };
        Ok(Weights { matrices, embedding })
    }

    /// All bytes, in one order.
    fn parts(&self) -> Vec<&[u8]> {
        let matrices = self.matrices.iter().flatten().flat_map(|matrix| matrix.packed.parts());
        let table = match &self.embedding {
            LookupTable::Stored { bytes, .. } => Some(bytes.as_slice()),
            // What is kept is not put off.
            LookupTable::Late { .. } | LookupTable::Packed { .. } => None,
        };
        matrices.chain(table).collect()
    }

    /// The same, to be filled.
    fn parts_mut(&mut self) -> Vec<&mut [u8]> {
        let matrices = self.matrices.iter_mut().flatten().flat_map(|matrix| matrix.packed.parts_mut());
        let table = match &mut self.embedding {
            LookupTable::Stored { bytes, .. } => Some(bytes.as_mut_slice()),
            LookupTable::Late { .. } | LookupTable::Packed { .. } => None,
        };
        matrices.chain(table).collect()
    }
}

impl LookupTable {
    /// Reads a table, rounded if that is wished for, or finds out how to do that later.
    pub fn load(
        loader: &Loader<'_>,
        context: &Context,
        role: Role,
        rows: usize,
    ) -> Result<LookupTable, ModelError> {
        let table = loader.table(role, rows, context)?;
        let row_bytes = table.row_bytes();
        if let Some(source) = loader.late_table(&table) {
            return Ok(LookupTable::Late {
                format: table.format,
                rows: table.bytes.len() / row_bytes,
                source,
            });
        }
        Ok(LookupTable::Stored { format: table.format, row_bytes, bytes: table.bytes.into_owned() })
    }

    /// Memory for it.
    fn outline(loader: &Loader<'_>, role: Role, rows: usize) -> Result<LookupTable, ModelError> {
        let table = loader.stored_table(role, rows)?;
        let format = loader.target(role, table.format);
        let row_bytes = format.row_bytes(table.columns).unwrap_or(0);
        let all = table.bytes.len() / table.row_bytes().max(1);
        Ok(LookupTable::Stored { format, row_bytes, bytes: vec![0; all * row_bytes] })
    }
}

/// Which file of the folder is a model's: its path, and how it is loaded.
fn name(loader: &Loader<'_>) -> String {
    let path = loader.checkpoint.path();
    let path = fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
    format!("{} {:?}", path.display(), loader.quantization())
}

/// A digest of everything that decides what the weights are packed to.
fn identity(loader: &Loader<'_>, program: &Program, context: &Context) -> Result<[u8; 32], ModelError> {
    let (checkpoint, quantization) = (loader.checkpoint, loader.quantization());
    let contents = fingerprint::of(checkpoint, quantization, Precision::Auto, &[], context.isa.name());
    let mut hasher = blake3::Hasher::new();
    hasher.update(&contents.get()?);
    hasher.update(&PackedMatrix::LAYOUT_VERSION.to_le_bytes());
    let floats = loader.floats();
    hasher.update(format!("{:?} {floats:?} {:?}", checkpoint.stamps(), program.matrices).as_bytes());
    Ok(hasher.finalize().into())
}

/// The matrix of the head, if it is the embedding too.
pub(crate) fn tied_head(spec: &ModelSpec, program: &Program) -> Option<usize> {
    let is_head = |key: &MatrixKey| key.parts.len() == 1 && key.parts[0].role == Role::Head;
    if spec.tied { program.matrices.iter().position(is_head) } else { None }
}
