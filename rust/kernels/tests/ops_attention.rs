//! Attention against its oracle, and the law that a row's result depends on its own sequence alone, bit for bit.

mod ops_support;

use half::{bf16, f16};
use infer_kernels::{
    Attention, AttentionRows, CHUNK_TOKENS, Context, Isa, KvCache, KvElement, KvLayer, PAGE_TOKENS, Rows,
    RowsMut, Scratch, attention, attention_ref,
};
use ops_support::{Random, assert_near, bits, context};
use proptest::prelude::*;

const ELEMENTS: [KvElement; 3] = [KvElement::F32, KvElement::F16, KvElement::Bf16];
const LAYER: usize = 1;

/// Queries, keys and values of one sequence: (length, width).
#[derive(Clone)]
struct Sequence {
    queries: Vec<f32>,
    keys: Vec<f32>,
    values: Vec<f32>,
    length: usize,
}

impl Sequence {
    /// Keys and values are numbers that every element type holds exactly.
    fn new(shape: &Attention, length: usize, seed: u64) -> Sequence {
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

    fn reference(&self, shape: &Attention) -> Vec<f64> {
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
struct Stored {
    cache: KvCache,
    tables: Vec<Vec<u32>>,
}

impl Stored {
    fn new(
        context: &Context,
        shape: &Attention,
        sequences: &[Sequence],
        element: KvElement,
        seed: u64,
    ) -> Stored {
        let needed: usize = sequences.iter().map(|sequence| sequence.length.div_ceil(PAGE_TOKENS)).sum();
        let mut order: Vec<u32> = (0..needed as u32 + 3).collect();
        let mut random = Random(seed);
        for i in (1..order.len()).rev() {
            order.swap(i, random.bits() as usize % (i + 1));
        }
        let layer = KvLayer { kv_heads: shape.kv_heads, head_dim: shape.head_dim };
        let layers = [KvLayer { kv_heads: 1, head_dim: 8 }, layer];
        let cache = KvCache::new(&layers, order.len(), element).unwrap();
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
    fn poison(&mut self, context: &Context, layer: KvLayer) {
        let (rows, width) = (self.cache.pages() * PAGE_TOKENS, layer.kv_heads * layer.head_dim);
        let bad = vec![f32::NAN; rows * width];
        let slots: Vec<u32> = (0..rows as u32).collect();
        let bad = Rows::new(&bad, rows, width, width);
        self.cache.write(context, LAYER, bad, bad, &slots);
    }
}

fn slots(table: &[u32], positions: std::ops::Range<usize>) -> Vec<u32> {
    positions.map(|p| table[p / PAGE_TOKENS] * PAGE_TOKENS as u32 + (p % PAGE_TOKENS) as u32).collect()
}

/// Computes the given row ranges of the sequences in one call; results in the order given.
fn compute(
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

fn shape(heads: usize, kv_heads: usize, head_dim: usize) -> Attention {
    let scale = (head_dim as f32).powf(-0.5) * 2.0;
    Attention { heads, kv_heads, head_dim, scale, window: None, softcap: None }
}

fn assert_matches(isa: Isa, shape: &Attention, lengths: &[usize], element: KvElement) {
    let context = context(isa, 2);
    let sequences: Vec<Sequence> =
        lengths.iter().enumerate().map(|(i, &length)| Sequence::new(shape, length, i as u64)).collect();
    let stored = Stored::new(&context, shape, &sequences, element, 5);
    let parts: Vec<_> = lengths.iter().enumerate().map(|(i, &length)| (i, 0..length)).collect();
    for (sequence, output) in sequences.iter().zip(compute(&context, shape, &stored, &sequences, &parts)) {
        assert_near(
            &output,
            &sequence.reference(shape),
            3e-6,
            &format!("{} {element:?} {shape:?}", isa.name()),
        );
    }
}

#[test]
fn every_element_type_on_every_instruction_set() {
    for isa in Isa::available() {
        for element in ELEMENTS {
            assert_matches(isa, &shape(8, 2, 64), &[1, 16, 37, 300], element);
        }
    }
}

#[test]
fn every_head_dimension_and_group() {
    for isa in Isa::available() {
        for head_dim in [1, 8, 16, 20, 64, 72, 80, 96, 128, 256] {
            assert_matches(isa, &shape(4, 2, head_dim), &[19, 70], KvElement::F16);
        }
        for group in [1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 40] {
            assert_matches(isa, &shape(2 * group, 2, 24), &[35], KvElement::F32);
        }
    }
}

#[test]
fn windows_and_soft_caps() {
    for isa in Isa::available() {
        for window in [1, 2, 15, 16, 17, 100, 256, 300, 1000] {
            let shape = Attention { window: Some(window), softcap: Some(3.0), ..shape(4, 2, 32) };
            assert_matches(isa, &shape, &[290, 530], KvElement::F32);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn any_shape_matches_the_oracle(
        group in 1usize..9, kv_heads in 1usize..4, head_dim in 1usize..70, lengths in prop::collection::vec(1usize..400, 1..4),
        window in prop::option::of(1usize..300), softcap in prop::option::of(1.0f32..20.0), element in 0usize..3,
    ) {
        let shape = Attention { window, softcap, ..shape(group * kv_heads, kv_heads, head_dim) };
        assert_matches(Isa::detect(), &shape, &lengths, ELEMENTS[element]);
    }
}

/// A long sequence and two short ones, whole, in one call on one thread: what all other ways of computing must equal.
fn expected(isa: Isa, shape: &Attention, element: KvElement) -> (Vec<Sequence>, Vec<Vec<f32>>) {
    let lengths = [2 * CHUNK_TOKENS + 45, 33, 100];
    let sequences: Vec<Sequence> =
        lengths.iter().enumerate().map(|(i, &length)| Sequence::new(shape, length, 50 + i as u64)).collect();
    let context = context(isa, 1);
    let stored = Stored::new(&context, shape, &sequences, element, 1);
    let parts: Vec<_> = lengths.iter().enumerate().map(|(i, &length)| (i, 0..length)).collect();
    let output = compute(&context, shape, &stored, &sequences, &parts);
    (sequences, output)
}

fn variants() -> Vec<Attention> {
    vec![
        shape(4, 2, 64),
        Attention { softcap: Some(2.0), window: Some(70), ..shape(6, 2, 40) },
        Attention { window: Some(300), ..shape(3, 3, 20) },
    ]
}

#[test]
fn chunked_prompts_and_decoding_equal_the_whole_prompt() {
    for (isa, shape) in
        Isa::available().into_iter().flat_map(|isa| variants().into_iter().map(move |shape| (isa, shape)))
    {
        let (sequences, expected) = expected(isa, &shape, KvElement::F16);
        let context = context(isa, 2);
        let stored = Stored::new(&context, &shape, &sequences, KvElement::F16, 1);
        for step in [1, 7, 16, 250] {
            let mut output = Vec::new();
            for first in (0..sequences[0].length).step_by(step) {
                let part = (0, first..sequences[0].length.min(first + step));
                output.extend(compute(&context, &shape, &stored, &sequences, &[part]).remove(0));
            }
            assert_eq!(bits(&output), bits(&expected[0]), "{} in steps of {step}: {shape:?}", isa.name());
        }
    }
}

#[test]
fn decoding_while_the_cache_grows_equals_the_whole_prompt() {
    let shape = shape(4, 2, 32);
    for isa in Isa::available() {
        let (sequences, expected) = expected(isa, &shape, KvElement::Bf16);
        let context = context(isa, 2);
        let sequence = &sequences[1];
        let width = shape.kv_heads * shape.head_dim;
        let empty = [Sequence { length: 0, ..sequence.clone() }];
        let mut stored = Stored::new(&context, &shape, &empty, KvElement::Bf16, 1);
        stored.tables[0] = vec![2, 0, 1];
        let mut output = Vec::new();
        for position in 0..sequence.length {
            let at = position * width..(position + 1) * width;
            let keys = Rows::new(&sequence.keys[at.clone()], 1, width, width);
            let values = Rows::new(&sequence.values[at], 1, width, width);
            let slots = slots(&stored.tables[0], position..position + 1);
            stored.cache.write(&context, LAYER, keys, values, &slots);
            let part = (0, position..position + 1);
            output.extend(
                compute(&context, &shape, &stored, std::slice::from_ref(sequence), &[part]).remove(0),
            );
        }
        assert_eq!(bits(&output), bits(&expected[1]), "{}", isa.name());
    }
}

#[test]
fn neighbours_threads_and_pages_change_nothing() {
    for (isa, shape) in
        Isa::available().into_iter().flat_map(|isa| variants().into_iter().map(move |shape| (isa, shape)))
    {
        let (sequences, expected) = expected(isa, &shape, KvElement::F32);
        for threads in [1, 2, 3, 5] {
            let context = context(isa, threads);
            let stored = Stored::new(&context, &shape, &sequences, KvElement::F32, 90 + threads as u64);
            let last = sequences[0].length - 1;
            let parts = [(2, 50..100), (0, last..last + 1), (1, 0..33), (0, 200..290)];
            let output = compute(&context, &shape, &stored, &sequences, &parts);
            let width = shape.heads * shape.head_dim;
            for ((index, part), output) in parts.iter().zip(&output) {
                let expected = &expected[*index][part.start * width..part.end * width];
                assert_eq!(bits(output), bits(expected), "{} {threads} threads {index} {part:?}", isa.name());
            }
            // One sequence alone: few tasks, so its chunks are shared out.
            for part in [0..sequences[0].length, last..last + 1, 511..515] {
                let output = compute(&context, &shape, &stored, &sequences, &[(0, part.clone())]);
                let expected = &expected[0][part.start * width..part.end * width];
                assert_eq!(
                    bits(&output[0]),
                    bits(expected),
                    "{} {threads} threads alone {part:?}",
                    isa.name()
                );
            }
        }
    }
}

#[test]
fn instruction_sets_agree_bit_for_bit() {
    for shape in variants() {
        for element in ELEMENTS {
            let (_, scalar) = expected(Isa::Scalar, &shape, element);
            for isa in Isa::available() {
                let (_, output) = expected(isa, &shape, element);
                assert_eq!(bits(&output.concat()), bits(&scalar.concat()), "{} {element:?}", isa.name());
            }
        }
    }
}

#[test]
fn rows_outside_all_sequences_are_left_alone() {
    let shape = shape(2, 1, 16);
    let context = context(Isa::detect(), 1);
    let sequences = [Sequence::new(&shape, 4, 0)];
    let stored = Stored::new(&context, &shape, &sequences, KvElement::F32, 0);
    let mut output = vec![7.0; 6 * 32];
    let queries = vec![0.5; 6 * 32];
    let rows = [AttentionRows { first_row: 2, rows: 2, first_position: 2, pages: &stored.tables[0] }];
    let (input, result) = (Rows::new(&queries, 6, 32, 32), RowsMut::new(&mut output, 6, 32, 32));
    attention(&context, &shape, &stored.cache, LAYER, &rows, input, result, &mut Scratch::default());
    assert!(output[..64].iter().chain(&output[128..]).all(|&value| value == 7.0));
    assert!(output[64..128].iter().all(|&value| value != 7.0));
}

#[test]
#[should_panic(expected = "two sequences share a row")]
fn shared_rows_are_refused() {
    let shape = shape(2, 1, 16);
    let context = context(Isa::detect(), 1);
    let sequences = [Sequence::new(&shape, 4, 0)];
    let stored = Stored::new(&context, &shape, &sequences, KvElement::F32, 0);
    let (queries, mut output) = (vec![0.5; 64], vec![0.0; 64]);
    let rows = AttentionRows { first_row: 0, rows: 2, first_position: 2, pages: &stored.tables[0] };
    let (input, result) = (Rows::new(&queries, 2, 32, 32), RowsMut::new(&mut output, 2, 32, 32));
    attention(&context, &shape, &stored.cache, LAYER, &[rows, rows], input, result, &mut Scratch::default());
}

#[test]
fn elements_are_rounded_to_nearest_even() {
    let shape = Attention { scale: 1.0, ..shape(1, 1, 37) };
    let context = context(Isa::detect(), 1);
    let value: Vec<f32> = Random(4).values(37);
    for element in ELEMENTS {
        let sequence =
            Sequence { queries: vec![0.0; 37], keys: vec![0.0; 37], values: value.clone(), length: 1 };
        let sequences = [sequence];
        let stored = Stored::new(&context, &shape, &sequences, element, 0);
        let output = compute(&context, &shape, &stored, &sequences, &[(0, 0..1)]).remove(0);
        let round = |x: f32| match element {
            KvElement::F32 => x,
            KvElement::F16 => f16::from_f32(x).to_f32(),
            KvElement::Bf16 => bf16::from_f32(x).to_f32(),
        };
        assert_eq!(bits(&output), bits(&value.iter().map(|&x| round(x)).collect::<Vec<_>>()), "{element:?}");
    }
}

#[test]
fn copied_pages_hold_the_same() {
    let shape = shape(4, 2, 24);
    let context = context(Isa::detect(), 1);
    let sequences = [Sequence::new(&shape, 30, 8)];
    let mut stored = Stored::new(&context, &shape, &sequences, KvElement::F16, 0);
    let before = compute(&context, &shape, &stored, &sequences, &[(0, 0..30)]);
    let free: Vec<u32> =
        (0..stored.cache.pages() as u32).filter(|page| !stored.tables[0].contains(page)).collect();
    for (page, &free) in stored.tables[0].iter_mut().zip(&free) {
        stored.cache.copy_page(*page, free);
        *page = free;
    }
    let after = compute(&context, &shape, &stored, &sequences, &[(0, 0..30)]);
    assert_eq!(bits(&after[0]), bits(&before[0]));
}

#[test]
fn caches_that_cannot_be_are_refused() {
    let layer = KvLayer { kv_heads: 8, head_dim: 128 };
    assert_eq!(KvCache::page_bytes(&[layer; 3], KvElement::F16), 3 * 2 * 8 * 128 * 16 * 2);
    let refused =
        |layers: &[KvLayer], pages| KvCache::new(layers, pages, KvElement::F32).err().unwrap().to_string();
    assert!(refused(&[layer; 100], 100_000_000).contains("key/value cache"));
    assert!(refused(&[KvLayer { kv_heads: usize::MAX, head_dim: 3 }], 4).contains("key/value cache"));
    assert!(refused(&[KvLayer { kv_heads: 0, head_dim: 3 }], 4).contains("heads"));
    assert!(refused(&[layer], usize::MAX).contains("at most 268435455"));
    // Reserved, but not touched.
    let before = resident_pages();
    let cache = KvCache::new(&[layer; 16], 2048, KvElement::F16).unwrap();
    assert!(cache.reserved_bytes() >= 2 << 30);
    assert!(resident_pages() < before + (1 << 18), "a new cache took memory");
}

/// 4 KiB pages of memory that the process uses; 0 where the system does not say.
fn resident_pages() -> usize {
    let counts = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
    counts.split_whitespace().nth(1).map_or(0, |pages| pages.parse().unwrap())
}
