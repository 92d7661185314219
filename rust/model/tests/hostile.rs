//! Wrong checkpoints end in one clear error: never in a panic, and never in numbers.

mod common;

use std::path::Path;

use common::{exact, golden_folder};
use infer_model::{Checkpoint, CpuModel, ModelError};
use serde_json::{Value, json};

/// A copy of the small Llama with one change to its configuration, loaded.
fn with_config(change: impl FnOnce(&mut Value)) -> Result<CpuModel, ModelError> {
    let source = golden_folder().join("llama");
    let folder = tempfile::tempdir().expect("a temporary folder");
    std::fs::copy(source.join("model.safetensors"), folder.path().join("model.safetensors")).expect("copied");
    let mut config: Value =
        serde_json::from_slice(&std::fs::read(source.join("config.json")).expect("readable")).expect("JSON");
    change(&mut config);
    std::fs::write(folder.path().join("config.json"), config.to_string()).expect("written");
    CpuModel::load(folder.path(), &exact(1))
}

#[track_caller]
fn refused(result: Result<CpuModel, ModelError>, parts: &[&str]) {
    match result {
        Ok(_) => panic!("loaded; expected an error naming {parts:?}"),
        Err(error) => {
            let message = error.to_string();
            assert!(parts.iter().all(|part| message.contains(part)), "{message:?} lacks one of {parts:?}");
        }
    }
}

#[test]
fn configurations_that_cannot_be_right_name_the_field() {
    refused(
        with_config(|config| config["architectures"] = json!(["FalconForCausalLM"])),
        &["FalconForCausalLM", "LlamaForCausalLM"],
    );
    refused(
        with_config(|config| config["architectures"] = json!([])),
        &["architectures", "LlamaForCausalLM"],
    );
    refused(with_config(|config| *config = json!([1])), &["JSON object"]);
    for field in
        ["hidden_size", "num_attention_heads", "num_hidden_layers", "vocab_size", "max_position_embeddings"]
    {
        for wrong in
            [json!(0), json!(-1), json!("64"), json!(1.5), json!(1e300), json!(null), json!(u64::MAX)]
        {
            refused(with_config(|config| config[field] = wrong), &[field]);
        }
    }
    for (field, wrong) in [
        ("num_key_value_heads", json!(3)),
        ("head_dim", json!(0)),
        ("head_dim", json!(1u64 << 40)),
        ("rms_norm_eps", json!(-1.0)),
        ("hidden_act", json!("tanhish")),
        ("tie_word_embeddings", json!("yes")),
        ("eos_token_id", json!("</s>")),
    ] {
        refused(with_config(|config| config[field] = wrong), &[field]);
    }
    for field in ["use_bidirectional_attention", "add_cross_attention"] {
        refused(with_config(|config| config[field] = json!(true)), &[field]);
    }
    refused(with_config(|config| config["layer_types"] = json!(["chunked_attention"])), &["layer_types"]);
    let gptq = json!({"quant_method": "gptq", "bits": 4});
    refused(
        with_config(|config| config["quantization_config"] = gptq),
        &["quantization_config", "gptq", "GGUF"],
    );
    for (rope, part) in [
        (json!({"rope_type": "spiral"}), "spiral"),
        (json!({"rope_type": "linear"}), "factor"),
        (json!({"rope_type": "linear", "factor": 0}), "factor"),
        (json!({"rope_type": "llama3", "factor": 8}), "low_freq_factor"),
        (
            json!({"rope_type": "longrope", "factor": 2, "short_factor": [1.0], "long_factor": [1.0]}),
            "short_factor",
        ),
        (json!({"rope_type": "default", "rope_theta": 0.5}), "rope_theta"),
    ] {
        refused(with_config(|config| config["rope_parameters"] = rope), &[part]);
    }
}

/// Of several models, people must see which one is meant.
#[test]
fn what_is_wrong_is_told_with_its_path() {
    let path = |result: Result<CpuModel, ModelError>| match result {
        Err(error @ ModelError::In { .. }) => error.to_string(),
        Err(error) => panic!("{error}"),
        Ok(_) => panic!("loaded"),
    };
    let told = path(with_config(|config| config["hidden_size"] = json!("64")));
    assert!(told.contains("/config.json: model configuration: `hidden_size` is"), "{told}");
    let told = path(with_config(|config| config["architectures"] = json!(["FalconForCausalLM"])));
    assert!(told.contains("/config.json: unknown architecture"), "{told}");
    let told = path(with_config(|config| config["num_hidden_layers"] = json!(40)));
    assert!(told.starts_with(std::env::temp_dir().to_str().expect("UTF-8")), "{told}");
}

#[test]
fn tensors_that_do_not_fit_the_configuration_name_the_tensor() {
    refused(with_config(|config| config["intermediate_size"] = json!(4096)), &["mlp.", "shape"]);
    refused(with_config(|config| config["num_hidden_layers"] = json!(40)), &["model.layers.", "no tensor"]);
    refused(with_config(|config| config["vocab_size"] = json!(1 << 20)), &["shape", "rows"]);
    refused(with_config(|config| config["hidden_size"] = json!(1 << 19)), &["shape"]);
}

/// The configuration and the tensors must tell the same story: nothing is left out, nothing is taken for zero.
#[test]
fn biases_and_norms_that_one_side_does_not_know_are_refused() {
    refused(with_config(|config| config["attention_bias"] = json!(true)), &["q_proj.bias", "no tensor"]);
    refused(with_config(|config| config["mlp_bias"] = json!(true)), &["_proj.bias", "no tensor"]);
    refused(with_config(|config| config["architectures"] = json!(["Qwen2ForCausalLM"])), &["q_proj.bias"]);
    let biased = golden_folder().join("llama_bias");
    let folder = tempfile::tempdir().expect("a temporary folder");
    std::fs::copy(biased.join("model.safetensors"), folder.path().join("model.safetensors")).expect("copied");
    let text = std::fs::read_to_string(biased.join("config.json")).expect("readable");
    let text = text.replace("\"attention_bias\": true", "\"attention_bias\": false");
    std::fs::write(folder.path().join("config.json"), text).expect("written");
    refused(CpuModel::load(folder.path(), &exact(1)), &["self_attn.", "bias", "LlamaForCausalLM"]);
    let extra = golden_folder().join("qwen3");
    std::fs::copy(extra.join("model.safetensors"), folder.path().join("model.safetensors")).expect("copied");
    let text = std::fs::read_to_string(extra.join("config.json")).expect("readable");
    std::fs::write(folder.path().join("config.json"), text.replace("Qwen3ForCausalLM", "LlamaForCausalLM"))
        .expect("written");
    refused(CpuModel::load(folder.path(), &exact(1)), &["k_norm", "LlamaForCausalLM"]);
}

/// GPT-NeoX's fused tensor has rows for every head's keys, whatever `num_key_value_heads` says.
#[test]
fn a_fused_tensor_of_another_layout_is_refused() {
    let source = golden_folder().join("gpt_neox");
    let folder = tempfile::tempdir().expect("a temporary folder");
    std::fs::copy(source.join("model.safetensors"), folder.path().join("model.safetensors")).expect("copied");
    let mut config: Value =
        serde_json::from_slice(&std::fs::read(source.join("config.json")).expect("readable")).expect("JSON");
    config["num_key_value_heads"] = json!(1);
    std::fs::write(folder.path().join("config.json"), config.to_string()).expect("written");
    refused(CpuModel::load(folder.path(), &exact(1)), &["num_key_value_heads"]);
}

#[test]
fn folders_that_are_no_models_say_what_is_missing() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let open = |path: &Path| CpuModel::load(path, &exact(1));
    refused(open(&folder.path().join("absent")), &["absent", "cannot read"]);
    refused(open(folder.path()), &["neither config.json nor a .gguf"]);
    let config = golden_folder().join("llama/config.json");
    std::fs::copy(&config, folder.path().join("config.json")).expect("copied");
    refused(open(folder.path()), &["no .safetensors"]);
    std::fs::write(folder.path().join("pytorch_model.bin"), b"x").expect("written");
    refused(open(folder.path()), &["pickles"]);
    refused(open(&config), &[".gguf"]);
    let gguf = golden_folder().join("llama/model.q4_0.gguf");
    std::fs::copy(&gguf, folder.path().join("model.gguf")).expect("copied");
    assert!(open(folder.path()).is_ok(), "a GGUF file beside its configuration is the model");
}

#[cfg(unix)]
#[test]
fn what_is_neither_file_nor_folder_is_told() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let socket = folder.path().join("x.gguf");
    let _bound = std::os::unix::net::UnixListener::bind(&socket).expect("bound");
    for path in [Path::new("/dev/null"), &socket] {
        refused(CpuModel::load(path, &exact(1)), &["is not a model", "neither a regular file nor a folder"]);
    }
}

/// Two shards with one tensor: only one of the two could be meant.
#[test]
fn a_tensor_in_two_files_is_refused() {
    let source = golden_folder().join("llama");
    let folder = tempfile::tempdir().expect("a temporary folder");
    std::fs::copy(source.join("config.json"), folder.path().join("config.json")).expect("copied");
    for shard in ["a.safetensors", "b.safetensors"] {
        std::fs::copy(source.join("model.safetensors"), folder.path().join(shard)).expect("copied");
    }
    let index = json!({"metadata": {}, "weight_map": {"x": "a.safetensors", "y": "b.safetensors"}});
    let path = folder.path().join("model.safetensors.index.json");
    std::fs::write(path, index.to_string()).expect("written");
    refused(CpuModel::load(folder.path(), &exact(1)), &["b.safetensors", "another file", "more than once"]);
}

/// A message repeats the beginning of what a file says, not all of it.
#[test]
fn messages_stay_short_whatever_the_file_holds() {
    let long = "x".repeat(1 << 20);
    for key in ["architectures", "hidden_act", "hidden_size"] {
        let value = if key == "architectures" { json!([long]) } else { json!(long) };
        let error = with_config(|config| config[key] = value).err().expect("refused").to_string();
        assert!(error.len() < 2000, "{key}: {} bytes", error.len());
    }
}

/// Every truncation and many single-bit flips of a real file: an error, or (a flip in weights) a model.
#[test]
fn damaged_files_never_panic() {
    let source = golden_folder().join("llama");
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join("model.gguf");
    let whole = std::fs::read(source.join("model.q4_0.gguf")).expect("readable");
    let header = whole.len().min(6000);
    for length in (0..header).step_by(61).chain([whole.len() - 1]) {
        std::fs::write(&path, &whole[..length]).expect("written");
        for mmap in [true, false] {
            assert!(Checkpoint::open(&path, mmap).is_err(), "{length} bytes of {}", whole.len());
        }
    }
    for position in (0..header).step_by(7) {
        let mut damaged = whole.clone();
        damaged[position] ^= 1 << (position % 8);
        std::fs::write(&path, &damaged).expect("written");
        let _ = CpuModel::load(&path, &exact(1)); // either is right; a panic is not
    }
}
