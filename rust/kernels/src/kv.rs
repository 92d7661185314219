//! The paged cache of keys and values.
//!
//! A page holds `PAGE_TOKENS` consecutive positions of one sequence, for every layer and all of its key/value heads. Pages
//! lie in blocks of `BLOCK_PAGES`:
//!
//! ```text
//! block = (layers, kv_heads, [keys (BLOCK_PAGES, part), values (BLOCK_PAGES, part)])
//! part of keys = [elements (head_dim, PAGE_TOKENS), scales (groups, PAGE_TOKENS)]
//! part of values = [elements (PAGE_TOKENS, head_dim), scales (1, PAGE_TOKENS)]
//! ```
//!
//! Keys and values of a layer may have different types, and so may layers. Scales are f32 and belong to the 8-bit types only; lying inside
//! the parts, they go wherever a page goes (copies, exports). One vector holds those of a page's tokens.
//!
//! Keys are transposed, so that one vector register holds one lane per token; values are not, so that one holds neighbouring
//! dimensions. A head's parts of neighbouring pages are neighbours: with whole pages of all heads one after the other, reading one head
//! jumped by a power of two every few KiB, which defeats the hardware prefetcher and piles all pages onto the same cache sets. All layers
//! of a block lie together, so that a short sequence touches few huge pages: with layers apart, one token of a model of 1B took 62 MiB.
//!
//! With 16 tokens a page, a score is a chain of fused multiply-adds over `head_dim` in every lane: no horizontal sum, and the
//! same bits wherever a page lies and whatever its neighbours hold.
//!
//! All layers share one allocation that the operating system hands out page by page as it is first written, so a generous
//! number of pages costs nothing until sequences use them.

mod e4m3;
mod element;
mod storage;
mod writer;

use crate::{Context, KernelError, Rows};
pub use e4m3::decode as decode_e4m3;
pub use element::KvElement;
pub(crate) use element::{E4m3, Element, with_element};
use storage::Storage;
use writer::{WriteHead, Writer};

/// Tokens in one page; also the number of lanes of the virtual vector.
pub const PAGE_TOKENS: usize = 16;

/// Pages whose parts for one head lie together.
pub const BLOCK_PAGES: usize = 16;

/// Bytes past the last value that a full vector load may touch (its lanes are then discarded).
const OVERREAD: usize = 64;

/// Shape and types of one layer's keys and values.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct KvLayer {
    /// Key/value heads.
    pub kv_heads: usize,
    /// Width of one head.
    pub head_dim: usize,
    /// How keys are stored.
    pub keys: KvElement,
    /// How values are stored.
    pub values: KvElement,
}

impl KvLayer {
    /// Bytes of one page's keys and of its values, for one head; `None` on overflow.
    fn parts(self) -> Option<[usize; 2]> {
        let scales = [self.keys.key_scales(self.head_dim), self.values.value_scales()];
        let part = |element: KvElement, scales: usize| {
            let elements = self.head_dim.checked_mul(element.bytes())?;
            elements.checked_add(scales.checked_mul(size_of::<f32>())?)?.checked_mul(PAGE_TOKENS)
        };
        Some([part(self.keys, scales[0])?, part(self.values, scales[1])?])
    }

    /// Bytes of one page, all heads; `None` on overflow.
    fn page_bytes(self) -> Option<usize> {
        let [keys, values] = self.parts()?;
        keys.checked_add(values)?.checked_mul(self.kv_heads)
    }
}

/// A layer and where its pages begin.
#[derive(Clone, Copy)]
struct PlacedLayer {
    shape: KvLayer,
    /// First byte of the layer in a block.
    offset: usize,
    /// Bytes of a block, all layers together.
    block_bytes: usize,
    /// Bytes of one page's keys for one head, scales included.
    keys: usize,
    /// The same of its values.
    values: usize,
}

impl PlacedLayer {
    /// First byte of the block that a page lies in, for one head.
    fn block(&self, page: usize, kv_head: usize) -> usize {
        let within = self.offset + kv_head * BLOCK_PAGES * (self.keys + self.values);
        page / BLOCK_PAGES * self.block_bytes + within
    }

    /// First byte of the keys of a page and head.
    fn keys(&self, page: usize, kv_head: usize) -> usize {
        self.block(page, kv_head) + page % BLOCK_PAGES * self.keys
    }

    /// First byte of its values.
    fn values(&self, page: usize, kv_head: usize) -> usize {
        self.block(page, kv_head) + BLOCK_PAGES * self.keys + page % BLOCK_PAGES * self.values
    }
}

/// Keys and values of every layer, in pages.
pub struct KvCache {
    storage: Storage,
    layers: Vec<PlacedLayer>,
    pages: usize,
}

impl KvCache {
    /// Reserves `pages` pages for each of `layers`, all zero.
    ///
    /// # Errors
    /// A layer of no heads or no width, a size beyond the address space, or memory that the system refuses.
    pub fn new(layers: &[KvLayer], pages: usize) -> Result<KvCache, KernelError> {
        for layer in layers {
            let least = |what, actual| KernelError::Size { what, actual, expected: "at least 1".to_owned() };
            if layer.kv_heads == 0 {
                return Err(least("the number of key/value heads", 0));
            }
            if layer.head_dim == 0 {
                return Err(least("the head dimension of the key/value cache", 0));
            }
        }
        let most = u32::MAX as usize / PAGE_TOKENS;
        if pages > most {
            let expected = format!("at most {most}: slots of {PAGE_TOKENS} tokens have 32-bit numbers");
            return Err(KernelError::Size { what: "the number of key/value pages", actual: pages, expected });
        }
        let too_large = || too_large(layers, pages);
        let (placed, bytes) = place(layers, pages).ok_or_else(too_large)?;
        // The first block stays in small pages: it is read too rarely for large ones to tell, and one short sequence touches a few KiB of
        // each head in it, a tenth of what it would take in large ones.
        let small = placed.first().map_or(0, |layer| layer.block_bytes);
        let storage = bytes.checked_add(OVERREAD).and_then(|bytes| Storage::zeroed(bytes, small));
        let storage = storage.ok_or_else(too_large)?;
        Ok(KvCache { storage, layers: placed, pages })
    }

    /// Bytes that one page takes in all of `layers` together, scales included (saturating).
    pub fn page_bytes(layers: &[KvLayer]) -> usize {
        layers.iter().fold(0usize, |sum, layer| sum.saturating_add(layer.page_bytes().unwrap_or(usize::MAX)))
    }

    /// Pages in each layer.
    pub fn pages(&self) -> usize {
        self.pages
    }

    /// Bytes of one page in all layers together.
    pub fn bytes_of_page(&self) -> usize {
        self.parts(0).map(|(_, bytes)| bytes).sum()
    }

    /// Number of layers.
    pub fn layers(&self) -> usize {
        self.layers.len()
    }

    /// Shape and types of a layer.
    ///
    /// # Panics
    /// If there is no such layer.
    pub fn layer(&self, layer: usize) -> KvLayer {
        self.layers[layer].shape
    }

    /// Bytes of address space reserved (memory is used only for pages that were written).
    pub fn reserved_bytes(&self) -> usize {
        self.storage.bytes()
    }

    /// Stores keys and values of one layer: row `i` goes to slot `slots[i]`, which is `page * PAGE_TOKENS + offset in the page`.
    ///
    /// `keys` and `values` are (rows, kv_heads * head_dim). If a slot occurs twice, the later row wins.
    ///
    /// # Panics
    /// If the shapes differ from the layer's or a slot is beyond the cache.
    pub fn write(
        &mut self,
        context: &Context,
        layer: usize,
        keys: Rows<'_>,
        values: Rows<'_>,
        slots: &[u32],
    ) {
        let KvLayer { kv_heads, head_dim, .. } = self.layers[layer].shape;
        assert_eq!(
            (keys.rows(), keys.width()),
            (slots.len(), kv_heads * head_dim),
            "keys do not match the layer"
        );
        assert_eq!(
            (values.rows(), values.width()),
            (slots.len(), kv_heads * head_dim),
            "values do not match the layer"
        );
        let end = self.pages * PAGE_TOKENS;
        assert!(
            slots.iter().all(|&slot| (slot as usize) < end),
            "a slot lies beyond the cache's {end} slots"
        );
        let writer = Writer { cache: self, layer, keys, values, slots };
        // One head is one task, so two tasks never write the same bytes, not even if a slot is repeated.
        let write = |head| context.isa.dispatch(WriteHead { writer: &writer, head });
        let work = slots.len() * kv_heads * head_dim;
        if work < 4096 || context.pool.threads() == 1 {
            (0..kv_heads).for_each(write);
        } else {
            context.pool.run(kv_heads, write);
        }
    }

    /// Copies page `from` over page `to` in every layer.
    ///
    /// # Panics
    /// If either page is beyond the cache.
    pub fn copy_page(&mut self, from: u32, to: u32) {
        let (from, to) = (self.known(from), self.known(to));
        for (from, to, bytes) in self.parts(from).zip(self.parts(to)).map(|((a, n), (b, _))| (a, b, n)) {
            // SAFETY: `parts` lie inside the storage, `&mut self` makes the access exclusive, and `copy` allows from == to.
            unsafe { std::ptr::copy(self.storage.base().add(from), self.storage.base().add(to), bytes) };
        }
    }

    /// Replaces the contents of `bytes` by what page `page` holds: layer after layer, head after head, the keys' elements
    /// (head_dim, PAGE_TOKENS) and scales, then the values' (PAGE_TOKENS, head_dim) and scales, in the layer's types, little-endian.
    /// They are [`KvCache::page_bytes`] bytes, the same on every instruction set.
    ///
    /// # Panics
    /// If the page is beyond the cache.
    pub fn export_page(&self, page: u32, bytes: &mut Vec<u8>) {
        bytes.clear();
        for (start, length) in self.parts(self.known(page)) {
            // SAFETY: `parts` lie inside the storage, which is initialized (zeroed) and only written through `&mut self`.
            bytes.extend_from_slice(unsafe {
                std::slice::from_raw_parts(self.storage.base().add(start), length)
            });
        }
    }

    /// Fills page `page` with what [`KvCache::export_page`] gave, of this or of a like cache.
    ///
    /// # Errors
    /// Bytes of another length.
    ///
    /// # Panics
    /// If the page is beyond the cache.
    pub fn import_page(&mut self, page: u32, bytes: &[u8]) -> Result<(), KernelError> {
        let expected: usize = self.parts(self.known(page)).map(|(_, length)| length).sum();
        if bytes.len() != expected {
            let what = "the length in bytes of a key/value page to import";
            return Err(KernelError::Size { what, actual: bytes.len(), expected: expected.to_string() });
        }
        let mut rest = bytes;
        for (start, length) in self.parts(page as usize) {
            let (part, after) = rest.split_at(length);
            rest = after;
            // SAFETY: `parts` lie inside the storage, `&mut self` makes the access exclusive, and `bytes` is another object.
            unsafe { self.storage.base().add(start).copy_from_nonoverlapping(part.as_ptr(), length) };
        }
        Ok(())
    }

    /// The number of a page that the cache has.
    fn known(&self, page: u32) -> usize {
        assert!((page as usize) < self.pages, "page {page} is beyond the cache's {} pages", self.pages);
        page as usize
    }

    /// Where the bytes of a page lie, in the order of [`KvCache::export_page`]: (first byte, bytes). All are inside the
    /// storage: `place` summed exactly these sizes.
    fn parts(&self, page: usize) -> impl Iterator<Item = (usize, usize)> + '_ {
        self.layers.iter().flat_map(move |layer| {
            (0..layer.shape.kv_heads).flat_map(move |head| {
                [(layer.keys(page, head), layer.keys), (layer.values(page, head), layer.values)]
            })
        })
    }

    /// Keys of one page and head: (head_dim, PAGE_TOKENS) elements, then (groups, PAGE_TOKENS) scales for the 8-bit types.
    ///
    /// # Panics
    /// If layer, page or head is beyond the cache: the kernels read through this pointer without further checks.
    pub(crate) fn keys(&self, layer: usize, page: u32, kv_head: usize) -> *const u8 {
        let place = self.place_of(layer, page, kv_head);
        // SAFETY: inside the storage, as `place_of` asserts and by how `place` summed the sizes.
        unsafe { self.storage.base().add(place.keys(page as usize, kv_head)) }
    }

    /// Values of one page and head: (PAGE_TOKENS, head_dim) elements, then PAGE_TOKENS scales for the 8-bit types. A full
    /// vector may be loaded at any of the elements.
    ///
    /// # Panics
    /// As [`KvCache::keys`].
    pub(crate) fn values(&self, layer: usize, page: u32, kv_head: usize) -> *const u8 {
        let place = self.place_of(layer, page, kv_head);
        // SAFETY: as in `keys`.
        unsafe { self.storage.base().add(place.values(page as usize, kv_head)) }
    }

    /// A layer that has this page and head.
    fn place_of(&self, layer: usize, page: u32, kv_head: usize) -> &PlacedLayer {
        let place = &self.layers[layer];
        let known = (page as usize) < self.pages && kv_head < place.shape.kv_heads;
        assert!(known, "page or head beyond the cache");
        place
    }
}

/// Where each layer begins, and the number of bytes in all.
fn place(layers: &[KvLayer], pages: usize) -> Option<(Vec<PlacedLayer>, usize)> {
    let bytes = |layer: &KvLayer| layer.page_bytes()?.checked_mul(BLOCK_PAGES);
    let block_bytes = layers.iter().try_fold(0usize, |sum, layer| sum.checked_add(bytes(layer)?))?;
    let mut offset = 0;
    let mut placed = Vec::with_capacity(layers.len());
    for &shape in layers {
        let [keys, values] = shape.parts()?;
        placed.push(PlacedLayer { shape, offset, block_bytes, keys, values });
        offset += bytes(&shape)?;
    }
    Some((placed, pages.div_ceil(BLOCK_PAGES).checked_mul(block_bytes)?))
}

fn too_large(layers: &[KvLayer], pages: usize) -> KernelError {
    let what = "the key/value cache; fewer pages, shorter sequences or a smaller element type need less";
    KernelError::Allocation { what, bytes: KvCache::page_bytes(layers).saturating_mul(pages) }
}
