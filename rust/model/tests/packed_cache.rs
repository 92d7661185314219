//! Packed weights on disk: the same model, bit for bit, whatever happens to the files.

mod common;

use std::fs;
use std::path::{Path, PathBuf};

use common::models::{llama, rounded};
use common::{exact, golden_cases, golden_folder, logits};
use infer_model::PackedCacheUse::{Failed, Read, Written};
use infer_model::{CpuModel, LoadOptions, PackedCacheUse};

/// The bits of the logits of a fixed text, what came of the folder, and the warning.
fn computed(path: &Path, options: &LoadOptions) -> (Vec<u32>, PackedCacheUse, Option<String>) {
    let mut model =
        CpuModel::load(path, options).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let tokens: Vec<u32> = (0..40).map(|at| (at * 29 + at * at % 7) % 80).collect();
    let bits = logits(&mut model, &tokens, 17, false).iter().map(|logit| logit.to_bits()).collect();
    let (found, warning) = model.packed_cache();
    (bits, found, warning.map(str::to_owned))
}

fn with(folder: &Path, options: LoadOptions) -> LoadOptions {
    LoadOptions { packed_cache_dir: Some(folder.to_owned()), ..options }
}

/// The only file of a folder.
fn only_file(folder: &Path) -> PathBuf {
    let files: Vec<PathBuf> = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    assert_eq!(files.len(), 1, "{files:?}");
    files[0].clone()
}

#[test]
fn every_family_comes_back_as_it_was_packed() {
    for case in golden_cases() {
        let folder = tempfile::tempdir().unwrap();
        let path = golden_folder().join(&case);
        let (expected, ..) = computed(&path, &exact(2));
        for found in [Written, Read] {
            let again = computed(&path, &with(folder.path(), exact(2)));
            assert!(again == (expected.clone(), found, None), "{case}: {:?} {:?}", again.1, again.2);
        }
        only_file(folder.path());
    }
}

#[test]
fn rounded_weights_are_kept_apart_and_untied_embeddings_with_them() {
    let folder = tempfile::tempdir().unwrap();
    for tied in [false, true] {
        let (source, cache) =
            (folder.path().join(format!("{tied}")), folder.path().join(format!("{tied} cache")));
        llama(&source, tied);
        let ways = [None, Some("int8"), Some("int4"), Some("int4-g128")];
        for found in [Written, Read] {
            for name in ways {
                let options = LoadOptions { quantization: name.map(rounded), ..exact(2) };
                let (expected, ..) = computed(&source, &options);
                assert!(computed(&source, &with(&cache, options)) == (expected, found, None), "{name:?}");
            }
        }
        assert_eq!(fs::read_dir(&cache).unwrap().count(), ways.len());
    }
}

#[test]
fn a_damaged_file_is_written_again() {
    let folder = tempfile::tempdir().unwrap();
    let (source, cache) = (folder.path().join("model"), folder.path().join("cache"));
    llama(&source, true);
    let options = with(&cache, LoadOptions { quantization: Some(rounded("int4")), ..exact(2) });
    let (expected, ..) = computed(&source, &options);
    let file = only_file(&cache);
    let whole = fs::read(&file).unwrap();
    let mut flipped = whole.clone();
    flipped[whole.len() / 2] ^= 1;
    for damaged in [&whole[..0], &whole[..40], &whole[..whole.len() / 2], &whole[..whole.len() - 1], &flipped]
    {
        fs::write(&file, damaged).unwrap();
        let (bits, found, warning) = computed(&source, &options);
        assert!(bits == expected && found == Written);
        let warning = warning.expect("a warning");
        assert!(warning.starts_with("packed_cache_dir: ") && warning.contains("packed again"), "{warning}");
        assert!(computed(&source, &options) == (expected.clone(), Read, None));
        assert!(fs::read(only_file(&cache)).unwrap() == whole);
    }
}

#[test]
fn a_changed_model_is_packed_anew() {
    let folder = tempfile::tempdir().unwrap();
    let (source, cache) = (folder.path().join("model"), folder.path().join("cache"));
    llama(&source, true);
    let options = with(&cache, exact(2));
    let (before, ..) = computed(&source, &options);
    let file = source.join("model.safetensors");
    let mut bytes = fs::read(&file).unwrap();
    let last = bytes.len() - 1; // in the middle of nothing that a fingerprint must see: the time of change tells
    bytes[last] ^= 1;
    fs::write(&file, bytes).unwrap();
    let (after, found, warning) = computed(&source, &options);
    assert!((found, warning) == (Written, None) && after != before);
    assert!(computed(&source, &options) == (after, Read, None));
    only_file(&cache);
}

#[test]
fn many_at_once_write_one_whole_file() {
    let folder = tempfile::tempdir().unwrap();
    let (source, cache) = (folder.path().join("model"), folder.path().join("cache"));
    llama(&source, false);
    let options = with(&cache, exact(1));
    let (expected, ..) = computed(&source, &exact(1));
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for _ in 0..5 {
                    let (bits, found, warning) = computed(&source, &options);
                    assert!(
                        bits == expected && found != Failed && warning.is_none(),
                        "{found:?} {warning:?}"
                    );
                }
            });
        }
    });
    assert!(computed(&source, &options) == (expected, Read, None));
    only_file(&cache);
}

#[test]
fn a_folder_that_cannot_be_written_is_no_reason_to_fail() {
    let folder = tempfile::tempdir().unwrap();
    let (source, file) = (folder.path().join("model"), folder.path().join("file"));
    llama(&source, true);
    fs::write(&file, b"no folder").unwrap();
    let (expected, ..) = computed(&source, &exact(1));
    for cache in [file.clone(), file.join("below")] {
        let (bits, found, warning) = computed(&source, &with(&cache, exact(1)));
        assert!(bits == expected && found == Failed);
        assert!(warning.expect("a warning").contains("file"));
    }
}
