//! Every family against Hugging Face transformers: tests/models/README.md tells how the cases are made.
//!
//! The table (case, architecture, largest difference): `cargo test -p infer-model --test goldens -- --nocapture`

mod common;

use common::{Expected, exact, golden_cases, golden_folder, greedy, is_long, largest_difference, logits};
use infer_model::{Checkpoint, CpuModel};

const TOLERANCE: f32 = 1e-3;

/// Largest difference of a case's logits in one of its forms, and whether greedy decoding agrees.
fn compare(case: &str, file: &str) -> (String, f32, bool) {
    let expected = Expected::read(case);
    let path = golden_folder().join(case).join(file);
    let mut model = CpuModel::load(&path, &exact(2)).unwrap_or_else(|error| panic!("{case}/{file}: {error}"));
    let long = is_long(&model, expected.token_ids.len());
    let found = logits(&mut model, &expected.token_ids, 17, long);
    let difference = largest_difference(&found, &expected.logits);
    let text = greedy(&mut model, &expected.token_ids[..expected.prompt_tokens], expected.greedy.len());
    (model.spec().architecture().to_owned(), difference, text == expected.greedy)
}

#[test]
fn every_family_equals_transformers() {
    let cases = golden_cases();
    let mut failures = Vec::new();
    println!("{:<28} {:<22} {:>12}  greedy", "case", "architecture", "difference");
    for case in &cases {
        let (architecture, difference, same) = compare(case, "");
        println!("{case:<28} {architecture:<22} {difference:>12.2e}  {}", if same { "same" } else { "DIFFERS" });
        if difference.is_nan() || difference > TOLERANCE || !same {
            failures.push(case.clone());
        }
    }
    assert!(failures.is_empty(), "beyond {TOLERANCE} or with another greedy text: {failures:?}");
}

#[test]
fn every_architecture_has_a_case() {
    let have: std::collections::HashSet<&str> = golden_cases()
        .iter()
        .map(|case| Checkpoint::open(&golden_folder().join(case), true).expect("opens").spec.architecture())
        .collect();
    let missing: Vec<_> =
        infer_model::ARCHITECTURES.iter().map(|arch| arch.hf[0]).filter(|name| !have.contains(name)).collect();
    assert!(missing.is_empty(), "no golden case for {missing:?}");
}
