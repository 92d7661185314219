"""Golden cases of the families with sandwich norms or experts: Gemma, GLM-4 and the mixtures."""

from __future__ import annotations

from golden_case import Case, common, rope

GEMMA3_ROPES = {
    "sliding_attention": rope("default", 100.0),
    "full_attention": rope("linear", 10000.0, factor=4.0),
}
GEMMA3_UNSCALED = {**GEMMA3_ROPES, "full_attention": rope("default", 10000.0)}
GEMMA3_ONE_THETA = {**GEMMA3_ROPES, "sliding_attention": rope("default", 10000.0)}

GEMMA = [
    Case("gemma", "GemmaForCausalLM", common(head_dim=16, intermediate_size=40, num_key_value_heads=1)),
    Case(
        "gemma2",
        "Gemma2ForCausalLM",
        common(
            num_hidden_layers=3,
            intermediate_size=40,
            head_dim=8,
            query_pre_attn_scalar=5,
            sliding_window=9,
            attn_logit_softcapping=2.5,
            final_logit_softcapping=3.0,
        ),
        {
            "scalar": {"query_pre_attn_scalar": 8},
            "window": {"sliding_window": 10},
            "attention cap": {"attn_logit_softcapping": 3.0},
            "logit cap": {"final_logit_softcapping": 3.5},
        },
        {"rope_parameters": None, "rope_theta": 10000.0, "layer_types": None},
    ),
    Case(
        "gemma2_head_scale",
        "Gemma2ForCausalLM",
        common(
            intermediate_size=40,
            head_dim=16,
            query_pre_attn_scalar=16,
            sliding_window=6,
            attn_logit_softcapping=2.5,
            final_logit_softcapping=3.0,
        ),
    ),
    Case(
        "gemma3",
        "Gemma3ForCausalLM",
        common(
            num_hidden_layers=7,
            intermediate_size=24,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            query_pre_attn_scalar=6,
            sliding_window=8,
            rope_parameters=GEMMA3_ROPES,
        ),
        {
            "scalar": {"query_pre_attn_scalar": 8},
            "window": {"sliding_window": 9},
            "scaling": {"rope_parameters": GEMMA3_UNSCALED},
            "local theta": {"rope_parameters": GEMMA3_ONE_THETA},
        },
        {
            "rope_parameters": None,
            "rope_theta": 10000.0,
            "rope_local_base_freq": 100.0,
            "rope_scaling": {"rope_type": "linear", "factor": 4.0},
            "layer_types": None,
            "_sliding_window_pattern": None,
            "sliding_window_pattern": 6,
        },
    ),
    Case(
        "gemma3_head_scale",
        "Gemma3ForCausalLM",
        common(
            num_hidden_layers=6,
            intermediate_size=24,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            query_pre_attn_scalar=8,
            sliding_window=5,
        ),
        {"global theta": {"rope_parameters": {**GEMMA3_ROPES, "sliding_attention": rope("default")}}},
    ),
]

GLM_HALF = {**rope("default"), "partial_rotary_factor": 0.5}
GLM_SETTINGS = common(head_dim=8, rope_parameters=GLM_HALF, attention_bias=True)
GLM_OLD = {"rope_parameters": None, "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
GLM_WHOLE = {"rotary": {"rope_parameters": {**rope("default"), "partial_rotary_factor": 1.0}}}

GLM = [
    # 1e-5 is what llama.cpp writes into every GGUF file of this family
    Case("glm", "GlmForCausalLM", {**GLM_SETTINGS, "rms_norm_eps": 1e-5}, GLM_WHOLE, GLM_OLD),
    Case("glm4", "Glm4ForCausalLM", {**GLM_SETTINGS, "rms_norm_eps": 1.5625e-7}, GLM_WHOLE),
]

QWEN2_MOE = common(
    moe_intermediate_size=16,
    shared_expert_intermediate_size=24,
    num_experts=4,
    num_experts_per_tok=2,
    intermediate_size=40,
)
QWEN3_MOE = common(
    moe_intermediate_size=16,
    num_experts=5,
    num_experts_per_tok=3,
    intermediate_size=40,
    head_dim=8,
)
RAW = {"top-k": {"norm_topk_prob": False}}
NORMALISED = {"top-k": {"norm_topk_prob": True}}

EXPERTS = [
    Case(
        "mixtral",
        "MixtralForCausalLM",
        common(intermediate_size=24, num_local_experts=4, num_experts_per_tok=2),
        {"experts": {"num_experts_per_tok": 3}},
    ),
    Case("qwen2_moe", "Qwen2MoeForCausalLM", {**QWEN2_MOE, "norm_topk_prob": False}, NORMALISED),
    Case(
        "qwen2_moe_mixed",
        "Qwen2MoeForCausalLM",
        {
            **QWEN2_MOE,
            "norm_topk_prob": True,
            "num_hidden_layers": 4,
            "num_experts": 3,
            "moe_intermediate_size": 16,
            "decoder_sparse_step": 2,
            "mlp_only_layers": [3],
        },
        RAW,
    ),
    Case("qwen3_moe", "Qwen3MoeForCausalLM", {**QWEN3_MOE, "norm_topk_prob": True}, RAW),
    Case(
        "qwen3_moe_mixed",
        "Qwen3MoeForCausalLM",
        {**QWEN3_MOE, "norm_topk_prob": False, "mlp_only_layers": [0]},
        NORMALISED,
    ),
]
