//! Sequences with known keys and values, stored in pages, and the attention over them.

use infer_kernels::{
    Attention, AttentionRows, Context, Isa, KvCache, KvElement, KvLayer, PAGE_TOKENS, Rows, RowsMut, Scratch,
    attention, attention_ref,
};

use crate::ops_support::{Random, assert_near, context};

/// Types of keys and of values: each of both, and some that differ.
pub const TYPES: [(KvElement, KvElement); 9] = [
    both(KvElement::F32),
    both(KvElement::F16),
    both(KvElement::Bf16),
    both(KvElement::Int8),
    both(KvElement::E4m3),
    (KvElement::F16, KvElement::Int8),
    (KvElement::Int8, KvElement::F32),
    (KvElement::E4m3, KvElement::Bf16),
    (KvElement::F32, KvElement::E4m3),
];

/// Keys and values of one type.
pub const fn both(element: KvElement) -> (KvElement, KvElement) {
    (element, element)
}

pub const LAYER: usize = 1;

/// Queries, keys and values of one sequence: (length, width).
#[derive(Clone)]
pub struct Sequence {
    pub queries: Vec<f32>,
    pub keys: Vec<f32>,
    pub values: Vec<f32>,
    pub length: usize,
}

impl Sequence {
    /// Keys and values are numbers that every element type without a scale holds exactly.
    pub fn new(shape: &Attention, length: usize, seed: u64) -> Sequence {
        let mut random = Random(seed);
        let exact = |x: f32| (x * 64.0).round() / 32.0;
        let stored = length * shape.kv_heads * shape.head_dim;
        Sequence {
            queries: random.values(length * shape.heads * shape.head_dim),
            keys: random.values(stored).into_iter().map(exact).collect(),
            values: random.values(stored).into_iter().map(exact).collect(),
            length,
        }
    }

    /// The same with what a cache of these types makes of keys and values, by the scalar oracles.
    pub fn rounded(&self, shape: &Attention, (keys, values): (KvElement, KvElement)) -> Sequence {
        let heads = |data: &[f32], round: &dyn Fn(&[f32]) -> Vec<f32>| {
            data.chunks(shape.head_dim).flat_map(round).collect()
        };
        Sequence {
            keys: heads(&self.keys, &|head| keys.stored_key_ref(head)),
            values: heads(&self.values, &|head| values.stored_value_ref(head)),
            ..self.clone()
        }
    }

    pub fn reference(&self, shape: &Attention) -> Vec<f64> {
        let (query_width, width) = (shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim);
        let part = |data: &'static str, j: usize, head: usize| {
            let all = if data == "keys" { &self.keys } else { &self.values };
            &all[j * width + head * shape.head_dim..][..shape.head_dim]
        };
        let row = |position: usize| {
            let query = &self.queries[position * query_width..][..query_width];
            attention_ref(shape, query, position, |j, h| part("keys", j, h), |j, h| part("values", j, h))
        };
        (0..self.length).flat_map(row).collect()
    }
}

/// A cache that holds whole sequences, its pages dealt out in an order that `seed` shuffles.
pub struct Stored {
    pub cache: KvCache,
    pub tables: Vec<Vec<u32>>,
}

impl Stored {
    pub fn new(
        context: &Context,
        shape: &Attention,
        sequences: &[Sequence],
        types: (KvElement, KvElement),
        seed: u64,
    ) -> Stored {
        let needed: usize = sequences.iter().map(|sequence| sequence.length.div_ceil(PAGE_TOKENS)).sum();
        let mut order: Vec<u32> = (0..needed as u32 + 3).collect();
        let mut random = Random(seed);
        for i in (1..order.len()).rev() {
            order.swap(i, random.bits() as usize % (i + 1));
        }
        let (keys, values) = types;
        let layer = KvLayer { kv_heads: shape.kv_heads, head_dim: shape.head_dim, keys, values };
        // The other layer has its types the other way round.
        let layers = [KvLayer { kv_heads: 1, head_dim: 8, keys: values, values: keys }, layer];
        let cache = KvCache::new(&layers, order.len()).unwrap();
        let mut stored = Stored { cache, tables: Vec::new() };
        stored.poison(context, layer);
        for sequence in sequences {
            let table = order.split_off(order.len() - sequence.length.div_ceil(PAGE_TOKENS));
            let slots = slots(&table, 0..sequence.length);
            let width = shape.kv_heads * shape.head_dim;
            let keys = Rows::new(&sequence.keys, sequence.length, width, width);
            let values = Rows::new(&sequence.values, sequence.length, width, width);
            stored.cache.write(context, LAYER, keys, values, &slots);
            stored.tables.push(table);
        }
        stored
    }

    /// Fills everything with NaN, as a page's former owner might have left it.
    pub fn poison(&mut self, context: &Context, layer: KvLayer) {
        let (rows, width) = (self.cache.pages() * PAGE_TOKENS, layer.kv_heads * layer.head_dim);
        let bad = vec![f32::NAN; rows * width];
        let slots: Vec<u32> = (0..rows as u32).collect();
        let bad = Rows::new(&bad, rows, width, width);
        self.cache.write(context, LAYER, bad, bad, &slots);
    }
}

pub fn slots(table: &[u32], positions: std::ops::Range<usize>) -> Vec<u32> {
    positions.map(|p| table[p / PAGE_TOKENS] * PAGE_TOKENS as u32 + (p % PAGE_TOKENS) as u32).collect()
}

/// Computes the given row ranges of the sequences in one call; results in the order given.
pub fn compute(
    context: &Context,
    shape: &Attention,
    stored: &Stored,
    sequences: &[Sequence],
    parts: &[(usize, std::ops::Range<usize>)],
) -> Vec<Vec<f32>> {
    let width = shape.heads * shape.head_dim;
    let (mut queries, mut rows) = (Vec::new(), Vec::new());
    for (index, part) in parts {
        let first_row = queries.len() / width;
        queries.extend_from_slice(&sequences[*index].queries[part.start * width..part.end * width]);
        let pages = &stored.tables[*index];
        rows.push(AttentionRows { first_row, rows: part.len(), first_position: part.start, pages });
    }
    let count = queries.len() / width;
    let mut output = vec![f32::NAN; queries.len()];
    let (input, result) =
        (Rows::new(&queries, count, width, width), RowsMut::new(&mut output, count, width, width));
    attention(context, shape, &stored.cache, LAYER, &rows, input, result, &mut Scratch::default());
    rows.iter().map(|rows| output[rows.first_row * width..][..rows.rows * width].to_vec()).collect()
}

pub fn shape(heads: usize, kv_heads: usize, head_dim: usize) -> Attention {
    let scale = (head_dim as f32).powf(-0.5) * 2.0;
    Attention { heads, kv_heads, head_dim, scale, window: None, softcap: None }
}

pub fn assert_matches(isa: Isa, shape: &Attention, lengths: &[usize], types: (KvElement, KvElement)) {
    let context = context(isa, 2);
    let sequences: Vec<Sequence> =
        lengths.iter().enumerate().map(|(i, &length)| Sequence::new(shape, length, i as u64)).collect();
    let stored = Stored::new(&context, shape, &sequences, types, 5);
    let parts: Vec<_> = lengths.iter().enumerate().map(|(i, &length)| (i, 0..length)).collect();
    for (sequence, output) in sequences.iter().zip(compute(&context, shape, &stored, &sequences, &parts)) {
        assert_near(
            &output,
            &sequence.rounded(shape, types).reference(shape),
            3e-6,
            &format!("{} {types:?} {shape:?}", isa.name()),
        );
    }
}
