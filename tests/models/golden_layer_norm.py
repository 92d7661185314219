"""Golden cases of the families with LayerNorm: StableLM, StarCoder2, Cohere2, GPT-2 and GPT-NeoX."""

from __future__ import annotations

from golden_case import WIDE_HEADS, Case, common, rope

QUARTER = {**WIDE_HEADS, "rope_parameters": {**rope("default"), "partial_rotary_factor": 0.25}}
NEOX = common(**QUARTER)
NEOX.pop("num_key_value_heads")
NEOX_HALF = {**rope("default"), "partial_rotary_factor": 0.5}
GPT2 = {
    "vocab_size": 83,
    "n_positions": 64,
    "n_ctx": 64,  # not read any more, but published configurations have it and llama.cpp's converter asks for it
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# rotary_pct: as n_ctx above
COHERE2 = common(num_hidden_layers=4, intermediate_size=40, sliding_window=9, logit_scale=0.4, rotary_pct=1.0)

LAYER_NORM_FAMILIES = [
    Case("stablelm", "StableLmForCausalLM", common(**QUARTER, use_qkv_bias=True)),
    Case(
        "stablelm_qk_norm",
        "StableLmForCausalLM",
        common(**QUARTER, qk_layernorm=True, use_parallel_residual=False),
    ),
    Case(
        "stablelm_parallel",
        "StableLmForCausalLM",
        common(**QUARTER, qk_layernorm=True, use_parallel_residual=True),
        {},
        {"rope_parameters": None, "rope_theta": 10000.0, "rope_scaling": None, "partial_rotary_factor": 0.25},
    ),
    Case(
        "starcoder2",
        "Starcoder2ForCausalLM",
        common(sliding_window=10, intermediate_size=64),
        {"window": {"sliding_window": 11}},
    ),
    Case(
        "starcoder2_full",
        "Starcoder2ForCausalLM",
        common(num_key_value_heads=1, intermediate_size=40),
    ),
    Case(
        "cohere2",
        "Cohere2ForCausalLM",
        COHERE2,
        {"window": {"sliding_window": 10}, "scale": {"logit_scale": 0.5}},
        {
            "rope_parameters": None,
            "rope_theta": 10000.0,
            "rope_scaling": None,
            "layer_types": None,
            "sliding_window_pattern": 4,
        },
    ),
    Case("gpt2", "GPT2LMHeadModel", GPT2),
    Case(
        "gpt2_inner",
        "GPT2LMHeadModel",
        {**GPT2, "n_inner": 56, "activation_function": "gelu"},
        published_names=True,
    ),
    Case(
        "gpt_neox",
        "GPTNeoXForCausalLM",
        {**NEOX, "use_parallel_residual": True},
        {"sequential": {"use_parallel_residual": False}, "rotary": {"rope_parameters": NEOX_HALF}},
        {
            "rope_parameters": None,
            "rotary_emb_base": 10000.0,
            "rotary_pct": 0.25,
            "rope_scaling": None,
        },
    ),
    Case("gpt_neox_sequential", "GPTNeoXForCausalLM", {**NEOX, "use_parallel_residual": False}),
]
