//! The seeds of the fuzz targets, which `fuzz/seeds` holds as files: small honest files, and one liar of each
//! kind, so that a fuzzer starts at every refusal.

use infer_formats::{Array, GgufWriter, TensorType, Value};

use super::{RawGguf, raw_safetensors};

/// One fuzz target: its name and its named seeds.
pub type Target = (&'static str, Vec<(&'static str, Vec<u8>)>);

pub fn all() -> [Target; 3] {
    [("gguf", gguf()), ("safetensors", safetensors()), ("safetensors_index", safetensors_index())]
}

fn gguf() -> Vec<(&'static str, Vec<u8>)> {
    let raw = |tensors, entries| RawGguf::header(3, tensors, entries);
    let count = |count: u64| [&8_u32.to_le_bytes()[..], &count.to_le_bytes()].concat();
    vec![
        ("empty_version_2", RawGguf::header(2, 0, 0).0),
        ("scalars", scalars()),
        ("arrays", arrays()),
        ("tensors", tensors()),
        ("vocabulary_of_a_split_model", vocabulary()),
        ("version_1", RawGguf::header(1, 0, 0).0),
        ("big_endian", RawGguf::header(3_u32.swap_bytes(), 0, 0).0),
        ("many_tensors", raw(u64::MAX, 0).0),
        ("many_entries", raw(0, 1 << 61).0),
        ("many_strings", raw(0, 1).entry("a", 9, &count(1 << 61)).0),
        ("key_twice", raw(0, 2).entry("a", 0, &[1]).entry("a", 0, &[1]).0),
        ("alignment_zero", raw(0, 1).entry("general.alignment", 4, &[0; 4]).0),
        ("name_twice", raw(2, 0).tensor("a", &[1], 0, 0).tensor("a", &[1], 0, 32).data(64)),
        ("overlap", raw(2, 0).tensor("a", &[16], 0, 0).tensor("b", &[1], 0, 32).data(64)),
        ("gap", raw(2, 0).tensor("a", &[1], 0, 64).tensor("b", &[1], 0, 0).data(68)),
        ("zero_dimension", raw(1, 0).tensor("a", &[0], 0, 0).data(32)),
        ("wrapping_shape", raw(1, 0).tensor("a", &[1 << 32, 1 << 32], 0, 0).data(32)),
        ("removed_type", raw(1, 0).tensor("a", &[32], 4, 0).data(32)),
        ("part_of_a_block", raw(1, 0).tensor("a", &[16, 2], 8, 0).data(64)),
    ]
}

fn scalars() -> Vec<u8> {
    let values = [
        ("u8", Value::U8(1)),
        ("i8", Value::I8(-1)),
        ("u16", Value::U16(1)),
        ("i16", Value::I16(-1)),
        ("u32", Value::U32(1)),
        ("i32", Value::I32(-1)),
        ("f32", Value::F32(1.5)),
        ("u64", Value::U64(1)),
        ("i64", Value::I64(-1)),
        ("f64", Value::F64(1.5)),
        ("bool", Value::Bool(true)),
        ("string", Value::String("é".into())),
    ];
    written(values, &[])
}

fn arrays() -> Vec<u8> {
    let nested = Array::Array(vec![Array::U8(vec![1, 2]), Array::Array(vec![Array::Bool(vec![true])])]);
    let values = [
        ("i32s", Array::I32(vec![1, -2, 3])),
        ("f32s", Array::F32(vec![0.5])),
        ("bools", Array::Bool(vec![true, false])),
        ("strings", Array::String(vec!["a".into(), String::new()])),
        ("nested", nested),
        ("none", Array::U64(vec![])),
    ];
    written(values.map(|(key, array)| (key, Value::Array(array))), &[])
}

fn tensors() -> Vec<u8> {
    let tensors = [
        ("norm", TensorType::F32, &[4][..]),
        ("weight", TensorType::Q4_0, &[2, 32][..]),
        ("experts", TensorType::Bf16, &[2, 1, 2][..]),
        ("scalar", TensorType::I8, &[][..]),
    ];
    written([("general.alignment", Value::U32(8))], &tensors)
}

fn vocabulary() -> Vec<u8> {
    let texts = |texts: &[&str]| Value::Array(Array::String(texts.iter().map(|&text| text.into()).collect()));
    let values = [
        ("general.architecture", Value::String("llama".into())),
        ("tokenizer.ggml.tokens", texts(&["<s>", "a", "▁a"])),
        ("tokenizer.ggml.scores", Value::Array(Array::F32(vec![0.0, -1.0, -2.0]))),
        ("tokenizer.ggml.token_type", Value::Array(Array::I32(vec![3, 1, 1]))),
        ("split.no", Value::U16(0)),
        ("split.count", Value::U16(2)),
        ("split.tensors.count", Value::I32(2)),
    ];
    written(values, &[("output.weight", TensorType::F16, &[2, 3])])
}

fn written<const N: usize>(
    values: [(&str, Value); N],
    tensors: &[(&'static str, TensorType, &[usize])],
) -> Vec<u8> {
    let mut writer = GgufWriter::new();
    for (key, value) in values {
        writer.metadata(key, value).expect("seeds are right");
    }
    for &(name, tensor_type, shape) in tensors {
        let bytes = tensor_type.byte_len(shape.iter().product()).expect("seeds are right");
        writer.tensor(name, tensor_type, shape, vec![1; bytes]).expect("seeds are right");
    }
    writer.finish()
}

fn safetensors() -> Vec<(&'static str, Vec<u8>)> {
    let one = |dtype: &str, shape: &str, begin: u64, end: u64| {
        format!(r#"{{"w":{{"dtype":"{dtype}","shape":{shape},"data_offsets":[{begin},{end}]}}}}"#)
    };
    let two = |second: &str, begin: u64| {
        let tensor = |name, begin| {
            format!(r#""{name}":{{"dtype":"U8","shape":[2],"data_offsets":[{begin},{}]}}"#, begin + 2)
        };
        format!("{{{},{}}}", tensor("a", 0), tensor(second, begin))
    };
    let metadata = format!(r#"{{"__metadata__":{{"format":"pt"}},{}"#, &one("BF16", "[2,1]", 0, 4)[1..]);
    vec![
        ("empty", raw_safetensors("{}", 0)),
        ("metadata", raw_safetensors(&metadata, 4)),
        ("two", raw_safetensors(&two("b", 2), 4)),
        ("scalar", raw_safetensors(&one("F64", "[]", 0, 8), 8)),
        ("packed", raw_safetensors(&one("F4", "[2,3]", 0, 3), 3)),
        ("overlap", raw_safetensors(&two("b", 1), 3)),
        ("gap", raw_safetensors(&two("b", 3), 5)),
        ("name_twice", raw_safetensors(&two("a", 2), 4)),
        ("trailing", raw_safetensors(&two("b", 2), 5)),
        ("wrapping_shape", raw_safetensors(&one("F32", "[4611686018427387904]", 0, 0), 0)),
        ("zero_dimension", raw_safetensors(&one("F32", "[0]", 0, 0), 0)),
        ("long_header", [&u64::MAX.to_le_bytes()[..], b"{}"].concat()),
        ("deep", raw_safetensors(&format!("{{\"a\":{}", "[".repeat(200)), 0)),
    ]
}

fn safetensors_index() -> Vec<(&'static str, Vec<u8>)> {
    let index = |file: &str| {
        format!(r#"{{"metadata":{{"total_size":8}},"weight_map":{{"a":"{file}","b":"x.safetensors"}}}}"#)
    };
    let twice = r#"{"weight_map":{"a":"x.safetensors","a":"x.safetensors"}}"#;
    vec![
        ("two", index("model-00001-of-00002.safetensors").into()),
        ("parent", index("../x.safetensors").into()),
        ("absolute", index("/x.safetensors").into()),
        ("pickle", index("x.bin").into()),
        ("name_twice", twice.into()),
        ("escapes", index("\\u0078.safetensors").into()),
    ]
}
