//! A short fuzz run that needs no fuzzer: every seed of `fuzz/seeds`, and deterministic mutants of each,
//! through the properties that the fuzz targets check.

mod common;

use std::path::{Path, PathBuf};

use common::{properties, seeds};

/// What integer fields are overwritten with: edges of 8, 16, 31, 32, 63 and 64 bits, and small numbers.
const EXTREMES: [u64; 13] = [
    0,
    1,
    7,
    32,
    0xff,
    0xffff,
    0x7fff_ffff,
    0x8000_0000,
    0x8000_0001,
    u32::MAX as u64,
    i64::MAX as u64,
    1 << 63,
    u64::MAX,
];
/// What numbers in JSON are replaced by.
const EXTREME_NUMBERS: [&str; 9] =
    ["0", "-1", "1", "7", "0.5", "1e999", "2147483648", "18446744073709551615", "18446744073709551616"];

fn folder(target: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/seeds").join(target)
}

fn check(target: &str, input: &[u8]) -> bool {
    match target {
        "gguf" => properties::gguf(input).is_ok(),
        "safetensors" => properties::safetensors(input).is_ok(),
        "safetensors_index" => properties::safetensors_index(input).is_ok(),
        _ => panic!("no properties for {target}"),
    }
}

/// Writes the seeds anew: `cargo test -p infer-formats --test seeds -- --ignored`.
#[test]
#[ignore = "writes fuzz/seeds"]
fn write_seeds() {
    for (target, files) in seeds::all() {
        std::fs::create_dir_all(folder(target)).unwrap();
        for (name, bytes) in files {
            std::fs::write(folder(target).join(name), bytes).unwrap();
        }
    }
}

#[test]
fn the_seeds_on_disk_are_those_of_the_code() {
    for (target, files) in seeds::all() {
        let entries = std::fs::read_dir(folder(target)).unwrap();
        assert_eq!(entries.count(), files.len(), "{target}: a seed too many or too few");
        for (name, bytes) in files {
            assert_eq!(std::fs::read(folder(target).join(name)).unwrap(), bytes, "{target}/{name}");
        }
    }
}

#[test]
fn honest_seeds_are_accepted_and_liars_refused() {
    let accepted: Vec<String> = seeds::all()
        .into_iter()
        .flat_map(|(target, files)| files.into_iter().map(move |file| (target, file)))
        .filter(|(target, (_, bytes))| check(target, bytes))
        .map(|(target, (name, _))| format!("{target}/{name}"))
        .collect();
    let expected = [
        "gguf/empty_version_2",
        "gguf/scalars",
        "gguf/arrays",
        "gguf/tensors",
        "gguf/vocabulary_of_a_split_model",
        "gguf/gap",
        "safetensors/empty",
        "safetensors/metadata",
        "safetensors/two",
        "safetensors/scalar",
        "safetensors/packed",
        "safetensors_index/two",
        "safetensors_index/escapes",
    ];
    assert_eq!(accepted, expected);
}

#[test]
fn truncated_seeds_end_in_a_result() {
    each_seed(|target, seed| {
        let honest = check(target, seed);
        for end in 0..seed.len() {
            let accepted = check(target, &seed[..end]);
            // Only the padding after a GGUF file's last tensor may be missing.
            let padding = target == "gguf" && seed.len() - end < 32;
            assert!(!honest || !accepted || padding, "{target}: a seed cut at {end} is accepted");
        }
    });
}

#[test]
fn flipped_bits_end_in_a_result() {
    each_seed(|target, seed| {
        let mut mutant = seed.to_vec();
        for bit in 0..seed.len() * 8 {
            mutant[bit / 8] ^= 1 << (bit % 8);
            check(target, &mutant);
            mutant[bit / 8] = seed[bit / 8];
        }
    });
}

#[test]
fn extreme_integers_end_in_a_result() {
    each_seed(|target, seed| {
        for at in 0..seed.len() {
            for extreme in EXTREMES {
                for width in [1, 2, 4, 8] {
                    let end = (at + width).min(seed.len());
                    let mut mutant = seed.to_vec();
                    mutant[at..end].copy_from_slice(&extreme.to_le_bytes()[..end - at]);
                    check(target, &mutant);
                }
            }
        }
    });
}

#[test]
fn extreme_json_numbers_end_in_a_result() {
    for (target, files) in seeds::all() {
        let header = match target {
            "safetensors" => 8,
            "safetensors_index" => 0,
            _ => continue,
        };
        for (_, seed) in files {
            let json_end = seed.iter().rposition(|&byte| byte == b'}').map_or(seed.len(), |last| last + 1);
            for run in digit_runs(&seed, header..json_end) {
                for number in EXTREME_NUMBERS {
                    let json =
                        [&seed[header..run.start], number.as_bytes(), &seed[run.end..json_end]].concat();
                    let length = (json.len() as u64).to_le_bytes();
                    check(target, &[&length[..header], &json, &seed[json_end..]].concat());
                }
            }
        }
    }
}

#[test]
fn spliced_seeds_end_in_a_result() {
    let all: Vec<Vec<u8>> =
        seeds::all().into_iter().flat_map(|(_, files)| files).map(|file| file.1).collect();
    let mut random = Random(0x5eed);
    each_seed(|target, seed| {
        for _ in 0..500 {
            let mut mutant = seed.to_vec();
            for _ in 0..=random.below(3) {
                splice(&mut mutant, &all[random.below(all.len())], &mut random);
            }
            check(target, &mutant);
        }
    });
}

fn each_seed(mut check: impl FnMut(&str, &[u8])) {
    for (target, files) in seeds::all() {
        for (_, seed) in &files {
            check(target, seed);
        }
    }
}

fn digit_runs(text: &[u8], within: std::ops::Range<usize>) -> Vec<std::ops::Range<usize>> {
    let mut runs: Vec<std::ops::Range<usize>> = Vec::new();
    for at in within.filter(|&at| text[at].is_ascii_digit()) {
        match runs.last_mut() {
            Some(run) if run.end == at => run.end += 1,
            _ => runs.push(at..at + 1),
        }
    }
    runs
}

/// Replaces a random range by a random range of `other`; either may be empty.
fn splice(mutant: &mut Vec<u8>, other: &[u8], random: &mut Random) {
    let start = random.below(mutant.len() + 1);
    let end = (start + random.below(17)).min(mutant.len());
    let from = random.below(other.len() + 1);
    let until = (from + random.below(33)).min(other.len());
    mutant.splice(start..end, other[from..until].iter().copied());
}

/// SplitMix64 (Steele, Lea and Flood, 2014): small, and the same everywhere.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ (mixed >> 31)) as usize % limit
    }
}
