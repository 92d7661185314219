//! Every architecture we run: one row each, said as a difference from [`LLAMA`].
//!
//! A row holds what is fixed for a family; what varies between its checkpoints is read from the configuration by
//! `spec.rs`. Adding a family made of known steps is one row here and one golden case.

use infer_kernels::{Activation, NormKind, RopeStyle};

use crate::names::{self, Names};

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
    /// One over the square root of the field's value.
    InverseSqrt(&'static str),
}

const HALF: Positions = Positions::Rope(RopeStyle::Half);
const INTERLEAVED: Positions = Positions::Rope(RopeStyle::Interleaved);

/// Llama 1, 2 and 3, and all that copied it: the row from which the others differ.
pub const LLAMA: Arch = Arch {
    hf: &["LlamaForCausalLM", "LLaMAForCausalLM"],
    gguf: "llama",
    gguf_permuted: true,
    norm: NormKind::Rms,
    norm_unit_offset: false,
    pre_norm: true,
    post_norm: false,
    parallel: Parallel::No,
    qk_norm: QkNorm::None,
    positions: HALF,
    rotary_fraction: 1.0,
    rope_theta: 10_000.0,
    windows: Windows::Never,
    rotated: Rotated::All,
    gated: true,
    activation: Activation::Silu,
    activation_fixed: false,
    embedding_scale: Scale::Default,
    residual_scale: Scale::Default,
    attention_scale: Scale::Default,
    logit_scale: Scale::Default,
    tied: false,
    transposed: false,
    qkv_per_head: false,
    experts: None,
    names: &names::LLAMA,
};

const QWEN2: Arch = Arch {
    hf: &["Qwen2ForCausalLM"],
    gguf: "qwen2",
    gguf_permuted: false,
    windows: Windows::FromLayerIfFlag,
    ..LLAMA
};

const QWEN3: Arch = Arch { hf: &["Qwen3ForCausalLM"], gguf: "qwen3", qk_norm: QkNorm::PerHead, ..QWEN2 };

const GEMMA: Arch = Arch {
    hf: &["GemmaForCausalLM"],
    gguf: "gemma",
    gguf_permuted: false,
    norm_unit_offset: true,
    activation: Activation::GeluTanh,
    activation_fixed: true,
    embedding_scale: Scale::SqrtHidden,
    tied: true,
    ..LLAMA
};

const GEMMA2: Arch = Arch {
    hf: &["Gemma2ForCausalLM"],
    gguf: "gemma2",
    post_norm: true,
    attention_scale: Scale::InverseSqrt("query_pre_attn_scalar"),
    windows: Windows::AllButEach(2),
    names: &names::GEMMA2,
    ..GEMMA
};

const GLM: Arch = Arch {
    hf: &["GlmForCausalLM"],
    gguf: "chatglm",
    gguf_permuted: false,
    positions: INTERLEAVED,
    rotary_fraction: 0.5,
    names: &names::FUSED,
    ..LLAMA
};

const GPT_NEOX: Arch = Arch {
    hf: &["GPTNeoXForCausalLM"],
    gguf: "gptneox",
    gguf_permuted: false,
    norm: NormKind::Layer,
    parallel: Parallel::FlagTwoNorms(true),
    rotary_fraction: 0.25,
    gated: false,
    activation: Activation::GeluErf,
    qkv_per_head: true,
    names: &names::GPT_NEOX,
    ..LLAMA
};

const QWEN2_MOE: Arch = Arch {
    hf: &["Qwen2MoeForCausalLM"],
    gguf: "qwen2moe",
    experts: Some(ExpertsRow { width_field: "moe_intermediate_size", renormalise: false, shared: true }),
    ..QWEN2
};

/// All rows.
pub const ARCHITECTURES: &[Arch] = &[
    LLAMA,
    Arch { hf: &["MistralForCausalLM"], windows: Windows::All, ..LLAMA },
    Arch {
        hf: &["MixtralForCausalLM"],
        windows: Windows::All,
        rope_theta: 1_000_000.0,
        experts: Some(ExpertsRow { width_field: "intermediate_size", renormalise: true, shared: false }),
        names: &names::MIXTRAL,
        ..LLAMA
    },
    QWEN2,
    QWEN3,
    QWEN2_MOE,
    Arch {
        hf: &["Qwen3MoeForCausalLM"],
        gguf: "qwen3moe",
        qk_norm: QkNorm::PerHead,
        windows: Windows::AllIfFlag,
        experts: Some(ExpertsRow { width_field: "moe_intermediate_size", renormalise: false, shared: false }),
        ..QWEN2
    },
    Arch {
        hf: &["Phi3ForCausalLM"],
        gguf: "phi3",
        gguf_permuted: false,
        windows: Windows::All,
        names: &names::FUSED,
        ..LLAMA
    },
    GEMMA,
    GEMMA2,
    Arch {
        hf: &["Gemma3ForCausalLM"],
        gguf: "gemma3",
        qk_norm: QkNorm::PerHead,
        windows: Windows::AllButEach(6),
        rope_theta: 1_000_000.0,
        ..GEMMA2
    },
    Arch {
        hf: &["Olmo2ForCausalLM"],
        gguf: "olmo2",
        gguf_permuted: false,
        pre_norm: false,
        post_norm: true,
        qk_norm: QkNorm::Full,
        names: &names::OLMO2,
        ..LLAMA
    },
    Arch {
        hf: &["GraniteForCausalLM"],
        gguf: "granite",
        embedding_scale: Scale::Field("embedding_multiplier"),
        residual_scale: Scale::Field("residual_multiplier"),
        attention_scale: Scale::Field("attention_multiplier"),
        logit_scale: Scale::Inverse("logits_scaling"),
        ..LLAMA
    },
    Arch {
        hf: &["SmolLM3ForCausalLM"],
        gguf: "smollm3",
        rope_theta: 2_000_000.0,
        windows: Windows::AllIfFlag,
        rotated: Rotated::Marked,
        tied: true,
        ..LLAMA
    },
    Arch {
        hf: &["StableLmForCausalLM"],
        gguf: "stablelm",
        gguf_permuted: false,
        norm: NormKind::Layer,
        parallel: Parallel::FlagOneNorm(false),
        qk_norm: QkNorm::LayerPerHeadIfFlag,
        rotary_fraction: 0.25,
        names: &names::STABLELM,
        ..LLAMA
    },
    Arch {
        hf: &["Starcoder2ForCausalLM"],
        gguf: "starcoder2",
        gguf_permuted: false,
        norm: NormKind::Layer,
        windows: Windows::All,
        gated: false,
        activation: Activation::GeluTanh,
        tied: true,
        names: &names::STARCODER2,
        ..LLAMA
    },
    Arch {
        hf: &["Cohere2ForCausalLM"],
        gguf: "cohere2",
        gguf_permuted: false,
        norm: NormKind::Layer,
        parallel: Parallel::Always,
        positions: INTERLEAVED,
        windows: Windows::AllButEach(4),
        rotated: Rotated::Windowed,
        logit_scale: Scale::Field("logit_scale"),
        tied: true,
        ..LLAMA
    },
    GLM,
    Arch { hf: &["Glm4ForCausalLM"], gguf: "glm4", post_norm: true, names: &names::GLM4, ..GLM },
    Arch {
        hf: &["GPT2LMHeadModel"],
        gguf: "gpt2",
        gguf_permuted: false,
        norm: NormKind::Layer,
        positions: Positions::Learned,
        gated: false,
        activation: Activation::GeluTanh,
        tied: true,
        transposed: true,
        names: &names::GPT2,
        ..LLAMA
    },
    GPT_NEOX,
];

/// Finds the row of a class name of `config.json`.
pub fn by_hf(name: &str) -> Option<&'static Arch> {
    ARCHITECTURES.iter().find(|arch| arch.hf.contains(&name))
}

/// Finds the row of a GGUF `general.architecture`; several families share "llama" and differ by having experts.
pub fn by_gguf(name: &str, experts: bool) -> Option<&'static Arch> {
    ARCHITECTURES.iter().find(|arch| arch.gguf == name && arch.experts.is_some() == experts)
}

/// Names of all architectures, comma separated, for messages.
pub fn known() -> String {
    ARCHITECTURES.iter().map(|arch| arch.hf[0]).collect::<Vec<_>>().join(", ")
}
