//! The paged cache of keys and values.
//!
//! A page holds `PAGE_TOKENS` consecutive positions of one sequence, for every layer and all of its key/value heads. A layer's
//! pages lie in blocks of `BLOCK_PAGES`:
//!
//! ```text
//! block = (kv_heads, [keys (BLOCK_PAGES, head_dim, PAGE_TOKENS), values (BLOCK_PAGES, PAGE_TOKENS, head_dim)])
//! ```
//!
//! Keys are transposed, so that one vector register holds one lane per token; values are not, so that one holds neighbouring
//! dimensions. A head's parts of neighbouring pages are neighbours: with whole pages of all heads one after the other, reading one head
//! jumped by a power of two every few KiB, which defeats the hardware prefetcher and piles all pages onto the same cache sets. Blocks are
//! small enough that a short sequence touches little memory, huge pages included.
//!
//! With 16 tokens a page, a score is a chain of fused multiply-adds over `head_dim` in every lane: no horizontal sum, and the
//! same bits wherever a page lies and whatever its neighbours hold.
//!
//! All layers share one allocation that the operating system hands out page by page as it is first written, so a generous
//! number of pages costs nothing until sequences use them.

mod storage;

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

use crate::{Context, KernelError, Rows};
use storage::Storage;

/// Tokens in one page; also the number of lanes of the virtual vector.
pub const PAGE_TOKENS: usize = 16;

/// Pages whose parts for one head lie together.
pub const BLOCK_PAGES: usize = 16;

/// Bytes past the last value that a full vector load may touch (its lanes are then discarded).
const OVERREAD: usize = 64;

/// How a key or a value is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum KvElement {
    /// 32-bit floating point: exact.
    F32,
    /// IEEE binary16, rounded to nearest even. Values beyond 65504 become infinite.
    F16,
    /// bfloat16, rounded to nearest even: the range of f32 with 8 significant bits.
    Bf16,
}

impl KvElement {
    /// Bytes of one element.
    pub fn bytes(self) -> usize {
        match self {
            KvElement::F32 => 4,
            KvElement::F16 | KvElement::Bf16 => 2,
        }
    }
}

/// The shape of one layer's keys and values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvLayer {
    /// Key/value heads.
    pub kv_heads: usize,
    /// Width of one head.
    pub head_dim: usize,
}

impl KvLayer {
    /// Elements of one page's keys (its values are as many), or `None` on overflow.
    fn half_page(self) -> Option<usize> {
        self.kv_heads.checked_mul(self.head_dim)?.checked_mul(PAGE_TOKENS)
    }
}

/// A layer and where its pages begin.
#[derive(Clone, Copy)]
struct PlacedLayer {
    shape: KvLayer,
    /// First element of the layer.
    offset: usize,
    /// Elements of one page's keys for one head; of its values too.
    part: usize,
}

impl PlacedLayer {
    /// First element of the keys of a page and head. Its values begin `BLOCK_PAGES` parts later.
    fn keys(&self, page: usize, kv_head: usize) -> usize {
        let heads = page / BLOCK_PAGES * self.shape.kv_heads + kv_head;
        self.offset + (heads * 2 * BLOCK_PAGES + page % BLOCK_PAGES) * self.part
    }
}

/// Keys and values of every layer, in pages.
pub struct KvCache {
    storage: Storage,
    layers: Vec<PlacedLayer>,
    pages: usize,
    element: KvElement,
}

impl KvCache {
    /// Reserves `pages` pages for each of `layers`, all zero.
    ///
    /// # Errors
    /// A layer of no heads or no width, a size beyond the address space, or memory that the system refuses.
    pub fn new(layers: &[KvLayer], pages: usize, element: KvElement) -> Result<KvCache, KernelError> {
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
        let (placed, elements) = place(layers, pages).ok_or_else(|| too_large(layers, pages, element))?;
        let bytes = elements
            .checked_mul(element.bytes())
            .and_then(|bytes| bytes.checked_add(OVERREAD))
            .ok_or_else(|| too_large(layers, pages, element))?;
        let storage = Storage::zeroed(bytes).ok_or_else(|| too_large(layers, pages, element))?;
        Ok(KvCache { storage, layers: placed, pages, element })
    }

    /// Bytes that one page takes in all of `layers` together (saturating).
    pub fn page_bytes(layers: &[KvLayer], element: KvElement) -> usize {
        layers.iter().fold(0usize, |sum, layer| {
            let half = layer.half_page().unwrap_or(usize::MAX);
            sum.saturating_add(half.saturating_mul(2).saturating_mul(element.bytes()))
        })
    }

    /// Pages in each layer.
    pub fn pages(&self) -> usize {
        self.pages
    }

    /// How elements are stored.
    pub fn element(&self) -> KvElement {
        self.element
    }

    /// Number of layers.
    pub fn layers(&self) -> usize {
        self.layers.len()
    }

    /// The shape of a layer.
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
        let KvLayer { kv_heads, head_dim } = self.layers[layer].shape;
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
        let writer = Writer { cache: self, layer, head_dim, keys, values, slots };
        // One head is one task, so two tasks never write the same bytes, not even if a slot is repeated.
        let work = slots.len() * kv_heads * head_dim;
        if work < 16384 || context.pool.threads() == 1 {
            (0..kv_heads).for_each(|head| writer.head(head));
        } else {
            context.pool.run(kv_heads, |head| writer.head(head));
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

    /// Replaces the contents of `bytes` by what page `page` holds: layer after layer, head after head, the keys
    /// (head_dim, PAGE_TOKENS), then the values (PAGE_TOKENS, head_dim), in the cache's element types, little-endian. They
    /// are [`KvCache::page_bytes`] bytes, the same on every instruction set.
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
        let size = self.element.bytes();
        self.layers.iter().flat_map(move |layer| {
            (0..layer.shape.kv_heads).flat_map(move |head| {
                let keys = layer.keys(page, head);
                [keys, keys + BLOCK_PAGES * layer.part].map(|part| (part * size, layer.part * size))
            })
        })
    }

    /// Keys of one page and head: (head_dim, PAGE_TOKENS) elements.
    ///
    /// # Panics
    /// If layer, page or head is beyond the cache: the kernels read through this pointer without further checks.
    pub(crate) fn keys(&self, layer: usize, page: u32, kv_head: usize) -> *const u8 {
        let place = &self.layers[layer];
        assert!(
            (page as usize) < self.pages && kv_head < place.shape.kv_heads,
            "page or head beyond the cache"
        );
        let element = place.keys(page as usize, kv_head);
        // SAFETY: inside the storage, by the assertion and by how `place` summed the sizes.
        unsafe { self.storage.base().add(element * self.element.bytes()) }
    }

    /// Values of one page and head: (PAGE_TOKENS, head_dim) elements. A full vector may be loaded at any of them.
    ///
    /// # Panics
    /// As [`KvCache::keys`].
    pub(crate) fn values(&self, layer: usize, page: u32, kv_head: usize) -> *const u8 {
        let distance = BLOCK_PAGES * self.layers[layer].part;
        // SAFETY: a head's values follow its keys inside the block.
        unsafe { self.keys(layer, page, kv_head).add(distance * self.element.bytes()) }
    }
}

/// Where each layer begins, and the number of elements in all.
fn place(layers: &[KvLayer], pages: usize) -> Option<(Vec<PlacedLayer>, usize)> {
    let blocks = pages.div_ceil(BLOCK_PAGES);
    let mut offset = 0usize;
    let mut placed = Vec::with_capacity(layers.len());
    for &shape in layers {
        let block = shape.half_page()?.checked_mul(2 * BLOCK_PAGES)?;
        placed.push(PlacedLayer { shape, offset, part: shape.head_dim * PAGE_TOKENS });
        offset = offset.checked_add(block.checked_mul(blocks)?)?;
    }
    Some((placed, offset))
}

fn too_large(layers: &[KvLayer], pages: usize, element: KvElement) -> KernelError {
    let what = "the key/value cache; fewer pages, shorter sequences or a smaller element type need less";
    KernelError::Allocation { what, bytes: KvCache::page_bytes(layers, element).saturating_mul(pages) }
}

/// One call of [`KvCache::write`].
struct Writer<'a> {
    cache: &'a KvCache,
    layer: usize,
    head_dim: usize,
    keys: Rows<'a>,
    values: Rows<'a>,
    slots: &'a [u32],
}

impl Writer<'_> {
    /// Stores all rows of one head.
    fn head(&self, head: usize) {
        let columns = head * self.head_dim..(head + 1) * self.head_dim;
        match self.cache.element {
            KvElement::F32 => self.rows::<f32>(head, columns, |from, to| to.copy_from_slice(from)),
            KvElement::F16 => self.rows::<f16>(head, columns, |from, to| to.convert_from_f32_slice(from)),
            KvElement::Bf16 => self.rows::<bf16>(head, columns, |from, to| to.convert_from_f32_slice(from)),
        }
    }

    fn rows<E: Copy + Default>(
        &self,
        head: usize,
        columns: std::ops::Range<usize>,
        convert: impl Fn(&[f32], &mut [E]),
    ) {
        let mut converted = vec![E::default(); self.head_dim];
        for (row, &slot) in self.slots.iter().enumerate() {
            let (page, token) = (slot / PAGE_TOKENS as u32, slot as usize % PAGE_TOKENS);
            let keys = self.cache.keys(self.layer, page, head).cast_mut().cast::<E>();
            let values = self.cache.values(self.layer, page, head).cast_mut().cast::<E>();
            convert(&self.keys.row(row)[columns.clone()], &mut converted);
            for (dimension, &key) in converted.iter().enumerate() {
                // SAFETY: (head_dim, PAGE_TOKENS) elements of size_of::<E>() bytes lie there; the caller of `write` holds the
                // cache exclusively and only this task touches this head. The storage is raw memory of no particular type.
                unsafe { keys.add(dimension * PAGE_TOKENS + token).write(key) };
            }
            convert(&self.values.row(row)[columns.clone()], &mut converted);
            // SAFETY: as above; (PAGE_TOKENS, head_dim) elements lie there.
            unsafe {
                values.add(token * self.head_dim).copy_from_nonoverlapping(converted.as_ptr(), self.head_dim)
            };
        }
    }
}
