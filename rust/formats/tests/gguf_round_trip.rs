//! What the writer writes, the reader reads: for any metadata and any tensors.

mod common;

use common::{assert_mentions, properties};
use infer_formats::{Array, Gguf, GgufWriter, TensorType, Value};
use proptest::collection::{btree_map, vec};
use proptest::prelude::*;

fn any_array() -> impl Strategy<Value = Array> {
    let leaf = prop_oneof![
        vec(any::<u8>(), 0..5).prop_map(Array::U8),
        vec(any::<i8>(), 0..5).prop_map(Array::I8),
        vec(any::<u16>(), 0..5).prop_map(Array::U16),
        vec(any::<i16>(), 0..5).prop_map(Array::I16),
        vec(any::<u32>(), 0..5).prop_map(Array::U32),
        vec(any::<i32>(), 0..5).prop_map(Array::I32),
        vec(any::<u64>(), 0..5).prop_map(Array::U64),
        vec(any::<i64>(), 0..5).prop_map(Array::I64),
        vec(any::<f32>(), 0..5).prop_map(Array::F32),
        vec(any::<f64>(), 0..5).prop_map(Array::F64),
        vec(any::<bool>(), 0..5).prop_map(Array::Bool),
        vec(".{0,8}", 0..5).prop_map(Array::String),
    ];
    leaf.prop_recursive(6, 24, 4, |inner| vec(inner, 0..4).prop_map(Array::Array))
}

fn any_value() -> impl Strategy<Value = Value> {
    prop_oneof![
        any::<u8>().prop_map(Value::U8),
        any::<i8>().prop_map(Value::I8),
        any::<u16>().prop_map(Value::U16),
        any::<i16>().prop_map(Value::I16),
        any::<u32>().prop_map(Value::U32),
        any::<i32>().prop_map(Value::I32),
        any::<u64>().prop_map(Value::U64),
        any::<i64>().prop_map(Value::I64),
        any::<f32>().prop_map(Value::F32),
        any::<f64>().prop_map(Value::F64),
        any::<bool>().prop_map(Value::Bool),
        ".{0,40}".prop_map(Value::String),
        any_array().prop_map(Value::Array),
    ]
}

/// A type that GGUF holds, and a shape of whole blocks: row-major, up to four dimensions.
fn any_tensor() -> impl Strategy<Value = (TensorType, Vec<usize>)> {
    let types: Vec<TensorType> =
        TensorType::ALL.iter().copied().filter(|tensor_type| tensor_type.ggml_id().is_some()).collect();
    (prop::sample::select(types), vec(1_usize..4, 1..=4)).prop_map(|(tensor_type, mut shape)| {
        *shape.last_mut().expect("at least one dimension") *= tensor_type.block_len();
        (tensor_type, shape)
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn the_reader_returns_what_was_written(
        metadata in btree_map("[a-z.]{1,20}", any_value(), 0..12),
        tensors in btree_map(".{1,30}", any_tensor(), 0..8),
        alignment in prop_oneof![Just(None), (3_u32..12).prop_map(|power| Some(1_u32 << power))],
        fill in any::<u8>(),
    ) {
        let mut writer = GgufWriter::new();
        let mut expected: Vec<(String, Value)> = metadata.into_iter().collect();
        expected.extend(alignment.map(|alignment| ("general.alignment".to_owned(), Value::U32(alignment))));
        for (key, value) in &expected {
            writer.metadata(key, value.clone()).unwrap();
        }
        for (number, (name, (tensor_type, shape))) in tensors.iter().enumerate() {
            let bytes = tensor_type.byte_len(shape.iter().product()).unwrap();
            let fill = fill.wrapping_add(number as u8);
            writer.tensor(name, *tensor_type, shape, vec![fill; bytes]).unwrap();
        }
        let file = writer.finish();
        let gguf = properties::gguf(&file).unwrap();

        prop_assert_eq!(gguf.version, 3);
        let found: Vec<(String, Value)> =
            gguf.metadata.iter().map(|(key, value)| (key.to_owned(), value.clone())).collect();
        prop_assert_eq!(found, expected);
        prop_assert_eq!(gguf.tensors.len(), tensors.len());
        for (number, (found, (name, (tensor_type, shape)))) in gguf.tensors.iter().zip(&tensors).enumerate() {
            prop_assert_eq!(&found.name, name);
            prop_assert_eq!(found.tensor_type, *tensor_type);
            prop_assert_eq!(&found.shape, shape);
            prop_assert_eq!(found.range.start % alignment.unwrap_or(32) as usize, 0);
            let fill = fill.wrapping_add(number as u8);
            prop_assert!(found.bytes(&file).unwrap().iter().all(|&byte| byte == fill));
        }
    }

    #[test]
    fn any_bytes_end_in_a_result(bytes in vec(any::<u8>(), 0..400)) {
        let _ = properties::gguf(&bytes);
        let magic = [&b"GGUF\x03\0\0\0"[..], &bytes].concat();
        let _ = properties::gguf(&magic);
        let _ = properties::safetensors(&bytes);
        let _ = properties::safetensors_index(&bytes);
    }
}

#[test]
fn the_writer_refuses_what_the_reader_would() {
    let mut writer = GgufWriter::new();
    writer.metadata("key", Value::U8(1)).unwrap();
    let again = writer.metadata("key", Value::U8(2)).unwrap_err();
    assert_mentions(&again, &["metadata key \"key\" occurs more than once"]);
    assert_mentions(&writer.metadata("", Value::U8(2)).unwrap_err(), &["metadata key 1", "0 bytes long"]);
    let alignment = writer.metadata("general.alignment", Value::U32(12)).unwrap_err();
    assert_mentions(&alignment, &["general.alignment", "12", "power of two"]);

    let nested = |levels| (1..levels).fold(Array::U8(vec![1]), |inner, _| Array::Array(vec![inner]));
    writer.metadata("eight", Value::Array(nested(8))).unwrap();
    let deep = writer.metadata("nine", Value::Array(nested(9))).unwrap_err();
    assert_mentions(&deep, &["\"nine\"", "more than 8"]);
    // An empty array of arrays still says that its elements are arrays.
    let hollow = (1..8).fold(Array::Array(vec![]), |inner, _| Array::Array(vec![inner]));
    assert!(writer.metadata("hollow", Value::Array(hollow)).is_err());

    writer.tensor("w", TensorType::F32, &[2, 2], vec![0; 16]).unwrap();
    let mut refused = |name: &str, tensor_type, shape: &[usize], bytes: usize, mentions: &[&str]| {
        assert_mentions(&writer.tensor(name, tensor_type, shape, vec![0; bytes]).unwrap_err(), mentions);
    };
    refused("w", TensorType::F32, &[1], 4, &["tensor \"w\" occurs more than once"]);
    refused("", TensorType::F32, &[1], 4, &["the name of tensor 1"]);
    refused("v", TensorType::F32, &[2, 2], 15, &["tensor \"v\" is 15 bytes", "16 bytes"]);
    refused("v", TensorType::F32, &[2, 0], 0, &["[2, 0]", "at least 1"]);
    refused("v", TensorType::F32, &[1; 5], 4, &["at most 4 dimensions"]);
    refused("v", TensorType::Q4_0, &[2, 16], 18, &["[2, 16]", "multiple of 32"]);
    refused("v", TensorType::F8E4M3, &[1], 1, &["type of tensor \"v\" is F8_E4M3", "GGUF can hold"]);
    refused("v", TensorType::F32, &[usize::MAX, 2], 4, &["tensor \"v\""]);

    let gguf = Gguf::parse(&writer.finish()).unwrap();
    assert_eq!((gguf.metadata.len(), gguf.tensors.len()), (2, 1), "refused input left something behind");
}

#[test]
fn a_failing_output_is_reported() {
    struct Full(usize);
    impl std::io::Write for Full {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            let taken = bytes.len().min(self.0);
            self.0 -= taken;
            if taken == 0 { Err(std::io::ErrorKind::StorageFull.into()) } else { Ok(taken) }
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }
    let mut writer = GgufWriter::new();
    writer.tensor("w", TensorType::F32, &[64], vec![1; 256]).unwrap();
    let mut whole = Vec::new();
    writer.write(&mut whole).unwrap();
    assert_eq!(whole.len(), 64 + 256);
    for room in 0..whole.len() {
        let error = writer.write(&mut Full(room)).expect_err("the output is too small");
        assert_eq!(error.kind(), std::io::ErrorKind::StorageFull, "room for {room} bytes");
    }
    writer.write(&mut Full(whole.len())).unwrap();
}
