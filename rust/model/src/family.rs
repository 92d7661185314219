//! What a row of `arch.rs` can say about a family of models.

use infer_kernels::{Activation, NormKind, RopeStyle};

use crate::names::Names;

/// What is fixed for a family of models.
#[derive(Debug, Clone, Copy)]
pub struct Arch {
    /// Class names in `architectures` of `config.json`; the first names the family.
    pub hf: &'static [&'static str],
    /// `general.architecture` in GGUF files that llama.cpp writes for this family.
    pub gguf: &'static str,
    /// llama.cpp's converter reorders the rows of Q and K for interleaved rotation; undone at load.
    pub gguf_permuted: bool,
    /// Kind of every norm but those of queries and keys.
    pub norm: NormKind,
    /// The checkpoint stores `w - 1` (Gemma). GGUF files have it folded already.
    pub norm_unit_offset: bool,
    /// A norm before attention and before the feed-forward network.
    pub pre_norm: bool,
    /// A norm on the output of attention and of the feed-forward network, before the residual addition.
    pub post_norm: bool,
    /// When attention and feed-forward read the same residual.
    pub parallel: Parallel,
    /// Norms of queries and keys.
    pub qk_norm: QkNorm,
    /// How positions enter.
    pub positions: Positions,
    /// Fraction of each head that is rotated, where the configuration is silent.
    pub rotary_fraction: f32,
    /// Rope base where the configuration is silent.
    pub rope_theta: f32,
    /// Which layers see a window only, where `layer_types` is absent.
    pub windows: Windows,
    /// Which layers rotate.
    pub rotated: Rotated,
    /// `act(gate) * up` instead of `act(up)`.
    pub gated: bool,
    /// The activation where the configuration is silent.
    pub activation: Activation,
    /// `hidden_act` is wrong in old checkpoints of this family and is ignored.
    pub activation_fixed: bool,
    /// Scale of embeddings.
    pub embedding_scale: Scale,
    /// Scale of each branch before it is added to the residual.
    pub residual_scale: Scale,
    /// Scale of attention scores.
    pub attention_scale: Scale,
    /// Scale of logits.
    pub logit_scale: Scale,
    /// Epsilon of norms where the configuration is silent.
    pub epsilon: f32,
    /// Window where the configuration has no `sliding_window` at all (null means none).
    pub window: Option<usize>,
    /// Rope base of layers with a window, where it is one of its own.
    pub local_theta: Option<f32>,
    /// Cap of attention scores where the configuration is silent (null means none).
    pub attention_softcap: Option<f32>,
    /// Cap of logits where the configuration is silent (null means none).
    pub logit_softcap: Option<f32>,
    /// Biases of queries, keys and values, in safetensors checkpoints.
    pub qkv_bias: Bias,
    /// Bias of attention's output.
    pub output_bias: Bias,
    /// Biases of feed-forward networks.
    pub mlp_bias: Bias,
    /// Norms have a bias.
    pub norm_bias: bool,
    /// The head shares the embedding where the configuration is silent.
    pub tied: bool,
    /// Linear weights are stored (inputs, outputs), as GPT-2's `Conv1D` does.
    pub transposed: bool,
    /// Rows of a fused QKV tensor are grouped per head (GPT-NeoX) instead of Q, K, V. GGUF files have it undone.
    pub qkv_per_head: bool,
    /// Experts instead of one feed-forward network.
    pub experts: Option<ExpertsRow>,
    /// Tensor names in safetensors files.
    pub names: &'static Names,
}

/// What is fixed about a family's experts.
#[derive(Debug, Clone, Copy)]
pub struct ExpertsRow {
    /// Field with the width of one expert.
    pub width_field: &'static str,
    /// Weights of the chosen experts are divided by their sum, where the configuration is silent.
    pub renormalise: bool,
    /// There is a shared expert behind a sigmoid gate.
    pub shared: bool,
}

/// Blocks where attention and feed-forward both read the block's input.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Parallel {
    /// Never.
    No,
    /// Always, with one norm for both.
    Always,
    /// If `use_parallel_residual` says so (the value here where it is silent); one norm for both.
    FlagOneNorm(bool),
    /// If `use_parallel_residual` says so; a norm each.
    FlagTwoNorms(bool),
}

/// Norms of queries and keys before rotation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum QkNorm {
    /// None.
    None,
    /// Root mean square over each head, one weight for all heads.
    PerHead,
    /// Root mean square over the whole row.
    Full,
    /// LayerNorm over each head with its own weight, if the configuration's `qk_layernorm` is set.
    LayerPerHeadIfFlag,
}

/// How positions enter the model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Positions {
    /// Rotation of queries and keys.
    Rope(RopeStyle),
    /// A learned vector per position, added to the embedding.
    Learned,
}

/// Whether products have a bias. A checkpoint that says otherwise than its configuration is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bias {
    /// None.
    Never,
    /// All.
    Always,
    /// As the field says (the value here where it is silent).
    Flag(&'static str, bool),
}

/// Which layers attend within a window, where `layer_types` is absent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Windows {
    /// None of them.
    Never,
    /// All of them, if `sliding_window` is a number.
    All,
    /// If `use_sliding_window` is set: layers from `max_window_layers` on.
    FromLayerIfFlag,
    /// If `use_sliding_window` is set: all.
    AllIfFlag,
    /// If `use_sliding_window` is set: those that `layer_types` names, which must then be there.
    StatedIfFlag,
    /// All but each n-th (`sliding_window_pattern` overrides n).
    AllButEach(usize),
}

/// Which layers rotate queries and keys.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rotated {
    /// All.
    All,
    /// Those with a window (Cohere2).
    Windowed,
    /// Those marked in `no_rope_layers`, else all but each `no_rope_layer_interval`-th (SmolLM3).
    Marked,
}

/// Where a scale comes from.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Scale {
    /// The usual: 1, or `head_dim ** -0.5` for attention.
    Default,
    /// Square root of the hidden size.
    SqrtHidden,
    /// The field's value (1 where silent).
    Field(&'static str),
    /// One over the field's value.
    Inverse(&'static str),
    /// One over the square root of the field's value, or of the value here where it is silent.
    InverseSqrt(&'static str, f32),
    /// The field's value, or the one here where it is silent.
    FieldOr(&'static str, f32),
}
