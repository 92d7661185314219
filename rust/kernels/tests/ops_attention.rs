//! Attention against its oracle, and the law that a row's result depends on its own sequence alone, bit for bit.

mod attention_support;
mod ops_support;

use attention_support::{LAYER, Sequence, Stored, TYPES, assert_matches, both, compute, shape, slots};
use half::{bf16, f16};
use infer_kernels::{
    Attention, AttentionRows, CHUNK_TOKENS, Isa, KvCache, KvElement, KvLayer, PAGE_TOKENS, Rows, RowsMut,
    Scratch, attention,
};
use ops_support::{Random, bits, context};
use proptest::prelude::*;

#[test]
fn every_element_type_on_every_instruction_set() {
    for isa in Isa::available() {
        for types in TYPES {
            assert_matches(isa, &shape(8, 2, 64), &[1, 16, 37, 300], types);
        }
    }
}

#[test]
fn every_head_dimension_and_group() {
    for isa in Isa::available() {
        for head_dim in [1, 8, 16, 20, 64, 72, 80, 96, 128, 256] {
            assert_matches(isa, &shape(4, 2, head_dim), &[19, 70], both(KvElement::F16));
            assert_matches(isa, &shape(4, 2, head_dim), &[19, 70], (KvElement::Int8, KvElement::E4m3));
        }
        for group in [1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 40] {
            assert_matches(isa, &shape(2 * group, 2, 24), &[35], both(KvElement::F32));
            assert_matches(isa, &shape(2 * group, 2, 72), &[35], both(KvElement::Int8));
        }
    }
}

#[test]
fn windows_and_soft_caps() {
    for isa in Isa::available() {
        for window in [1, 2, 15, 16, 17, 100, 256, 300, 1000] {
            let shape = Attention { window: Some(window), softcap: Some(3.0), ..shape(4, 2, 32) };
            assert_matches(isa, &shape, &[290, 530], both(KvElement::F32));
            assert_matches(isa, &shape, &[290], both(KvElement::Int8));
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn any_shape_matches_the_oracle(
        group in 1usize..9, kv_heads in 1usize..4, head_dim in 1usize..70, lengths in prop::collection::vec(1usize..400, 1..4),
        window in prop::option::of(1usize..300), softcap in prop::option::of(1.0f32..20.0), types in 0usize..9,
    ) {
        let shape = Attention { window, softcap, ..shape(group * kv_heads, kv_heads, head_dim) };
        assert_matches(Isa::detect(), &shape, &lengths, TYPES[types]);
    }
}

/// A long sequence and two short ones, whole, in one call on one thread: what all other ways of computing must equal.
fn expected(isa: Isa, shape: &Attention, types: (KvElement, KvElement)) -> (Vec<Sequence>, Vec<Vec<f32>>) {
    let lengths = [2 * CHUNK_TOKENS + 45, 33, 100];
    let sequences: Vec<Sequence> =
        lengths.iter().enumerate().map(|(i, &length)| Sequence::new(shape, length, 50 + i as u64)).collect();
    let context = context(isa, 1);
    let stored = Stored::new(&context, shape, &sequences, types, 1);
    let parts: Vec<_> = lengths.iter().enumerate().map(|(i, &length)| (i, 0..length)).collect();
    let output = compute(&context, shape, &stored, &sequences, &parts);
    (sequences, output)
}

/// Every instruction set with every variant, and the types that the laws are held to there.
fn cases(
    types: &[(KvElement, KvElement)],
) -> impl Iterator<Item = (Isa, Attention, (KvElement, KvElement))> + '_ {
    Isa::available().into_iter().flat_map(move |isa| {
        variants().into_iter().flat_map(move |shape| types.iter().map(move |&types| (isa, shape, types)))
    })
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
    let all = [both(KvElement::F16), both(KvElement::Int8), both(KvElement::E4m3)];
    for (isa, shape, types) in cases(&all) {
        let (sequences, expected) = expected(isa, &shape, types);
        let context = context(isa, 2);
        let stored = Stored::new(&context, &shape, &sequences, types, 1);
        for step in [1, 7, 16, 250] {
            let mut output = Vec::new();
            for first in (0..sequences[0].length).step_by(step) {
                let part = (0, first..sequences[0].length.min(first + step));
                output.extend(compute(&context, &shape, &stored, &sequences, &[part]).remove(0));
            }
            assert_eq!(
                bits(&output),
                bits(&expected[0]),
                "{} in steps of {step}: {types:?} {shape:?}",
                isa.name()
            );
        }
    }
}

#[test]
fn decoding_while_the_cache_grows_equals_the_whole_prompt() {
    let shape = shape(4, 2, 32);
    let all = [both(KvElement::Bf16), (KvElement::Int8, KvElement::E4m3), (KvElement::E4m3, KvElement::Int8)];
    for (isa, types) in Isa::available().into_iter().flat_map(|isa| all.map(|types| (isa, types))) {
        let (sequences, expected) = expected(isa, &shape, types);
        let context = context(isa, 2);
        let sequence = &sequences[1];
        let width = shape.kv_heads * shape.head_dim;
        let empty = [Sequence { length: 0, ..sequence.clone() }];
        let mut stored = Stored::new(&context, &shape, &empty, types, 1);
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
    let all = [both(KvElement::F32), both(KvElement::Int8), both(KvElement::E4m3)];
    for (isa, shape, types) in cases(&all) {
        let (sequences, expected) = expected(isa, &shape, types);
        for threads in [1, 2, 3, 5] {
            let context = context(isa, threads);
            let stored = Stored::new(&context, &shape, &sequences, types, 90 + threads as u64);
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
        for types in TYPES {
            let (_, scalar) = expected(Isa::Scalar, &shape, types);
            for isa in Isa::available() {
                let (_, output) = expected(isa, &shape, types);
                assert_eq!(bits(&output.concat()), bits(&scalar.concat()), "{} {types:?}", isa.name());
            }
        }
    }
}

#[test]
fn rows_outside_all_sequences_are_left_alone() {
    let shape = shape(2, 1, 16);
    let context = context(Isa::detect(), 1);
    let sequences = [Sequence::new(&shape, 4, 0)];
    let stored = Stored::new(&context, &shape, &sequences, both(KvElement::F32), 0);
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
    let stored = Stored::new(&context, &shape, &sequences, both(KvElement::F32), 0);
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
    for element in [KvElement::F32, KvElement::F16, KvElement::Bf16] {
        let sequence =
            Sequence { queries: vec![0.0; 37], keys: vec![0.0; 37], values: value.clone(), length: 1 };
        let sequences = [sequence];
        let stored = Stored::new(&context, &shape, &sequences, both(element), 0);
        let output = compute(&context, &shape, &stored, &sequences, &[(0, 0..1)]).remove(0);
        let round = |x: f32| match element {
            KvElement::F16 => f16::from_f32(x).to_f32(),
            KvElement::Bf16 => bf16::from_f32(x).to_f32(),
            _ => x,
        };
        assert_eq!(bits(&output), bits(&value.iter().map(|&x| round(x)).collect::<Vec<_>>()), "{element:?}");
    }
}

#[test]
fn copied_pages_hold_the_same() {
    let shape = shape(4, 2, 40);
    let context = context(Isa::detect(), 1);
    let sequences = [Sequence::new(&shape, 30, 8)];
    for types in TYPES {
        let mut stored = Stored::new(&context, &shape, &sequences, types, 0);
        let before = compute(&context, &shape, &stored, &sequences, &[(0, 0..30)]);
        let free: Vec<u32> =
            (0..stored.cache.pages() as u32).filter(|page| !stored.tables[0].contains(page)).collect();
        for (page, &free) in stored.tables[0].iter_mut().zip(&free) {
            stored.cache.copy_page(*page, free);
            *page = free;
        }
        let after = compute(&context, &shape, &stored, &sequences, &[(0, 0..30)]);
        assert_eq!(bits(&after[0]), bits(&before[0]), "{types:?}");
    }
}

#[test]
fn exported_pages_hold_the_same_in_another_place() {
    let shape = shape(4, 2, 24);
    let context = context(Isa::detect(), 1);
    let sequences = [Sequence::new(&shape, 30, 8)];
    for types in TYPES {
        let stored = Stored::new(&context, &shape, &sequences, types, 0);
        let mut other = Stored::new(&context, &shape, &sequences, types, 3);
        let layers = [0, 1].map(|layer| stored.cache.layer(layer));
        let (mut bytes, mut again) = (vec![1, 2, 3], Vec::new());
        other.tables[0] = vec![4, 1];
        for (&from, &to) in stored.tables[0].iter().zip(&other.tables[0]) {
            stored.cache.export_page(from, &mut bytes);
            assert_eq!(bytes.len(), KvCache::page_bytes(&layers));
            other.cache.import_page(to, &bytes).unwrap();
            other.cache.export_page(to, &mut again);
            assert_eq!(again, bytes, "{types:?}");
            let refused = other.cache.import_page(to, &bytes[1..]).unwrap_err().to_string();
            assert!(refused.contains("key/value page") && refused.contains(&bytes.len().to_string()));
        }
        let outputs =
            [&stored, &other].map(|stored| compute(&context, &shape, stored, &sequences, &[(0, 0..30)]));
        assert_eq!(bits(&outputs[0][0]), bits(&outputs[1][0]), "{types:?}");
    }
}

/// Pages that no row sees may be missing.
#[test]
fn pages_before_the_window_are_never_looked_at() {
    let shape = Attention { window: Some(40), ..shape(4, 2, 24) };
    let length = 2 * CHUNK_TOKENS + 30;
    let sequences = [Sequence::new(&shape, length, 8)];
    for (isa, threads) in Isa::available().into_iter().flat_map(|isa| [(isa, 1), (isa, 3)]) {
        let context = context(isa, threads);
        let mut stored = Stored::new(&context, &shape, &sequences, both(KvElement::F16), 0);
        let parts = [(0, length - 20..length)];
        let before = compute(&context, &shape, &stored, &sequences, &parts);
        let seen = (length - 20 + 1 - 40) / PAGE_TOKENS;
        stored.tables[0][..seen].fill(u32::MAX);
        let after = compute(&context, &shape, &stored, &sequences, &parts);
        assert_eq!(bits(&after[0]), bits(&before[0]), "{} {threads} threads", isa.name());
    }
}

#[test]
fn caches_that_cannot_be_are_refused() {
    let layer = KvLayer { kv_heads: 8, head_dim: 128, keys: KvElement::F32, values: KvElement::F32 };
    let page = |keys, values| KvCache::page_bytes(&[KvLayer { keys, values, ..layer }; 3]) / (3 * 8 * 16);
    assert_eq!(page(KvElement::F16, KvElement::F32), 128 * 2 + 128 * 4);
    assert_eq!(page(KvElement::Int8, KvElement::Int8), 128 + 4 * 4 + 128 + 4);
    assert_eq!(page(KvElement::E4m3, KvElement::E4m3), 128 + 4 + 128 + 4);
    let refused = |layers: &[KvLayer], pages| KvCache::new(layers, pages).err().unwrap().to_string();
    assert!(refused(&[layer; 100], 100_000_000).contains("key/value cache"));
    assert!(refused(&[KvLayer { kv_heads: usize::MAX, ..layer }], 4).contains("key/value cache"));
    assert!(refused(&[KvLayer { head_dim: usize::MAX / 2, ..layer }], 4).contains("key/value cache"));
    assert!(refused(&[KvLayer { kv_heads: 0, ..layer }], 4).contains("heads"));
    assert!(refused(&[layer], usize::MAX).contains("at most 268435455"));
    // Reserved, but not touched.
    let before = resident_pages();
    let cache = KvCache::new(&[layer; 16], 1024).unwrap();
    assert!(cache.reserved_bytes() >= 2 << 30);
    assert!(resident_pages() < before + (1 << 18), "a new cache took memory");
}

/// 4 KiB pages of memory that the process uses; 0 where the system does not say.
fn resident_pages() -> usize {
    let counts = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
    counts.split_whitespace().nth(1).map_or(0, |pages| pages.parse().unwrap())
}
