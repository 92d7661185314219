//! Rounding while loading, and files that were rounded: what is computed is the same, bit for bit.

mod common;

use std::path::{Path, PathBuf};

use common::models::{experts, llama, rounded, write};
use common::{Expected, exact, golden_cases, golden_folder, is_long, largest_difference, logits};
use infer_formats::{Gguf, Safetensors};
use infer_kernels::Precision;
use infer_model::{Checkpoint, CpuModel, LoadOptions};
use serde_json::{Value, json};

/// The bits of the logits of a fixed text.
fn computed(path: &Path, options: &LoadOptions) -> Vec<u32> {
    let mut model =
        CpuModel::load(path, options).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let tokens: Vec<u32> = (0..40).map(|at| (at * 29 + at * at % 7) % 80).collect();
    logits(&mut model, &tokens, 17, false).iter().map(|logit| logit.to_bits()).collect()
}

/// Rounds while loading, writes every container that there is for it, and compares.
fn all_ways_agree(source: &Path, names: &[&str]) {
    let folder = tempfile::tempdir().unwrap();
    let names_of_files = |path: &Path| Checkpoint::open(path, true).unwrap().storage();
    for name in names {
        let quantization = Some(rounded(name));
        let mut outputs: Vec<PathBuf> = vec![folder.path().join(format!("{name}.gguf"))];
        if !source.join("config.json").is_file()
            || !Checkpoint::open(source, true).unwrap().spec.arch.transposed
        {
            outputs.push(folder.path().join(name));
        }
        outputs.retain(|output| {
            (*name != "int4-g128" || output.extension().is_none())
                && (source.is_dir() || output.extension().is_some())
        });
        for output in outputs {
            let bytes = write(source, &output, quantization).unwrap_or_else(|error| panic!("{error}"));
            let file = if output.is_dir() { output.join("model.safetensors") } else { output.clone() };
            assert_eq!(bytes, std::fs::metadata(file).unwrap().len());
            assert!(Checkpoint::open(&output, true).unwrap().is_quantized(), "{}", names_of_files(&output));
            for precision in [Precision::Exact, Precision::Auto] {
                let plain = LoadOptions { precision, ..exact(2) };
                let in_situ = computed(source, &LoadOptions { quantization, ..plain.clone() });
                assert!(in_situ != computed(source, &plain), "{name} rounds nothing");
                assert!(in_situ == computed(&output, &plain), "{} {precision:?}", output.display());
                let alone = LoadOptions { threads: Some(1), mmap: false, quantization, ..plain };
                assert!(in_situ == computed(source, &alone), "{name} depends on threads");
            }
        }
    }
}

#[test]
fn rounding_while_loading_equals_loading_what_was_rounded() {
    let folder = tempfile::tempdir().unwrap();
    for tied in [false, true] {
        let source = folder.path().join(format!("llama {tied}"));
        llama(&source, tied);
        all_ways_agree(&source, &["int8", "int4", "int4-g128"]);
        // A GGUF file of floats is rounded like the folder.
        let floats = folder.path().join(format!("floats {tied}.gguf"));
        write(&source, &floats, None).unwrap();
        let int4 = LoadOptions { quantization: Some(rounded("int4")), ..exact(2) };
        assert!(computed(&source, &exact(2)) == computed(&floats, &exact(2)));
        assert!(computed(&source, &int4) == computed(&floats, &int4));
        all_ways_agree(&floats, &["Q8_0", "Q4_0"]);
    }
    let source = folder.path().join("experts");
    experts(&source);
    all_ways_agree(&source, &["int8", "int4"]);
    for case in ["llama", "qwen2", "gpt2"] {
        all_ways_agree(&golden_folder().join(case), &["int8", "int4"]);
    }
}

/// Cases of which GGUF cannot say everything.
const UNSAID: &[&str] = &[
    "gemma2",
    "gemma3",
    "gpt2_inner",
    "llama_rope_dynamic",
    "mistral",
    "qwen2_moe_mixed",
    "qwen2_window",
    "qwen3_moe_mixed",
    "stablelm_parallel",
    "stablelm_qk_norm",
    "starcoder2",
];

#[test]
fn files_without_rounding_are_those_of_the_converter_of_llama_cpp() {
    let folder = tempfile::tempdir().unwrap();
    let mut refused = Vec::new();
    for case in golden_cases() {
        let source = golden_folder().join(&case);
        let output = folder.path().join(format!("{case}.gguf"));
        if let Err(error) = write(&source, &output, None) {
            refused.push(case);
            let message = error.to_string();
            assert!(
                message.contains("cannot say")
                    || message.contains("dimensions")
                    || message.contains("cannot hold"),
                "{message}"
            );
            continue;
        }
        let expected = Expected::read(&case);
        let mut model = CpuModel::load(&output, &exact(2)).unwrap_or_else(|error| panic!("{case}: {error}"));
        let long = is_long(&model, expected.token_ids.len());
        let difference =
            largest_difference(&logits(&mut model, &expected.token_ids, 17, long), &expected.logits);
        assert!(difference < 1e-3, "{case}: {difference}");
        let reference = source.join("model.gguf");
        if reference.is_file() {
            same_file(&case, &output, &reference);
        }
    }
    assert_eq!(refused, UNSAID);
}

/// Compares tensors, and the metadata that the reference has.
fn same_file(case: &str, own: &Path, reference: &Path) {
    let (own, reference) = (std::fs::read(own).unwrap(), std::fs::read(reference).unwrap());
    let (written, expected) = (Gguf::parse(&own).unwrap(), Gguf::parse(&reference).unwrap());
    let names = |gguf: &Gguf| {
        let mut names: Vec<_> = gguf.tensors.iter().map(|tensor| tensor.name.clone()).collect();
        names.sort();
        names
    };
    assert_eq!(names(&written), names(&expected), "{case}");
    for tensor in &expected.tensors {
        let found = written.tensor(&tensor.name).unwrap();
        assert_eq!(found.shape, tensor.shape, "{case} {}", tensor.name);
        let values = |info: &infer_formats::TensorInfo, file: &[u8]| {
            let format = infer_kernels::Format::from_name(info.tensor_type.name()).unwrap();
            let mut values = vec![0.0; info.elements()];
            infer_kernels::dequantize(format, info.bytes(file).unwrap(), &mut values);
            values
        };
        let (found, tensor_values) = (values(found, &own), values(tensor, &reference));
        let near = found.iter().zip(&tensor_values).all(|(a, b)| (a - b).abs() <= 1e-6 * b.abs());
        let exactly = found == tensor_values || (tensor.name == "rope_freqs.weight" && near);
        assert!(exactly, "{case} {}", tensor.name);
    }
    let skipped = ["general.", "tokenizer.", "GGUF."];
    for (key, value) in
        expected.metadata.iter().filter(|(key, _)| !skipped.iter().any(|own| key.starts_with(own)))
    {
        // Cohere's file says that nothing is scaled, and Phi's how long its training was where nothing is; the converter takes GLM's
        // context from a field that its configuration lacks.
        if !key.contains("rope.scaling.") && key != "chatglm.context_length" {
            assert_eq!(written.metadata.get(key), Some(value), "{case} {key}");
        }
    }
}

#[test]
fn a_folder_says_what_it_holds() {
    let place = tempfile::tempdir().unwrap();
    let (source, output) = (place.path().join("source"), place.path().join("rounded"));
    experts(&source);
    write(&source, &output, Some(rounded("int4"))).unwrap();
    let config: Value = serde_json::from_slice(&std::fs::read(output.join("config.json")).unwrap()).unwrap();
    let own = &config["quantization_config"];
    assert_eq!(own["quant_method"], "compressed-tensors");
    assert_eq!(own["config_groups"]["group_0"]["weights"]["num_bits"], 4);
    assert_eq!(own["ignore"], json!(["lm_head", "model.layers.0.mlp.gate"]));
    assert!(output.join("generation_config.json").is_file());
    let bytes = std::fs::read(output.join("model.safetensors")).unwrap();
    let file = Safetensors::parse(&bytes).unwrap();
    let shape =
        |name: &str| file.tensor(name).map(|tensor| (tensor.tensor_type.name(), tensor.shape.clone()));
    let query = "model.layers.0.self_attn.q_proj.weight";
    assert_eq!(shape(&format!("{query}_packed")), Some(("I32", vec![64, 8])));
    assert_eq!(shape(&format!("{query}_scale")), Some(("F16", vec![64, 2])));
    assert_eq!(shape(&format!("{query}_shape")), Some(("I64", vec![2])));
    assert_eq!(shape(query), None);
    assert_eq!(shape("lm_head.weight"), Some(("BF16", vec![96, 64])));
    assert_eq!(Checkpoint::open(&output, true).unwrap().storage(), "int4");
}
