//! `DeviceModel`: a model as a backend in Python gets it, its program and its weights one at a time.

use std::path::PathBuf;
use std::sync::Arc;

use infer_engine::EngineConfig;
use infer_kernels::{KvElement, Precision};
use infer_model::{Blueprint, PlainType, Role, RowForm, StoredRows};
use numpy::{PyArray1, PyArray3, PyArrayMethods, PyReadwriteArray1};
use pyo3::prelude::*;
use pyo3::types::PyDict;

use crate::backend::Outside;
use crate::convert::{Arg, Int};
use crate::error::{guarded, refusal};
use crate::kv::{element_name, read_kv_types};
use crate::load::{open, precision};
use crate::settings::{MAX_THREADS, read_load_format, read_quantization};
use crate::steps::{columns, fields};
use crate::wait::interruptible;

/// A norm's weight and bias.
type Vector<'py> = (Bound<'py, PyArray1<f32>>, Option<Bound<'py, PyArray1<f32>>>);

/// How many rows, the format in which they are stored, and that to compute with.
type Formats = (usize, &'static str, &'static str);

/// A checked checkpoint, ready to be read weight by weight.
#[pyclass(frozen, module = "infer._core")]
pub struct DeviceModel {
    blueprint: Arc<Blueprint>,
    threads: usize,
}

#[pymethods]
impl DeviceModel {
    #[new]
    #[pyo3(signature = (path, *, backend, dtype=Arg::of("auto".to_owned()), kv_cache_dtype=None, quantization=None, mmap=Arg::of(true),
        load_format=Arg::of("auto".to_owned()), seed=Arg::int(0)),
        text_signature = "(path, *, backend, dtype='auto', kv_cache_dtype='auto', quantization=None, mmap=True, load_format='auto', seed=0)")]
    fn new(
        py: Python<'_>,
        path: Arg<PathBuf>,
        backend: String,
        dtype: Arg<String>,
        kv_cache_dtype: Option<Bound<'_, PyAny>>,
        quantization: Option<Arg<String>>,
        mmap: Arg<bool>,
        load_format: Arg<String>,
        seed: Arg<Int>,
    ) -> PyResult<Self> {
        guarded(|| {
            let (element, auto) = match precision(&dtype.get("dtype", "a string")?)? {
                Precision::Exact => (PlainType::F32, KvElement::F32),
                Precision::Auto => (PlainType::Bf16, KvElement::Bf16),
            };
            let kv_types = read_kv_types(kv_cache_dtype.as_ref(), auto)?;
            let quantization = read_quantization(quantization)?;
            let (path, mmap) = (path.get("path", "a path")?, mmap.flag("mmap")?);
            let dummy = read_load_format(load_format, seed.fit("seed", "from 0 to 2**64 - 1")?)?;
            let blueprint = interruptible(py, "infer-load", move || {
                let checkpoint = open(&path, mmap, dummy)?;
                let made = Blueprint::new(checkpoint, kv_types, element, quantization, &backend);
                made.map_err(|error| error.to_string())
            })?;
            Ok(Self {
                blueprint: Arc::new(blueprint),
                threads: infer_kernels::default_threads().min(MAX_THREADS),
            })
        })
    }

    /// Type of the weights: "f32" or "bf16".
    #[getter]
    fn element(&self) -> &'static str {
        match self.blueprint.element() {
            PlainType::F32 => "f32",
            PlainType::Bf16 => "bf16",
        }
    }

    /// Names and widths of the buffers, and whether they have the wanted rows only.
    #[getter]
    fn buffers(&self) -> Vec<(&'static str, usize, bool)> {
        let buffers = self.blueprint.program().buffers.iter();
        buffers.map(|buffer| (buffer.name, buffer.width, buffer.wanted)).collect()
    }

    /// Kind and fields of every step.
    #[getter]
    fn steps<'py>(&self, py: Python<'py>) -> PyResult<Vec<(&'static str, Bound<'py, PyDict>)>> {
        self.blueprint.program().steps.iter().map(|step| fields(py, step)).collect()
    }

    /// The same with rows selected early.
    #[getter]
    fn narrow_steps<'py>(&self, py: Python<'py>) -> PyResult<Vec<(&'static str, Bound<'py, PyDict>)>> {
        let mut program = self.blueprint.program().clone();
        program.narrow();
        program.steps.iter().map(|step| fields(py, step)).collect()
    }

    /// The logits' buffer, first column and width.
    #[getter]
    fn logits(&self) -> (usize, usize, usize) {
        columns(self.blueprint.program().logits)
    }

    /// (outputs, inputs) of every matrix; no outputs where it was merged into another.
    #[getter]
    fn matrices(&self) -> Vec<(usize, usize)> {
        let count = self.blueprint.program().matrices.len();
        (0..count).map(|matrix| self.blueprint.matrix_shape(matrix)).collect()
    }

    /// Number of the matrix that is the head and the embedding, if they are one.
    #[getter]
    fn tied_head(&self) -> Option<usize> {
        self.blueprint.tied_head()
    }

    /// Types of each layer's keys and values.
    #[getter]
    fn kv_layers(&self) -> Vec<(&'static str, &'static str)> {
        let layers = self.blueprint.kv_layers().iter();
        layers.map(|layer| (element_name(layer.keys), element_name(layer.values))).collect()
    }

    /// Bytes of one page of all layers.
    #[getter]
    fn page_bytes(&self) -> usize {
        self.blueprint.page_bytes()
    }

    /// Most rows whose logits one step of an engine gives.
    fn max_logit_rows(&self, max_num_seqs: usize, max_num_batched_tokens: usize) -> usize {
        let vocabulary = self.blueprint.spec().vocabulary;
        EngineConfig::most_logit_rows(vocabulary, max_num_seqs, max_num_batched_tokens)
    }

    /// Sizes and constants of the model.
    #[getter]
    fn constants<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let spec = self.blueprint.spec();
        let dict = PyDict::new(py);
        dict.set_item("heads", spec.heads)?;
        dict.set_item("kv_heads", spec.kv_heads)?;
        dict.set_item("head_dim", spec.head_dim)?;
        dict.set_item("hidden", spec.hidden)?;
        dict.set_item("vocabulary", spec.vocabulary)?;
        dict.set_item("max_positions", spec.max_positions)?;
        dict.set_item("attention_scale", spec.attention_scale)?;
        dict.set_item("attention_softcap", spec.attention_softcap)?;
        dict.set_item("context_switch", spec.context_switch())?;
        dict.set_item("rotary_dims", spec.ropes.iter().map(|rope| rope.rotary_dim).collect::<Vec<_>>())?;
        Ok(dict)
    }

    /// For each part of a matrix: rows, the format in which they are stored, and that to compute with.
    fn matrix_formats(&self, matrix: usize) -> PyResult<Vec<Formats>> {
        guarded(|| {
            let parts = self.blueprint.matrix_formats(self.known(matrix)?).map_err(refusal)?;
            Ok(parts.into_iter().map(formats).collect())
        })
    }

    /// Columns that share a scale, if all of a matrix is stored as 8-bit floats ("F8_E4M3") with scales of one kind.
    fn matrix_group(&self, matrix: usize) -> PyResult<Option<usize>> {
        guarded(|| {
            let parts = self.blueprint.matrix_formats(self.known(matrix)?).map_err(refusal)?;
            let group = parts.first().and_then(|part| part.group);
            Ok(group.filter(|_| parts.iter().all(|part| part.group == group)))
        })
    }

    /// The scales of such a matrix: float32 (outputs, groups of columns).
    fn matrix_scales<'py>(&self, py: Python<'py>, matrix: usize) -> PyResult<Bound<'py, PyArray1<f32>>> {
        guarded(|| {
            let scales = self.blueprint.matrix_scales(self.known(matrix)?).map_err(refusal)?;
            Ok(PyArray1::from_vec(py, scales))
        })
    }

    /// Rows and seed of each part of a matrix whose weights are random; None where they are read.
    fn random_matrix(&self, matrix: usize) -> PyResult<Option<Vec<(usize, u64)>>> {
        guarded(|| Ok(self.blueprint.random_matrix(self.known(matrix)?)))
    }

    /// The seed of a table whose weights are random.
    fn random_table(&self, table: &str) -> PyResult<Option<u64>> {
        guarded(|| Ok(self.blueprint.random_table(role(table)?)))
    }

    /// Rows, stored format and that to compute with of a table.
    fn table_formats(&self, table: &str) -> PyResult<Formats> {
        guarded(|| self.blueprint.table_formats(role(table)?).map(formats).map_err(refusal))
    }

    /// Fill `out` (bytes) with rows of a matrix from `first` on: as "f32", "bf16", "stored", or None for the type of weights.
    #[pyo3(signature = (matrix, first, out, form=None))]
    fn read_matrix(
        &self,
        py: Python<'_>,
        matrix: usize,
        first: usize,
        mut out: PyReadwriteArray1<'_, u8>,
        form: Option<&str>,
    ) -> PyResult<()> {
        guarded(|| {
            let (matrix, out) = (self.known(matrix)?, out.as_slice_mut().map_err(refusal)?);
            let form = self.form(form)?;
            py.detach(|| self.blueprint.read_matrix(matrix, first, self.threads, form, out)).map_err(refusal)
        })
    }

    /// A matrix's bias, if it has one.
    fn matrix_bias<'py>(
        &self,
        py: Python<'py>,
        matrix: usize,
    ) -> PyResult<Option<Bound<'py, PyArray1<f32>>>> {
        guarded(|| {
            let bias = self.blueprint.matrix_bias(self.known(matrix)?).map_err(refusal)?;
            Ok(bias.map(|bias| PyArray1::from_vec(py, bias)))
        })
    }

    /// (rows, columns) of the table "embedding" or "position", if the model has it.
    fn table_shape(&self, table: &str) -> PyResult<Option<(usize, usize)>> {
        guarded(|| Ok(self.blueprint.table_shape(role(table)?)))
    }

    /// Fill `out` (bytes) with rows of a table from `first` on, in a form of `read_matrix`.
    #[pyo3(signature = (table, first, out, form=None))]
    fn read_table(
        &self,
        py: Python<'_>,
        table: &str,
        first: usize,
        mut out: PyReadwriteArray1<'_, u8>,
        form: Option<&str>,
    ) -> PyResult<()> {
        guarded(|| {
            let (role, out) = (role(table)?, out.as_slice_mut().map_err(refusal)?);
            let form = self.form(form)?;
            py.detach(|| self.blueprint.read_table(role, first, self.threads, form, out)).map_err(refusal)
        })
    }

    /// A norm's weight and bias.
    fn vector<'py>(&self, py: Python<'py>, vector: usize) -> PyResult<Vector<'py>> {
        guarded(|| {
            let count = self.blueprint.program().vectors.len();
            if vector >= count {
                return Err(refusal(format!("vector must be below {count}, got {vector}")));
            }
            let (weight, bias) = self.blueprint.vector(vector).map_err(refusal)?;
            Ok((PyArray1::from_vec(py, weight), bias.map(|bias| PyArray1::from_vec(py, bias))))
        })
    }

    /// Cosines and sines: (positions, rotary_dim / 2, 2).
    #[pyo3(signature = (rope, positions, *, long_context=false))]
    fn rotations<'py>(
        &self,
        py: Python<'py>,
        rope: usize,
        positions: usize,
        long_context: bool,
    ) -> PyResult<Bound<'py, PyArray3<f32>>> {
        guarded(|| {
            let ropes = &self.blueprint.spec().ropes;
            let Some(spec) = ropes.get(rope) else {
                return Err(refusal(format!("rope must be below {}, got {rope}", ropes.len())));
            };
            let pairs = spec.rotary_dim / 2;
            let values = py.detach(|| self.blueprint.rotations(rope, positions, long_context));
            PyArray1::from_vec(py, values).reshape([positions, pairs, 2])
        })
    }
}

impl DeviceModel {
    fn form(&self, form: Option<&str>) -> PyResult<RowForm> {
        match form {
            None => Ok(RowForm::Plain(self.blueprint.element())),
            Some("f32") => Ok(RowForm::Plain(PlainType::F32)),
            Some("bf16") => Ok(RowForm::Plain(PlainType::Bf16)),
            Some("stored") => Ok(RowForm::Stored),
            Some(other) => {
                Err(refusal(format!("form must be None, \"f32\", \"bf16\" or \"stored\", got {other:?}")))
            }
        }
    }

    fn known(&self, matrix: usize) -> PyResult<usize> {
        let count = self.blueprint.program().matrices.len();
        match matrix < count {
            true => Ok(matrix),
            false => Err(refusal(format!("matrix must be below {count}, got {matrix}"))),
        }
    }
}

/// Model, draft model, and bytes that the device has free for keys and values.
pub type OutsideArgs<'py> = (PyRef<'py, DeviceModel>, Option<PyRef<'py, DeviceModel>>, u64);

/// The models of an executor outside.
pub fn read_outside((model, draft, free): OutsideArgs<'_>) -> Outside {
    let blueprint = |model: PyRef<'_, DeviceModel>| Arc::clone(&model.blueprint);
    Outside { model: blueprint(model), draft: draft.map(blueprint), free }
}

fn formats(rows: StoredRows) -> Formats {
    match rows.group {
        Some(_) => (rows.rows, "F8_E4M3", "F8_E4M3"),
        None => (rows.rows, rows.stored.name(), rows.target.name()),
    }
}

fn role(table: &str) -> PyResult<Role> {
    match table {
        "embedding" => Ok(Role::Embedding),
        "position" => Ok(Role::Position),
        _ => Err(refusal(format!("table must be \"embedding\" or \"position\", got {table:?}"))),
    }
}
