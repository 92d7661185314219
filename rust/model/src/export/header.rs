//! What a GGUF file says about a model beside its tensors: the reverse of `gguf.rs`.

use infer_formats::Value;
use infer_kernels::NormKind;

use crate::checkpoint::Checkpoint;
use crate::family::{Parallel, Scale};
use crate::rope::RopeScaling;
use crate::spec::{FeedForward, LayerSpec};
use crate::{ModelError, ModelSpec};

/// Keys and values.
pub(super) type Entries = Vec<(String, Value)>;

/// Families whose file may tell a sliding window.
const WINDOWED: &[&str] = &["gemma2", "gemma3", "cohere2", "phi3"];

/// The metadata of a model but for its tokenizer.
pub(super) fn header(checkpoint: &Checkpoint) -> Result<Entries, ModelError> {
    let spec = &checkpoint.spec;
    let config = checkpoint.config()?;
    let mut header = Header { prefix: spec.arch.gguf, entries: Vec::new() };
    header.entries.push(("general.architecture".to_owned(), Value::String(spec.arch.gguf.to_owned())));
    header.entries.push(("general.type".to_owned(), Value::String("model".to_owned())));
    if let Some(name) = checkpoint.path().file_name() {
        header.entries.push(("general.name".to_owned(), Value::String(name.to_string_lossy().into_owned())));
    }
    let positions = config.size(&["max_position_embeddings", "n_positions", "n_ctx"], 1 << 30)?;
    header.count("block_count", spec.layers.len());
    header.count("context_length", positions);
    header.count("embedding_length", spec.hidden);
    header.count("attention.head_count", spec.heads);
    header.count("attention.head_count_kv", spec.kv_heads);
    header.count("attention.key_length", spec.head_dim);
    header.count("attention.value_length", spec.head_dim);
    header.count("vocab_size", spec.vocabulary);
    let epsilon = match spec.arch.norm {
        NormKind::Rms => "attention.layer_norm_rms_epsilon",
        NormKind::Layer => "attention.layer_norm_epsilon",
    };
    header.number(epsilon, f64::from(spec.epsilon));
    header.feed_forward(spec, config.count(&["intermediate_size"], 1 << 30)?);
    header.rotation(spec);
    header.scales(spec, &config)?;
    Ok(header.entries)
}

struct Header {
    prefix: &'static str,
    entries: Entries,
}

impl Header {
    fn add(&mut self, key: &str, value: Value) {
        self.entries.push((format!("{}.{key}", self.prefix), value));
    }

    fn count(&mut self, key: &str, value: usize) {
        self.add(key, Value::U32(u32::try_from(value).unwrap_or(u32::MAX)));
    }

    fn number(&mut self, key: &str, value: f64) {
        self.add(key, Value::F32(value as f32));
    }

    fn feed_forward(&mut self, spec: &ModelSpec, dense: Option<usize>) {
        let is_expert = |layer: &&LayerSpec| matches!(layer.feed_forward, FeedForward::Experts { .. });
        let Some(layer) = spec.layers.iter().find(is_expert).or(spec.layers.first()) else { return };
        match layer.feed_forward {
            FeedForward::Dense { width } => self.count("feed_forward_length", width),
            FeedForward::Experts { count, used, width, shared_width, .. } => {
                self.count("feed_forward_length", dense.unwrap_or(width));
                self.count("expert_count", count);
                self.count("expert_used_count", used);
                if spec.arch.experts.is_some_and(|experts| experts.width_field != "intermediate_size") {
                    self.count("expert_feed_forward_length", width);
                }
                if let Some(width) = shared_width {
                    self.count("expert_shared_feed_forward_length", width);
                }
            }
        }
    }

    fn rotation(&mut self, spec: &ModelSpec) {
        let Some(rope) = spec.ropes.first() else { return };
        self.number("rope.freq_base", rope.theta);
        self.count("rope.dimension_count", rope.rotary_dim);
        if let Some(local) = spec.ropes.get(1) {
            self.number("rope.freq_base_swa", local.theta);
        }
        let kind = |kind: &str| Value::String(kind.to_owned());
        match rope.scaling {
            RopeScaling::Linear { factor } => {
                self.add("rope.scaling.type", kind("linear"));
                self.number("rope.scaling.factor", factor);
            }
            RopeScaling::Yarn { factor, beta_fast, beta_slow, original, .. } => {
                self.add("rope.scaling.type", kind("yarn"));
                self.number("rope.scaling.factor", factor);
                self.count("rope.scaling.original_context_length", original as usize);
                self.number("rope.scaling.yarn_beta_fast", beta_fast);
                self.number("rope.scaling.yarn_beta_slow", beta_slow);
                self.number("rope.scaling.yarn_attn_factor", rope.attention_factor);
            }
            RopeScaling::Long { original, .. } => {
                self.number("rope.scaling.attn_factor", rope.attention_factor);
                self.count("rope.scaling.original_context_length", original);
            }
            RopeScaling::None | RopeScaling::Llama3 { .. } => {}
            RopeScaling::Dynamic { .. } | RopeScaling::Factors { .. } => {} // `difference` finds out
        }
    }

    fn scales(&mut self, spec: &ModelSpec, config: &crate::Config) -> Result<(), ModelError> {
        let window = spec.layers.iter().find_map(|layer| layer.window);
        if WINDOWED.contains(&self.prefix) && (window.is_some() || self.prefix == "phi3") {
            self.count("attention.sliding_window", window.unwrap_or(0));
        }
        for (key, cap) in [
            ("attn_logit_softcapping", spec.attention_softcap),
            ("final_logit_softcapping", spec.logit_softcap),
        ] {
            cap.iter().for_each(|cap| self.number(key, f64::from(*cap)));
        }
        for (key, scale, value) in [
            ("attention.scale", spec.arch.attention_scale, spec.attention_scale),
            ("embedding_scale", spec.arch.embedding_scale, spec.embedding_scale),
            ("residual_scale", spec.arch.residual_scale, spec.residual_scale),
            ("logit_scale", spec.arch.logit_scale, spec.logit_scale),
        ] {
            match scale {
                Scale::Field(_) | Scale::FieldOr(..) => self.number(key, f64::from(value)),
                Scale::Inverse(field) => self.number(key, config.positive(&[field])?.unwrap_or(1.0)),
                Scale::Default | Scale::SqrtHidden | Scale::InverseSqrt(..) => {}
            }
        }
        if matches!(spec.arch.parallel, Parallel::FlagOneNorm(_) | Parallel::FlagTwoNorms(_)) {
            self.add("use_parallel_residual", Value::Bool(spec.parallel));
        }
        Ok(())
    }
}
