//! Every family against Hugging Face transformers: tests/models/README.md tells how the cases are made.
//!
//! The table (case, architecture, largest difference): `cargo test -p infer-model --test goldens -- --nocapture`

#![allow(clippy::print_stdout)] // the table is for people

mod common;

use std::path::PathBuf;

use common::{Expected, exact, golden_cases, golden_folder, greedy, is_long, largest_difference, logits};
use infer_model::{Checkpoint, CpuModel};

const TOLERANCE: f32 = 1e-3;

/// One checkpoint and what it must compute.
struct Form {
    name: String,
    path: PathBuf,
    expected: PathBuf,
    /// Held by the form, removed when it is dropped.
    _folder: Option<tempfile::TempDir>,
}

/// All forms of a case: the folder, the folder with the configuration that transformers 4 would write, the GGUF files
/// that llama.cpp's tools made.
fn forms(case: &str) -> Vec<Form> {
    let folder = golden_folder().join(case);
    let expected = folder.join("expected.safetensors");
    let form = |name: &str, path: PathBuf, expected: PathBuf, held| Form {
        name: format!("{case}{name}"),
        path,
        expected,
        _folder: held,
    };
    let mut all = vec![form("", folder.clone(), expected.clone(), None)];
    if folder.join("config.v4.json").is_file() {
        let other = tempfile::tempdir().expect("a temporary folder");
        for entry in std::fs::read_dir(&folder).expect("readable") {
            let path = entry.expect("readable").path();
            let name = path.file_name().expect("a name").to_string_lossy().into_owned();
            if name.starts_with("model") && !name.ends_with(".gguf") {
                std::fs::copy(&path, other.path().join(name)).expect("copied");
            }
        }
        std::fs::copy(folder.join("config.v4.json"), other.path().join("config.json")).expect("copied");
        all.push(form(" (v4)", other.path().to_owned(), expected.clone(), Some(other)));
    }
    for (suffix, expected) in [
        ("gguf", expected),
        ("q8_0.gguf", folder.join("expected.q8_0.safetensors")),
        ("q4_0.gguf", folder.join("expected.q4_0.safetensors")),
    ] {
        let path = folder.join(format!("model.{suffix}"));
        if path.is_file() {
            all.push(form(&format!(" ({suffix})"), path, expected, None));
        }
    }
    all
}

/// Largest difference of a form's logits, and whether greedy decoding agrees.
fn compare(form: &Form) -> (String, f32, bool) {
    let expected = Expected::read_file(&form.expected);
    let mut model =
        CpuModel::load(&form.path, &exact(2)).unwrap_or_else(|error| panic!("{}: {error}", form.name));
    let long = is_long(&model, expected.token_ids.len());
    let found = logits(&mut model, &expected.token_ids, 17, long);
    let difference = largest_difference(&found, &expected.logits);
    let text = greedy(&mut model, &expected.token_ids[..expected.prompt_tokens], expected.greedy.len());
    (model.spec().architecture().to_owned(), difference, text == expected.greedy)
}

#[test]
fn every_family_equals_transformers() {
    let mut failures = Vec::new();
    println!("{:<36} {:<22} {:>12}  greedy", "case", "architecture", "difference");
    for form in golden_cases().iter().flat_map(|case| forms(case)) {
        let (architecture, difference, same) = compare(&form);
        let verdict = if same { "same" } else { "DIFFERS" };
        println!("{:<36} {architecture:<22} {difference:>12.2e}  {verdict}", form.name);
        if difference.is_nan() || difference > TOLERANCE || !same {
            failures.push(form.name.clone());
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
    let missing: Vec<_> = infer_model::ARCHITECTURES
        .iter()
        .map(|arch| arch.hf[0])
        .filter(|name| !have.contains(name))
        .collect();
    assert!(missing.is_empty(), "no golden case for {missing:?}");
}
