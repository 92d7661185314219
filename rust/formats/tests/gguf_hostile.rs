//! GGUF files that lie: each is refused with an error that names the field, the value and what would be
//! right.

mod common;

use common::{RawGguf, assert_mentions, properties};
use infer_formats::{FormatError, Gguf};

const U32: u32 = 4;
const STRING: u32 = 8;
const ARRAY: u32 = 9;
const F32_TYPE: u32 = 0;
const Q8_0_TYPE: u32 = 8;

/// A file with one F32 tensor of the given dimensions (fastest first) and offset, and `data` bytes.
fn one_tensor(dimensions: &[u64], type_id: u32, offset: u64, data: usize) -> Vec<u8> {
    RawGguf::header(3, 1, 0).tensor("w", dimensions, type_id, offset).data(data)
}

/// A file with one metadata entry.
fn one_entry(key: &str, type_id: u32, value: &[u8]) -> Vec<u8> {
    RawGguf::header(3, 0, 1).entry(key, type_id, value).0
}

fn refused(file: &[u8], mentions: &[&str]) -> FormatError {
    let error = properties::gguf(file).expect_err("the file lies");
    assert_mentions(&error, mentions);
    error
}

#[test]
fn the_honest_twin_of_these_files_is_accepted() {
    let gguf = properties::gguf(&one_tensor(&[4, 2], F32_TYPE, 0, 32)).unwrap();
    assert_eq!(gguf.tensors[0].shape, [2, 4]);
    assert_eq!(gguf.tensors[0].range, 96..128);
    properties::gguf(&one_entry("key", U32, &[7, 0, 0, 0])).unwrap();
    properties::gguf(&RawGguf::header(2, 0, 0).0).unwrap();
}

#[test]
fn other_files_and_versions_are_named() {
    refused(b"", &["the magic", "0 are left"]);
    refused(b"GGM", &["the magic"]);
    refused(b"\x08\0\0\0\0\0\0\0{}", &["magic", "is this a GGUF file"]);
    refused(b"GGUF", &["the version"]);
    refused(&RawGguf::header(1, 0, 0).0, &["the version is 1", "2 or 3", "converted anew"]);
    refused(&RawGguf::header(0, 0, 0).0, &["the version is 0"]);
    refused(&RawGguf::header(4, 0, 0).0, &["the version is 4", "expected 2 or 3"]);
    refused(&RawGguf::header(3_u32.swap_bytes(), 0, 0).0, &["big-endian"]);
}

#[test]
fn counts_beyond_the_file_are_refused_before_allocation() {
    for count in [1, 2, 1 << 31, (1 << 31) + 1, 1 << 61, i64::MAX as u64, u64::MAX] {
        refused(&RawGguf::header(3, count, 0).0, &["the tensor count", &count.to_string()]);
        refused(&RawGguf::header(3, 0, count).0, &["the metadata entry count", &count.to_string()]);
        let array = [&0_u32.to_le_bytes()[..], &count.to_le_bytes()].concat();
        refused(&one_entry("tokens", ARRAY, &array), &["element count", "tokens", &count.to_string()]);
        let text = count.to_le_bytes();
        refused(&one_entry("name", STRING, &text), &["the length", "\"name\"", &count.to_string()]);
        let key = count.max(17);
        let needs = format!("metadata key 0 = {key} needs {key} bytes");
        refused(&RawGguf::header(3, 0, 1).u64(key).bytes(&[0; 16]).0, &[&needs, "16 are left"]);
    }
}

#[test]
fn keys_and_names_are_checked() {
    refused(&one_entry("", U32, &[0; 4]), &["metadata key 0", "0 bytes long", "1 to 65535"]);
    let long = "k".repeat(65_536);
    refused(&one_entry(&long, U32, &[0; 4]), &["65536 bytes long"]);
    properties::gguf(&one_entry(&long[1..], U32, &[0; 4])).unwrap();
    let twice = RawGguf::header(3, 0, 2).entry("a.b", U32, &[0; 4]).entry("a.b", U32, &[1; 4]).0;
    refused(&twice, &["metadata key \"a.b\" occurs more than once"]);
    refused(&RawGguf::header(3, 1, 0).tensor("", &[8], F32_TYPE, 0).data(32), &["the name of tensor 0"]);
    let twice = RawGguf::header(3, 2, 0).tensor("w", &[8], F32_TYPE, 0).tensor("w", &[8], F32_TYPE, 32);
    refused(&twice.data(64), &["tensor \"w\" occurs more than once"]);
    let invalid = RawGguf::header(3, 0, 1).u64(2).bytes(b"\xff\xfe").u32(U32).u32(0);
    refused(&invalid.0, &["metadata key 0", "UTF-8"]);
    let value = [&2_u64.to_le_bytes()[..], b"\xc3\x28"].concat();
    refused(&one_entry("general.name", STRING, &value), &["general.name", "UTF-8"]);
}

#[test]
fn messages_stay_short_and_printable() {
    let key = format!("\u{1b}[31m{}", "x".repeat(60_000));
    let error = properties::gguf(&one_entry(&key, 99, &[0; 4])).unwrap_err().to_string();
    assert!(error.len() < 400, "{} bytes", error.len());
    assert!(!error.chars().any(char::is_control), "{error}");
}

#[test]
fn unknown_types_are_refused_by_number() {
    refused(&one_entry("key", 13, &[0; 8]), &["type id of metadata key \"key\" is 13", "0 (u8) to 12"]);
    refused(&one_entry("key", u32::MAX, &[0; 8]), &["4294967295"]);
    let array = [&13_u32.to_le_bytes()[..], &0_u64.to_le_bytes()].concat();
    refused(&one_entry("key", ARRAY, &array), &["type id of metadata key \"key\" is 13"]);
    for id in [4, 5, 31, 32, 33, 36, 37, 38] {
        refused(&one_tensor(&[256], id, 0, 4096), &["tensor \"w\"", &format!("is {id};"), "removed"]);
    }
    for id in [43, 255, i32::MAX as u32, u32::MAX] {
        refused(&one_tensor(&[256], id, 0, 4096), &["tensor \"w\"", &format!("is {id};"), "0 to 42"]);
    }
}

#[test]
fn bools_are_zero_or_one() {
    refused(&one_entry("flag", 7, &[2]), &["\"flag\" is 2", "0 or 1"]);
    let array = [&7_u32.to_le_bytes()[..], &3_u64.to_le_bytes(), &[0, 1, 255]].concat();
    refused(&one_entry("flags", ARRAY, &array), &["element 2", "\"flags\" is 255"]);
}

#[test]
fn nesting_has_a_limit() {
    let nested = |levels: usize| {
        let outer = [&ARRAY.to_le_bytes()[..], &1_u64.to_le_bytes()].concat().repeat(levels - 1);
        let inner = [&0_u32.to_le_bytes()[..], &1_u64.to_le_bytes(), &[5]].concat();
        one_entry("deep", ARRAY, &[outer, inner].concat())
    };
    properties::gguf(&nested(8)).unwrap();
    refused(&nested(9), &["\"deep\"", "more than 8 levels"]);
    refused(&nested(60_000), &["\"deep\"", "more than 8 levels"]);
}

#[test]
fn nesting_needs_little_stack() {
    let deep = [&ARRAY.to_le_bytes()[..], &1_u64.to_le_bytes()].concat().repeat(100_000);
    let file = one_entry("deep", ARRAY, &deep);
    let small = std::thread::Builder::new().stack_size(256 << 10);
    let thread = small.spawn(move || Gguf::parse(&file).is_err()).unwrap();
    assert!(thread.join().unwrap());
}

#[test]
fn alignment_is_a_power_of_two() {
    for alignment in [0_u32, 1, 4, 7, 24, 33, 1 << 21, 1 << 31, u32::MAX] {
        let file = one_entry("general.alignment", U32, &alignment.to_le_bytes());
        refused(&file, &["general.alignment", &format!("is {alignment};"), "power of two"]);
    }
    refused(&one_entry("general.alignment", STRING, &0_u64.to_le_bytes()), &["general.alignment", "string"]);
    for alignment in [8_u32, 32, 64, 1 << 20] {
        properties::gguf(&one_entry("general.alignment", U32, &alignment.to_le_bytes()))
            .unwrap_or_else(|error| panic!("{alignment}: {error}"));
    }
}

#[test]
fn alignment_moves_the_data() {
    let file = |alignment: u32, offset: u64, data: usize| {
        RawGguf::header(3, 1, 1)
            .entry("general.alignment", U32, &alignment.to_le_bytes())
            .tensor("w", &[4], F32_TYPE, offset)
            .data(data)
    };
    assert_eq!(properties::gguf(&file(64, 0, 64)).unwrap().tensors[0].range, 128..144);
    assert_eq!(properties::gguf(&file(8, 0, 64)).unwrap().tensors[0].range, 96..112);
    refused(&file(64, 32, 64), &["the offset of tensor \"w\" is 32", "general.alignment (64)"]);
    refused(&file(1 << 20, 0, 64), &["the data of tensor \"w\"", "16 bytes at byte 1048576", "0 are left"]);
}

#[test]
fn shapes_are_checked() {
    refused(&one_tensor(&[4, 0], F32_TYPE, 0, 64), &["dimension 1 of tensor \"w\" is 0", "from 1"]);
    refused(&one_tensor(&[1; 5], F32_TYPE, 0, 64), &["the rank of tensor \"w\" is 5", "at most 4"]);
    let endless = RawGguf::header(3, 1, 0).string("w").u32(u32::MAX).data(64);
    refused(&endless, &["the rank of tensor \"w\" is 4294967295"]);
    refused(&one_tensor(&[33, 32], Q8_0_TYPE, 0, 2048), &["[32, 33]", "multiple of 32", "Q8_0"]);
    refused(&one_tensor(&[16, 64], Q8_0_TYPE, 0, 2048), &["[64, 16]", "multiple of 32"]);
    let scalar = properties::gguf(&one_tensor(&[], F32_TYPE, 0, 32)).unwrap();
    assert_eq!((scalar.tensors[0].shape.len(), scalar.tensors[0].range.len()), (0, 4));
}

#[test]
fn products_that_wrap_are_refused() {
    let wrapping: [&[u64]; 6] = [
        &[1 << 32, 1 << 32],
        &[1 << 62],
        &[u64::MAX],
        &[1 << 16, 1 << 16, 1 << 16, 1 << 16],
        &[0x4000_0000_0000_0001, 4],
        &[1 << 31, 1 << 31, 2, 2],
    ];
    for dimensions in wrapping {
        refused(&one_tensor(dimensions, F32_TYPE, 0, 64), &["tensor \"w\""]);
    }
    refused(&one_tensor(&[1 << 62], F32_TYPE, 0, 64), &["the shape of tensor \"w\"", "a size below"]);
    let huge = one_tensor(&[1 << 63, 1], Q8_0_TYPE, 0, 64);
    refused(&huge, &["the data of tensor \"w\" needs 9799832789158199296 bytes", "64 are left"]);
}

#[test]
fn data_ends_exactly_where_it_must() {
    let data_start = 64;
    for (missing, accepted) in [(0, true), (1, false), (2, false), (31, false), (32, false)] {
        let mut file = one_tensor(&[8], F32_TYPE, 0, 32);
        assert_eq!(file.len(), data_start + 32);
        file.truncate(file.len() - missing);
        assert_eq!(properties::gguf(&file).is_ok(), accepted, "{missing} bytes missing");
    }
    let mut file = one_tensor(&[8], F32_TYPE, 0, 31);
    let error = refused(&file, &["the data of tensor \"w\"", "32 bytes at byte 64", "31 are left"]);
    assert!(matches!(error, FormatError::Truncated { .. }));
    file.push(0);
    properties::gguf(&file).unwrap();
}

#[test]
fn offsets_are_checked() {
    for offset in [1, 4, 31, 33, u64::MAX] {
        let text = format!("the offset of tensor \"w\" is {offset};");
        refused(&one_tensor(&[8], F32_TYPE, offset, 4096), &[&text, "multiple of general.alignment (32)"]);
    }
    refused(&one_tensor(&[8], F32_TYPE, u64::MAX - 31, 64), &["offset", "18446744073709551584"]);
    refused(&one_tensor(&[8], F32_TYPE, 1 << 63, 64), &["the data of tensor \"w\"", "0 are left"]);
    properties::gguf(&one_tensor(&[8], F32_TYPE, 4064, 4096)).unwrap();
    refused(&one_tensor(&[8], F32_TYPE, 4096, 4096), &["0 are left"]);
}

#[test]
fn overlapping_tensors_are_named() {
    let file = |second: u64| {
        RawGguf::header(3, 2, 0)
            .tensor("b", &[16], F32_TYPE, second)
            .tensor("a", &[16], F32_TYPE, 0)
            .data(256)
    };
    let error = refused(&file(32), &["\"a\" (bytes 96..160)", "\"b\" (bytes 128..192)", "overlap"]);
    assert!(matches!(error, FormatError::Overlap { .. }));
    refused(&file(0), &["overlap"]);
    properties::gguf(&file(64)).unwrap();
    properties::gguf(&file(192)).unwrap();
}

#[test]
fn extreme_values_in_every_integer_field_end_in_a_result() {
    let file = RawGguf::header(3, 2, 3)
        .entry("general.alignment", U32, &32_u32.to_le_bytes())
        .entry("text", STRING, &[&3_u64.to_le_bytes()[..], b"abc"].concat())
        .entry("list", ARRAY, &[&U32.to_le_bytes()[..], &2_u64.to_le_bytes(), &[9; 8]].concat())
        .tensor("w", &[8, 2], F32_TYPE, 0)
        .tensor("q", &[32], Q8_0_TYPE, 64)
        .data(128);
    properties::gguf(&file).unwrap();
    let extremes = [0, 1, 2, 31, 32, (1 << 31) - 1, 1 << 31, (1 << 31) + 1, 1 << 32, 1 << 63, u64::MAX];
    for at in 0..file.len() - 8 {
        for extreme in extremes {
            let mut lying = file.clone();
            lying[at..at + 8].copy_from_slice(&u64::to_le_bytes(extreme));
            let _ = properties::gguf(&lying);
            lying[at + 4..at + 8].copy_from_slice(&file[at + 4..at + 8]);
            let _ = properties::gguf(&lying);
        }
    }
}
