//! One task of attention: a block of query rows over a run of chunks.

use super::plan::Item;
use super::product::{SCORE_STRIDE, Scores, Weighted, scale_weights};
use super::softmax::{Partial, Weigh, merge};
use super::{CHUNK_PAGES, CHUNK_TOKENS, Call};
use crate::kv::{Element, KvElement, KvLayer, PAGE_TOKENS, with_element};
use crate::simd::{Kernel, LANES, Simd};
use std::marker::PhantomData;
use std::ops::Range;

/// Rows whose values are summed together; they share the positions that all of them see.
const BLOCK_ROWS: usize = 8;

/// How many pages ahead keys and values are fetched. 1 to 4 do about equally well; 8 pages of one head no longer fit the L1 cache
/// beside those in use.
const FETCH_PAGES: usize = 2;

/// Working memory of one thread. Row `r` is query row `r / group` with head `r % group` of the task.
#[derive(Debug, Default)]
pub(super) struct Workspace {
    queries: Vec<f32>,  // (head_dim, rows)
    scores: Vec<f32>,   // (rows, SCORE_STRIDE)
    partials: Vec<f32>, // (rows, stride): the chunk's weighted values
    chunk: Vec<Partial>,
    sums: Vec<f32>, // (rows, stride): the weighted values so far
    total: Vec<Partial>,
}

impl Workspace {
    /// Values of a stored partial result: whole vectors of sums, then greatest score and sum of weights.
    pub fn partial_width(head_dim: usize) -> usize {
        head_dim.next_multiple_of(LANES) + LANES
    }

    fn prepare(&mut self, rows: usize, head_dim: usize) {
        let stride = head_dim.next_multiple_of(LANES);
        let grow = |buffer: &mut Vec<f32>, length: usize| {
            if buffer.len() < length {
                buffer.resize(length, 0.0);
            }
        };
        grow(&mut self.queries, rows * head_dim);
        grow(&mut self.scores, rows * SCORE_STRIDE);
        grow(&mut self.partials, rows * stride);
        grow(&mut self.sums, rows * stride);
        self.sums[..rows * stride].fill(0.0);
        self.chunk.clear();
        self.chunk.resize(rows, Partial::EMPTY);
        self.total.clear();
        self.total.resize(rows, Partial::EMPTY);
    }
}

/// Computes an [`Item`].
pub(super) struct Tile<'a> {
    call: &'a Call<'a>,
    item: &'a Item,
    workspace: &'a mut Workspace,
    group: usize,
    head_dim: usize,
    /// `head_dim` rounded up to whole vectors.
    stride: usize,
    keys: KvElement,
    values: KvElement,
}

impl<'a> Tile<'a> {
    pub fn new(call: &'a Call<'a>, item: &'a Item, workspace: &'a mut Workspace) -> Tile<'a> {
        let head_dim = call.attention.head_dim;
        let stride = head_dim.next_multiple_of(LANES);
        let KvLayer { keys, values, .. } = call.cache.layer(call.layer);
        Tile { call, item, workspace, group: call.attention.group(), head_dim, stride, keys, values }
    }

    fn rows(&self) -> usize {
        self.item.rows.len() * self.group
    }

    /// Copies the queries, transposed.
    fn gather_queries(&mut self) {
        let rows = self.rows();
        let width = self.group * self.head_dim;
        for (token, row) in self.item.rows.clone().enumerate() {
            let row = self.call.queries.row(self.call.sequences[self.item.sequence].first_row + row);
            let heads = &row[self.item.kv_head * width..][..width];
            for (head, query) in heads.chunks_exact(self.head_dim).enumerate() {
                let column = token * self.group + head;
                let transposed = self.workspace.queries[column..].iter_mut().step_by(rows);
                transposed.zip(query).for_each(|(to, &value)| *to = value);
            }
        }
    }

    /// What the item's query row `token` sees of a chunk, counted from the chunk's first position; possibly empty.
    fn visible(&self, token: usize, chunk: usize) -> Range<usize> {
        let position = self.call.sequences[self.item.sequence].first_position + self.item.rows.start + token;
        let first = chunk * CHUNK_TOKENS;
        let begin = self.call.attention.first_visible(position).max(first) - first;
        let end = (position + 1).clamp(first, first + CHUNK_TOKENS) - first;
        begin.min(end)..end
    }

    /// The chunk's pages that any row sees.
    fn visible_pages(&self, chunk: usize) -> Range<usize> {
        let last = self.item.rows.len() - 1;
        self.visible(0, chunk).start / PAGE_TOKENS..self.visible(last, chunk).end.div_ceil(PAGE_TOKENS)
    }

    /// Where keys and values of the chunk's visible pages lie.
    fn pages(&self, chunk: usize) -> ChunkPages {
        let visible = self.visible_pages(chunk);
        let mut pages = ChunkPages::EMPTY;
        for page in visible.clone() {
            (pages.keys[page], pages.values[page]) = self.page(chunk, page);
        }
        // What comes next, in the order of use: the keys, the values, the next chunk's keys.
        let next = visible.len().min(FETCH_PAGES);
        let (start, turn) = (visible.start, visible.end - next);
        pages.after_keys[start..turn].copy_from_slice(&pages.keys[start + next..visible.end]);
        pages.after_keys[turn..visible.end].copy_from_slice(&pages.values[start..start + next]);
        pages.after_values[start..turn].copy_from_slice(&pages.values[start + next..visible.end]);
        if chunk + 1 < self.item.chunks.end {
            let following = self.visible_pages(chunk + 1);
            for (page, following) in (turn..visible.end).zip(following) {
                pages.after_values[page] = self.page(chunk + 1, following).0;
            }
        }
        pages
    }

    /// Keys and values of one page of a chunk.
    fn page(&self, chunk: usize, page: usize) -> (*const u8, *const u8) {
        let Call { cache, layer, .. } = *self.call;
        let number = self.call.sequences[self.item.sequence].pages[chunk * CHUNK_PAGES + page];
        (cache.keys(layer, number, self.item.kv_head), cache.values(layer, number, self.item.kv_head))
    }

    /// Scores, weights and weighted values of one chunk, into the workspace's `chunk` and `partials`.
    #[inline(always)]
    fn chunk<S: Simd>(&mut self, simd: S, chunk: usize) {
        let rows = self.rows();
        let pages = self.pages(chunk);
        with_element!(self.keys, E => self.scores::<S, E>(simd, chunk, &pages));
        let weigh = Weigh::new(simd, self.call.attention.scale, self.call.attention.softcap);
        for row in 0..rows {
            let visible = self.visible(row / self.group, chunk);
            let scores = &mut self.workspace.scores[row * SCORE_STRIDE..][..CHUNK_TOKENS];
            self.workspace.chunk[row] =
                if visible.is_empty() { Partial::EMPTY } else { weigh.row(simd, scores, visible) };
        }
        with_element!(self.values, E => self.sums::<S, E>(simd, chunk, &pages));
    }

    /// Scores of all rows against the chunk's visible pages.
    #[inline(always)]
    fn scores<S: Simd, E: Element>(&mut self, simd: S, chunk: usize, pages: &ChunkPages) {
        let scores = Scores::<E> {
            queries: &self.workspace.queries,
            rows: self.rows(),
            head_dim: self.head_dim,
            keys: &pages.keys,
            ahead: &pages.after_keys,
            element: PhantomData,
        };
        // SAFETY: `pages` holds, for visible pages, pointers to keys inside the cache, and `E` is their type.
        unsafe { scores.compute(simd, self.visible_pages(chunk), &mut self.workspace.scores) };
    }

    /// Weighted values of one chunk, from weights to `partials`.
    #[inline(always)]
    fn sums<S: Simd, E: Element>(&mut self, simd: S, chunk: usize, pages: &ChunkPages) {
        let rows = self.rows();
        if E::SCALED {
            let visible = self.visible_pages(chunk);
            for weights in self.workspace.scores[..rows * SCORE_STRIDE].chunks_exact_mut(SCORE_STRIDE) {
                // SAFETY: as for `Weighted`. What a row does not see is scaled too, and never used.
                unsafe {
                    scale_weights::<S, E>(simd, &pages.values, self.head_dim, visible.clone(), weights);
                }
            }
        }
        self.workspace.partials[..rows * self.stride].fill(0.0);
        let tokens_per_block = (BLOCK_ROWS / self.group).max(1);
        for first in (0..self.item.rows.len()).step_by(tokens_per_block) {
            let block = first..self.item.rows.len().min(first + tokens_per_block);
            self.add_values::<S, E>(simd, chunk, pages, block);
        }
    }

    /// Adds the weighted values that a block of query rows sees. What all of them see is added in one pass; before and after it each
    /// query row adds what it sees alone. A masked position is never multiplied: it may hold anything, NaN included.
    #[inline(always)]
    fn add_values<S: Simd, E: Element>(
        &mut self,
        simd: S,
        chunk: usize,
        pages: &ChunkPages,
        block: Range<usize>,
    ) {
        let weighted = Weighted::<E> {
            weights: &self.workspace.scores,
            head_dim: self.head_dim,
            stride: self.stride,
            values: &pages.values,
            ahead: &pages.after_values,
            element: PhantomData,
        };
        // Both bounds ascend with the query row.
        let start = self.visible(block.end - 1, chunk).start;
        let end = self.visible(block.start, chunk).end.max(start);
        let group = self.group;
        for pass in 0..3 {
            // SAFETY: `pages` holds, for visible pages, pointers to values inside the cache.
            unsafe {
                if pass == 1 {
                    let rows = block.start * group..block.end * group;
                    weighted.add(simd, rows, start..end, &mut self.workspace.partials);
                    continue;
                }
                for token in block.clone() {
                    let visible = self.visible(token, chunk);
                    let alone = if pass == 0 {
                        visible.start..visible.end.min(start)
                    } else {
                        visible.start.max(end)..visible.end
                    };
                    let rows = token * group..(token + 1) * group;
                    weighted.add(simd, rows, alone, &mut self.workspace.partials);
                }
            }
        }
    }

    /// Merges the chunk's partial results into the totals.
    #[inline(always)]
    fn merge_chunk<S: Simd>(&mut self, simd: S) {
        let Workspace { partials, chunk, sums, total, .. } = &mut *self.workspace;
        for (row, (chunk, total)) in chunk.iter().zip(total.iter_mut()).enumerate() {
            let at = row * self.stride..(row + 1) * self.stride;
            merge(simd, total, &mut sums[at.clone()], *chunk, &partials[at]);
        }
    }

    /// Stores the chunk's partial results for a later merge.
    fn store_partials(&self, first: usize) {
        for (row, chunk) in self.workspace.chunk.iter().enumerate() {
            // SAFETY: every (item, chunk, row) has its own row of partials, and items compute each chunk once.
            let stored = unsafe { self.call.partials.row_mut(first + row) };
            stored[..self.stride]
                .copy_from_slice(&self.workspace.partials[row * self.stride..][..self.stride]);
            stored[self.stride] = chunk.greatest;
            stored[self.stride + 1] = chunk.sum;
        }
    }
}

impl Kernel for Tile<'_> {
    type Output = ();
    const MULTIPLIES_BYTES: bool = false;

    #[inline(always)]
    fn run<S: Simd>(mut self, simd: S) {
        let rows = self.rows();
        self.workspace.prepare(rows, self.head_dim);
        self.gather_queries();
        for chunk in self.item.chunks.clone() {
            self.chunk(simd, chunk);
            match self.item.partial {
                Some(first) => self.store_partials(first + (chunk - self.item.chunks.start) * rows),
                None => self.merge_chunk(simd),
            }
        }
        if self.item.partial.is_none() {
            for row in 0..rows {
                let sums = &self.workspace.sums[row * self.stride..][..self.stride];
                finish(simd, self.call, self.item, row, self.workspace.total[row], sums);
            }
        }
    }
}

/// Merges the stored partial results of an item's rows in ascending order of chunks.
pub(super) struct Merge<'a> {
    pub call: &'a Call<'a>,
    pub item: &'a Item,
}

impl Kernel for Merge<'_> {
    type Output = ();
    const MULTIPLIES_BYTES: bool = false;

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Some(first) = self.item.partial else { return };
        let rows = self.item.rows.len() * self.call.attention.group();
        let stride = self.call.attention.head_dim.next_multiple_of(LANES);
        let mut sums = vec![0.0; stride];
        for row in 0..rows {
            sums.fill(0.0);
            let mut total = Partial::EMPTY;
            for chunk in 0..self.item.chunks.len() {
                // SAFETY: all items are computed, and only this task looks at the partials of its rows.
                let stored = unsafe { self.call.partials.row_mut(first + chunk * rows + row) };
                let partial = Partial { greatest: stored[stride], sum: stored[stride + 1] };
                merge(simd, &mut total, &mut sums, partial, &stored[..stride]);
            }
            finish(simd, self.call, self.item, row, total, &sums);
        }
    }
}

/// Pointers to a chunk's visible pages (null for the others).
struct ChunkPages {
    keys: [*const u8; CHUNK_PAGES],
    values: [*const u8; CHUNK_PAGES],
    /// What to fetch while a page's keys are used.
    after_keys: [*const u8; CHUNK_PAGES],
    /// What to fetch while a page's values are used; null for nothing.
    after_values: [*const u8; CHUNK_PAGES],
}

impl ChunkPages {
    const EMPTY: ChunkPages = {
        let nothing = [std::ptr::null(); CHUNK_PAGES];
        ChunkPages { keys: nothing, values: nothing, after_keys: nothing, after_values: nothing }
    };
}

/// Writes a row's result: its weighted values divided by the sum of its weights.
#[inline(always)]
fn finish<S: Simd>(simd: S, call: &Call<'_>, item: &Item, row: usize, total: Partial, sums: &[f32]) {
    let (group, head_dim) = (call.attention.group(), call.attention.head_dim);
    let index = call.sequences[item.sequence].first_row + item.rows.start + row / group;
    let head = item.kv_head * group + row % group;
    // SAFETY: items are disjoint in (rows, key/value head), `check` proved that sequences share no row, and no reference to a part
    // of the output outlives this function.
    let output = unsafe { call.output.part_mut(index, head * head_dim, head_dim) };
    let inverse = simd.splat(1.0 / total.sum);
    for (sums, output) in sums.as_chunks::<LANES>().0.iter().zip(output.chunks_mut(LANES)) {
        let result = simd.mul(simd.load(sums), inverse);
        match output.first_chunk_mut::<LANES>() {
            Some(lanes) => simd.store(result, lanes),
            None => simd.store_partial(result, output),
        }
    }
}
