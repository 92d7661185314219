//! What the tests of this room share: the golden cases, and running a model over a text.
#![allow(dead_code)] // each test binary uses its part

pub mod models;

use std::path::{Path, PathBuf};

use infer_formats::Safetensors;
use infer_kernels::{KvElement, PAGE_TOKENS, Precision};
use infer_model::{Batch, BatchSequence, CpuModel, KvTypes, LoadOptions};

/// Exact weights, f32 activations, f32 keys and values.
pub fn exact(threads: usize) -> LoadOptions {
    LoadOptions {
        threads: Some(threads),
        precision: Precision::Exact,
        mmap: true,
        kv_types: KvTypes::all(KvElement::F32),
        quantization: None,
        packed_cache_dir: None,
    }
}

/// Every type of keys and values, both of the same and mixed, one layer apart from the others.
pub fn all_kv_types() -> Vec<KvTypes> {
    use KvElement::{Bf16, E4m3, F16, F32, Int8};
    let mut all: Vec<_> = [F32, F16, Bf16, Int8, E4m3].map(KvTypes::all).into();
    all.push(KvTypes { keys: F16, values: Int8, skip_layers: Vec::new(), kept: F16 });
    all.push(KvTypes { keys: Int8, values: E4m3, skip_layers: vec![-1], kept: F32 });
    all
}

pub fn golden_folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/models/golden")
}

/// Names of all golden cases.
pub fn golden_cases() -> Vec<String> {
    let mut names: Vec<String> = std::fs::read_dir(golden_folder())
        .expect("the golden folder is part of the repository")
        .map(|entry| entry.expect("a readable folder").path())
        .filter(|path| path.join("expected.safetensors").is_file())
        .map(|path| path.file_name().expect("a name").to_string_lossy().into_owned())
        .collect();
    names.sort();
    names
}

/// What transformers computed.
pub struct Expected {
    pub token_ids: Vec<u32>,
    /// (tokens, vocabulary)
    pub logits: Vec<f32>,
    pub prompt_tokens: usize,
    pub greedy: Vec<u32>,
}

impl Expected {
    pub fn read(case: &str) -> Self {
        Self::read_file(&golden_folder().join(case).join("expected.safetensors"))
    }

    pub fn read_file(path: &Path) -> Self {
        let bytes = std::fs::read(path).expect("readable");
        let file = Safetensors::parse(&bytes).expect("well-formed");
        let raw = |name: &str| &bytes[file.tensor(name).expect("present").range.clone()];
        let ids = |name: &str| -> Vec<u32> {
            let values =
                raw(name).chunks_exact(8).map(|item| i64::from_le_bytes(item.try_into().expect("8 bytes")));
            values.map(|id| u32::try_from(id).expect("an id")).collect()
        };
        let floats =
            raw("logits").chunks_exact(4).map(|item| f32::from_le_bytes(item.try_into().expect("4 bytes")));
        Self {
            token_ids: ids("token_ids"),
            logits: floats.collect(),
            prompt_tokens: ids("prompt_tokens")[0] as usize,
            greedy: ids("greedy"),
        }
    }
}

/// Logits of all tokens, computed in chunks of the given size.
pub fn logits(model: &mut CpuModel, tokens: &[u32], chunk: usize, long_context: bool) -> Vec<f32> {
    let pages: Vec<u32> = (0..tokens.len().div_ceil(PAGE_TOKENS) as u32).rev().collect();
    model.allocate_cache(pages.len()).expect("memory");
    let mut all = Vec::new();
    for (index, part) in tokens.chunks(chunk).enumerate() {
        let mut out = Vec::new();
        let sequence = BatchSequence {
            first_row: 0,
            rows: part.len(),
            first_position: index * chunk,
            pages: &pages,
            local_pages: &[],
            long_context,
        };
        let rows: Vec<u32> = (0..part.len() as u32).collect();
        let batch = Batch { tokens: part, sequences: &[sequence], logit_rows: &rows };
        model.forward(&batch, &mut out).expect("computable");
        all.extend(out);
    }
    all
}

/// Is a sequence of this length computed with long-context frequencies?
pub fn is_long(model: &CpuModel, length: usize) -> bool {
    model.spec().context_switch().is_some_and(|switch| length > switch)
}

pub fn argmax(row: &[f32]) -> u32 {
    let mut best = 0;
    for (index, value) in row.iter().enumerate() {
        if *value > row[best] {
            best = index;
        }
    }
    best as u32
}

/// Greedy continuation, each step from scratch.
pub fn greedy(model: &mut CpuModel, prompt: &[u32], count: usize) -> Vec<u32> {
    let mut text = prompt.to_vec();
    for _ in 0..count {
        let long_context = is_long(model, text.len());
        let all = logits(model, &text, text.len(), long_context);
        text.push(argmax(&all[all.len() - model.spec().vocabulary..]));
    }
    text.split_off(prompt.len())
}

pub fn largest_difference(found: &[f32], expected: &[f32]) -> f32 {
    assert_eq!(found.len(), expected.len());
    found
        .iter()
        .zip(expected)
        .map(|(a, b)| (a - b).abs())
        .fold(0.0, |most, own| if own <= most { most } else { own })
}
