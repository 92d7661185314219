//! safetensors: honest files are read as the reference implementation reads them, lying ones are refused.

mod common;

use std::path::Path;

use common::{assert_mentions, properties, raw_safetensors};
use infer_formats::{FormatError, Safetensors, TensorType};
use proptest::collection::{btree_map, vec};
use proptest::prelude::*;
use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView, serialize};

/// A header of one F32 tensor "w".
fn one_tensor(shape: &str, begin: &str, end: &str) -> String {
    format!(r#"{{"w":{{"dtype":"F32","shape":{shape},"data_offsets":[{begin},{end}]}}}}"#)
}

fn refused(header: &str, data: usize, mentions: &[&str]) -> FormatError {
    let file = raw_safetensors(header, data);
    let error = properties::safetensors(&file).expect_err("the file lies");
    assert_mentions(&error, mentions);
    error
}

#[test]
fn an_honest_file_is_accepted() {
    let header = r#"{"__metadata__":{"format":"pt","\u0061":"b"},
        "b":{"dtype":"BF16","shape":[2,3],"data_offsets":[4,16]},
        "a":{"shape":[],"extra":[[]],"data_offsets":[0,4],"dtype":"F32"}}   "#;
    let parsed = properties::safetensors(&raw_safetensors(header, 16)).unwrap();
    assert_eq!(parsed.metadata["format"], "pt");
    assert_eq!(parsed.metadata["a"], "b");
    let names: Vec<&str> = parsed.tensors.iter().map(|tensor| tensor.name.as_str()).collect();
    assert_eq!(names, ["a", "b"]);
    let tensor = parsed.tensor("b").unwrap();
    assert_eq!((tensor.tensor_type, tensor.shape.as_slice()), (TensorType::Bf16, &[2, 3][..]));
    let start = 8 + header.len() + 4;
    assert_eq!(tensor.range, start..start + 12);
    assert_eq!(parsed.tensor("c"), None);
    assert!(properties::safetensors(&raw_safetensors("{}", 0)).unwrap().tensors.is_empty());
}

#[test]
fn the_header_length_is_checked() {
    let file = |length: u64, rest: &[u8]| [&length.to_le_bytes()[..], rest].concat();
    let refused = |file: &[u8], mentions: &[&str]| {
        assert_mentions(&properties::safetensors(file).unwrap_err(), mentions);
    };
    refused(b"", &["the header length", "8 bytes", "0 are left"]);
    refused(b"1234567", &["7 are left"]);
    refused(&file(0, b"{}"), &["first byte is absent", "'{'"]);
    refused(&file(3, b"{}"), &["the header needs 3 bytes at byte 8, but 2 are left"]);
    refused(&file(2, b"[]"), &["first byte is 0x5b", "'{'"]);
    refused(&file(3, b"{} "[..2].into()), &["2 are left"]);
    for length in [100_000_001, 1 << 31, (1 << 31) + 1, 1 << 63, u64::MAX - 7, u64::MAX] {
        refused(&file(length, b"{}"), &[&length.to_string(), "at most 100000000"]);
    }
    refused(&file(100_000_000, b"{}"), &["2 are left"]);
    refused(b"GGUF\x03\0\0\0\0\0\0\0", &["is this a safetensors file?"]);
}

#[test]
fn bad_json_is_refused() {
    for header in ["{", "{}{}", "{\"w\":1}", "{\"w\":{}}", "{\"a\":[]", "{\"\\ud800\":{}}", "{null:1}"] {
        refused(header, 0, &["the header is not the JSON"]);
    }
    refused("{\"\u{1}\":{}}", 0, &["control character"]);
    let mut file = raw_safetensors("{\"a\":1}", 0);
    file[10] = 0xff;
    assert!(properties::safetensors(&file).is_err());
    let long = refused(
        &one_tensor(&format!("\"{}\"", "\\u001b".repeat(9999)), "0", "4"),
        4,
        &["invalid type: string"],
    );
    assert!(long.to_string().len() < 400 && !long.to_string().contains('\u{1b}'), "{long}");
    refused(r#"{"__metadata__":{"a":1}}"#, 0, &["expected a string"]);
    refused(r#"{"__metadata__":{"a":"1","a":"2"}}"#, 0, &["__metadata__ key \"a\" occurs more than once"]);
    refused(r#"{"__metadata__":{},"__metadata__":{}}"#, 0, &["duplicate field `__metadata__`"]);
    refused(&one_tensor("[1]", "0", "4").replace("\"shape\"", "\"dtype\""), 4, &["duplicate field `dtype`"]);
}

#[test]
fn extreme_numbers_are_refused() {
    properties::safetensors(&raw_safetensors(&one_tensor("[2,2]", "0", "16"), 16)).unwrap();
    for number in ["-1", "1.5", "1e3", "1e999", "18446744073709551616", "null", "\"1\"", "true", "[]"] {
        refused(&one_tensor(&format!("[{number},2]"), "0", "16"), 16, &["not the JSON", "column"]);
        refused(&one_tensor("[2,2]", number, "16"), 16, &["not the JSON", "column"]);
        refused(&one_tensor("[2,2]", "0", number), 16, &["not the JSON", "column"]);
    }
    refused(&one_tensor("[0,2]", "0", "0"), 0, &["shape of tensor \"w\" is [0, 2]", "at least 1"]);
    for shape in ["[18446744073709551615]", "[4294967296,4294967296]", "[4611686018427387904]"] {
        refused(&one_tensor(shape, "0", "16"), 16, &["shape of tensor \"w\"", "below 2^64"]);
    }
    refused(&one_tensor("[2,3]", "0", "16"), 16, &["[0, 16]", "24 bytes", "F32 [2, 3]"]);
    refused(&one_tensor("[2,2]", "16", "0"), 16, &["[16, 0]", "16 bytes"]);
    let far = one_tensor("[2,2]", "18446744073709551599", "18446744073709551615");
    refused(&far, 16, &["the data of tensor \"w\"", "0 are left"]);
    refused(&one_tensor(&format!("[{}1]", "1,".repeat(16)), "0", "4"), 4, &["at most 16 sizes"]);
    let endless = format!("[{}1]", "1,".repeat(1_000_000));
    refused(&one_tensor(&endless, "0", "4"), 4, &["at most 16 sizes"]);
}

#[test]
fn offsets_must_cover_the_data() {
    let two = |first: (usize, usize), second: (usize, usize)| {
        format!(
            r#"{{"a":{{"dtype":"U8","shape":[{}],"data_offsets":[{},{}]}},
                "b":{{"dtype":"U8","shape":[{}],"data_offsets":[{},{}]}}}}"#,
            first.1 - first.0,
            first.0,
            first.1,
            second.1 - second.0,
            second.0,
            second.1
        )
    };
    properties::safetensors(&raw_safetensors(&two((0, 8), (8, 16)), 16)).unwrap();
    properties::safetensors(&raw_safetensors(&two((8, 16), (0, 8)), 16)).unwrap();
    let overlap = refused(&two((0, 9), (8, 16)), 16, &["\"a\"", "\"b\"", "overlap"]);
    assert!(matches!(overlap, FormatError::Overlap { .. }));
    refused(&two((0, 16), (0, 16)), 16, &["overlap"]);
    refused(&two((0, 7), (8, 16)), 16, &["the start of tensor \"b\"", "no gaps"]);
    refused(&two((1, 8), (8, 16)), 16, &["the start of tensor \"a\"", "no gaps"]);
    refused(&two((0, 8), (8, 16)), 15, &["the data of tensor \"b\"", "8 bytes", "7 are left"]);
    refused(&two((0, 8), (8, 16)), 0, &["the data of tensor \"a\"", "0 are left"]);
    refused(&two((0, 8), (8, 16)), 17, &["the file length", "where the last tensor ends"]);
    refused("{}", 1, &["the file length"]);
}

#[test]
fn names_and_types_are_checked() {
    let twice = r#"{"w":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},
        "w":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}}"#;
    let error = refused(twice, 2, &["tensor \"w\" occurs more than once"]);
    assert!(matches!(error, FormatError::Duplicate { .. }));
    let unknown = one_tensor("[1]", "0", "4").replace("F32", "Q4_0");
    refused(&unknown, 4, &["dtype of tensor \"w\" is \"Q4_0\"", "one of BOOL, U8", "BF16"]);
    let packed = one_tensor("[3]", "0", "1").replace("F32", "F4");
    refused(&packed, 1, &["[3]", "F4 elements fill a whole number of bytes"]);
}

#[test]
fn deep_json_needs_little_stack() {
    let headers = [
        format!("{{\"w\":{}{}}}", "[".repeat(60_000), "]".repeat(60_000)),
        format!("{{\"w\":{{\"extra\":{}", "[".repeat(60_000)),
        "{\"a\":".repeat(60_000),
    ];
    for header in headers {
        let file = raw_safetensors(&header, 0);
        let small = std::thread::Builder::new().stack_size(256 << 10);
        let thread = small.spawn(move || Safetensors::parse(&file).is_err()).unwrap();
        assert!(thread.join().unwrap());
    }
}

/// The reference implementation's types that have whole bytes per element, with their size.
fn any_dtype() -> impl Strategy<Value = (Dtype, usize)> {
    use Dtype::*;
    let types = [
        BOOL,
        U8,
        I8,
        F8_E5M2,
        F8_E4M3,
        F8_E8M0,
        F8_E4M3FNUZ,
        F8_E5M2FNUZ,
        I16,
        U16,
        F16,
        BF16,
        I32,
        U32,
        F32,
        C64,
        F64,
        I64,
        U64,
    ];
    prop::sample::select(types.to_vec()).prop_map(|dtype| (dtype, dtype.bitsize() / 8))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn reads_what_the_reference_writes(
        tensors in btree_map(".{1,20}", (any_dtype(), vec(1_usize..5, 0..4)), 0..8),
        metadata in btree_map(".{0,10}", ".{0,10}", 0..4),
    ) {
        let bytes: Vec<Vec<u8>> = tensors
            .values()
            .zip(1..)
            .map(|(((_, size), shape), fill)| vec![fill; size * shape.iter().product::<usize>()])
            .collect();
        let views = tensors.iter().zip(&bytes).map(|((name, ((dtype, _), shape)), bytes)| {
            (name, TensorView::new(*dtype, shape.clone(), bytes).unwrap())
        });
        let stored = (!metadata.is_empty()).then(|| metadata.clone().into_iter().collect());
        let file = serialize(views, stored).unwrap();
        let parsed = properties::safetensors(&file).unwrap();
        prop_assert_eq!(&parsed.metadata, &metadata);
        prop_assert_eq!(parsed.tensors.len(), tensors.len());
        for ((name, ((dtype, _), shape)), bytes) in tensors.iter().zip(&bytes) {
            let found = parsed.tensor(name).unwrap();
            prop_assert_eq!(found.tensor_type.to_string(), dtype.to_string());
            prop_assert_eq!(&found.shape, shape);
            prop_assert_eq!(found.bytes(&file), Some(bytes.as_slice()));
        }
    }

    #[test]
    fn never_accepts_what_the_reference_refuses(
        shape in "[0-9\\[\\],]{0,6}|\\[[1-4]?,?[1-4]?\\]",
        offsets in (0_usize..3, 0_usize..40),
        data in 0_usize..40,
        dtype in "F32|U8|F16|F4|I8|X",
    ) {
        let header = one_tensor(&shape, &offsets.0.to_string(), &offsets.1.to_string());
        let file = raw_safetensors(&header.replace("F32", &dtype), data);
        if properties::safetensors(&file).is_ok() {
            prop_assert!(SafeTensors::deserialize(&file).is_ok());
        }
    }
}

#[test]
fn trained_models_are_read() {
    for model in ["target", "draft"] {
        let shared = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared/tinylm");
        let Ok(file) = std::fs::read(shared.join(model).join("model.safetensors")) else { return };
        let parsed = properties::safetensors(&file).unwrap();
        let oracle = SafeTensors::deserialize(&file).unwrap();
        assert_eq!(parsed.metadata["format"], "pt");
        assert_eq!(parsed.tensors.len(), oracle.len());
        for (name, view) in oracle.iter() {
            let found = parsed.tensor(name).unwrap();
            assert_eq!(found.tensor_type.name(), view.dtype().to_string());
            assert_eq!(found.shape, view.shape());
            assert_eq!(found.bytes(&file), Some(view.data()));
        }
        let header = parsed.tensors[0].range.start;
        for end in (0..file.len()).step_by(4096).chain(0..header) {
            assert!(Safetensors::parse(&file[..end]).is_err(), "{model} cut at {end}");
        }
    }
}
