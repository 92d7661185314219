//! Cuts a call into tasks. No choice made here changes a result.

use super::{Attention, AttentionRows, CHUNK_TOKENS};
use std::ops::Range;

/// Query rows times heads of a task: enough that reading keys and values costs little beside computing with them.
const TILE_ROWS: usize = 32;

/// Tasks per thread below which chunks are shared out too.
const TASKS_PER_THREAD: usize = 4;

/// One task: some query rows of a sequence, with all heads of one key/value head, over some chunks.
#[derive(Clone, Debug)]
pub(super) struct Item {
    pub sequence: usize,
    pub kv_head: usize,
    /// Query rows, counted within the sequence.
    pub rows: Range<usize>,
    pub chunks: Range<usize>,
    /// First row among the partial results of this item's first chunk; `None` if the item computes the rows' results alone.
    pub partial: Option<usize>,
}

/// The tasks of a call.
#[derive(Debug, Default)]
pub(super) struct Plan {
    /// What is computed first, in any order.
    pub items: Vec<Item>,
    /// Items whose partial results are merged afterwards: all chunks of their rows.
    pub merges: Vec<Item>,
    /// Partial results in all.
    pub partial_rows: usize,
}

impl Plan {
    pub fn make(&mut self, attention: &Attention, sequences: &[AttentionRows<'_>], threads: usize) {
        self.items.clear();
        self.merges.clear();
        self.partial_rows = 0;
        let tokens = (TILE_ROWS / attention.group()).max(1);
        for (sequence, rows) in sequences.iter().enumerate() {
            for first in (0..rows.rows).step_by(tokens) {
                let block = first..rows.rows.min(first + tokens);
                let (begin, end) = (rows.first_position + block.start, rows.first_position + block.end);
                let chunks = attention.first_visible(begin) / CHUNK_TOKENS..end.div_ceil(CHUNK_TOKENS);
                self.items.extend((0..attention.kv_heads).map(|kv_head| Item {
                    sequence,
                    kv_head,
                    rows: block.clone(),
                    chunks: chunks.clone(),
                    partial: None,
                }));
            }
        }
        let wanted = threads * TASKS_PER_THREAD;
        if threads > 1 && self.items.len() < wanted {
            self.share_chunks(attention.group(), wanted.div_ceil(self.items.len().max(1)));
        }
        // Long tasks first: none is then left alone at the end.
        self.items.sort_by_key(|item| std::cmp::Reverse(item.chunks.len()));
    }

    /// Cuts items of several chunks into up to `parts` items.
    fn share_chunks(&mut self, group: usize, parts: usize) {
        for item in std::mem::take(&mut self.items) {
            if item.chunks.len() < 2 {
                self.items.push(item);
                continue;
            }
            let per_chunk = item.rows.len() * group;
            let step = item.chunks.len().div_ceil(parts);
            for start in item.chunks.clone().step_by(step) {
                let partial = Some(self.partial_rows + (start - item.chunks.start) * per_chunk);
                let chunks = start..item.chunks.end.min(start + step);
                self.items.push(Item { chunks, partial, ..item.clone() });
            }
            let partial = Some(self.partial_rows);
            self.partial_rows += item.chunks.len() * per_chunk;
            self.merges.push(Item { partial, ..item });
        }
    }
}
