//! Weights that are packed while a model is used: the same bits before, meanwhile and after; and files that change too early.

mod common;

use std::fs::{self, File};
use std::path::Path;
use std::time::{Duration, SystemTime};

use common::models::{experts, llama, rounded, write};
use common::{exact, golden_cases, golden_folder, logits};
use infer_model::{CpuModel, LoadOptions};

const CHUNK: usize = 5;

fn tokens() -> Vec<u32> {
    (0..20).map(|at| (at * 29 + at * at % 7) % 80).collect()
}

fn bits(model: &mut CpuModel) -> Vec<u32> {
    logits(model, &tokens(), CHUNK, false).iter().map(|logit| logit.to_bits()).collect()
}

/// Fewer and fewer weights are left, and what is computed stays the same.
fn stays_the_same(path: &Path) {
    let read = LoadOptions { mmap: false, ..exact(2) };
    let mut at_once = CpuModel::load(path, &read).unwrap_or_else(|error| panic!("{error}"));
    assert_eq!(at_once.unpacked_bytes(), 0, "files that are read are packed at once");
    let expected = bits(&mut at_once);
    let mut used = CpuModel::load(path, &exact(2)).unwrap_or_else(|error| panic!("{error}"));
    let all = used.unpacked_bytes();
    assert_eq!(used.weight_bytes(), at_once.weight_bytes());
    // Four steps: the first one packs nothing, the others something each.
    assert!(bits(&mut used) == expected, "{}", path.display());
    assert!(used.unpacked_bytes() < all || all == 0);
    let mut prepared = CpuModel::load(path, &exact(2)).unwrap_or_else(|error| panic!("{error}"));
    while prepared.prepare().unwrap_or_else(|error| panic!("{error}")) {
        let left = prepared.unpacked_bytes();
        assert!(left > 0 && left < all);
    }
    assert_eq!(prepared.unpacked_bytes(), 0);
    assert!(bits(&mut prepared) == expected && bits(&mut used) == expected, "{}", path.display());
}

#[test]
fn packed_or_not_it_is_the_same_model() {
    for case in golden_cases() {
        stays_the_same(&golden_folder().join(case));
    }
    let folder = tempfile::tempdir().unwrap();
    let (dense, mixture) = (folder.path().join("dense"), folder.path().join("mixture"));
    llama(&dense, true);
    experts(&mixture);
    for source in [dense, mixture] {
        for name in ["int8", "int4"] {
            let file = source.with_extension(format!("{name}.gguf"));
            write(&source, &file, Some(rounded(name))).unwrap();
            stays_the_same(&file);
            let mut model = CpuModel::load(&file, &exact(1)).unwrap();
            assert!(model.unpacked_bytes() > 0, "nothing was put off");
            fs::remove_file(&file).unwrap();
            bits(&mut model); // a file that is gone can still be read
        }
    }
}

#[test]
fn a_file_that_changes_before_it_was_read_is_told() {
    let folder = tempfile::tempdir().unwrap();
    let (source, file) = (folder.path().join("model"), folder.path().join("model.gguf"));
    llama(&source, false);
    write(&source, &file, Some(rounded("int8"))).unwrap();
    let whole = fs::read(&file).unwrap();
    let cut = |length: u64| File::options().write(true).open(&file).and_then(|file| file.set_len(length));
    let later = SystemTime::now() + Duration::from_secs(60);
    let touch = || File::options().write(true).open(&file).and_then(|file| file.set_modified(later));
    for change in [&(|| cut(whole.len() as u64 / 2)) as &dyn Fn() -> std::io::Result<()>, &touch] {
        fs::write(&file, &whole).unwrap();
        let mut stepping = CpuModel::load(&file, &exact(2)).unwrap();
        let mut preparing = CpuModel::load(&file, &exact(2)).unwrap();
        let mut packed = CpuModel::load(&file, &exact(2)).unwrap();
        while packed.prepare().unwrap() {}
        let expected = bits(&mut packed);
        change().unwrap();
        for _ in 0..2 {
            let told = [step(&mut stepping), preparing.prepare().map(|_| ()).unwrap_err().to_string()];
            for told in told {
                let reason = told.contains("cut short") || told.contains("changed");
                assert!(
                    reason && told.contains("model.gguf") && told.contains("load the model again"),
                    "{told}"
                );
            }
        }
        assert!(bits(&mut packed) == expected, "what was packed needs no file");
    }
}

/// What a step that fails says.
fn step(model: &mut CpuModel) -> String {
    model.allocate_cache(1).unwrap();
    let sequence = infer_model::BatchSequence {
        first_row: 0,
        rows: 1,
        first_position: 0,
        pages: &[0],
        local_pages: &[],
        long_context: false,
    };
    let batch = infer_model::Batch { tokens: &[1], sequences: &[sequence], logit_rows: &[0] };
    let mut logits = vec![1.0];
    let told = model.forward(&batch, &mut logits).unwrap_err().to_string();
    assert!(logits.is_empty(), "logits of weights that were not read");
    told
}

/// A fingerprint may be asked for at any time, also when the file is gone after its weights were packed.
#[test]
fn a_fingerprint_is_the_same_at_any_time() {
    let from = golden_folder().join("llama/model.q8_0.gguf");
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("model.gguf");
    fs::copy(&from, &file).unwrap();
    let read = LoadOptions { mmap: false, ..exact(2) };
    let expected = CpuModel::load(&file, &read).unwrap().fingerprint().get().unwrap();
    let early = CpuModel::load(&file, &exact(2)).unwrap();
    assert!(early.unpacked_bytes() > 0, "nothing was put off");
    assert_eq!(early.fingerprint().get().unwrap(), expected);
    let mut packed = CpuModel::load(&file, &exact(2)).unwrap();
    let later = packed.fingerprint().clone();
    while packed.prepare().unwrap() {}
    File::options().write(true).open(&file).unwrap().set_len(0).unwrap();
    assert_eq!(packed.fingerprint().get().unwrap(), expected);
    drop(packed);
    assert_eq!(later.get().unwrap(), expected);
}

/// What was computed belongs to the file as it was: one that is another by now gives its name to nothing.
#[test]
fn a_changed_file_has_no_fingerprint_until_it_was_read() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("model.gguf");
    fs::copy(golden_folder().join("llama/model.q8_0.gguf"), &file).unwrap();
    let model = CpuModel::load(&file, &exact(2)).unwrap();
    let mut bytes = fs::read(&file).unwrap();
    let end = bytes.len();
    bytes[end - 64..].fill(1);
    std::thread::sleep(std::time::Duration::from_millis(20)); // times of change are those of a clock that ticks
    fs::write(&file, &bytes).unwrap();
    for _ in 0..2 {
        let told = model.fingerprint().get().unwrap_err().to_string();
        assert!(told.contains("it was changed before all of its weights were read"), "{told}");
    }
    fs::write(&file, &bytes[..end / 2]).unwrap();
    let told = model.fingerprint().get().unwrap_err().to_string();
    assert!(told.contains("model.gguf"), "{told}");
}
