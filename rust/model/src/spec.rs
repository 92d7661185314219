//! From a row of `arch.rs` and a checkpoint's configuration to a checked description of one model.

use infer_kernels::{Activation, NormKind};

use crate::arch;
use crate::family::{Arch, Bias, Parallel, Positions, QkNorm, Scale};
use crate::layers;
use crate::rope::{RopeScaling, RopeSpec};
use crate::{Config, ModelError};

/// Everything `program.rs` needs to know about one model. Sizes are checked: no product of two of them overflows.
#[derive(Debug, Clone)]
pub struct ModelSpec {
    /// The family's row.
    pub arch: &'static Arch,
    /// Width of the residual.
    pub hidden: usize,
    /// Tokens in the vocabulary, rows of the head.
    pub vocabulary: usize,
    /// Longest sequence the checkpoint was made for, tokens: what the configuration says, times the factor of a rope that
    /// is stretched at run time (linear, dynamic).
    pub max_positions: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Epsilon of all norms.
    pub epsilon: f32,
    /// Norms of queries and keys, if any.
    pub qk_norm: Option<QkNormSpec>,
    /// Attention and feed-forward read the same residual.
    pub parallel: bool,
    /// ... and the same norm of it.
    pub shared_norm: bool,
    /// Kinds of rotation; layers refer to them by index.
    pub ropes: Vec<RopeSpec>,
    /// One entry per layer.
    pub layers: Vec<LayerSpec>,
    /// Factor on scores before the softmax.
    pub attention_scale: f32,
    /// Scores become `cap * tanh(score / cap)`.
    pub attention_softcap: Option<f32>,
    /// Logits become `cap * tanh(logit / cap)`.
    pub logit_softcap: Option<f32>,
    /// Factor on embeddings.
    pub embedding_scale: f32,
    /// Factor on each branch.
    pub residual_scale: f32,
    /// Factor on logits.
    pub logit_scale: f32,
    /// Activation of feed-forward networks.
    pub activation: Activation,
    /// The head is the embedding.
    pub tied: bool,
    /// Ids that end a text.
    pub eos_token_ids: Vec<u32>,
    /// Id that begins a text.
    pub bos_token_id: Option<u32>,
    /// Which products have a bias, as a safetensors checkpoint's configuration says.
    pub biases: Biases,
}

/// Which products have a bias.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Biases {
    /// Queries, keys and values.
    pub qkv: bool,
    /// Attention's output.
    pub output: bool,
    /// Feed-forward networks.
    pub mlp: bool,
}

/// Norms of queries and keys.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct QkNormSpec {
    /// Kind of norm.
    pub kind: NormKind,
    /// Each head alone (else the whole row).
    pub per_head: bool,
}

/// What differs between layers.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LayerSpec {
    /// Tokens visible, the token itself included; all if absent.
    pub window: Option<usize>,
    /// Index into [`ModelSpec::ropes`]; absent: no rotation.
    pub rope: Option<usize>,
    /// The second half of the layer.
    pub feed_forward: FeedForward,
}

/// The second half of a layer.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum FeedForward {
    /// One network for all tokens.
    Dense {
        /// Inner width.
        width: usize,
    },
    /// A few of many, chosen per token.
    Experts {
        /// How many there are.
        count: usize,
        /// How many a token uses.
        used: usize,
        /// Inner width of each.
        width: usize,
        /// Weights of the chosen are divided by their sum.
        renormalise: bool,
        /// Inner width of the expert that all tokens use, if there is one.
        shared_width: Option<usize>,
    },
}

pub(crate) const MAX_WIDTH: usize = 1 << 20;
pub(crate) const MAX_POSITIONS: usize = 1 << 30;
const MAX_VOCABULARY: usize = 1 << 24;
const MAX_HEADS: usize = 1 << 16;

impl ModelSpec {
    /// Reads the configuration of a safetensors checkpoint. `eos` from `generation_config.json` may be added later.
    ///
    /// # Errors
    /// An unknown architecture, a missing field, or a value that cannot be right.
    pub fn from_config(config: &Config) -> Result<Self, ModelError> {
        let names = config.texts("architectures")?.unwrap_or_default();
        let arch = names.iter().find_map(|name| arch::by_hf(name)).ok_or_else(|| {
            ModelError::UnknownArchitecture {
                name: if names.is_empty() {
                    "(none in `architectures`)".to_owned()
                } else {
                    names.join(", ")
                },
                known: arch::known(),
            }
        })?;
        Self::read(arch, config)
    }

    /// Reads a configuration for a given row.
    pub fn read(arch: &'static Arch, config: &Config) -> Result<Self, ModelError> {
        let hidden = config.size(&["hidden_size", "n_embd"], MAX_WIDTH)?;
        let heads = config.size(&["num_attention_heads", "n_head"], MAX_HEADS)?;
        let kv_heads = config.count(&["num_key_value_heads"], MAX_HEADS)?.unwrap_or(heads);
        if kv_heads == 0 || !heads.is_multiple_of(kv_heads) {
            let expected = format!("a divisor of num_attention_heads ({heads})");
            return Err(ModelError::config("num_key_value_heads", kv_heads, expected));
        }
        let head_dim = match config.count(&["head_dim"], MAX_WIDTH)? {
            Some(head_dim) => head_dim,
            None => hidden / heads,
        };
        if head_dim == 0 || heads * head_dim > MAX_WIDTH || head_dim > 1024 {
            return Err(ModelError::config(
                "head_dim",
                head_dim,
                "a number from 1 to 1024 that fits the heads",
            ));
        }
        let max_positions =
            config.size(&["max_position_embeddings", "n_positions", "n_ctx"], MAX_POSITIONS)?;
        let epsilon_fields: &[&str] = match arch.norm {
            NormKind::Rms => &["rms_norm_eps", "norm_eps"],
            NormKind::Layer => &["layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", "norm_eps"],
        };
        refuse_other_computations(arch, config, kv_heads == heads)?;
        let (parallel, shared_norm) = parallel(arch, config)?;
        let ropes = ropes(arch, config, head_dim, max_positions)?;
        let scales = Scales::read(arch, config, hidden, head_dim)?;
        Ok(Self {
            arch,
            hidden,
            vocabulary: config.size(&["vocab_size"], MAX_VOCABULARY)?,
            max_positions: stretched(max_positions, &ropes),
            heads,
            kv_heads,
            head_dim,
            epsilon: config.positive(epsilon_fields)?.map_or(arch.epsilon, |epsilon| epsilon as f32),
            qk_norm: qk_norm(arch, config)?,
            parallel,
            shared_norm,
            layers: layers::read(arch, config, hidden, ropes.len())?,
            ropes,
            attention_scale: scales.attention,
            attention_softcap: softcap(config, "attn_logit_softcapping", arch.attention_softcap)?,
            logit_softcap: softcap(config, "final_logit_softcapping", arch.logit_softcap)?,
            embedding_scale: scales.embedding,
            residual_scale: scales.residual,
            logit_scale: scales.logit,
            activation: activation(arch, config)?,
            tied: config.flag("tie_word_embeddings")?.unwrap_or(arch.tied),
            eos_token_ids: config.token_ids("eos_token_id")?,
            bos_token_id: config.token_ids("bos_token_id")?.first().copied(),
            biases: Biases {
                qkv: bias(config, arch.qkv_bias)?,
                output: bias(config, arch.output_bias)?,
                mlp: bias(config, arch.mlp_bias)?,
            },
        })
    }

    /// Name of the architecture as transformers has it.
    pub fn architecture(&self) -> &'static str {
        self.arch.hf[0]
    }

    /// The length beyond which a sequence must be computed anew with long-context frequencies, if the model has such.
    pub fn context_switch(&self) -> Option<usize> {
        self.ropes.iter().filter_map(RopeSpec::context_switch).min()
    }
}

/// Fields that change the computation in ways no row has: better refused than ignored.
fn refuse_other_computations(
    arch: &Arch,
    config: &Config,
    every_head_has_keys: bool,
) -> Result<(), ModelError> {
    for field in ["use_bidirectional_attention", "add_cross_attention"] {
        if config.flag(field)? == Some(true) {
            return Err(ModelError::config(field, true, "false: only causal language models are computed"));
        }
    }
    if arch.qkv_per_head && !every_head_has_keys {
        let expected = "as many as num_attention_heads in this family";
        return Err(ModelError::config("num_key_value_heads", "another number", expected));
    }
    Ok(())
}

fn softcap(config: &Config, field: &str, silent: Option<f32>) -> Result<Option<f32>, ModelError> {
    match config.contains(field) {
        true => Ok(config.positive(&[field])?.map(|cap| cap as f32)),
        false => Ok(silent),
    }
}

fn bias(config: &Config, rule: Bias) -> Result<bool, ModelError> {
    match rule {
        Bias::Never => Ok(false),
        Bias::Always => Ok(true),
        Bias::Flag(field, silent) => Ok(config.flag(field)?.unwrap_or(silent)),
    }
}

fn stretched(positions: usize, ropes: &[RopeSpec]) -> usize {
    let factor = |rope: &RopeSpec| match rope.scaling {
        RopeScaling::Linear { factor } | RopeScaling::Dynamic { factor, .. } => factor.max(1.0),
        _ => 1.0,
    };
    let least = ropes.iter().map(factor).reduce(f64::min).unwrap_or(1.0);
    ((positions as f64 * least) as usize).min(MAX_POSITIONS)
}

fn parallel(arch: &Arch, config: &Config) -> Result<(bool, bool), ModelError> {
    let flag = |default| Ok::<_, ModelError>(config.flag("use_parallel_residual")?.unwrap_or(default));
    Ok(match arch.parallel {
        Parallel::No => (false, false),
        Parallel::Always => (true, true),
        Parallel::FlagOneNorm(default) => (flag(default)?, true),
        Parallel::FlagTwoNorms(default) => (flag(default)?, false),
    })
}

fn qk_norm(arch: &Arch, config: &Config) -> Result<Option<QkNormSpec>, ModelError> {
    Ok(match arch.qk_norm {
        QkNorm::None => None,
        QkNorm::PerHead => Some(QkNormSpec { kind: NormKind::Rms, per_head: true }),
        QkNorm::Full => Some(QkNormSpec { kind: NormKind::Rms, per_head: false }),
        QkNorm::LayerPerHeadIfFlag => match config.flag("qk_layernorm")?.unwrap_or(false) {
            true => Some(QkNormSpec { kind: NormKind::Layer, per_head: true }),
            false => None,
        },
    })
}

struct Scales {
    attention: f32,
    embedding: f32,
    residual: f32,
    logit: f32,
}

impl Scales {
    fn read(arch: &Arch, config: &Config, hidden: usize, head_dim: usize) -> Result<Self, ModelError> {
        let field = |name: &str| Ok::<_, ModelError>(config.positive(&[name])?.unwrap_or(1.0));
        let resolve = |scale: Scale, default: f64| {
            Ok::<_, ModelError>(match scale {
                Scale::Default => default,
                Scale::SqrtHidden => (hidden as f64).sqrt(),
                Scale::Field(name) => field(name)?,
                Scale::Inverse(name) => 1.0 / field(name)?,
                Scale::InverseSqrt(name, silent) => {
                    config.positive(&[name])?.unwrap_or(f64::from(silent)).sqrt().recip()
                }
                Scale::FieldOr(name, silent) => config.positive(&[name])?.unwrap_or(f64::from(silent)),
            } as f32)
        };
        let usual = (head_dim as f64).sqrt().recip();
        let attention = match config.flag("scale_attn_weights")? {
            Some(false) => 1.0,
            _ => resolve(arch.attention_scale, usual)?,
        };
        if config.flag("scale_attn_by_inverse_layer_idx")? == Some(true) {
            let field = "scale_attn_by_inverse_layer_idx";
            return Err(ModelError::config(field, true, "false (a scale per layer is not supported)"));
        }
        Ok(Self {
            attention,
            embedding: resolve(arch.embedding_scale, 1.0)?,
            residual: resolve(arch.residual_scale, 1.0)?,
            logit: resolve(arch.logit_scale, 1.0)?,
        })
    }
}

fn activation(arch: &Arch, config: &Config) -> Result<Activation, ModelError> {
    let named = match config.text(&["hidden_activation"])? {
        None if arch.activation_fixed => None,
        None => config.text(&["hidden_act", "activation_function"])?,
        some => some,
    };
    Ok(match named {
        None => arch.activation,
        Some("silu" | "swish") => Activation::Silu,
        Some("gelu") => Activation::GeluErf,
        Some("gelu_new" | "gelu_pytorch_tanh" | "gelu_fast" | "gelu_tanh") => Activation::GeluTanh,
        Some("relu") => Activation::Relu,
        Some("relu2") => Activation::ReluSquared,
        Some(other) => {
            let known = "silu, gelu, gelu_new, gelu_pytorch_tanh, gelu_fast, relu or relu2";
            return Err(ModelError::config("hidden_act", format!("`{other}`"), known));
        }
    })
}

/// Kinds of rotation: the model's, and second the one of layers with a window where it differs (Gemma 3).
fn ropes(
    arch: &Arch,
    config: &Config,
    head_dim: usize,
    max_positions: usize,
) -> Result<Vec<RopeSpec>, ModelError> {
    if arch.positions == Positions::Learned {
        return Ok(Vec::new());
    }
    let outer = config.count(&["original_max_position_embeddings"], MAX_POSITIONS)?;
    let read = |parameters: Option<&Config>, theta: Option<f64>| {
        let inner = |names: &[&str]| match parameters {
            Some(parameters) => parameters.positive(names),
            None => Ok(None),
        };
        let fraction = inner(&["partial_rotary_factor"])?
            .or(config.positive(&["partial_rotary_factor", "rotary_pct", "rope_pct"])?)
            .unwrap_or(f64::from(arch.rotary_fraction));
        let rotary_dim = match config.count(&["rotary_dim"], head_dim)? {
            Some(rotary_dim) => rotary_dim,
            None => (head_dim as f64 * fraction) as usize,
        };
        if rotary_dim == 0 || rotary_dim > head_dim || !rotary_dim.is_multiple_of(2) {
            let expected = format!("a fraction which makes an even number of {head_dim} dimensions");
            return Err(ModelError::config("partial_rotary_factor", fraction, expected));
        }
        let theta = inner(&["rope_theta"])?
            .or(theta)
            .or(config.positive(&["rope_theta", "rotary_emb_base"])?)
            .unwrap_or(f64::from(arch.rope_theta));
        if theta <= 1.0 {
            return Err(ModelError::config("rope_theta", theta, "a number above 1"));
        }
        RopeSpec::read(parameters, theta, rotary_dim, max_positions, outer)
    };
    let parameters = match config.object("rope_parameters")? {
        Some(parameters) => Some(parameters),
        None => config.object("rope_scaling")?,
    };
    if let Some(parameters) = &parameters
        && (parameters.contains("full_attention") || parameters.contains("sliding_attention"))
    {
        let full = read(parameters.object("full_attention")?.as_ref(), None)?;
        let local = arch.local_theta.map(f64::from);
        let sliding = read(parameters.object("sliding_attention")?.as_ref(), local)?;
        return Ok(vec![full, sliding]);
    }
    let global = read(parameters.as_ref(), None)?;
    match config.positive(&["rope_local_base_freq"])?.or(arch.local_theta.map(f64::from)) {
        Some(theta) => Ok(vec![global, read(None, Some(theta))?]),
        None => Ok(vec![global]),
    }
}
