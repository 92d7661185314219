//! The law of the CPU: a token's logits are a function of its own sequence alone, bit for bit, whatever the batch,
//! its place in it, the sizes of chunks, the pages it lies in and the number of threads.

mod common;

use common::{Expected, all_kv_types, exact, golden_cases, golden_folder, is_long, logits};
use infer_kernels::{KvElement, PAGE_TOKENS, Precision};
use infer_model::{Batch, BatchSequence, CpuModel, KvTypes, LoadOptions};

/// Families that between them use every kind of step.
const CASES: &[&str] = &["llama", "gemma2", "gemma3", "cohere2", "gpt2", "qwen2_moe", "stablelm", "mistral"];

fn options(threads: usize, precision: Precision, kv_types: KvTypes) -> LoadOptions {
    LoadOptions { precision, kv_types, ..exact(threads) }
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

#[test]
fn chunks_and_threads_change_no_bit() {
    for case in CASES {
        let text = Expected::read(case).token_ids;
        let mut one = CpuModel::load(&golden_folder().join(case), &exact(1)).expect("loads");
        let long = is_long(&one, text.len());
        let reference = bits(&logits(&mut one, &text, text.len(), long));
        for threads in [1, 2, 3] {
            let mut model = CpuModel::load(&golden_folder().join(case), &exact(threads)).expect("loads");
            for chunk in [1, 7, 16, 33, text.len()] {
                let found = bits(&logits(&mut model, &text, chunk, long));
                assert_eq!(found, reference, "{case}: {threads} threads, chunks of {chunk}");
            }
        }
    }
}

/// Integer weights times rounded activations, in the formats that have integer kernels.
#[test]
fn chunks_and_threads_change_no_bit_of_quantized_models() {
    for file in
        ["llama/model.q8_0.gguf", "llama/model.q4_0.gguf", "qwen2/model.q8_0.gguf", "qwen2/model.q4_0.gguf"]
    {
        let path = golden_folder().join(file);
        let text = Expected::read(file.split('/').next().expect("a case")).token_ids;
        let auto = |threads| options(threads, Precision::Auto, KvTypes::all(KvElement::F16));
        let mut one = CpuModel::load(&path, &auto(1)).expect("loads");
        let reference = bits(&logits(&mut one, &text, text.len(), false));
        for threads in [1, 2, 3] {
            let mut model = CpuModel::load(&path, &auto(threads)).expect("loads");
            for chunk in [1, 2, 7, 16, 33, text.len()] {
                let found = bits(&logits(&mut model, &text, chunk, false));
                assert_eq!(found, reference, "{file}: {threads} threads, chunks of {chunk}");
            }
        }
    }
}

/// One family whose layers see everything and one whose layers have windows.
#[test]
fn chunks_and_threads_change_no_bit_of_any_type_of_keys_and_values() {
    for (case, kv_types) in ["llama", "mistral"]
        .iter()
        .flat_map(|case| all_kv_types().into_iter().map(move |types| (case, types)))
    {
        let text = Expected::read(case).token_ids;
        let load = |threads| {
            let options = options(threads, Precision::Exact, kv_types.clone());
            CpuModel::load(&golden_folder().join(case), &options).expect("loads")
        };
        let reference = bits(&logits(&mut load(1), &text, text.len(), false));
        for threads in [1, 3] {
            let mut model = load(threads);
            for chunk in [1, 7, 16, 33] {
                let found = bits(&logits(&mut model, &text, chunk, false));
                assert_eq!(found, reference, "{case} {kv_types:?}: {threads} threads, chunks of {chunk}");
            }
        }
    }
}

#[test]
fn neighbours_change_no_bit() {
    let exact = all_kv_types().into_iter().map(|types| (Precision::Exact, types));
    let auto = (Precision::Auto, KvTypes::all(KvElement::F16));
    for (number, (precision, kv_types)) in exact.chain([auto]).enumerate() {
        // All families with f32, the last ones with f16; two of them with every other type.
        let cases = if number == 0 || precision == Precision::Auto { CASES } else { &["llama", "gemma2"] };
        for case in cases {
            let text = Expected::read(case).token_ids;
            let mut model =
                CpuModel::load(&golden_folder().join(case), &options(2, precision, kv_types.clone()))
                    .expect("loads");
            let vocabulary = model.spec().vocabulary;
            let long = is_long(&model, text.len());
            let alone = bits(&logits(&mut model, &text, text.len(), long));
            // The text between two others, in pages that are scattered among theirs.
            let others: Vec<u32> = text.iter().rev().copied().collect();
            let pages_each = text.len().div_ceil(PAGE_TOKENS) as u32;
            let pages: Vec<Vec<u32>> =
                (0..3).map(|sequence| (0..pages_each).map(|page| page * 3 + sequence).collect()).collect();
            model.allocate_cache(3 * pages_each as usize).expect("memory");
            let tokens = [&others[..5], &text[..], &others[..]].concat();
            let starts = [0, 5, 5 + text.len(), 5 + 2 * text.len()];
            let sequences: Vec<_> = (0..3)
                .map(|index| BatchSequence {
                    first_row: starts[index],
                    rows: starts[index + 1] - starts[index],
                    first_position: 0,
                    pages: &pages[index],
                    local_pages: &[],
                    long_context: long,
                })
                .collect();
            let rows: Vec<u32> = (5..5 + text.len() as u32).collect();
            let mut found = Vec::new();
            let batch = Batch { tokens: &tokens, sequences: &sequences, logit_rows: &rows };
            model.forward(&batch, &mut found).expect("computable");
            assert_eq!(found.len(), text.len() * vocabulary);
            assert_eq!(bits(&found), alone, "{case} {precision:?} {kv_types:?}");
        }
    }
}

/// The last layer's end is computed for wanted rows only: of every family, some of the rows of two sequences, after a part of which
/// none is wanted; and where layers have windows, with a cache of their own, too.
#[test]
fn rows_that_nobody_wants_change_no_bit() {
    let mut split_cases = 0;
    for (case, is_split) in golden_cases().iter().flat_map(|case| [(case, false), (case, true)]) {
        let text = Expected::read(case).token_ids;
        let mut model = CpuModel::load(&golden_folder().join(case), &exact(2)).expect("loads");
        if is_split && model.local_page_bytes() == 0 {
            continue;
        }
        let vocabulary = model.spec().vocabulary;
        let long = is_long(&model, text.len());
        let all = bits(&logits(&mut model, &text, text.len(), long));
        let (first, pages_each) = (text.len() / 3, text.len().div_ceil(PAGE_TOKENS) as u32);
        let pages: Vec<Vec<u32>> =
            (0..2).map(|own| (own * pages_each..(own + 1) * pages_each).collect()).collect();
        let count = 2 * pages_each as usize;
        match is_split {
            true => model.allocate_split_cache(count, count).expect("memory"),
            false => model.allocate_cache(count).expect("memory"),
        }
        split_cases += usize::from(is_split);
        let mut compute = |from: usize, to: usize, wanted: &[u32]| {
            let sequence = |index: usize| BatchSequence {
                first_row: index * (to - from),
                rows: to - from,
                first_position: from,
                pages: &pages[index],
                local_pages: if is_split { &pages[1 - index] } else { &[] },
                long_context: long,
            };
            let tokens = [&text[from..to], &text[from..to]].concat();
            let sequences = [sequence(0), sequence(1)];
            let mut out = Vec::new();
            let batch = Batch { tokens: &tokens, sequences: &sequences, logit_rows: wanted };
            model.forward(&batch, &mut out).expect("computable");
            bits(&out)
        };
        assert!(compute(0, first, &[]).is_empty());
        let rows = text.len() - first;
        let end = rows as u32;
        // One alone, neighbours, neighbours of two sequences, and the last one.
        for wanted in [&[end - 1][..], &[1, 2, 4], &[0, end - 1, end, end + 1], &[2 * end - 1], &[]] {
            let found = compute(first, text.len(), wanted);
            let place = |row: &u32| first + *row as usize % rows;
            let expected = wanted.iter().flat_map(|row| &all[place(row) * vocabulary..][..vocabulary]);
            assert!(found.iter().eq(expected), "{case}: rows {wanted:?}");
        }
    }
    assert!(split_cases > 0, "no model has windows");
}
