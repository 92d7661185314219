//! Models that tests make, and writing them in other forms.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::AtomicBool;

use infer_formats::{SafetensorsWriter, TensorType};
use infer_kernels::Context;
use infer_model::{Checkpoint, ExportOptions, ModelError, Quantization, export};
use serde_json::{Value, json};

/// A number that looks random, the same in every run.
fn noise(index: usize) -> f32 {
    let state = (index as u32).wrapping_mul(2_654_435_761).wrapping_add(12_345);
    let mixed = (state ^ state >> 15).wrapping_mul(0x2c1b_3c6d);
    (mixed >> 8) as f32 / (1 << 23) as f32 - 1.0
}

/// Writes a folder with these tensors in bfloat16.
fn write_folder(folder: &Path, config: &Value, tensors: &BTreeMap<String, Vec<usize>>) {
    std::fs::create_dir_all(folder).unwrap();
    std::fs::write(folder.join("config.json"), config.to_string()).unwrap();
    std::fs::write(folder.join("generation_config.json"), "{\"eos_token_id\": 3}").unwrap();
    let mut writer = SafetensorsWriter::new();
    for (name, shape) in tensors {
        writer.declare(name, TensorType::Bf16, shape).unwrap();
    }
    let mut file = std::fs::File::create(folder.join("model.safetensors")).unwrap();
    let mut seed = 0;
    let bytes = |name: &str| {
        let count: usize = tensors[name].iter().product();
        seed += 1_000_003;
        let spread = if name.contains("norm") { 0.01 } else { 0.12 };
        let base = if name.contains("norm") { 1.0 } else { 0.0 };
        let value =
            |index: usize| base + noise(seed + index) * spread * (1.0 + noise(index * 7 + seed).abs());
        let upper_half = |index: usize| ((value(index).to_bits() >> 16) as u16).to_le_bytes(); // bfloat16, cut off
        Ok::<_, std::io::Error>((0..count).flat_map(upper_half).collect())
    };
    writer.write_with(&mut file, bytes).unwrap();
}

/// A Llama of widths that groups of 128 fit, its head apart from its embedding if `tied` is false.
pub fn llama(folder: &Path, tied: bool) {
    let config = json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 128, "intermediate_size": 256,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 96,
        "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu",
        "tie_word_embeddings": tied, "torch_dtype": "bfloat16", "eos_token_id": 1,
    });
    let mut tensors = BTreeMap::new();
    let mut add = |name: &str, shape: &[usize]| tensors.insert(format!("{name}.weight"), shape.to_vec());
    add("model.embed_tokens", &[96, 128]);
    add("model.norm", &[128]);
    if !tied {
        add("lm_head", &[96, 128]);
    }
    for layer in 0..2 {
        for (name, shape) in [
            ("input_layernorm", &[128][..]),
            ("post_attention_layernorm", &[128]),
            ("self_attn.q_proj", &[128, 128]),
            ("self_attn.k_proj", &[64, 128]),
            ("self_attn.v_proj", &[64, 128]),
            ("self_attn.o_proj", &[128, 128]),
            ("mlp.gate_proj", &[256, 128]),
            ("mlp.up_proj", &[256, 128]),
            ("mlp.down_proj", &[128, 256]),
        ] {
            add(&format!("model.layers.{layer}.{name}"), shape);
        }
    }
    write_folder(folder, &config, &tensors);
}

/// A Qwen3 with experts.
pub fn experts(folder: &Path) {
    let config = json!({
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "hidden_size": 64, "intermediate_size": 96,
        "moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": true, "head_dim": 16,
        "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 96,
        "max_position_embeddings": 128, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "hidden_act": "silu",
        "tie_word_embeddings": false, "eos_token_id": 1, "decoder_sparse_step": 1, "mlp_only_layers": [],
    });
    let mut tensors = BTreeMap::new();
    let mut add = |name: &str, shape: &[usize]| tensors.insert(format!("{name}.weight"), shape.to_vec());
    for (name, shape) in [
        ("model.embed_tokens", &[96, 64][..]),
        ("model.norm", &[64]),
        ("lm_head", &[96, 64]),
        ("model.layers.0.input_layernorm", &[64]),
        ("model.layers.0.post_attention_layernorm", &[64]),
        ("model.layers.0.self_attn.q_norm", &[16]),
        ("model.layers.0.self_attn.k_norm", &[16]),
        ("model.layers.0.self_attn.q_proj", &[64, 64]),
        ("model.layers.0.self_attn.k_proj", &[32, 64]),
        ("model.layers.0.self_attn.v_proj", &[32, 64]),
        ("model.layers.0.self_attn.o_proj", &[64, 64]),
        ("model.layers.0.mlp.gate", &[4, 64]),
    ] {
        add(name, shape);
    }
    for expert in 0..4 {
        add(&format!("model.layers.0.mlp.experts.{expert}.gate_proj"), &[32, 64]);
        add(&format!("model.layers.0.mlp.experts.{expert}.up_proj"), &[32, 64]);
        add(&format!("model.layers.0.mlp.experts.{expert}.down_proj"), &[64, 32]);
    }
    write_folder(folder, &config, &tensors);
}

/// Writes a model in another form.
pub fn write(
    source: &Path,
    output: &Path,
    quantization: Option<&'static Quantization>,
) -> Result<u64, ModelError> {
    let context = Context::new(2).unwrap();
    let stop = AtomicBool::new(false);
    let options = ExportOptions { quantization, metadata: Vec::new(), context: &context, stop: &stop };
    export(&Checkpoint::open(source, true).unwrap(), output, &options)
}

/// A way of rounding.
pub fn rounded(name: &str) -> &'static Quantization {
    Quantization::from_name(name).unwrap()
}
