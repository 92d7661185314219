"""Golden cases of the Llama family and of the families one step away from it."""

from __future__ import annotations

from typing import Any

from golden_case import DEFAULT_ROPE, WIDE_HEADS, Case, Settings, common, rope

LINEAR = rope("linear", factor=4.0)
LLAMA3 = rope(
    "llama3",
    theta=500000.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=32,
)
YARN = rope("yarn", factor=4.0, original_max_position_embeddings=32)
YARN_OPTIONS = rope(
    "yarn",
    theta=100.0,
    factor=4.0,
    original_max_position_embeddings=32,
    beta_fast=4.0,
    beta_slow=0.5,
    attention_factor=1.3,
)
DYNAMIC = rope("dynamic", factor=4.0)

LLAMA = [
    Case(
        "llama",
        "LlamaForCausalLM",
        common(intermediate_size=64, tie_word_embeddings=False),
        {"theta": {"rope_parameters": rope("default", 500.0)}},
        {"rope_parameters": None, "rope_theta": 10000.0, "rope_scaling": None},
        quantized=("Q8_0", "Q4_0"),
    ),
    Case("llama_tied", "LlamaForCausalLM", common(tie_word_embeddings=True), dtype="float32"),
    Case("llama_bias", "LlamaForCausalLM", common(attention_bias=True, mlp_bias=True)),
    Case("llama_head_dim", "LlamaForCausalLM", common(head_dim=16, intermediate_size=40), dtype="float16"),
    Case("llama_sharded", "LlamaForCausalLM", common(tie_word_embeddings=False), shards=2),
    Case(
        "llama_rope_linear",
        "LlamaForCausalLM",
        common(**WIDE_HEADS, rope_parameters=LINEAR),
        {"default": DEFAULT_ROPE},
        # the oldest spelling of the key is "type"
        {"rope_parameters": None, "rope_theta": 10000.0, "rope_scaling": {"type": "linear", "factor": 4.0}},
    ),
    Case(
        "llama_rope_dynamic",
        "LlamaForCausalLM",
        common(**WIDE_HEADS, max_position_embeddings=24, rope_parameters=DYNAMIC),
        {"default": DEFAULT_ROPE},
        token_by_token=True,
    ),
    Case(
        "llama_rope_yarn",
        "LlamaForCausalLM",
        common(**WIDE_HEADS, rope_parameters=YARN),
        {"default": DEFAULT_ROPE, "linear": {"rope_parameters": LINEAR}},
    ),
    Case(
        "llama_rope_yarn_options",
        "LlamaForCausalLM",
        common(**WIDE_HEADS, rope_parameters=YARN_OPTIONS),
        {
            "betas": {"rope_parameters": {**YARN_OPTIONS, "beta_fast": 32.0, "beta_slow": 1.0}},
            "attention_factor": {"rope_parameters": {**YARN_OPTIONS, "attention_factor": 1.0}},
        },
    ),
    Case(
        "llama_rope_llama3",
        "LlamaForCausalLM",
        common(**WIDE_HEADS, max_position_embeddings=256, rope_parameters=LLAMA3),
        {"default": {"rope_parameters": rope("default", 500000.0)}},
        {
            "rope_parameters": None,
            "rope_theta": 500000.0,
            "rope_scaling": {key: value for key, value in LLAMA3.items() if key != "rope_theta"},
        },
    ),
]

LLAMA_LIKE = [
    Case(
        "mistral",
        "MistralForCausalLM",
        common(sliding_window=7, rms_norm_eps=1e-5),
        {"window": {"sliding_window": 8}},
    ),
    Case(
        "mistral_full",
        "MistralForCausalLM",
        common(sliding_window=None, head_dim=16, rms_norm_eps=1e-5, tie_word_embeddings=True),
    ),
    Case(
        "qwen2",
        "Qwen2ForCausalLM",
        common(vocab_size=83, intermediate_size=64, tie_word_embeddings=True),
        quantized=("Q8_0", "Q4_0"),
    ),
    Case(
        "qwen2_window",
        "Qwen2ForCausalLM",
        common(num_hidden_layers=3, use_sliding_window=True, sliding_window=9, max_window_layers=1),
        {
            "window": {"sliding_window": 10},
            "layers": {"max_window_layers": 2},
        },
        {
            "rope_parameters": None,
            "rope_theta": 10000.0,
            "rope_scaling": None,
            "layer_types": None,
        },
    ),
    Case("qwen3", "Qwen3ForCausalLM", common(head_dim=16, intermediate_size=40, tie_word_embeddings=True)),
    Case("olmo2", "Olmo2ForCausalLM", common(rms_norm_eps=1e-5)),
    Case(
        "granite",
        "GraniteForCausalLM",
        common(
            embedding_multiplier=3.0,
            logits_scaling=0.6,
            residual_multiplier=0.7,
            attention_multiplier=0.25,
            tie_word_embeddings=True,
        ),
        {
            "embedding": {"embedding_multiplier": 1.0},
            "logits": {"logits_scaling": 1.0},
            "residual": {"residual_multiplier": 1.0},
            "attention": {"attention_multiplier": 0.35355339},
        },
    ),
    Case(
        "smollm3",
        "SmolLM3ForCausalLM",
        common(num_hidden_layers=4, intermediate_size=40, no_rope_layer_interval=4),
        {"rope everywhere": {"no_rope_layers": [1, 1, 1, 1]}},
    ),
]

PHI3_FACTORS = {
    "short_factor": [1.0, 1.1, 1.3, 1.5, 1.7, 2.0, 2.2, 2.5],
    "long_factor": [1.2, 1.9, 3.1, 5.0, 7.3, 9.0, 11.0, 14.5],
}


def _longrope(**parameters: Any) -> Settings:
    return rope("longrope", original_max_position_embeddings=32, partial_rotary_factor=1.0, **parameters)


PHI3_SETTINGS = common(
    **WIDE_HEADS,
    max_position_embeddings=128,
    original_max_position_embeddings=32,
    rope_parameters=_longrope(**PHI3_FACTORS),
)
PHI3_SWAPPED = _longrope(short_factor=PHI3_FACTORS["long_factor"], long_factor=PHI3_FACTORS["short_factor"])
PHI3_UNSCALED = _longrope(**PHI3_FACTORS, attention_factor=1.0)
PHI3_ABLATIONS = {"factors": {"rope_parameters": PHI3_SWAPPED}, "attention": {"rope_parameters": PHI3_UNSCALED}}
PHI3_OLD = {
    "rope_parameters": None,
    "rope_theta": 10000.0,
    "rope_scaling": {"type": "longrope", **PHI3_FACTORS},
    "original_max_position_embeddings": 32,
}
PHI3_PARTIAL = {**rope("default"), "partial_rotary_factor": 0.75}

PHI3 = [
    Case("phi3", "Phi3ForCausalLM", common(sliding_window=11), {"window": {"sliding_window": 12}}),
    Case(
        "phi3_partial",
        "Phi3ForCausalLM",
        common(rope_parameters=PHI3_PARTIAL, tie_word_embeddings=True),
        {"partial": DEFAULT_ROPE},
        {
            "rope_parameters": None,
            "rope_theta": 10000.0,
            "rope_scaling": None,
            "partial_rotary_factor": 0.75,
        },
    ),
    Case(
        "phi3_longrope_short",
        "Phi3ForCausalLM",
        PHI3_SETTINGS,
        PHI3_ABLATIONS,
        tokens=32,
        prompt_tokens=14,
        generated=16,
    ),
    # greedy starts below the original length (22 tokens) and ends beyond it (42)
    Case("phi3_longrope_long", "Phi3ForCausalLM", PHI3_SETTINGS, PHI3_ABLATIONS, PHI3_OLD),
]
