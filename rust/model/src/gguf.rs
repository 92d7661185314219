//! GGUF metadata, brought into the form of `config.json`, so that one reader serves both.
//!
//! Keys: the GGUF specification (ggml/docs/gguf.md) and what llama.cpp's converter writes for each architecture.

use std::path::Path;

use infer_formats::{FormatError, Metadata};
use infer_kernels::{Format, dequantize};
use serde_json::{Map, Value, json};

use crate::arch::{self, Arch};
use crate::checkpoint::Tensor;
use crate::{Config, ModelError};

/// (field of `config.json`, key below the architecture's prefix) of numbers that carry over as they are.
const NUMBERS: &[(&str, &str)] = &[
    ("num_hidden_layers", "block_count"),
    ("hidden_size", "embedding_length"),
    ("num_attention_heads", "attention.head_count"),
    ("num_key_value_heads", "attention.head_count_kv"),
    ("head_dim", "attention.key_length"),
    ("intermediate_size", "feed_forward_length"),
    ("max_position_embeddings", "context_length"),
    ("vocab_size", "vocab_size"),
    ("rms_norm_eps", "attention.layer_norm_rms_epsilon"),
    ("layer_norm_eps", "attention.layer_norm_epsilon"),
    ("rope_theta", "rope.freq_base"),
    ("sliding_window", "attention.sliding_window"),
    ("attn_logit_softcapping", "attn_logit_softcapping"),
    ("final_logit_softcapping", "final_logit_softcapping"),
    ("attention_multiplier", "attention.scale"),
    ("embedding_multiplier", "embedding_scale"),
    ("residual_multiplier", "residual_scale"),
    ("logits_scaling", "logit_scale"),
    ("logit_scale", "logit_scale"),
    ("num_experts", "expert_count"),
    ("num_experts_per_tok", "expert_used_count"),
    ("moe_intermediate_size", "expert_feed_forward_length"),
    ("shared_expert_intermediate_size", "expert_shared_feed_forward_length"),
];

/// Looks a tensor up by name.
type FindTensor<'a, 't> = &'a dyn Fn(&str) -> Option<Tensor<'t>>;

/// The row and the configuration of a GGUF model.
pub fn config(
    metadata: &Metadata,
    tensor: FindTensor<'_, '_>,
    path: &Path,
) -> Result<(&'static Arch, Config), ModelError> {
    let bad = |source: FormatError| ModelError::Format { path: path.to_owned(), source: Box::new(source) };
    let name = metadata.str("general.architecture").map_err(bad)?.unwrap_or("(none)");
    let reader = Reader { metadata, tensor, prefix: name };
    let experts = reader.number("expert_count").is_some_and(|count| count > 0.0);
    let arch = arch::by_gguf(name, experts)
        .ok_or_else(|| ModelError::UnknownArchitecture { name: name.to_owned(), known: gguf_names() })?;
    Ok((arch, Config::from_value(Value::Object(reader.fields(arch)?))?))
}

fn gguf_names() -> String {
    let mut names: Vec<_> = arch::ARCHITECTURES.iter().map(|arch| arch.gguf).collect();
    names.sort_unstable();
    names.dedup();
    names.join(", ")
}

struct Reader<'a, 't> {
    metadata: &'a Metadata,
    tensor: FindTensor<'a, 't>,
    prefix: &'a str,
}

impl Reader<'_, '_> {
    /// A number of any type; lists (one value per layer) count if all values are equal.
    fn number(&self, key: &str) -> Option<f64> {
        let key = format!("{}.{key}", self.prefix);
        if let Ok(Some(number)) = self.metadata.i64(&key) {
            return Some(number as f64);
        }
        if let Ok(Some(number)) = self.metadata.f32(&key) {
            // The shortest decimal that is this f32: 1e-5 stays 1e-5 when it is widened.
            return number.to_string().parse().ok();
        }
        let list = self.metadata.i32s(&key).ok()??;
        let first = *list.first()?;
        list.iter().all(|item| *item == first).then_some(f64::from(first))
    }

    fn text(&self, key: &str) -> Option<&str> {
        self.metadata.str(&format!("{}.{key}", self.prefix)).ok()?
    }

    fn fields(&self, arch: &Arch) -> Result<Map<String, Value>, ModelError> {
        let mut fields = Map::new();
        for (field, key) in NUMBERS {
            if let Some(number) = self.number(key) {
                fields.insert((*field).to_owned(), number_value(number));
            }
        }
        self.sizes(&mut fields);
        self.rotation(arch, &mut fields)?;
        self.family(arch, &mut fields);
        let id = |key: &str| self.metadata.u64(&format!("tokenizer.ggml.{key}_token_id")).ok().flatten();
        let ends: Vec<u64> = ["eos", "eot", "eom"].into_iter().filter_map(id).collect();
        fields.insert("eos_token_id".to_owned(), json!(ends));
        fields.insert("bos_token_id".to_owned(), json!(id("bos")));
        Ok(fields)
    }

    /// What the tensors say where metadata are silent.
    fn sizes(&self, fields: &mut Map<String, Value>) {
        if let Some(embedding) = (self.tensor)("token_embd.weight")
            && let Some(rows) = embedding.info.shape.first()
        {
            fields.insert("vocab_size".to_owned(), json!(rows));
        }
        let tied = (self.tensor)("output.weight").is_none();
        fields.insert("tie_word_embeddings".to_owned(), json!(tied));
        if let Some(parallel) =
            self.metadata.bool(&format!("{}.use_parallel_residual", self.prefix)).ok().flatten()
        {
            fields.insert("use_parallel_residual".to_owned(), json!(parallel));
        }
        let rows = |name: &str| (self.tensor)(name).and_then(|found| found.info.shape.first().copied());
        if let Some(width) = rows("blk.0.ffn_gate_shexp.weight") {
            fields.entry("shared_expert_intermediate_size").or_insert(json!(width));
        }
        let expert =
            (self.tensor)("blk.0.ffn_gate_exps.weight").and_then(|found| found.info.shape.get(1).copied());
        if let Some(width) = expert {
            fields.insert("moe_intermediate_size".to_owned(), json!(width));
        }
        fields.insert("qk_layernorm".to_owned(), json!((self.tensor)("blk.0.attn_q_norm.weight").is_some()));
    }

    fn rotation(&self, arch: &Arch, fields: &mut Map<String, Value>) -> Result<(), ModelError> {
        let size = |name: &str| fields.get(name).and_then(Value::as_f64);
        let head_dim =
            size("head_dim").or(size("hidden_size").zip(size("num_attention_heads")).map(|(h, n)| h / n));
        let rotated = self.number("rope.dimension_count");
        if let Some((head_dim, rotated)) = head_dim.zip(rotated) {
            fields.insert("partial_rotary_factor".to_owned(), json!(rotated / head_dim.max(1.0)));
        }
        let mut rope = Map::new();
        let original = self.number("rope.scaling.original_context_length");
        match self.text("rope.scaling.type").unwrap_or("none") {
            "linear" => {
                rope.insert("rope_type".to_owned(), json!("linear"));
                rope.insert("factor".to_owned(), json!(self.number("rope.scaling.factor").unwrap_or(1.0)));
            }
            "yarn" => {
                rope.insert("rope_type".to_owned(), json!("yarn"));
                for (field, key) in [
                    ("factor", "factor"),
                    ("beta_fast", "yarn_beta_fast"),
                    ("beta_slow", "yarn_beta_slow"),
                    ("attention_factor", "yarn_attn_factor"),
                ] {
                    if let Some(number) = self.number(&format!("rope.scaling.{key}")) {
                        rope.insert(field.to_owned(), json!(number));
                    }
                }
            }
            _ => {}
        }
        if let Some(factors) = self.factors("rope_freqs.weight")? {
            rope.insert("rope_type".to_owned(), json!("frequency_factors"));
            rope.insert("factors".to_owned(), json!(factors));
        }
        if let Some((long, short)) =
            self.factors("rope_factors_long.weight")?.zip(self.factors("rope_factors_short.weight")?)
        {
            rope.insert("rope_type".to_owned(), json!("longrope"));
            rope.insert("long_factor".to_owned(), json!(long));
            rope.insert("short_factor".to_owned(), json!(short));
            if let Some(factor) = self.number("rope.scaling.attn_factor") {
                rope.insert("attention_factor".to_owned(), json!(factor));
            }
        }
        if let Some(original) = original {
            rope.insert("original_max_position_embeddings".to_owned(), number_value(original));
        }
        if arch.gguf == "gemma3" && self.number("attention.sliding_window").is_some() {
            let local = self.number("rope.freq_base_swa").unwrap_or(10_000.0);
            fields.insert("rope_local_base_freq".to_owned(), json!(local));
        }
        if rope.contains_key("rope_type") {
            fields.insert("rope_parameters".to_owned(), Value::Object(rope));
        }
        Ok(())
    }

    /// Facts which llama.cpp keeps in its code instead of the file.
    fn family(&self, arch: &Arch, fields: &mut Map<String, Value>) {
        let mut set = |field: &str, value: Value| fields.insert(field.to_owned(), value);
        match arch.gguf {
            // The 27B models scale scores by the width per head, all others by the head's own width.
            "gemma2" | "gemma3" => {
                let layers = self.number("block_count");
                let per_head = self.number("embedding_length").zip(self.number("attention.head_count"));
                let largest = if arch.gguf == "gemma2" { 46.0 } else { 62.0 };
                if let Some((hidden, heads)) = per_head.filter(|_| layers == Some(largest)) {
                    set("query_pre_attn_scalar", json!(hidden / heads));
                }
                if arch.gguf == "gemma2" && self.number("attention.sliding_window").is_none() {
                    set("sliding_window", json!(4096));
                }
            }
            "qwen3moe" => {
                set("norm_topk_prob", json!(true));
            }
            _ => {}
        }
    }

    fn factors(&self, name: &str) -> Result<Option<Vec<f32>>, ModelError> {
        let Some(found) = (self.tensor)(name) else { return Ok(None) };
        if found.info.tensor_type != infer_formats::TensorType::F32 {
            return Err(ModelError::TensorType {
                name: name.to_owned(),
                found: found.info.tensor_type.name().to_owned(),
                known: "F32".to_owned(),
            });
        }
        let mut values = vec![0.0; found.bytes.len() / 4];
        dequantize(Format::F32, found.bytes, &mut values);
        Ok(Some(values))
    }
}

fn number_value(number: f64) -> Value {
    if number.fract() == 0.0 && number.abs() < 1e15 { json!(number as i64) } else { json!(number) }
}
