//! The tensors of a file that is to be written: what is known of each before its bytes are made.

use std::collections::HashMap;

use infer_formats::{TensorInfo, TensorType};
use infer_kernels::{Context, Format, round_rows};

use crate::checkpoint::{Checkpoint, Tensor};
use crate::step::Role;
use crate::weights::{Loader, format_of, unroundable, values};
use crate::{ModelError, Program, Quantization};

/// A tensor to write.
pub(super) struct Planned {
    pub info: TensorInfo,
    pub source: Source,
}

/// What its bytes are made of.
pub(super) enum Source {
    /// Rows of `columns` weights of one or more tensors (the experts of a layer), each in the same order.
    Rows { names: Vec<String>, order: Vec<usize>, columns: usize, transposed: bool, target: Format },
    /// All values of a tensor in this order, each plus a constant, in `f32`.
    Values { name: String, order: Option<Vec<usize>>, plus: f32 },
    /// These.
    Given(Vec<u8>),
    /// A tensor's bytes as they are.
    Copy(String),
}

impl Planned {
    /// A tensor of this name; its place in the file is the writer's affair.
    pub fn new(name: String, tensor_type: TensorType, shape: Vec<usize>, source: Source) -> Planned {
        Planned { info: TensorInfo { name, tensor_type, shape, range: 0..0 }, source }
    }

    /// Makes its bytes.
    pub fn bytes(&self, loader: &Loader<'_>, context: &Context) -> Result<Vec<u8>, ModelError> {
        match &self.source {
            Source::Given(bytes) => Ok(bytes.clone()),
            Source::Copy(name) => Ok(found(loader.checkpoint, name)?.bytes.to_vec()),
            Source::Values { name, order, plus } => {
                let all = values(loader.checkpoint, found(loader.checkpoint, name)?)?;
                let ordered =
                    order.as_ref().map(|order| order.iter().map(|at| all[*at]).collect()).unwrap_or(all);
                Ok(ordered.iter().flat_map(|value| (value + plus).to_le_bytes()).collect())
            }
            Source::Rows { names, order, columns, transposed, target } => {
                let mut out = Vec::new();
                for name in names {
                    let table = loader.whole(found(loader.checkpoint, name)?, *columns, *transposed)?;
                    let (width, stored) = (table.row_bytes(), found(loader.checkpoint, name)?.bytes);
                    let rows: Vec<&[u8]> =
                        order.iter().map(|row| &table.bytes[row * width..(row + 1) * width]).collect();
                    match table.format == *target {
                        true => rows.iter().for_each(|row| out.extend_from_slice(row)),
                        false => out.extend(
                            round_rows(context, table.format, *target, *columns, &rows)
                                .map_err(|error| unroundable(&table, *target, error))?,
                        ),
                    }
                    loader.checkpoint.release(stored);
                }
                Ok(out)
            }
        }
    }
}

fn found<'a>(checkpoint: &'a Checkpoint, name: &str) -> Result<Tensor<'a>, ModelError> {
    checkpoint.tensor(name).ok_or_else(|| ModelError::MissingTensor { name: name.to_owned() })
}

/// The container's name of a format.
pub(super) fn tensor_type(format: Format) -> Result<TensorType, ModelError> {
    let found = TensorType::ALL.iter().copied().find(|stored| stored.name() == format.name());
    found.ok_or_else(|| ModelError::Quantization(format!("{} is no type of a tensor", format.name())))
}

/// The format that a tensor of this role gets.
pub(super) fn target(
    quantization: Option<&Quantization>,
    role: Role,
    tensor: Tensor<'_>,
    columns: usize,
) -> Result<Format, ModelError> {
    let stored = format_of(tensor)?;
    let Some(target) =
        quantization.and_then(|quantization| quantization.format(role, quantization.ends_of(columns)))
    else {
        return Ok(stored);
    };
    match target.row_bytes(columns) {
        Some(_) => Ok(target),
        None => Err(crate::quantization::unsuitable(&tensor.info.name, &tensor.info.shape, target)),
    }
}

/// The role of every tensor that the model multiplies with or looks rows up in, and the columns of its matrix.
pub(super) fn roles(loader: &Loader<'_>) -> Result<HashMap<String, (Role, usize)>, ModelError> {
    let spec = loader.spec;
    let mut roles = HashMap::new();
    for key in &Program::new(spec).matrices {
        for (part, rows) in key.parts.iter().zip(&key.rows) {
            let (_, place) = loader.find(part, *rows)?;
            roles.insert(format!("{}.weight", place.name), (part.role, key.columns));
        }
    }
    for role in [Role::Embedding, Role::Position] {
        if let Ok(name) = loader.name(&crate::step::WeightKey { role, layer: None, expert: None }) {
            roles.insert(format!("{name}.weight"), (role, spec.hidden));
        }
    }
    Ok(roles)
}

/// The names of all tensors, in the order of the files.
pub(super) fn in_order(checkpoint: &Checkpoint) -> Vec<String> {
    let mut names: Vec<(usize, usize, String)> = checkpoint.places().collect();
    names.sort_unstable();
    names.into_iter().map(|(_, _, name)| name).collect()
}
