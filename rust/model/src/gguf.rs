//! GGUF metadata, brought into the form of `config.json`, so that one reader serves both.
//!
//! Keys: the GGUF specification (ggml/docs/gguf.md) and what llama.cpp's converter writes for each architecture.

use std::path::Path;

use infer_formats::{FormatError, Metadata, Value};
use infer_kernels::{Format, dequantize};
use serde_json::{Map, Value as Json, json};

use crate::arch;
use crate::checkpoint::Tensor;
use crate::family::{Arch, Positions, Windows};
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

/// Ids of tokens that end a text, where there are more than GGUF has keys for.
pub const END_TOKENS_KEY: &str = "tokenizer.infer.end_token_ids";

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
    let experts = reader.number("expert_count")?.is_some_and(|count| count > 0.0);
    let arch = arch::by_gguf(name, experts)
        .ok_or_else(|| ModelError::UnknownArchitecture { name: name.to_owned(), known: gguf_names() })?;
    Ok((arch, Config::from_value(Json::Object(reader.fields(arch)?))?))
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
    /// A finite number of any type; lists (one value per layer) count if all values are equal.
    fn number(&self, key: &str) -> Result<Option<f64>, ModelError> {
        let key = format!("{}.{key}", self.prefix);
        let Some(value) = self.metadata.get(&key) else { return Ok(None) };
        let wrong = |found: &str| ModelError::config(&key, found, "one finite number, below 2^63 if whole");
        if let Value::Array(_) = value {
            let list = self.metadata.i32s(&key).ok().flatten().unwrap_or_default();
            return match list.split_first() {
                Some((first, rest)) if rest.iter().all(|item| item == first) => Ok(Some(f64::from(*first))),
                _ => Err(wrong("a list of different values")),
            };
        }
        if let Ok(Some(number)) = self.metadata.i64(&key) {
            return Ok(Some(number as f64));
        }
        // The shortest decimal that is this f32: 1e-5 stays 1e-5 when it is widened.
        let number =
            self.metadata.f32(&key).ok().flatten().and_then(|number| number.to_string().parse().ok());
        number.filter(|number: &f64| number.is_finite()).map(Some).ok_or_else(|| wrong(&self.described(&key)))
    }

    fn text(&self, key: &str) -> Result<Option<&str>, ModelError> {
        let key = format!("{}.{key}", self.prefix);
        self.metadata.str(&key).map_err(|_| self.mistyped(&key, "a string"))
    }

    fn flag(&self, key: &str) -> Result<Option<bool>, ModelError> {
        let key = format!("{}.{key}", self.prefix);
        self.metadata.bool(&key).map_err(|_| self.mistyped(&key, "a bool"))
    }

    /// A token's id. Writers mark an absent token by -1, signed or not.
    fn token_id(&self, key: &str) -> Result<Option<u32>, ModelError> {
        if matches!(self.metadata.u64(key), Ok(Some(id)) if id > u64::from(u32::MAX)) {
            return Ok(None);
        }
        let id = self.metadata.i64(key).map_err(|_| self.mistyped(key, "a token id"))?;
        Ok(id.and_then(|id| u32::try_from(id).ok()))
    }

    /// All tokens that end a text.
    fn ends(&self) -> Result<Vec<u32>, ModelError> {
        let mut ends = Vec::new();
        for name in ["eos", "eot", "eom"] {
            ends.extend(self.token_id(&format!("tokenizer.ggml.{name}_token_id"))?);
        }
        let more = self.metadata.u64s(END_TOKENS_KEY);
        let more = more.map_err(|_| self.mistyped(END_TOKENS_KEY, "an array of token ids"))?;
        ends.extend(more.unwrap_or_default().into_iter().filter_map(|id| u32::try_from(id).ok()));
        Ok(ends)
    }

    fn described(&self, key: &str) -> String {
        self.metadata.described(key).unwrap_or_else(|| "missing".to_owned())
    }

    fn mistyped(&self, key: &str, expected: &str) -> ModelError {
        ModelError::config(key, self.described(key), expected)
    }

    fn fields(&self, arch: &Arch) -> Result<Map<String, Json>, ModelError> {
        let mut fields = Map::new();
        for (field, key) in NUMBERS {
            if let Some(number) = self.number(key)? {
                fields.insert((*field).to_owned(), number_value(number));
            }
        }
        self.sizes(&mut fields)?;
        self.rotation(arch, &mut fields)?;
        self.windows(arch, &mut fields)?;
        self.family(arch, &mut fields)?;
        if self.flag("attention.causal")? == Some(false) {
            let expected = "true: only causal language models are computed";
            return Err(ModelError::config("attention.causal", false, expected));
        }
        fields.insert("eos_token_id".to_owned(), json!(self.ends()?));
        fields.insert("bos_token_id".to_owned(), json!(self.token_id("tokenizer.ggml.bos_token_id")?));
        Ok(fields)
    }

    /// What the tensors say where metadata are silent.
    fn sizes(&self, fields: &mut Map<String, Json>) -> Result<(), ModelError> {
        if let Some(embedding) = (self.tensor)("token_embd.weight")
            && let Some(rows) = embedding.info.shape.first()
        {
            fields.insert("vocab_size".to_owned(), json!(rows));
        }
        let tied = (self.tensor)("output.weight").is_none();
        fields.insert("tie_word_embeddings".to_owned(), json!(tied));
        if let Some(parallel) = self.flag("use_parallel_residual")? {
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
        Ok(())
    }

    fn rotation(&self, arch: &Arch, fields: &mut Map<String, Json>) -> Result<(), ModelError> {
        if let Some(rotated) = self.number("rope.dimension_count")? {
            let fits = rotated >= 2.0 && rotated % 2.0 == 0.0;
            if !fits && arch.positions != Positions::Learned {
                let key = format!("{}.rope.dimension_count", self.prefix);
                return Err(self.mistyped(&key, "an even number of a head's dimensions, at least 2"));
            }
            fields.insert("rotary_dim".to_owned(), number_value(rotated));
        }
        let mut rope = self.scaling()?;
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
            if let Some(factor) = self.number("rope.scaling.attn_factor")? {
                rope.insert("attention_factor".to_owned(), json!(factor));
            }
        }
        if let Some(original) = self.number("rope.scaling.original_context_length")? {
            rope.insert("original_max_position_embeddings".to_owned(), number_value(original));
        }
        if let Some(local) = self.number("rope.freq_base_swa")?.filter(|_| arch.local_theta.is_some()) {
            fields.insert("rope_local_base_freq".to_owned(), json!(local));
        }
        if rope.contains_key("rope_type") {
            fields.insert("rope_parameters".to_owned(), Json::Object(rope));
        }
        Ok(())
    }

    /// The scaling that metadata describe. llama.cpp takes a factor without a type for linear scaling.
    fn scaling(&self) -> Result<Map<String, Json>, ModelError> {
        let mut rope = Map::new();
        let factor = self.number("rope.scaling.factor")?.or(self.number("rope.scale_linear")?);
        let silent =
            if factor.is_some_and(|factor| factor != 0.0 && factor != 1.0) { "linear" } else { "none" };
        let kind = self.text("rope.scaling.type")?.unwrap_or(silent);
        match kind {
            "none" | "longrope" => {}
            "linear" => {
                rope.insert(
                    "factor".to_owned(),
                    json!(factor.filter(|factor| *factor != 0.0).unwrap_or(1.0)),
                );
            }
            "yarn" => {
                for (field, key) in [
                    ("factor", "factor"),
                    ("beta_fast", "yarn_beta_fast"),
                    ("beta_slow", "yarn_beta_slow"),
                    ("attention_factor", "yarn_attn_factor"),
                ] {
                    if let Some(number) = self.number(&format!("rope.scaling.{key}"))? {
                        rope.insert(field.to_owned(), json!(number));
                    }
                }
            }
            other => {
                return Err(ModelError::config("rope.scaling.type", other, "none, linear, yarn or longrope"));
            }
        }
        for (key, neutral) in [("rope.scaling.yarn_log_multiplier", 0.0), ("rope.scaling.alpha", 0.0)] {
            if let Some(number) = self.number(key)?.filter(|number| *number != neutral) {
                return Err(ModelError::config(key, number, "nothing: this release does not compute it"));
            }
        }
        if matches!(kind, "linear" | "yarn") {
            rope.insert("rope_type".to_owned(), json!(kind));
        } else if kind == "longrope" && (self.tensor)("rope_factors_long.weight").is_none() {
            return Err(ModelError::MissingTensor { name: "rope_factors_long.weight".to_owned() });
        }
        Ok(rope)
    }

    /// Which layers have a window. A silent file means none, whatever the family's configuration would mean by silence.
    fn windows(&self, arch: &Arch, fields: &mut Map<String, Json>) -> Result<(), ModelError> {
        let key = format!("{}.attention.sliding_window", self.prefix);
        let window = self.number("attention.sliding_window")?.filter(|window| *window > 0.0);
        if let Some(window) = window.filter(|_| arch.windows == Windows::Never) {
            return Err(ModelError::config(&key, window, "none: this family has no windows"));
        }
        let silent = if arch.gguf == "gemma2" { json!(4096) } else { Json::Null };
        fields.entry("sliding_window").or_insert(silent);
        let pattern = format!("{key}_pattern");
        if let Ok(Some(windowed)) = self.metadata.bools(&pattern) {
            let kind = |windowed: &bool| if *windowed { "sliding_attention" } else { "full_attention" };
            fields.insert("layer_types".to_owned(), windowed.iter().map(kind).collect());
        } else if let Some(each) = self.number("attention.sliding_window_pattern")? {
            fields.insert("sliding_window_pattern".to_owned(), number_value(each));
        }
        Ok(())
    }

    /// Facts which llama.cpp keeps in its code instead of the file.
    fn family(&self, arch: &Arch, fields: &mut Map<String, Json>) -> Result<(), ModelError> {
        let mut set = |field: &str, value: Json| fields.insert(field.to_owned(), value);
        match arch.gguf {
            // The 27B models scale scores by the width per head, all others by the head's own width.
            "gemma2" | "gemma3" => {
                let largest = if arch.gguf == "gemma2" { 46.0 } else { 62.0 };
                let per_head = self.number("embedding_length")?.zip(self.number("attention.head_count")?);
                let per_head = per_head.map(|(hidden, heads)| hidden / heads.max(1.0));
                let own = self.number("attention.key_length")?.or(per_head);
                let whole = self.number("block_count")? == Some(largest);
                if let Some(width) = if whole { per_head } else { own } {
                    set("query_pre_attn_scalar", json!(width));
                }
            }
            "qwen3moe" => {
                set("norm_topk_prob", json!(true));
            }
            _ => {}
        }
        Ok(())
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

fn number_value(number: f64) -> Json {
    if number.fract() == 0.0 && number.abs() < 1e15 { json!(number as i64) } else { json!(number) }
}
