//! Every architecture we run: one row each, said as a difference from [`LLAMA`].
//!
//! A row (its fields: `family.rs`) holds what is fixed for a family; what varies between its checkpoints is read from the configuration by
//! `spec.rs`. Adding a family made of known steps is one row here and one golden case.

use infer_kernels::{Activation, NormKind, RopeStyle};

use crate::family::{Arch, Bias, ExpertsRow, Parallel, Positions, QkNorm, Rotated, Scale, Windows};
use crate::names;

const HALF: Positions = Positions::Rope(RopeStyle::Half);
const INTERLEAVED: Positions = Positions::Rope(RopeStyle::Interleaved);

const ATTENTION_BIAS: Bias = Bias::Flag("attention_bias", false);
const USE_BIAS: Bias = Bias::Flag("use_bias", true);

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
    epsilon: 1e-6,
    window: None,
    local_theta: None,
    attention_softcap: None,
    logit_softcap: None,
    qkv_bias: ATTENTION_BIAS,
    output_bias: ATTENTION_BIAS,
    mlp_bias: Bias::Flag("mlp_bias", false),
    norm_bias: false,
    tied: false,
    transposed: false,
    qkv_per_head: false,
    experts: None,
    names: &names::LLAMA,
};

const QWEN2: Arch = Arch {
    hf: &["Qwen2ForCausalLM"],
    qkv_bias: Bias::Always,
    output_bias: Bias::Never,
    mlp_bias: Bias::Never,
    gguf: "qwen2",
    gguf_permuted: false,
    windows: Windows::FromLayerIfFlag,
    ..LLAMA
};

const QWEN3: Arch = Arch {
    hf: &["Qwen3ForCausalLM"],
    gguf: "qwen3",
    qk_norm: QkNorm::PerHead,
    qkv_bias: ATTENTION_BIAS,
    output_bias: ATTENTION_BIAS,
    ..QWEN2
};

const GEMMA: Arch = Arch {
    hf: &["GemmaForCausalLM"],
    mlp_bias: Bias::Never,
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
    window: Some(4096),
    attention_softcap: Some(50.0),
    logit_softcap: Some(30.0),
    gguf: "gemma2",
    post_norm: true,
    attention_scale: Scale::InverseSqrt("query_pre_attn_scalar", 256.0),
    windows: Windows::AllButEach(2),
    names: &names::GEMMA2,
    ..GEMMA
};

const GLM: Arch = Arch {
    hf: &["GlmForCausalLM"],
    epsilon: 1.5625e-7,
    qkv_bias: Bias::Flag("attention_bias", true),
    output_bias: Bias::Never,
    mlp_bias: Bias::Never,
    gguf: "chatglm",
    gguf_permuted: false,
    positions: INTERLEAVED,
    rotary_fraction: 0.5,
    names: &names::FUSED,
    ..LLAMA
};

const GPT_NEOX: Arch = Arch {
    hf: &["GPTNeoXForCausalLM"],
    epsilon: 1e-5,
    qkv_bias: Bias::Flag("attention_bias", true),
    output_bias: Bias::Flag("attention_bias", true),
    mlp_bias: Bias::Always,
    norm_bias: true,
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
    qkv_bias: Bias::Flag("qkv_bias", true),
    windows: Windows::StatedIfFlag,
    gguf: "qwen2moe",
    experts: Some(ExpertsRow { width_field: "moe_intermediate_size", renormalise: false, shared: true }),
    ..QWEN2
};

/// All rows.
pub const ARCHITECTURES: &[Arch] = &[
    LLAMA,
    Arch {
        hf: &["MistralForCausalLM"],
        windows: Windows::All,
        window: Some(4096),
        qkv_bias: Bias::Never,
        output_bias: Bias::Never,
        mlp_bias: Bias::Never,
        ..LLAMA
    },
    Arch {
        hf: &["MixtralForCausalLM"],
        epsilon: 1e-5,
        qkv_bias: Bias::Never,
        output_bias: Bias::Never,
        mlp_bias: Bias::Never,
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
        qkv_bias: ATTENTION_BIAS,
        output_bias: ATTENTION_BIAS,
        gguf: "qwen3moe",
        qk_norm: QkNorm::PerHead,
        windows: Windows::AllIfFlag,
        experts: Some(ExpertsRow { width_field: "moe_intermediate_size", renormalise: false, shared: false }),
        ..QWEN2
    },
    Arch {
        hf: &["Phi3ForCausalLM"],
        epsilon: 1e-5,
        qkv_bias: Bias::Never,
        output_bias: Bias::Never,
        mlp_bias: Bias::Never,
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
        attention_softcap: None,
        logit_softcap: None,
        local_theta: Some(10_000.0),
        gguf: "gemma3",
        qk_norm: QkNorm::PerHead,
        windows: Windows::AllButEach(6),
        rope_theta: 1_000_000.0,
        ..GEMMA2
    },
    Arch {
        hf: &["Olmo2ForCausalLM"],
        epsilon: 1e-5,
        mlp_bias: Bias::Never,
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
        windows: Windows::StatedIfFlag,
        rotated: Rotated::Marked,
        tied: true,
        ..LLAMA
    },
    Arch {
        hf: &["StableLmForCausalLM"],
        epsilon: 1e-5,
        qkv_bias: Bias::Flag("use_qkv_bias", false),
        output_bias: Bias::Never,
        mlp_bias: Bias::Never,
        norm_bias: true,
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
        epsilon: 1e-5,
        qkv_bias: USE_BIAS,
        output_bias: USE_BIAS,
        mlp_bias: USE_BIAS,
        norm_bias: true,
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
        epsilon: 1e-5,
        window: Some(4096),
        mlp_bias: Bias::Never,
        gguf: "cohere2",
        gguf_permuted: false,
        norm: NormKind::Layer,
        parallel: Parallel::Always,
        positions: INTERLEAVED,
        windows: Windows::AllButEach(4),
        rotated: Rotated::Windowed,
        logit_scale: Scale::FieldOr("logit_scale", 0.0625),
        tied: true,
        ..LLAMA
    },
    GLM,
    Arch { hf: &["Glm4ForCausalLM"], gguf: "glm4", post_norm: true, names: &names::GLM4, ..GLM },
    Arch {
        hf: &["GPT2LMHeadModel"],
        epsilon: 1e-5,
        qkv_bias: Bias::Always,
        output_bias: Bias::Always,
        mlp_bias: Bias::Always,
        norm_bias: true,
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
