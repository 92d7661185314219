//! What a GGUF file says of a model, right and wrong.

mod common;

use common::golden_folder;
use infer_formats::{Array, Gguf, GgufWriter, Value};
use infer_model::{Checkpoint, END_TOKENS_KEY, ModelError};

/// The small model of a family with one key set anew.
fn with_entry(case: &str, key: &str, value: Value) -> Result<Checkpoint, ModelError> {
    let bytes = std::fs::read(golden_folder().join(case).join("model.gguf")).expect("readable");
    let model = Gguf::parse(&bytes).expect("a GGUF file");
    let mut writer = GgufWriter::new();
    for (own, found) in model.metadata.iter().filter(|(own, _)| *own != key) {
        writer.metadata(own, found.clone()).expect("new");
    }
    writer.metadata(key, value).expect("new");
    for tensor in &model.tensors {
        let data = tensor.bytes(&bytes).expect("within the file").to_vec();
        writer.tensor(tensor.name.clone(), tensor.tensor_type, &tensor.shape, data).expect("new");
    }
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join("model.gguf");
    std::fs::write(&path, writer.finish()).expect("written");
    Checkpoint::open(&path, false)
}

#[track_caller]
fn refused(key: &str, value: Value, words: &str) {
    let message = with_entry("llama", key, value).expect_err("refused").to_string();
    assert!(message.contains(&format!("`{key}` is {words}")), "{message}");
}

#[test]
fn values_of_another_type_are_told_with_key_and_value() {
    let text = || Value::String("yes".to_owned());
    for (key, value, words) in [
        ("llama.rope.scaling.type", Value::U32(2), "2 (u32); expected a string"),
        ("llama.attention.causal", Value::U32(0), "0 (u32); expected a bool"),
        ("llama.use_parallel_residual", text(), "the string \"yes\"; expected a bool"),
        ("tokenizer.ggml.eos_token_id", text(), "the string \"yes\"; expected a token id"),
        (END_TOKENS_KEY, text(), "the string \"yes\"; expected an array of token ids"),
        (
            "llama.context_length",
            Value::U64(1 << 63),
            "9223372036854775808 (u64); expected one finite number",
        ),
        ("llama.rope.freq_base", Value::F32(f32::NAN), "NaN (f32); expected one finite number"),
        ("llama.block_count", text(), "the string \"yes\"; expected one finite number"),
    ] {
        refused(key, value, words);
    }
    for wrong in [0, 1, 7] {
        refused(
            "llama.rope.dimension_count",
            Value::U32(wrong),
            &format!("{wrong} (u32); expected an even number"),
        );
    }
}

#[test]
fn all_ends_are_read() {
    let ends = |key: &str, value: Value| with_entry("llama", key, value).expect("a model").spec.eos_token_ids;
    assert_eq!(ends("tokenizer.ggml.eos_token_id", Value::U32(2)), [2]);
    assert_eq!(ends(END_TOKENS_KEY, Value::Array(Array::U32(vec![7, 9, 11]))), [7, 9, 11]);
    // "None", as some writers say it.
    assert_eq!(ends("tokenizer.ggml.eot_token_id", Value::I32(-1)), [0; 0]);
    assert_eq!(ends("tokenizer.ggml.eos_token_id", Value::U64(u64::MAX)), [0; 0]);
}
