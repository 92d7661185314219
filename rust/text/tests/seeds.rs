//! A short fuzz run that needs no fuzzer: every seed of `fuzz/seeds`, cuts, flipped bits and deterministic mutants of each, through the
//! property that the fuzz target checks.

mod common;

use std::path::{Path, PathBuf};

use common::properties::sentencepiece;
use common::sentencepiece::seeds;
use common::{Random, mutate};

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/seeds/sentencepiece")
}

/// Panics inside the library are caught and become errors; they need not be printed.
fn quietly(check: impl FnOnce()) {
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(|_| {}));
    let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(check));
    std::panic::set_hook(hook);
    if let Err(panic) = result {
        std::panic::resume_unwind(panic);
    }
}

/// Writes the seeds anew: `cargo test -p infer-text --test seeds -- --ignored`.
#[test]
#[ignore = "writes fuzz/seeds"]
fn write_seeds() {
    std::fs::create_dir_all(folder()).unwrap();
    for (name, bytes) in seeds() {
        std::fs::write(folder().join(name), bytes).unwrap();
    }
}

#[test]
fn the_seeds_on_disk_are_those_of_the_code() {
    assert_eq!(std::fs::read_dir(folder()).unwrap().count(), seeds().len(), "a seed too many or too few");
    for (name, bytes) in seeds() {
        assert_eq!(std::fs::read(folder().join(name)).unwrap(), bytes, "{name}");
    }
}

#[test]
fn honest_seeds_are_accepted_and_liars_refused() {
    let accepted: Vec<&str> =
        seeds().iter().filter(|(_, bytes)| sentencepiece(bytes).is_ok()).map(|(name, _)| *name).collect();
    assert_eq!(accepted, ["bpe", "unigram", "only_a_control", "unknown_field"]);
}

#[test]
fn cut_flipped_and_mutated_seeds_end_in_a_result() {
    quietly(|| {
        for (place, (_, seed)) in seeds().into_iter().enumerate() {
            for end in (0..seed.len()).step_by(7) {
                let _ = sentencepiece(&seed[..end]);
            }
            // The bytes of byte pieces are alike: some of them are enough.
            for bit in (0..seed.len().min(400) * 8).step_by(3) {
                let mut mutant = seed.clone();
                mutant[bit / 8] ^= 1 << (bit % 8);
                let _ = sentencepiece(&mutant);
            }
            for round in 0..300 {
                let _ = sentencepiece(&mutate(&mut Random((place as u64) << 32 | round), &seed));
            }
        }
    });
}
