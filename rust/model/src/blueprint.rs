//! A model for a backend outside of this crate: its program, and its weights one at a time, in plain numbers.
//!
//! What names, fused tensors, row orders and constants a checkpoint has is undone here, by the same loader that packs for the CPU, so a
//! backend knows only the program's matrices and vectors. Products of the same input are merged where their formats are the same, so that
//! a backend may keep a matrix in one format. Weights are read where the backend wants them (a pinned buffer): never is more than one of them
//! in memory, however large the model is.

use infer_kernels::{Format, KvCache, KvLayer, Precision};

use crate::checkpoint::Checkpoint;
use crate::fingerprint::{self, Fingerprint};
use crate::kv::KvTypes;
use crate::loading::tied_head;
use crate::quantization::unsuitable;
use crate::reading::{PlainType, RowForm, check_rows, convert};
use crate::rope::RopeTable;
use crate::step::{Role, WeightKey};
use crate::weights::{Loader, Source, Table, joined_bias};
use crate::{ModelError, ModelSpec, Program, Quantization, dummy};

/// Rows of a weight that are stored alike.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StoredRows {
    /// How many.
    pub rows: usize,
    /// Their format.
    pub stored: Format,
    /// The format that a backend is to compute with: the same, unless they are to be rounded.
    pub target: Format,
    /// Where they are stored as 8-bit floats (E4M3) with scales, how many columns share one; `stored` and `target` are then what
    /// they are as plain numbers.
    pub group: Option<usize>,
}

/// A checked checkpoint, ready to be read weight by weight.
pub struct Blueprint {
    checkpoint: Checkpoint,
    program: Program,
    kv_types: KvTypes,
    kv_layers: Vec<KvLayer>,
    element: PlainType,
    quantization: Option<&'static Quantization>,
    fingerprint: Fingerprint,
}

impl Blueprint {
    /// Writes the program and checks that every weight is there, in a shape that fits, and none is left over.
    ///
    /// `backend` names who will compute: cached keys and values of two backends are never taken for each other. `quantization` says to
    /// which formats the backend is to round weights that are stored as floats.
    ///
    /// # Errors
    /// Whatever is wrong with the checkpoint, types for layers that it has not, or a wish to round what is rounded already.
    pub fn new(
        checkpoint: Checkpoint,
        kv_types: KvTypes,
        element: PlainType,
        quantization: Option<&'static Quantization>,
        backend: &str,
    ) -> Result<Self, ModelError> {
        let quantization = checkpoint.rounding(quantization)?;
        let kv_layers = kv_types.layers(&checkpoint.spec)?;
        let mut program = Program::new(&checkpoint.spec);
        let loader = Loader::new(&checkpoint, quantization, element.format()).outside();
        program.fuse(|left, right| loader.may_merge(left, right));
        if checkpoint.dummy.is_none() {
            check(&loader, &program).map_err(|error| error.at(checkpoint.path()))?;
        }
        let precision = match element {
            PlainType::F32 => Precision::Exact,
            PlainType::Bf16 => Precision::Auto,
        };
        let fingerprint = fingerprint::of(&checkpoint, quantization, precision, &kv_layers, backend);
        fingerprint.get()?;
        Ok(Self { checkpoint, program, kv_types, kv_layers, element, quantization, fingerprint })
    }

    /// What the model is.
    #[must_use]
    pub fn spec(&self) -> &ModelSpec {
        &self.checkpoint.spec
    }

    /// The files.
    #[must_use]
    pub fn checkpoint(&self) -> &Checkpoint {
        &self.checkpoint
    }

    /// Its steps; matrices without parts were merged into others.
    #[must_use]
    pub fn program(&self) -> &Program {
        &self.program
    }

    /// The type of weights.
    #[must_use]
    pub fn element(&self) -> PlainType {
        self.element
    }

    /// Types of keys and values as they were wished for.
    #[must_use]
    pub fn kv_types(&self) -> &KvTypes {
        &self.kv_types
    }

    /// Shape and types of each layer's keys and values.
    #[must_use]
    pub fn kv_layers(&self) -> &[KvLayer] {
        &self.kv_layers
    }

    /// Bytes of one page, all layers together.
    #[must_use]
    pub fn page_bytes(&self) -> usize {
        KvCache::page_bytes(&self.kv_layers)
    }

    /// As [`crate::CpuModel::fingerprint`].
    #[must_use]
    pub fn fingerprint(&self) -> &Fingerprint {
        &self.fingerprint
    }

    /// The matrix of the head, if it is the embedding too.
    #[must_use]
    pub fn tied_head(&self) -> Option<usize> {
        tied_head(self.spec(), &self.program)
    }

    /// (outputs, inputs) of a matrix.
    ///
    /// # Panics
    /// If there is no such matrix.
    #[must_use]
    pub fn matrix_shape(&self, matrix: usize) -> (usize, usize) {
        let key = &self.program.matrices[matrix];
        (key.rows.iter().sum(), key.columns)
    }

    /// How weights that are stored as floats are rounded, if they are.
    #[must_use]
    pub fn quantization(&self) -> Option<&'static Quantization> {
        self.quantization
    }

    /// The formats of a matrix's rows, in their order.
    ///
    /// # Errors
    /// A tensor that does not fit, or whose rows are no whole number of the target's blocks.
    ///
    /// # Panics
    /// If there is no such matrix.
    pub fn matrix_formats(&self, matrix: usize) -> Result<Vec<StoredRows>, ModelError> {
        let (key, loader) = (&self.program.matrices[matrix], self.loader(self.quantization));
        let formats = key.parts.iter().zip(&key.rows).map(|(part, rows)| {
            let stored = loader.stored(part, *rows)?;
            let all = stored_rows(&loader, part.role, (stored.format, stored.name), [*rows, key.columns])?;
            let group = stored.group.map(|group| group.unwrap_or(key.columns));
            Ok(StoredRows { group, ..all })
        });
        formats.collect()
    }

    /// The format of a table's rows.
    ///
    /// # Errors
    /// A model without such a table, or as [`Blueprint::matrix_formats`].
    pub fn table_formats(&self, role: Role) -> Result<StoredRows, ModelError> {
        let Some((rows, columns)) = self.table_shape(role) else { return Err(no_table(role)) };
        let loader = self.loader(self.quantization);
        if self.checkpoint.dummy.is_some() {
            return stored_rows(&loader, role, (dummy::FORMAT, "of random weights"), [rows, columns]);
        }
        let table = loader.stored_table(role, rows)?;
        stored_rows(&loader, role, (table.format, table.name), [rows, columns])
    }

    /// Fills `out` with rows of a matrix, (outputs, inputs), from `first` on, little-endian.
    ///
    /// # Errors
    /// A tensor that does not fit, an `out` that is no whole number of the matrix's rows, or rows to be read as they are stored whose
    /// formats differ.
    ///
    /// # Panics
    /// If there is no such matrix.
    pub fn read_matrix(
        &self,
        matrix: usize,
        first: usize,
        threads: usize,
        form: RowForm,
        out: &mut [u8],
    ) -> Result<(), ModelError> {
        let (rows, _) = self.matrix_shape(matrix);
        let sources = self.loader(None).sources(&self.program.matrices[matrix])?;
        let Some(one) = sources.first().map(|source| &source.table) else { return Ok(()) };
        let alike =
            |other: &Table<'_>| other.format == one.format && other.scaled.is_some() == one.scaled.is_some();
        if form == RowForm::Stored && !sources.iter().all(|source| alike(&source.table)) {
            return Err(ModelError::Request(format!(
                "parts of matrix {matrix} are stored in several formats"
            )));
        }
        let width = form.row_bytes(one);
        let (mut skipped, mut rest) = (check_rows(rows, width, first, out)?.start, out);
        for source in sources {
            let begin = skipped.min(source.outputs());
            let end = source.outputs().min(begin + rest.len() / width);
            skipped -= begin;
            let (part, others) = rest.split_at_mut((end - begin) * width);
            convert(&source, begin..end, form, threads, part);
            rest = others;
        }
        Ok(())
    }

    /// The scales of a matrix of 8-bit floats: for each of its rows one, or one for each group of columns
    /// ([`StoredRows::group`]); none for others.
    ///
    /// # Errors
    /// A tensor that does not fit.
    ///
    /// # Panics
    /// If there is no such matrix.
    pub fn matrix_scales(&self, matrix: usize) -> Result<Vec<f32>, ModelError> {
        let mut scales = Vec::new();
        for source in self.loader(None).sources(&self.program.matrices[matrix])? {
            let Some(scaled) = source.table.scaled else { continue };
            scales.extend(source.row_numbers().iter().flat_map(|row| scaled.row(*row)));
        }
        Ok(scales)
    }

    /// The seed of each part of a matrix whose weights are random, for backends that make them themselves (`dummy.rs`); else none.
    ///
    /// # Panics
    /// If there is no such matrix.
    #[must_use]
    pub fn random_matrix(&self, matrix: usize) -> Option<Vec<(usize, u64)>> {
        let (key, loader) = (&self.program.matrices[matrix], self.loader(None));
        let parts = key.parts.iter().zip(&key.rows);
        parts.map(|(part, rows)| Some((*rows, loader.random_seed(part)?))).collect()
    }

    /// The same of a table.
    #[must_use]
    pub fn random_table(&self, role: Role) -> Option<u64> {
        self.loader(None).random_seed(&WeightKey { role, layer: None, expert: None })
    }

    fn loader(&self, quantization: Option<&'static Quantization>) -> Loader<'_> {
        Loader::new(&self.checkpoint, quantization, self.element.format()).outside()
    }

    /// A matrix's bias, if it has one: (outputs).
    ///
    /// # Errors
    /// A tensor that does not fit.
    ///
    /// # Panics
    /// If there is no such matrix.
    pub fn matrix_bias(&self, matrix: usize) -> Result<Option<Vec<f32>>, ModelError> {
        if self.checkpoint.dummy.is_some() {
            return Ok(self.loader(None).outline(&self.program.matrices[matrix])?.1);
        }
        let sources = self.loader(None).sources(&self.program.matrices[matrix])?;
        Ok(joined_bias(&sources))
    }

    /// Rows and columns of the embedding, or of the learned positions, if the model has them.
    #[must_use]
    pub fn table_shape(&self, role: Role) -> Option<(usize, usize)> {
        let spec = self.spec();
        match role {
            Role::Embedding => Some((spec.vocabulary, spec.hidden)),
            Role::Position => has_positions(spec).then_some((spec.max_positions, spec.hidden)),
            _ => None,
        }
    }

    /// Fills `out` with rows of a table as [`Blueprint::read_matrix`] does.
    ///
    /// # Errors
    /// A model without such a table, or an `out` that is no whole number of its rows.
    pub fn read_table(
        &self,
        role: Role,
        first: usize,
        threads: usize,
        form: RowForm,
        out: &mut [u8],
    ) -> Result<(), ModelError> {
        let Some((rows, _)) = self.table_shape(role) else { return Err(no_table(role)) };
        let source = Source::whole(self.loader(None).stored_table(role, rows)?, rows);
        let range = check_rows(rows, form.row_bytes(&source.table), first, out)?;
        convert(&source, range, form, threads, out);
        Ok(())
    }

    /// A norm's weight and bias. The weight has one value per column of a group, or one per column of all groups.
    ///
    /// # Errors
    /// A tensor that does not fit.
    ///
    /// # Panics
    /// If there is no such vector.
    pub fn vector(&self, vector: usize) -> Result<(Vec<f32>, Option<Vec<f32>>), ModelError> {
        let found = self.loader(None).vector(&self.program.vectors[vector])?;
        Ok((found.weight, found.bias))
    }

    /// Cosines and sines of positions 0 to `positions`, short or long context: (positions, rotary_dim / 2, 2).
    ///
    /// # Panics
    /// If the model has no such rotation.
    #[must_use]
    pub fn rotations(&self, rope: usize, positions: usize, long_context: bool) -> Vec<f32> {
        let spec = &self.spec().ropes[rope];
        let table = RopeTable::new(spec);
        let mut all = Vec::with_capacity(positions * spec.rotary_dim);
        let (mut cos, mut sin) = (Vec::new(), Vec::new());
        for position in 0..positions {
            cos.clear();
            sin.clear();
            table.append(position, long_context, &mut cos, &mut sin);
            all.extend(cos.iter().zip(&sin).flat_map(|(cos, sin)| [*cos, *sin]));
        }
        all
    }
}

/// Whether every weight is there, in a shape that fits, and none is left over.
fn check(loader: &Loader<'_>, program: &Program) -> Result<(), ModelError> {
    let spec = loader.spec;
    for key in program.matrices.iter().filter(|key| !key.parts.is_empty()) {
        loader.sources(key)?;
    }
    program.vectors.iter().try_for_each(|key| loader.vector(key).map(drop))?;
    loader.stored_table(Role::Embedding, spec.vocabulary)?;
    if has_positions(spec) {
        loader.stored_table(Role::Position, spec.max_positions)?;
    }
    loader.check_all_read()
}

/// What rows of a role, in this format and tensor, are to become.
fn stored_rows(
    loader: &Loader<'_>,
    role: Role,
    (stored, name): (Format, &str),
    shape: [usize; 2],
) -> Result<StoredRows, ModelError> {
    let target = loader.target(role, stored);
    match target.row_bytes(shape[1]) {
        Some(_) => Ok(StoredRows { rows: shape[0], stored, target, group: None }),
        None => Err(unsuitable(name, &shape, target)),
    }
}

fn no_table(role: Role) -> ModelError {
    ModelError::Request(format!("this model has no table of the role {role:?}"))
}

fn has_positions(spec: &ModelSpec) -> bool {
    spec.arch.positions == crate::family::Positions::Learned
}
