//! Files made by the reference implementation (`data/make_gguf.py`) and by others: read as they were meant.

mod common;

use std::collections::BTreeMap;
use std::path::Path;

use common::{assert_mentions, properties};
use infer_formats::{Array, Gguf, TensorType, Value};

fn data(name: &str) -> Vec<u8> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(name);
    std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

#[test]
fn every_metadata_type_is_read() {
    let file = data("every_type.gguf");
    let gguf = properties::gguf(&file).unwrap();
    let texts = ["", "text", "naïve 文字 🦙\n\0"].map(String::from).to_vec();
    let expected = [
        ("uint8", Value::U8(255), Array::U8(vec![0, 1, u8::MAX])),
        ("int8", Value::I8(127), Array::I8(vec![i8::MIN, 0, i8::MAX])),
        ("uint16", Value::U16(u16::MAX), Array::U16(vec![0, 1, u16::MAX])),
        ("int16", Value::I16(i16::MAX), Array::I16(vec![i16::MIN, 0, i16::MAX])),
        ("uint32", Value::U32(u32::MAX), Array::U32(vec![0, 1, u32::MAX])),
        ("int32", Value::I32(i32::MAX), Array::I32(vec![i32::MIN, 0, i32::MAX])),
        ("float32", Value::F32(f32::MAX), Array::F32(vec![-1.5, 0.0, f32::MAX])),
        ("uint64", Value::U64(u64::MAX), Array::U64(vec![0, 1, u64::MAX])),
        ("int64", Value::I64(i64::MAX), Array::I64(vec![i64::MIN, 0, i64::MAX])),
        ("float64", Value::F64(f64::MAX), Array::F64(vec![-1.5, 5e-324, f64::MAX])),
        ("bool", Value::Bool(true), Array::Bool(vec![true, false, true])),
        ("string", Value::String(texts[2].clone()), Array::String(texts)),
    ];
    for (name, scalar, array) in expected {
        assert_eq!(gguf.metadata.get(&format!("scalar.{name}")), Some(&scalar));
        assert_eq!(gguf.metadata.get(&format!("array.{name}")), Some(&Value::Array(array)));
    }
    let nested = Array::Array(vec![
        Array::I32(vec![1, -2]),
        Array::Array(vec![Array::F32(vec![3.5]), Array::String(vec!["deep".into()])]),
        Array::Bool(vec![true]),
    ]);
    assert_eq!(gguf.metadata.get("array.nested"), Some(&Value::Array(nested)));
    assert_eq!((gguf.version, gguf.metadata.len()), (3, 26));
    assert_eq!(gguf.metadata.iter().next(), Some(("general.architecture", &Value::String("llama".into()))));
}

#[test]
fn every_tensor_type_has_the_reference_size() {
    let table: BTreeMap<String, (u32, usize, usize)> =
        serde_json::from_slice(&data("ggml_types.json")).unwrap();
    for (name, &(id, block_len, block_bytes)) in &table {
        let tensor_type = TensorType::from_ggml_id(id).unwrap_or_else(|| panic!("{name} ({id}) is unknown"));
        let found = (tensor_type.name(), tensor_type.block_len(), tensor_type.block_bytes());
        assert_eq!(found, (name.as_str(), block_len, block_bytes));
    }
    let ours = TensorType::ALL.iter().filter(|tensor_type| tensor_type.ggml_id().is_some()).count();
    assert_eq!(ours, table.len());

    let file = data("every_type.gguf");
    let gguf = Gguf::parse(&file).unwrap();
    assert_eq!(gguf.tensors.len(), table.len());
    for (name, &(id, block_len, block_bytes)) in &table {
        let tensor = gguf.tensor(&format!("tensor.{name}")).unwrap();
        assert_eq!(tensor.tensor_type.ggml_id(), Some(id));
        assert_eq!(tensor.shape, [2, 2 * block_len]);
        let expected = vec![id as u8; 4 * block_bytes];
        assert_eq!(tensor.bytes(&file), Some(expected.as_slice()), "{name}");
    }
}

#[test]
fn block_arithmetic_is_exact() {
    assert_eq!(TensorType::Q4_0.byte_len(64), Some(36));
    assert_eq!(TensorType::Q4_0.byte_len(0), Some(0));
    assert_eq!(TensorType::Q4_0.byte_len(63), None);
    assert_eq!(TensorType::F4.byte_len(6), Some(3));
    assert_eq!(TensorType::F6E3M2.byte_len(6), None);
    assert_eq!(TensorType::F64.byte_len(usize::MAX), None);
    assert_eq!(TensorType::U8.byte_len(usize::MAX), Some(usize::MAX));
}

#[test]
fn a_vocabulary_is_read_through_typed_getters() {
    let file = data("vocabulary.gguf");
    let gguf = properties::gguf(&file).unwrap();
    let metadata = &gguf.metadata;
    assert_eq!(metadata.str("tokenizer.ggml.model").unwrap(), Some("gpt2"));
    let tokens = metadata.strings("tokenizer.ggml.tokens").unwrap().unwrap();
    assert_eq!(tokens, ["a", "b", "Ġab", "<|endoftext|>"]);
    assert_eq!(metadata.i32s("tokenizer.ggml.token_type").unwrap(), Some(vec![1, 1, 1, 3]));
    assert_eq!(metadata.f32s("tokenizer.ggml.scores").unwrap(), Some(&[-1.0, -2.0, -3.5, 0.0][..]));
    assert_eq!(metadata.u64s("qwen2.attention.head_count_kv").unwrap(), Some(vec![2, 4]));
    assert_eq!(metadata.f32("qwen2.rope.freq_base").unwrap(), Some(1e6));
    assert_eq!(metadata.bool("tokenizer.ggml.add_bos_token").unwrap(), Some(false));
    assert_eq!(metadata.u64("general.alignment").unwrap(), Some(64));
    assert_eq!(metadata.i64("general.alignment").unwrap(), Some(64));
    assert_eq!(metadata.u64("absent").unwrap(), None);
    assert!(gguf.split().unwrap().is_none());

    let norm = gguf.tensor("output_norm.weight").unwrap();
    assert_eq!((norm.tensor_type, norm.shape.as_slice()), (TensorType::F32, &[3][..]));
    let output = gguf.tensor("output.weight").unwrap();
    assert_eq!((output.shape.as_slice(), output.elements()), (&[2, 3][..], 6));
    assert_eq!(output.range.start % 64, 0);
    assert_eq!(output.bytes(&file).unwrap()[..4], [0x00, 0x00, 0x00, 0x3c]); // 0 and 1 as f16
}

#[test]
fn getters_name_what_they_found() {
    let gguf = Gguf::parse(&data("every_type.gguf")).unwrap();
    let metadata = &gguf.metadata;
    let negative = metadata.u64s("array.int8").unwrap_err();
    assert_mentions(&negative, &["\"array.int8\"", "array of 3 elements of type i8", "non-negative"]);
    let text = metadata.u64("scalar.string").unwrap_err();
    assert_mentions(&text, &["\"scalar.string\"", "the string", "non-negative integer"]);
    assert_mentions(&metadata.i64("scalar.uint64").unwrap_err(), &["18446744073709551615 (u64)"]);
    assert_mentions(&metadata.i32s("array.uint32").unwrap_err(), &["array of 3", "u32"]);
    assert_mentions(&metadata.f32("scalar.float64").unwrap_err(), &["e308", "32-bit float"]);
    assert_mentions(&metadata.f32("scalar.uint8").unwrap_err(), &["255 (u8)"]);
    assert_mentions(&metadata.bool("scalar.uint8").unwrap_err(), &["255 (u8)", "a bool"]);
    assert_mentions(&metadata.str("scalar.bool").unwrap_err(), &["the bool true", "a string"]);
    assert_mentions(&metadata.strings("scalar.string").unwrap_err(), &["an array of strings"]);
    assert_mentions(&metadata.f32s("array.float64").unwrap_err(), &["f64", "32-bit floats"]);
    assert_mentions(&metadata.bools("array.uint8").unwrap_err(), &["u8", "bools"]);
    assert_eq!(metadata.u64("scalar.int8").unwrap(), Some(127));
    assert_eq!(metadata.i64("scalar.int64").unwrap(), Some(i64::MAX));
    assert_eq!(metadata.u64("scalar.uint64").unwrap(), Some(u64::MAX));
    assert_eq!(metadata.i32s("array.int16").unwrap(), Some(vec![-32768, 0, 32767]));
}

#[test]
fn a_trained_model_is_read() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared/data/weights/stories260K");
    let Ok(file) = std::fs::read(folder.join("stories260K.f32.gguf")) else { return };
    let gguf = properties::gguf(&file).unwrap();
    assert_eq!((gguf.tensors.len(), gguf.metadata.len()), (48, 19));
    assert_eq!(gguf.metadata.u64("llama.block_count").unwrap(), Some(5));
    assert_eq!(gguf.metadata.strings("tokenizer.ggml.tokens").unwrap().unwrap().len(), 512);
    let embedding = gguf.tensor("token_embd.weight").unwrap();
    assert_eq!(embedding.shape, [512, 64]);
    assert_eq!(embedding.range, 14176..14176 + 512 * 64 * 4);
    for missing in [1, 4096, 1 << 20] {
        assert!(Gguf::parse(&file[..file.len() - missing]).is_err(), "{missing} bytes missing");
    }
    for end in (0..file.len()).step_by(4096).chain(0..14_176) {
        assert!(Gguf::parse(&file[..end]).is_err(), "cut at {end}");
    }
}
