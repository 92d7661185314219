//! Which types the keys and values of each layer have.

use infer_kernels::{KvCache, KvElement, KvLayer};

use crate::{ModelError, ModelSpec};

/// The types of a model's cached keys and values.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KvTypes {
    /// How keys are stored.
    pub keys: KvElement,
    /// How values are stored.
    pub values: KvElement,
    /// Layers that store both as `kept` instead; negative numbers count from the end.
    pub skip_layers: Vec<i64>,
    /// How the layers of `skip_layers` store keys and values.
    pub kept: KvElement,
}

impl KvTypes {
    /// One type for everything.
    #[must_use]
    pub fn all(element: KvElement) -> Self {
        Self { keys: element, values: element, skip_layers: Vec::new(), kept: element }
    }

    /// Shape and types of every layer of a model.
    ///
    /// # Errors
    /// A number in `skip_layers` that is no layer of the model.
    pub fn layers(&self, spec: &ModelSpec) -> Result<Vec<KvLayer>, ModelError> {
        let Self { keys, values, kept, .. } = *self;
        let layer = KvLayer { kv_heads: spec.kv_heads, head_dim: spec.head_dim, keys, values };
        let mut layers = vec![layer; spec.layers.len()];
        let count = layers.len() as i64;
        for &number in &self.skip_layers {
            let index = if number < 0 { number.saturating_add(count) } else { number };
            let Some(skipped) = usize::try_from(index).ok().and_then(|index| layers.get_mut(index)) else {
                return Err(ModelError::Request(format!(
                    "kv_cache_dtype[\"skip_layers\"] must name layers of the model, from {} to {}, got {number}",
                    -count,
                    count - 1
                )));
            };
            *skipped = KvLayer { keys: kept, values: kept, ..layer };
        }
        Ok(layers)
    }

    /// Bytes of one page of a model's cache, all layers together: known before it is loaded.
    ///
    /// # Errors
    /// As [`KvTypes::layers`].
    pub fn page_bytes(&self, spec: &ModelSpec) -> Result<usize, ModelError> {
        Ok(KvCache::page_bytes(&self.layers(spec)?))
    }
}
