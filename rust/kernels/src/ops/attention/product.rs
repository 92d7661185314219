//! The two matrix products of attention over one chunk, in register tiles.
//!
//! Every sum is one chain of fused multiply-adds in its lane: scores over the head's dimensions, values over positions. A tile's size
//! decides how many chains run side by side and never what a chain does. Numbers that share a scale are summed first and then multiplied by
//! it: a key's dimensions group by group; a value's scale is multiplied into its token's weight instead ([`scale_weights`]).

use super::CHUNK_TOKENS;
use crate::kv::{Element, PAGE_TOKENS};
use crate::simd::{LANES, Simd};
use std::marker::PhantomData;
use std::ops::Range;

/// Distance between two rows of scores. Not a power of two, which would put all rows into the same few sets of the L1 cache.
pub(super) const SCORE_STRIDE: usize = CHUNK_TOKENS + LANES;

/// Whether there are 32 registers of 16 lanes, so that large tiles stay in registers.
#[inline(always)]
fn wide<S: Simd>() -> bool {
    S::REGISTERS >= 32
}

/// Scores of query rows against whole pages.
pub(super) struct Scores<'a, E> {
    /// (head_dim, rows): transposed, so that the rows of a register tile are neighbours.
    pub queries: &'a [f32],
    pub rows: usize,
    pub head_dim: usize,
    /// Keys of each page of the chunk, (head_dim, PAGE_TOKENS) of type `E`, and their scales.
    pub keys: &'a [*const u8],
    /// For each page, what to fetch from memory while it is computed with: as many bytes as its keys. May point anywhere.
    pub ahead: &'a [*const u8],
    pub element: PhantomData<E>,
}

impl<E: Element> Scores<'_, E> {
    /// Writes the scores of all rows against the chunk's pages `pages` into `scores`, (rows, SCORE_STRIDE).
    ///
    /// # Safety
    /// The pages' keys are valid for reading.
    #[inline(always)]
    pub unsafe fn compute<S: Simd>(&self, simd: S, pages: Range<usize>, scores: &mut [f32]) {
        assert!(scores.len() >= self.rows * SCORE_STRIDE && self.queries.len() >= self.rows * self.head_dim);
        assert!(
            pages.end <= self.keys.len()
                && self.ahead.len() == self.keys.len()
                && pages.end * PAGE_TOKENS <= SCORE_STRIDE
        );
        let mut page = pages.start;
        // SAFETY: the assertions, and the caller's promise about the keys.
        unsafe {
            while page + 4 <= pages.end {
                self.all_rows::<S, 4>(simd, page, scores);
                page += 4;
            }
            while page < pages.end {
                self.all_rows::<S, 1>(simd, page, scores);
                page += 1;
            }
        }
    }

    /// Scores of all rows against `PAGES` pages.
    #[inline(always)]
    unsafe fn all_rows<S: Simd, const PAGES: usize>(&self, simd: S, page: usize, scores: &mut [f32]) {
        let mut row = 0;
        // SAFETY: rows stay below `self.rows`, pages below the caller's end.
        unsafe {
            if wide::<S>() {
                while row + 8 <= self.rows {
                    self.split_pages::<S, 8, 2, PAGES>(simd, row, page, scores);
                    row += 8;
                }
            }
            while row + 4 <= self.rows {
                if wide::<S>() {
                    self.split_pages::<S, 4, 2, PAGES>(simd, row, page, scores);
                } else {
                    self.split_pages::<S, 4, 1, PAGES>(simd, row, page, scores);
                }
                row += 4;
            }
            while row + 2 <= self.rows {
                self.split_pages::<S, 2, 2, PAGES>(simd, row, page, scores);
                row += 2;
            }
            if row < self.rows {
                self.split_pages::<S, 1, 4, PAGES>(simd, row, page, scores);
            }
        }
    }

    /// Cuts `PAGES` pages (1 or 4) into tiles of at most `WIDE` pages.
    #[inline(always)]
    unsafe fn split_pages<S: Simd, const ROWS: usize, const WIDE: usize, const PAGES: usize>(
        &self,
        simd: S,
        row: usize,
        page: usize,
        scores: &mut [f32],
    ) {
        let mut done = 0;
        while done < PAGES {
            // SAFETY: the caller's promise.
            unsafe {
                if PAGES >= WIDE {
                    self.tile::<S, ROWS, WIDE>(simd, row, page + done, scores);
                    done += WIDE;
                } else {
                    self.tile::<S, ROWS, 1>(simd, row, page + done, scores);
                    done += 1;
                }
            }
        }
    }

    #[inline(always)]
    unsafe fn tile<S: Simd, const ROWS: usize, const PAGES: usize>(
        &self,
        simd: S,
        row: usize,
        page: usize,
        scores: &mut [f32],
    ) {
        // SAFETY: `compute` asserted the sizes of queries, keys and scores; keys hold head_dim * PAGE_TOKENS elements, then a scale
        // for each group and token if their type has scales.
        unsafe {
            let (mut keys, mut ahead) = ([std::ptr::null::<E>(); PAGES], [std::ptr::null::<E>(); PAGES]);
            for i in 0..PAGES {
                keys[i] = self.keys.get_unchecked(page + i).cast();
                ahead[i] = self.ahead.get_unchecked(page + i).cast();
            }
            let fetch = row == 0; // the tiles of other rows find their keys in the cache
            let mut query = self.queries.as_ptr().add(row);
            let (mut dimension, mut group) = (0, 0);
            while dimension < self.head_dim {
                let stop = self.head_dim.min(dimension.saturating_add(E::KEY_GROUP));
                let mut sums = [[simd.splat(0.0); PAGES]; ROWS];
                while dimension < stop {
                    for i in 0..PAGES {
                        if fetch {
                            simd.prefetch(ahead[i].wrapping_add(dimension * PAGE_TOKENS).cast());
                        }
                        let key = E::load(simd, keys[i].add(dimension * PAGE_TOKENS));
                        for (r, sums) in sums.iter_mut().enumerate() {
                            sums[i] = simd.mul_add(simd.splat(*query.add(r)), key, sums[i]);
                        }
                    }
                    query = query.add(self.rows);
                    dimension += 1;
                }
                for (r, sums) in sums.iter().enumerate() {
                    for (i, &sum) in sums.iter().enumerate() {
                        let at = (row + r) * SCORE_STRIDE + (page + i) * PAGE_TOKENS;
                        let score = &mut *scores.as_mut_ptr().add(at).cast::<[f32; LANES]>();
                        let scales = keys[i].add(self.head_dim * PAGE_TOKENS).cast::<f32>();
                        let sum = match (E::SCALED, group) {
                            (false, _) => sum,
                            (true, 0) => simd.mul(sum, simd.load_pointer(scales)),
                            (true, _) => {
                                let scale = simd.load_pointer(scales.add(group * PAGE_TOKENS));
                                simd.mul_add(sum, scale, simd.load(score))
                            }
                        };
                        simd.store(sum, score);
                    }
                }
                group += 1;
            }
        }
    }
}

/// Multiplies the weights of one row, SCORE_STRIDE values, by the scales of the values of `pages`.
///
/// # Safety
/// The pages' values, of a type with scales, are valid for reading.
#[inline(always)]
pub(super) unsafe fn scale_weights<S: Simd, E: Element>(
    simd: S,
    values: &[*const u8],
    head_dim: usize,
    pages: Range<usize>,
    weights: &mut [f32],
) {
    for page in pages {
        let lanes = &mut weights.as_chunks_mut::<LANES>().0[page];
        // SAFETY: the caller's promise; the scales lie behind PAGE_TOKENS * head_dim elements.
        let scales =
            unsafe { simd.load_pointer(values[page].cast::<E>().add(PAGE_TOKENS * head_dim).cast()) };
        simd.store(simd.mul(simd.load(lanes), scales), lanes);
    }
}

/// Sums of values weighted by row.
pub(super) struct Weighted<'a, E> {
    /// (rows, SCORE_STRIDE).
    pub weights: &'a [f32],
    pub head_dim: usize,
    /// Distance between two rows of sums: `head_dim` rounded up to whole vectors.
    pub stride: usize,
    /// Values of each page of the chunk, (PAGE_TOKENS, head_dim) of type `E`; a full vector may be loaded at any of them.
    pub values: &'a [*const u8],
    /// For each page, what to fetch from memory meanwhile: as many bytes as its values. May point anywhere.
    pub ahead: &'a [*const u8],
    pub element: PhantomData<E>,
}

impl<E: Element> Weighted<'_, E> {
    /// Adds, for each of `rows`, the weighted values of the chunk's positions `tokens` to `sums`, (rows, stride), in ascending order.
    ///
    /// # Safety
    /// The values of these positions are valid for reading.
    #[inline(always)]
    pub unsafe fn add<S: Simd>(&self, simd: S, rows: Range<usize>, tokens: Range<usize>, sums: &mut [f32]) {
        if tokens.is_empty() {
            return;
        }
        assert!(sums.len() >= rows.end * self.stride && self.weights.len() >= rows.end * SCORE_STRIDE);
        assert!(tokens.end <= CHUNK_TOKENS && tokens.end.div_ceil(PAGE_TOKENS) <= self.values.len());
        assert_eq!(self.ahead.len(), self.values.len());
        let mut row = rows.start;
        // SAFETY: the assertions, and the caller's promise about the values.
        unsafe {
            if wide::<S>() {
                while row + 8 <= rows.end {
                    self.all_columns::<S, 8, 2>(simd, row, tokens.clone(), sums);
                    row += 8;
                }
            }
            while row + 4 <= rows.end {
                if wide::<S>() {
                    self.all_columns::<S, 4, 4>(simd, row, tokens.clone(), sums);
                } else {
                    self.all_columns::<S, 4, 1>(simd, row, tokens.clone(), sums);
                }
                row += 4;
            }
            while row + 2 <= rows.end {
                if wide::<S>() {
                    self.all_columns::<S, 2, 8>(simd, row, tokens.clone(), sums);
                } else {
                    self.all_columns::<S, 2, 2>(simd, row, tokens.clone(), sums);
                }
                row += 2;
            }
            if row < rows.end {
                self.all_columns::<S, 1, 4>(simd, row, tokens, sums);
            }
        }
    }

    /// All dimensions of `ROWS` rows, up to `WIDE` vectors at a time.
    #[inline(always)]
    unsafe fn all_columns<S: Simd, const ROWS: usize, const WIDE: usize>(
        &self,
        simd: S,
        row: usize,
        tokens: Range<usize>,
        sums: &mut [f32],
    ) {
        let mut column = 0;
        // SAFETY: columns stay below the stride.
        unsafe {
            while column + WIDE * LANES <= self.stride {
                self.tile::<S, ROWS, WIDE>(simd, row, column, tokens.clone(), sums);
                column += WIDE * LANES;
            }
            while column < self.stride {
                self.tile::<S, ROWS, 1>(simd, row, column, tokens.clone(), sums);
                column += LANES;
            }
        }
    }

    #[inline(always)]
    unsafe fn tile<S: Simd, const ROWS: usize, const WIDE: usize>(
        &self,
        simd: S,
        row: usize,
        column: usize,
        tokens: Range<usize>,
        sums: &mut [f32],
    ) {
        // SAFETY: `add` asserted the sizes; values hold PAGE_TOKENS * head_dim elements and a vector beyond.
        unsafe {
            let base = sums.as_mut_ptr().add(row * self.stride + column);
            let mut lanes = [[simd.splat(0.0); WIDE]; ROWS];
            for (r, lanes) in lanes.iter_mut().enumerate() {
                for (c, lanes) in lanes.iter_mut().enumerate() {
                    *lanes = simd.load_pointer(base.add(r * self.stride + c * LANES));
                }
            }
            let fetch = row == 0;
            let mut token = tokens.start;
            while token < tokens.end {
                let page = token / PAGE_TOKENS;
                let stop = tokens.end.min((page + 1) * PAGE_TOKENS);
                let values = self.values.get_unchecked(page).cast::<E>();
                let ahead = self.ahead.get_unchecked(page).cast::<E>();
                while token < stop {
                    let at = token % PAGE_TOKENS * self.head_dim + column;
                    let value = values.add(at);
                    let weight = self.weights.as_ptr().add(row * SCORE_STRIDE + token);
                    for c in 0..WIDE {
                        if fetch {
                            simd.prefetch(ahead.wrapping_add(at + c * LANES).cast());
                        }
                        let value = E::load(simd, value.add(c * LANES));
                        for (r, lanes) in lanes.iter_mut().enumerate() {
                            lanes[c] =
                                simd.mul_add(simd.splat(*weight.add(r * SCORE_STRIDE)), value, lanes[c]);
                        }
                    }
                    token += 1;
                }
            }
            for (r, lanes) in lanes.iter().enumerate() {
                for (c, &lanes) in lanes.iter().enumerate() {
                    simd.store(lanes, &mut *base.add(r * self.stride + c * LANES).cast::<[f32; LANES]>());
                }
            }
        }
    }
}
