//! Random weights: the same for a seed, whoever asks and however; and no file is read for them.

mod common;

use std::path::{Path, PathBuf};

use common::models::rounded;
use common::{exact, golden_cases, golden_folder, logits};
use infer_kernels::KvElement;
use infer_model::{Blueprint, Checkpoint, CpuModel, KvTypes, LoadOptions, PlainType, Role, RowForm};

/// A folder with nothing but the configuration of a golden case.
fn bare(place: &Path, case: &str) -> PathBuf {
    let folder = place.join(case);
    std::fs::create_dir_all(&folder).unwrap();
    std::fs::copy(golden_folder().join(case).join("config.json"), folder.join("config.json")).unwrap();
    folder
}

fn computed(folder: &Path, seed: u64, options: &LoadOptions) -> Vec<f32> {
    let checkpoint = Checkpoint::open_dummy(folder, seed).unwrap();
    let mut model = CpuModel::from_checkpoint(&checkpoint, options)
        .unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
    logits(&mut model, &[5, 3, 70, 11, 8], 5, false)
}

#[test]
fn every_family_computes_with_random_weights() {
    let place = tempfile::tempdir().unwrap();
    for case in golden_cases() {
        let folder = bare(place.path(), &case);
        let first = computed(&folder, 1, &exact(2));
        assert!(first.iter().all(|logit| logit.is_finite()), "{case}");
        assert!(first == computed(&folder, 1, &exact(1)), "{case} depends on threads");
        assert!(first != computed(&folder, 2, &exact(2)), "{case} has no seed");
        let whole = Checkpoint::open(&golden_folder().join(&case), true).unwrap();
        let dummy = Checkpoint::open_dummy(&folder, 1).unwrap();
        // Biases are not counted, and GPT-2's files have masks.
        assert!(
            case.starts_with("gpt2")
                || dummy.parameters().abs_diff(whole.parameters()) * 4 <= whole.parameters(),
            "{case}"
        );
        assert_eq!((dummy.storage(), dummy.weight_bytes()), ("BF16", dummy.parameters() * 2));
    }
}

#[test]
fn random_weights_are_rounded_and_kept_like_others() {
    let place = tempfile::tempdir().unwrap();
    let folder = bare(place.path(), "llama");
    let plain = computed(&folder, 3, &exact(2));
    let int8 = LoadOptions { quantization: Some(rounded("int8")), ..exact(2) };
    let found = computed(&folder, 3, &int8);
    assert!(found != plain && common::largest_difference(&found, &plain) < 0.1);
    let cached = LoadOptions { packed_cache_dir: Some(place.path().join("cache")), ..exact(2) };
    for seed in [3, 4, 3] {
        assert!(computed(&folder, seed, &cached) == computed(&folder, seed, &exact(2)));
    }
}

#[test]
fn a_backend_is_told_seeds_and_may_read_the_same_numbers() {
    let place = tempfile::tempdir().unwrap();
    let folder = bare(place.path(), "qwen2");
    let checkpoint = Checkpoint::open_dummy(&folder, 9).unwrap();
    let model =
        Blueprint::new(checkpoint, KvTypes::all(KvElement::F32), PlainType::F32, None, "test").unwrap();
    let (rows, columns) = model.matrix_shape(0);
    let parts = model.random_matrix(0).unwrap();
    assert_eq!(parts.iter().map(|(rows, _)| rows).sum::<usize>(), rows);
    assert!(parts.len() == 3 && parts[0].1 != parts[1].1, "queries, keys and values are one product");
    let read = |first: usize, count: usize| {
        let mut out = vec![0; count * columns * 4];
        model.read_matrix(0, first, 2, RowForm::Plain(PlainType::F32), &mut out).unwrap();
        out
    };
    assert!(read(0, rows)[7 * columns * 4..] == read(7, rows - 7));
    assert_eq!(model.matrix_bias(0).unwrap(), Some(vec![0.0; rows]));
    assert!(model.random_table(Role::Embedding).is_some());
    let other = Blueprint::new(
        Checkpoint::open_dummy(&folder, 10).unwrap(),
        KvTypes::all(KvElement::F32),
        PlainType::F32,
        None,
        "test",
    );
    assert_ne!(model.fingerprint().get().unwrap(), other.unwrap().fingerprint().get().unwrap());
    let gguf = golden_folder().join("llama/model.q8_0.gguf");
    let message = Checkpoint::open_dummy(&gguf, 1).unwrap_err().to_string();
    assert!(message.contains("load_format \"dummy\" needs a folder with config.json"), "{message}");
}
