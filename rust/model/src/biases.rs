//! Biases beside weights: which there must be, and those of matrices that are several weights.

use infer_kernels::Format;

use crate::ModelError;
use crate::places::Part;
use crate::program::MatrixKey;
use crate::step::{Role, WeightKey};
use crate::weights::{Loader, Source, values};

impl Loader<'_> {
    /// The format in memory and the bias of a matrix whose weights are packed already.
    pub fn outline(&self, key: &MatrixKey) -> Result<(Format, Option<Vec<f32>>), ModelError> {
        let mut biases = Vec::new();
        let mut format = None;
        for (part, &rows) in key.parts.iter().zip(&key.rows) {
            if self.checkpoint.dummy.is_some() {
                biases.push((self.no_bias(part, rows), rows));
                format.get_or_insert(self.target(part.role, self.stored(part, rows)?.format));
                continue;
            }
            let (tensor, place) = self.find(part, rows)?;
            let chosen = self.permuted(part.role, place.rows(rows));
            let bias = self.chosen_bias(part, &place, &chosen)?;
            biases.push((bias, rows));
            format.get_or_insert(self.target(part.role, self.format_of(tensor)?));
        }
        Ok((format.unwrap_or(Format::F32), joined(biases)))
    }

    /// The values of a weight's bias that belong to these of its rows.
    pub fn chosen_bias(
        &self,
        key: &WeightKey,
        part: &Part,
        chosen: &[usize],
    ) -> Result<Option<Vec<f32>>, ModelError> {
        let all = self.bias(key, &part.name, part.total)?;
        Ok(all.map(|all| chosen.iter().filter_map(|row| all.get(*row).copied()).collect()))
    }

    /// Whether the configuration says that there is a bias beside a weight.
    fn wants_bias(&self, key: &WeightKey) -> bool {
        let biases = self.spec.biases;
        match key.role {
            Role::Query | Role::Key | Role::Value => biases.qkv,
            Role::Output => biases.output,
            Role::Gate | Role::Up | Role::Down => biases.mlp,
            _ => false,
        }
    }

    /// The bias beside a random weight: zeros.
    pub fn no_bias(&self, key: &WeightKey, rows: usize) -> Option<Vec<f32>> {
        self.wants_bias(key).then(|| vec![0.0; rows])
    }

    /// The bias beside a weight; there must be one exactly if the configuration says so. (GGUF metadata do not say.)
    fn bias(&self, key: &WeightKey, name: &str, total: usize) -> Result<Option<Vec<f32>>, ModelError> {
        let wanted = self.wants_bias(key);
        let name = format!("{name}.bias");
        let found = match wanted || self.checkpoint.is_gguf() {
            true => self.tensor(&name),
            false => None, // if there is one, check_all_read refuses it
        };
        let Some(tensor) = found else {
            let missing = wanted && !self.checkpoint.is_gguf();
            return if missing { Err(ModelError::MissingTensor { name }) } else { Ok(None) };
        };
        if tensor.info.shape[..] != [total] {
            let (found, expected) = (tensor.info.shape.clone(), format!("{total} values"));
            return Err(ModelError::Shape { name, found, expected });
        }
        values(self.checkpoint, tensor).map(Some)
    }
}

/// The biases of a matrix's parts, zeros for parts that have none; none if no part has one.
pub(crate) fn joined_bias(sources: &[Source<'_>]) -> Option<Vec<f32>> {
    joined(sources.iter().map(|source| (source.bias.clone(), source.outputs())).collect())
}

fn joined(biases: Vec<(Option<Vec<f32>>, usize)>) -> Option<Vec<f32>> {
    let any = biases.iter().any(|(bias, _)| bias.is_some());
    let all = biases.into_iter().flat_map(|(bias, rows)| bias.unwrap_or_else(|| vec![0.0; rows]));
    any.then(|| all.collect())
}
