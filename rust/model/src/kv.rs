//! Which types the keys and values of each layer have, and where they lie: all layers in pages of the same numbers, or those that see
//! only a window in pages of their own.

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

    /// Bytes of one page in those layers that see only a window.
    ///
    /// # Errors
    /// As [`KvTypes::layers`].
    pub fn local_page_bytes(&self, spec: &ModelSpec) -> Result<usize, ModelError> {
        Ok(KvCache::page_bytes(&windowed(&self.layers(spec)?, spec)))
    }
}

/// A page's numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KvPage {
    /// In the layers that see everything; in all layers, where the cache is not split.
    pub page: u32,
    /// In the layers that see only a window, where the cache is split; none: it is not there.
    pub local: Option<u32>,
}

impl From<u32> for KvPage {
    fn from(page: u32) -> Self {
        Self { page, local: None }
    }
}

/// The keys and values of a model.
pub(crate) struct KvCaches {
    full: KvCache,
    /// Those of layers that see only a window, if they have pages of their own.
    local: Option<KvCache>,
    places: Vec<LayerPlace>,
}

/// Where a layer's keys and values are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct LayerPlace {
    /// In the pages of layers that see only a window.
    pub local: bool,
    /// Number of the layer in its cache.
    index: usize,
}

impl KvCaches {
    /// `pages` pages for each of a model's layers, or `local_pages` for those that see only a window.
    pub fn new(
        spec: &ModelSpec,
        layers: &[KvLayer],
        pages: usize,
        local_pages: Option<usize>,
    ) -> Result<Self, ModelError> {
        let mut shapes = [Vec::new(), Vec::new()];
        let mut places = Vec::with_capacity(layers.len());
        for (shape, layer) in layers.iter().zip(&spec.layers) {
            let local = local_pages.is_some() && layer.window.is_some();
            let own = &mut shapes[usize::from(local)];
            places.push(LayerPlace { local, index: own.len() });
            own.push(*shape);
        }
        let full = KvCache::new(&shapes[0], pages)?;
        let local = local_pages.map(|pages| KvCache::new(&shapes[1], pages)).transpose()?;
        Ok(Self { full, local, places })
    }

    /// Pages, and pages of the layers that see only a window.
    pub fn pages(&self) -> (usize, Option<usize>) {
        (self.full.pages(), self.local.as_ref().map(KvCache::pages))
    }

    /// Where a layer of the model lies.
    pub fn place(&self, layer: usize) -> LayerPlace {
        self.places[layer]
    }

    /// The cache that has a layer, and its number there.
    pub fn layer(&self, layer: usize) -> (&KvCache, usize) {
        let LayerPlace { local, index } = self.places[layer];
        let split = self.local.as_ref().filter(|_| local);
        (split.unwrap_or(&self.full), index)
    }

    /// The same to write.
    pub fn layer_mut(&mut self, layer: usize) -> (&mut KvCache, usize) {
        let LayerPlace { local, index } = self.places[layer];
        let split = self.local.as_mut().filter(|_| local);
        (split.unwrap_or(&mut self.full), index)
    }

    /// Copies a page, in the layers that have it.
    pub fn copy_page(&mut self, from: KvPage, to: KvPage) -> Result<(), ModelError> {
        self.check(from)?;
        self.check(to)?;
        self.full.copy_page(from.page, to.page);
        if let (Some(local), Some(from), Some(to)) = (&mut self.local, from.local, to.local) {
            local.copy_page(from, to);
        }
        Ok(())
    }

    /// See [`crate::CpuModel::export_page`].
    pub fn export_page(&self, page: KvPage, bytes: &mut Vec<u8>) -> Result<(), ModelError> {
        self.check(page)?;
        self.full.export_page(page.page, bytes);
        if let Some(local) = &self.local {
            let length = bytes.len() + local.bytes_of_page();
            if let Some(page) = page.local {
                let mut more = Vec::new();
                local.export_page(page, &mut more);
                bytes.append(&mut more);
            }
            bytes.resize(length, 0);
        }
        Ok(())
    }

    /// See [`crate::CpuModel::import_page`].
    pub fn import_page(&mut self, page: KvPage, bytes: &[u8]) -> Result<(), ModelError> {
        self.check(page)?;
        let expected = self.full.bytes_of_page() + self.local.as_ref().map_or(0, KvCache::bytes_of_page);
        if bytes.len() != expected {
            return Err(ModelError::Request(format!("a page takes {expected} bytes, got {}", bytes.len())));
        }
        let (full, rest) = bytes.split_at(self.full.bytes_of_page());
        self.full.import_page(page.page, full)?;
        if let (Some(local), Some(page)) = (&mut self.local, page.local) {
            local.import_page(page, rest)?;
        }
        Ok(())
    }

    fn check(&self, page: KvPage) -> Result<(), ModelError> {
        let (pages, local_pages) = self.pages();
        let outside = |page: u32, pages: usize| (page as usize >= pages).then_some((page, pages));
        let wrong = outside(page.page, pages)
            .or_else(|| page.local.zip(local_pages).and_then(|(page, pages)| outside(page, pages)));
        match wrong {
            None => Ok(()),
            Some((page, pages)) => {
                Err(ModelError::Request(format!("page {page} is outside the cache of {pages} pages")))
            }
        }
    }
}

/// The layers that see only a window.
pub(crate) fn windowed(layers: &[KvLayer], spec: &ModelSpec) -> Vec<KvLayer> {
    let windowed = layers.iter().zip(&spec.layers).filter(|(_, layer)| layer.window.is_some());
    windowed.map(|(shape, _)| *shape).collect()
}
