//! Prefill and decode tokens per second of a model, without Python: for profilers.
//!
//! `cargo run --release -p infer-model --example speed -- MODEL [THREADS] [PROMPT_TOKENS] [GENERATED_TOKENS]`

use std::path::Path;
use std::time::Instant;

use infer_kernels::{KvElement, PAGE_TOKENS, Precision};
use infer_model::{Batch, BatchSequence, CpuModel, KvTypes, LoadOptions, ModelError};

fn main() -> Result<(), ModelError> {
    let arguments: Vec<String> = std::env::args().collect();
    let number = |index: usize, default: usize| {
        arguments.get(index).and_then(|text| text.parse().ok()).unwrap_or(default)
    };
    let path = arguments.get(1).map_or("model.gguf", String::as_str);
    let (threads, prompt, generated) = (number(2, 2), number(3, 128), number(4, 32));
    let options = LoadOptions {
        threads: Some(threads),
        precision: Precision::Auto,
        mmap: true,
        kv_types: KvTypes::all(KvElement::F16),
        quantization: None,
        packed_cache_dir: None,
    };
    let start = Instant::now();
    let mut model = CpuModel::load(Path::new(path), &options)?;
    report("load", start.elapsed().as_secs_f64(), 1);
    let pages: Vec<u32> = (0..(prompt + generated).div_ceil(PAGE_TOKENS) as u32).collect();
    model.allocate_cache(pages.len())?;
    let mut logits = Vec::new();
    let mut forward = |model: &mut CpuModel, tokens: &[u32], first_position: usize| {
        let sequence = BatchSequence {
            first_row: 0,
            rows: tokens.len(),
            first_position,
            pages: &pages,
            local_pages: &[],
            long_context: false,
        };
        let last = [tokens.len() as u32 - 1];
        model.forward(&Batch { tokens, sequences: &[sequence], logit_rows: &last }, &mut logits)
    };
    for _ in 0..3 {
        let vocabulary = model.spec().vocabulary as u32;
        let tokens: Vec<u32> = (0..prompt as u32).map(|index| index * 7919 % vocabulary).collect();
        let start = Instant::now();
        forward(&mut model, &tokens, 0)?;
        report("prefill", start.elapsed().as_secs_f64(), prompt);
        let start = Instant::now();
        for step in 0..generated {
            forward(&mut model, &[step as u32 * 31 % vocabulary], prompt + step)?;
        }
        report("decode", start.elapsed().as_secs_f64(), generated);
    }
    Ok(())
}

#[allow(clippy::print_stdout)] // a program for people
fn report(what: &str, seconds: f64, count: usize) {
    println!("{what:<8} {:>9.1} ms  {:>9.2} /s", seconds * 1e3, count as f64 / seconds);
}
