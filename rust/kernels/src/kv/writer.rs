//! Rounding rows of keys and values into their pages.

use super::{Element, KvCache, KvLayer, PAGE_TOKENS, with_element};
use crate::Rows;
use crate::simd::{Kernel, Simd};

/// One call of [`KvCache::write`].
pub(super) struct Writer<'a> {
    pub cache: &'a KvCache,
    pub layer: usize,
    pub keys: Rows<'a>,
    pub values: Rows<'a>,
    pub slots: &'a [u32],
}

/// Stores all rows of one head.
pub(super) struct WriteHead<'a> {
    pub writer: &'a Writer<'a>,
    pub head: usize,
}

impl Kernel for WriteHead<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let WriteHead { writer, head } = self;
        let KvLayer { keys, values, .. } = writer.cache.layer(writer.layer);
        with_element!(keys, E => writer.keys::<S, E>(simd, head));
        with_element!(values, E => writer.values::<S, E>(simd, head));
    }
}

impl Writer<'_> {
    /// Rows of slots, and where in its page each goes.
    fn places(&self) -> impl Iterator<Item = (usize, u32, usize)> {
        self.slots.iter().enumerate().map(|(row, &slot)| {
            let page = PAGE_TOKENS as u32;
            (row, slot / page, (slot % page) as usize)
        })
    }

    #[inline(always)]
    fn keys<S: Simd, E: Element>(&self, simd: S, head: usize) {
        let head_dim = self.cache.layer(self.layer).head_dim;
        let mut rounded = vec![E::default(); E::key_group(head_dim)];
        for (row, page, token) in self.places() {
            let keys = self.cache.keys(self.layer, page, head).cast_mut().cast::<E>();
            let row = &self.keys.row(row)[head * head_dim..(head + 1) * head_dim];
            for (group, values) in row.chunks(rounded.len()).enumerate() {
                let rounded = &mut rounded[..values.len()];
                let scale = E::round(simd, values, rounded);
                let first = group * E::key_group(head_dim);
                // SAFETY: (head_dim, PAGE_TOKENS) elements of size_of::<E>() bytes lie there, then for scaled types a scale for each
                // group and token; the caller of `write` holds the cache exclusively and only this task touches this
                // head. The storage is raw memory of no particular type, and parts are multiples of 16 bytes.
                unsafe {
                    for (dimension, &key) in (first..).zip(rounded.iter()) {
                        keys.add(dimension * PAGE_TOKENS + token).write(key);
                    }
                    if E::SCALED {
                        let scales = keys.add(head_dim * PAGE_TOKENS).cast::<f32>();
                        scales.add(group * PAGE_TOKENS + token).write(scale);
                    }
                }
            }
        }
    }

    #[inline(always)]
    fn values<S: Simd, E: Element>(&self, simd: S, head: usize) {
        let head_dim = self.cache.layer(self.layer).head_dim;
        let mut rounded = vec![E::default(); head_dim];
        for (row, page, token) in self.places() {
            let values = self.cache.values(self.layer, page, head).cast_mut().cast::<E>();
            let scale =
                E::round(simd, &self.values.row(row)[head * head_dim..(head + 1) * head_dim], &mut rounded);
            // SAFETY: as in `keys`; (PAGE_TOKENS, head_dim) elements lie there, then for scaled types a scale for each token.
            unsafe {
                values.add(token * head_dim).copy_from_nonoverlapping(rounded.as_ptr(), head_dim);
                if E::SCALED {
                    values.add(head_dim * PAGE_TOKENS).cast::<f32>().add(token).write(scale);
                }
            }
        }
    }
}
