//! What cannot be rounded, written or read, and what is said of it.

mod common;

use std::path::Path;
use std::sync::atomic::AtomicBool;

use common::models::{llama, rounded, write};
use common::{exact, golden_folder};
use infer_formats::{Safetensors, SafetensorsWriter, TensorType};
use infer_kernels::Context;
use infer_model::{Checkpoint, CpuModel, ExportOptions, LoadOptions, ModelError, export};
use serde_json::{Value, json};

/// A refusal says all of these.
fn told<T>(result: Result<T, ModelError>, words: &[&str]) {
    let Err(error) = result else { panic!("not refused; {words:?} was expected") };
    let message = error.to_string();
    assert!(words.iter().all(|word| message.contains(word)), "{message}");
}

/// Changes one thing in a copy of a written folder.
fn with_change(original: &Path, change: impl Fn(&mut Value)) -> tempfile::TempDir {
    let copy = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(original).unwrap() {
        let path = entry.unwrap().path();
        std::fs::copy(&path, copy.path().join(path.file_name().unwrap())).unwrap();
    }
    let path = copy.path().join("config.json");
    let mut config: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    change(&mut config);
    std::fs::write(path, config.to_string()).unwrap();
    copy
}

#[test]
fn mistakes_are_told() {
    let place = tempfile::tempdir().unwrap();
    let (source, output) = (place.path().join("source"), place.path().join("rounded"));
    llama(&source, true);
    write(&source, &output, Some(rounded("int4"))).unwrap();
    told(write(&source, &output, Some(rounded("int8"))), &["output", "exists already"]);
    told(
        write(&output, &place.path().join("again"), Some(rounded("int8"))),
        &["int8", "quantized already", "int4"],
    );
    let gguf = place.path().join("wide.gguf");
    told(write(&source, &gguf, Some(rounded("int4-g128"))), &["int4-g128", "GGUF", "folder"]);
    let narrow = golden_folder().join("qwen3");
    told(
        write(&narrow, &gguf, Some(rounded("int4"))),
        &["quantization", "down", "[32, 40]", "multiple of 32"],
    );
    told(
        write(&golden_folder().join("gpt2"), &place.path().join("gpt2"), Some(rounded("int4"))),
        &["transposed", ".gguf"],
    );
    told(
        write(&golden_folder().join("llama/model.gguf"), &place.path().join("x"), Some(rounded("int4"))),
        &["output", ".gguf"],
    );
    let load = |path: &Path, name: &str| {
        let options = LoadOptions { quantization: Some(rounded(name)), ..exact(1) };
        CpuModel::load(path, &options).map(|_| 0)
    };
    told(load(&output, "int4"), &["quantization", "quantized already", "int4"]);
    told(load(&narrow, "int8"), &["tensor", "down_proj", "multiple of 32"]);
    told(load(&golden_folder().join("llama/model.q8_0.gguf"), "int4"), &["quantized already", "Q8_0"]);
    let left = std::fs::read_dir(place.path()).unwrap().count();
    assert_eq!(left, 2, "only the source and the first output");
}

/// Loading rounds embedding and head of a folder, so what cannot be rounded must not be written.
#[test]
fn ends_that_cannot_be_rounded_are_told_before_anything_is_written() {
    let place = tempfile::tempdir().unwrap();
    let source = place.path().join("source");
    llama(&source, false);
    let path = source.join("model.safetensors");
    let whole = std::fs::read(&path).unwrap();
    for name in ["model.embed_tokens.weight", "lm_head.weight"] {
        let range = Safetensors::parse(&whole).unwrap().tensor(name).unwrap().range.clone();
        for bits in [0x7fc0_u16, 0x7f80, 0x47c3] {
            // Not a number, infinity, and 99840, beyond half precision
            let mut bytes = whole.clone();
            bytes[range.start + 2..range.start + 4].copy_from_slice(&bits.to_le_bytes());
            std::fs::write(&path, bytes).unwrap();
            for quantization in ["int8", "int4", "int4-g128"] {
                told(
                    write(&source, &place.path().join("out"), Some(rounded(quantization))),
                    &["quantization", name],
                );
            }
        }
    }
    assert_eq!(std::fs::read_dir(place.path()).unwrap().count(), 1, "only the source");
}

/// Advice must not lead from one container to the other and back.
#[test]
fn what_no_container_holds_is_told_in_words() {
    let place = tempfile::tempdir().unwrap();
    let (file, folder) = (place.path().join("x.gguf"), place.path().join("x"));
    let inner = golden_folder().join("gpt2_inner");
    told(
        write(&inner, &file, None),
        &["cannot say that the activation (hidden_act) is gelu", "nor can a folder"],
    );
    told(write(&inner, &folder, Some(rounded("int8"))), &["transposed", "nor can a .gguf file", "is gelu"]);
    for (case, words) in [
        ("mistral", &["cannot say which layers have sliding windows (of ", "write a folder instead"][..]),
        ("qwen2_moe_mixed", &["which layers are dense among layers with experts"]),
        ("llama_rope_dynamic", &["rope_parameters"]),
        (
            "stablelm_qk_norm",
            &["cannot hold the norms of single heads", "k_layernorm", "write a folder instead"],
        ),
    ] {
        told(write(&golden_folder().join(case), &file, None), words);
    }
}

#[test]
fn other_methods_are_told() {
    let place = tempfile::tempdir().unwrap();
    let (source, output) = (place.path().join("source"), place.path().join("rounded"));
    llama(&source, true);
    write(&source, &output, Some(rounded("int4"))).unwrap();
    for (change, words) in [
        (json!({"quant_method": "gptq"}), &["quant_method", "gptq", "compressed-tensors"][..]),
        (
            json!({"quant_method": "compressed-tensors", "format": "int-quantized"}),
            &["format", "pack-quantized"],
        ),
        (
            json!({"quant_method": "compressed-tensors", "format": "pack-quantized",
                   "config_groups": {"a": {"weights": {"type": "int", "symmetric": false}}}}),
            &["config_groups.a.weights", "symmetric true"],
        ),
        (
            json!({"quant_method": "compressed-tensors", "format": "pack-quantized",
                   "config_groups": {"a": {"input_activations": {"num_bits": 8}}}}),
            &["input_activations"],
        ),
    ] {
        let copy = with_change(&output, |config| config["quantization_config"] = change.clone());
        told(Checkpoint::open(copy.path(), true), words);
    }
}

#[test]
fn a_stop_leaves_nothing_behind() {
    let place = tempfile::tempdir().unwrap();
    let source = place.path().join("source");
    llama(&source, true);
    let stop = AtomicBool::new(true);
    let context = Context::new(1).unwrap();
    let options = ExportOptions {
        quantization: Some(rounded("int8")),
        metadata: Vec::new(),
        context: &context,
        stop: &stop,
    };
    for name in ["stopped.gguf", "stopped"] {
        let target = place.path().join(name);
        told(export(&Checkpoint::open(&source, true).unwrap(), &target, &options), &["interrupted"]);
        assert!(!target.exists());
    }
    let left = std::fs::read_dir(place.path()).unwrap().count();
    assert_eq!(left, 1, "only the source");
}

/// Other programs' folders: scales in bfloat16 are read where half precision has the very number.
#[test]
fn other_scales_are_read_exactly_or_refused() {
    let place = tempfile::tempdir().unwrap();
    for (bits, works) in [(0x3c80_u16, true), (0x0080, false)] {
        // 2^-6, and the smallest normal bfloat16, which half precision has not
        let folder = place.path().join(bits.to_string());
        llama(&folder, true);
        let output = place.path().join(format!("{bits} rounded"));
        write(&folder, &output, Some(rounded("int4-g128"))).unwrap();
        let path = output.join("model.safetensors");
        let bytes = std::fs::read(&path).unwrap();
        let file = Safetensors::parse(&bytes).unwrap();
        let mut writer = SafetensorsWriter::new();
        for tensor in &file.tensors {
            let kind = if tensor.name.ends_with("_scale") { TensorType::Bf16 } else { tensor.tensor_type };
            writer.declare(&tensor.name, kind, &tensor.shape).unwrap();
        }
        let mut out = Vec::new();
        let part = |name: &str| {
            let own = file.tensor(name).unwrap().bytes(&bytes).unwrap();
            let scales = bits.to_le_bytes().repeat(own.len() / 2);
            Ok::<_, std::io::Error>(if name.ends_with("_scale") { scales } else { own.to_vec() })
        };
        writer.write_with(&mut out, part).unwrap();
        std::fs::write(&path, out).unwrap();
        match CpuModel::load(&output, &exact(1)) {
            Ok(_) => assert!(works),
            Err(error) => assert!(!works && error.to_string().contains("half precision"), "{error}"),
        }
    }
}
