//! Speed of attention: decoding at two context lengths (GB/s of keys and values read) and a prompt of 512 (GFLOP/s).
//!
//! `cargo run --release -p infer-kernels --example attention_speed [threads]`. Layers are visited in turn, so that decoding finds its
//! keys and values in memory and not in a cache, as it does in a model. The best call of several rounds counts.

use infer_kernels::{
    Attention, AttentionRows, Context, KvCache, KvElement, KvLayer, PAGE_TOKENS, Rows, RowsMut, Scratch,
    attention,
};
use std::time::Instant;

/// A model's attention.
struct Model {
    name: &'static str,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
}

impl Model {
    fn layer(&self, element: KvElement) -> KvLayer {
        KvLayer { kv_heads: self.kv_heads, head_dim: self.head_dim, keys: element, values: element }
    }
}

const MODELS: [Model; 3] = [
    Model { name: "Llama-3.2-1B", heads: 32, kv_heads: 8, head_dim: 64 },
    Model { name: "Qwen3-0.6B", heads: 16, kv_heads: 8, head_dim: 128 },
    Model { name: "Llama-2-7B", heads: 32, kv_heads: 32, head_dim: 128 },
];

/// Keys and values that all layers hold together, so that the last-level cache cannot.
const RESIDENT_BYTES: usize = 192 << 20;

#[allow(clippy::print_stdout)] // it is what an example is for
fn main() -> Result<(), Box<dyn std::error::Error>> {
    let threads = std::env::args().nth(1).map_or(Ok(2), |threads| threads.parse())?;
    let context = Context::new(threads)?;
    println!("{} with {threads} threads", context.isa.name());
    for model in &MODELS {
        for element in [KvElement::F32, KvElement::F16, KvElement::Bf16, KvElement::Int8, KvElement::E4m3] {
            let bytes =
                |positions: usize| positions / PAGE_TOKENS * KvCache::page_bytes(&[model.layer(element)]);
            let decode = |position: usize| -> Result<f64, infer_kernels::KernelError> {
                Ok(bytes(position) as f64 / best_seconds(&context, model, element, position - 1, 1)? / 1e9)
            };
            let prompt = 512;
            let flops = 4 * model.heads * model.head_dim * prompt * (prompt + 1) / 2;
            let seconds = best_seconds(&context, model, element, 0, prompt)?;
            println!(
                "{:12} {element:?}: decode at 1k {:5.1} GB/s, at 8k {:5.1} GB/s; prompt of {prompt} {:6.1} GFLOP/s",
                model.name,
                decode(1024)?,
                decode(8192)?,
                flops as f64 / seconds / 1e9
            );
        }
    }
    Ok(())
}

/// Seconds that one layer takes for `rows` rows from `first_position` on.
fn best_seconds(
    context: &Context,
    model: &Model,
    element: KvElement,
    first_position: usize,
    rows: usize,
) -> Result<f64, infer_kernels::KernelError> {
    let &Model { heads, kv_heads, head_dim, .. } = model;
    let shape = model.layer(element);
    let pages = (first_position + rows).div_ceil(PAGE_TOKENS);
    let layers = (RESIDENT_BYTES / (pages * KvCache::page_bytes(&[shape]))).max(1);
    let mut cache = KvCache::new(&vec![shape; layers], pages)?;
    let (positions, width) = (pages * PAGE_TOKENS, kv_heads * head_dim);
    let numbers: Vec<f32> = (0..positions * width).map(|i| (i * 37 % 101) as f32 / 101.0 - 0.5).collect();
    let stored = Rows::new(&numbers, positions, width, width);
    let slots: Vec<u32> = (0..positions as u32).collect();
    (0..layers).for_each(|layer| cache.write(context, layer, stored, stored, &slots));

    let scale = (head_dim as f32).powf(-0.5);
    let kind = Attention { heads, kv_heads, head_dim, scale, window: None, softcap: None };
    let table: Vec<u32> = (0..pages as u32).collect();
    let sequence = AttentionRows { first_row: 0, rows, first_position, pages: &table };
    let width = heads * head_dim;
    let queries: Vec<f32> = (0..rows * width).map(|i| (i * 53 % 97) as f32 / 97.0 - 0.5).collect();
    let (mut output, mut scratch) = (vec![0.0; rows * width], Scratch::default());
    let mut best = f64::INFINITY;
    for _ in 0..7 {
        for layer in 0..layers {
            let start = Instant::now();
            let (input, result) =
                (Rows::new(&queries, rows, width, width), RowsMut::new(&mut output, rows, width, width));
            attention(context, &kind, &cache, layer, &[sequence], input, result, &mut scratch);
            best = best.min(start.elapsed().as_secs_f64());
        }
    }
    Ok(best)
}
