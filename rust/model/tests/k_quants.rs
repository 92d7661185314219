//! Files as `llama-quantize` writes them for Q4_K_M and its like: `tests/models/generate_k_quants.py` makes a tiny one, and
//! the logits that an independent computation in double precision gives for the weights that its blocks stand for.

mod common;

use common::{Expected, exact, golden_folder, greedy, largest_difference, logits};
use infer_kernels::Precision;
use infer_model::{CpuModel, LoadOptions};

fn folder() -> std::path::PathBuf {
    golden_folder().join("../k_quants")
}

#[test]
fn a_mix_of_block_formats_gives_the_logits_of_its_values() {
    let expected = Expected::read_file(&folder().join("expected.safetensors"));
    let mut model = CpuModel::load(&folder().join("model.gguf"), &exact(2)).expect("loads");
    let found = logits(&mut model, &expected.token_ids, 7, false);
    let difference = largest_difference(&found, &expected.logits);
    assert!(difference < 1e-3, "{difference}");
    let prompt = &expected.token_ids[..expected.prompt_tokens];
    assert_eq!(greedy(&mut model, prompt, expected.greedy.len()), expected.greedy);
}

#[test]
fn rounded_activations_stay_close() {
    let expected = Expected::read_file(&folder().join("expected.safetensors"));
    let options = LoadOptions { precision: Precision::Auto, ..exact(2) };
    let mut model = CpuModel::load(&folder().join("model.gguf"), &options).expect("loads");
    let found = logits(&mut model, &expected.token_ids, 7, false);
    let size = expected.logits.iter().fold(0.0_f32, |most, value| most.max(value.abs()));
    let difference = largest_difference(&found, &expected.logits);
    assert!(difference < 0.05 * size, "{difference} of {size}");
}
