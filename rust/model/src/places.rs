//! Where a weight is: the tensor that holds it, whole or together with others, and which of its rows in which order.

use crate::ModelError;
use crate::checkpoint::Tensor;
use crate::spec::FeedForward;
use crate::step::{Role, WeightKey};
use crate::weights::Loader;

/// Which rows of a tensor a weight is.
#[derive(Default)]
pub(crate) struct Part {
    pub name: String,
    /// Rows of the whole tensor.
    pub total: usize,
    /// First row.
    first: usize,
    /// (rows taken, rows from one block to the next), for tensors grouped per head.
    block: Option<(usize, usize)>,
}

impl Part {
    /// The rows, in the order of outputs.
    pub fn rows(&self, count: usize) -> Vec<usize> {
        match self.block {
            None => (self.first..self.first + count).collect(),
            Some((taken, step)) => {
                (0..count).map(|row| self.first + row / taken * step + row % taken).collect()
            }
        }
    }
}

impl<'a> Loader<'a> {
    /// The tensor that holds a weight, and which part of it the weight is: a tensor of its own, or part of a fused one.
    pub fn find(&self, key: &WeightKey, rows: usize) -> Result<(Tensor<'a>, Part), ModelError> {
        let key = match key.role {
            Role::Head if self.spec.tied => WeightKey { role: Role::Embedding, ..*key },
            _ => *key,
        };
        let fused = self.fused(&key, rows);
        let own = self.name(&key).ok().map(|name| Part { name, total: rows, ..Part::default() });
        // "up" of a gated network may be the name of gate and up together, so the fused meaning is tried first.
        let candidates = match key.role {
            Role::Up => [fused, own],
            _ => [own, fused],
        };
        let mut tried = Vec::new();
        for part in candidates.into_iter().flatten() {
            let name = format!("{}.weight", part.name);
            match self.tensor(&name) {
                Some(tensor) => return Ok((tensor, part)),
                None => tried.push(name),
            }
        }
        Err(ModelError::MissingTensor { name: tried.join("` or `") })
    }

    /// The part of a fused or stacked tensor that a weight is, if this naming has one.
    fn fused(&self, key: &WeightKey, rows: usize) -> Option<Part> {
        let (names, spec) = (self.names, self.spec);
        let layer = self.layer_prefix(key);
        let part = |name: &str, total: usize, first: usize| {
            (!name.is_empty()).then(|| Part { name: format!("{layer}{name}"), total, first, block: None })
        };
        let (queries, keys, dim) = (spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim, spec.head_dim);
        let qkv = |index: usize, first: usize| {
            let whole = part(names.fused_qkv, queries + 2 * keys, first)?;
            match spec.arch.qkv_per_head && !self.checkpoint.is_gguf() {
                true => Some(Part { first: index * dim, block: Some((dim, 3 * dim)), ..whole }),
                false => Some(whole),
            }
        };
        let gate_up = |first: usize| {
            let gate = format!("{layer}{}.weight", names.gate);
            let fused = spec.arch.gated && self.tensor(&gate).is_none();
            if fused { part(names.fused_gate_up, 2 * rows, first) } else { None }
        };
        let experts = match key.layer.and_then(|layer| spec.layers.get(layer)).map(|layer| layer.feed_forward)
        {
            Some(FeedForward::Experts { count, .. }) => count,
            _ => 1,
        };
        let stacked = |name: &str| part(name, experts * rows, key.expert.unwrap_or(0) * rows);
        match key.role {
            Role::Query => qkv(0, 0),
            Role::Key => qkv(1, queries),
            Role::Value => qkv(2, queries + keys),
            Role::Gate => gate_up(0),
            Role::Up => gate_up(rows),
            Role::ExpertGate => stacked(names.stacked_gate),
            Role::ExpertUp => stacked(names.stacked_up),
            Role::ExpertDown => stacked(names.stacked_down),
            _ => None,
        }
    }

    /// Undoes the row order that llama.cpp's converter gives Q and K: pairs side by side instead of halves.
    pub fn permuted(&self, role: Role, rows: Vec<usize>) -> Vec<usize> {
        let affected = self.checkpoint.is_gguf() && self.spec.arch.gguf_permuted;
        if !affected || !matches!(role, Role::Query | Role::Key) {
            return rows;
        }
        let (dim, half) = (self.spec.head_dim, self.spec.head_dim / 2);
        let moved = |row: usize| {
            let (head, at) = (row / dim, row % dim);
            head * dim + 2 * (at % half) + at / half
        };
        (0..rows.len()).map(|row| rows[moved(row)]).collect()
    }

    fn layer_prefix(&self, key: &WeightKey) -> String {
        key.layer.map(|layer| self.names.layer.replace("{}", &layer.to_string())).unwrap_or_default()
    }

    pub fn name(&self, key: &WeightKey) -> Result<String, ModelError> {
        let names = self.names;
        let own = match key.role {
            Role::Embedding => names.embedding,
            Role::Position => names.position,
            Role::FinalNorm => names.final_norm,
            Role::Head => names.head,
            Role::AttentionNorm => names.attention_norm,
            Role::AttentionPostNorm => names.attention_post_norm,
            Role::FeedForwardNorm => names.feed_forward_norm,
            Role::FeedForwardPostNorm => names.feed_forward_post_norm,
            Role::Query => names.query,
            Role::Key => names.key,
            Role::Value => names.value,
            Role::Output => names.output,
            Role::QueryNorm => names.query_norm,
            Role::KeyNorm => names.key_norm,
            Role::Gate => names.gate,
            Role::Up => names.up,
            Role::Down => names.down,
            Role::Router => names.router,
            Role::ExpertGate => names.expert_gate,
            Role::ExpertUp => names.expert_up,
            Role::ExpertDown => names.expert_down,
            Role::SharedGate => names.shared_gate,
            Role::SharedUp => names.shared_up,
            Role::SharedDown => names.shared_down,
            Role::SharedRouter => names.shared_router,
        };
        if own.is_empty() {
            return Err(ModelError::MissingTensor { name: format!("{key} (this family has none)") });
        }
        let own = key.expert.map_or(own.to_owned(), |expert| own.replace("{}", &expert.to_string()));
        Ok(format!("{}{own}", self.layer_prefix(key)))
    }
}
