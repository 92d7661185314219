//! Attention of query rows over paged keys and values; prompt and decoding are one path.
//!
//! The positions of a sequence are cut into chunks of [`CHUNK_TOKENS`], aligned to position 0. In each chunk a query row gets
//! its greatest score, the sum of its weights and the weighted sum of the values (the online softmax of Milakov and Gimelshein, 2018, as in
//! FlashAttention); chunks are merged in ascending order. Inside a chunk every sum runs in one fixed order, and only over what
//! the row may see. So a row's result depends on its own query, position and visible keys alone, bit for bit: not on other rows,
//! on how rows were tiled, on pages, on what stale pages hold, or on threads.
//!
//! A task is a block of query rows of one sequence with all query heads that share a key/value head, so keys and values are read
//! once for all of them. When there are fewer tasks than would keep all threads busy, chunks are shared out too, and their partial
//! results merged afterwards by the same operations.

mod plan;
mod product;
mod reference;
mod softmax;
mod tile;

use crate::kv::PAGE_TOKENS;
use crate::{Context, KvCache, Rows, RowsMut, Scratch, SharedRows};
use plan::{Item, Plan};
pub use reference::attention_ref;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use tile::{Merge, Tile, Workspace};

/// Positions whose scores are weighed together. Changing it changes results (in the last bits).
pub const CHUNK_TOKENS: usize = 256;

/// Pages in a chunk.
const CHUNK_PAGES: usize = CHUNK_TOKENS / PAGE_TOKENS;

/// Query rows of one sequence. Row `i` has position `first_position + i` and sees positions up to its own.
#[derive(Clone, Copy, Debug)]
pub struct AttentionRows<'a> {
    /// Index of row 0 among the rows of the call.
    pub first_row: usize,
    /// Number of rows.
    pub rows: usize,
    /// Position of row 0 in its sequence.
    pub first_position: usize,
    /// The sequence's pages: position `p` lies in `pages[p / PAGE_TOKENS]`. Pages wholly before the window are never looked at.
    pub pages: &'a [u32],
}

/// The shape and kind of an attention.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Attention {
    /// Query heads.
    pub heads: usize,
    /// Key/value heads; divides `heads`.
    pub kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Factor of every score.
    pub scale: f32,
    /// The key at position `j` is visible to the query at position `i` if `j <= i` and `i - j < window`.
    pub window: Option<usize>,
    /// Scores become `cap * tanh(score / cap)`, after scaling.
    pub softcap: Option<f32>,
}

impl Attention {
    /// Query heads that share a key/value head.
    fn group(&self) -> usize {
        self.heads / self.kv_heads
    }

    /// The first position that is visible from `position`.
    fn first_visible(&self, position: usize) -> usize {
        self.window.map_or(0, |window| (position + 1).saturating_sub(window))
    }
}

/// Working memory of [`attention`], kept between calls.
#[derive(Debug, Default)]
pub(crate) struct AttentionScratch {
    plan: Plan,
    workspaces: Vec<Mutex<Workspace>>,
    partials: Vec<f32>,
}

/// `output[row, head] = softmax(scale * query[row, head] . keys) * values`, over the visible positions of the row's sequence.
///
/// `queries` and `output` are (rows, heads * head_dim). Rows that belong to no sequence are left as they are. Keys and
/// values of every visible position, the row's own included, must have been written before.
///
/// # Panics
/// If shapes do not fit each other or the layer, or a visible page is missing or beyond the cache.
pub fn attention(
    context: &Context,
    attention: &Attention,
    cache: &KvCache,
    layer: usize,
    sequences: &[AttentionRows<'_>],
    queries: Rows<'_>,
    output: RowsMut<'_>,
    scratch: &mut Scratch,
) {
    check(attention, cache, layer, sequences, queries, &output);
    let scratch = &mut scratch.attention;
    scratch.plan.make(attention, sequences, context.pool.threads());
    let slots = context.pool.threads().min(scratch.plan.items.len());
    scratch.workspaces.resize_with(slots.max(scratch.workspaces.len()), Default::default);
    let width = Workspace::partial_width(attention.head_dim);
    let partial_rows = scratch.plan.partial_rows;
    if scratch.partials.len() < partial_rows * width {
        scratch.partials.resize(partial_rows * width, 0.0);
    }
    let call = Call {
        context,
        attention,
        cache,
        layer,
        sequences,
        queries,
        output: output.share(),
        partials: RowsMut::new(&mut scratch.partials, partial_rows, width, width).share(),
    };
    let (plan, workspaces) = (&scratch.plan, &scratch.workspaces);
    let next = AtomicUsize::new(0);
    context.pool.run(slots, |slot| {
        let mut workspace = workspaces[slot].lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        while let Some(item) = plan.items.get(next.fetch_add(1, Ordering::Relaxed)) {
            call.compute(item, &mut workspace);
        }
    });
    if partial_rows > 0 {
        context.pool.run(plan.merges.len(), |merge| {
            context.isa.dispatch(Merge { call: &call, item: &plan.merges[merge] });
        });
    }
}

/// What all tasks of one call share.
struct Call<'a> {
    context: &'a Context,
    attention: &'a Attention,
    cache: &'a KvCache,
    layer: usize,
    sequences: &'a [AttentionRows<'a>],
    queries: Rows<'a>,
    output: SharedRows<'a>,
    /// One row per (item, chunk, query row of the item): the accumulated values, then greatest score and sum of weights.
    partials: SharedRows<'a>,
}

impl Call<'_> {
    fn compute(&self, item: &Item, workspace: &mut Workspace) {
        self.context.isa.dispatch(Tile::new(self, item, workspace));
    }
}

/// Proves everything that the kernels rely on.
fn check(
    attention: &Attention,
    cache: &KvCache,
    layer: usize,
    sequences: &[AttentionRows<'_>],
    queries: Rows<'_>,
    output: &RowsMut<'_>,
) {
    let Attention { heads, kv_heads, head_dim, .. } = *attention;
    let shape = cache.layer(layer);
    assert_eq!(
        (kv_heads, head_dim),
        (shape.kv_heads, shape.head_dim),
        "attention does not match layer {layer}'s cache"
    );
    assert!(
        heads > 0 && heads.is_multiple_of(kv_heads),
        "{kv_heads} key/value heads do not divide {heads} heads"
    );
    assert!(attention.window != Some(0), "a window of 0 sees nothing");
    assert_eq!((queries.rows(), queries.width()), (output.rows(), heads * head_dim), "queries do not match");
    assert_eq!(output.width(), heads * head_dim, "output does not match");
    let mut covered = vec![false; queries.rows()];
    for sequence in sequences {
        let AttentionRows { first_row, rows, first_position, pages } = *sequence;
        let rows_end = first_row.checked_add(rows).filter(|&end| end <= queries.rows());
        let end = first_position.checked_add(rows).filter(|&end| end.div_ceil(PAGE_TOKENS) <= pages.len());
        let (Some(rows_end), Some(end)) = (rows_end, end) else {
            panic!(
                "rows {first_row}..+{rows} at position {first_position} with {} pages do not fit the call",
                pages.len()
            );
        };
        let covered = &mut covered[first_row..rows_end];
        assert!(!covered.contains(&true), "two sequences share a row");
        covered.fill(true);
        let visible = attention.first_visible(first_position) / PAGE_TOKENS..end.div_ceil(PAGE_TOKENS);
        let known = pages[visible].iter().all(|&page| (page as usize) < cache.pages());
        assert!(known, "a visible page is beyond the cache's {} pages", cache.pages());
    }
}
