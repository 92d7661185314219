//! What tensors are called: one table per way of naming, said as a difference from [`LLAMA`].
//!
//! Names are given without `.weight` and `.bias`; `{}` in `layer` is the layer, in expert names the expert.
//! An empty name means that the family has no such tensor.

/// Names of a family's tensors.
#[derive(Debug, Clone, Copy)]
#[allow(missing_docs)] // the field names are the documentation: they are the roles of `weights.rs`
pub struct Names {
    pub embedding: &'static str,
    pub position: &'static str,
    pub final_norm: &'static str,
    pub head: &'static str,
    pub layer: &'static str,
    pub attention_norm: &'static str,
    pub attention_post_norm: &'static str,
    pub feed_forward_norm: &'static str,
    pub feed_forward_post_norm: &'static str,
    pub query: &'static str,
    pub key: &'static str,
    pub value: &'static str,
    pub fused_qkv: &'static str,
    pub output: &'static str,
    pub query_norm: &'static str,
    pub key_norm: &'static str,
    pub gate: &'static str,
    pub up: &'static str,
    pub fused_gate_up: &'static str,
    pub down: &'static str,
    pub router: &'static str,
    pub expert_gate: &'static str,
    pub expert_up: &'static str,
    pub expert_down: &'static str,
    pub stacked_gate: &'static str,
    pub stacked_up: &'static str,
    pub stacked_down: &'static str,
    pub shared_gate: &'static str,
    pub shared_up: &'static str,
    pub shared_down: &'static str,
    pub shared_router: &'static str,
}

/// The naming of transformers' Llama, which most families kept.
pub const LLAMA: Names = Names {
    embedding: "model.embed_tokens",
    position: "",
    final_norm: "model.norm",
    head: "lm_head",
    layer: "model.layers.{}.",
    attention_norm: "input_layernorm",
    attention_post_norm: "",
    feed_forward_norm: "post_attention_layernorm",
    feed_forward_post_norm: "",
    query: "self_attn.q_proj",
    key: "self_attn.k_proj",
    value: "self_attn.v_proj",
    fused_qkv: "",
    output: "self_attn.o_proj",
    query_norm: "self_attn.q_norm",
    key_norm: "self_attn.k_norm",
    gate: "mlp.gate_proj",
    up: "mlp.up_proj",
    fused_gate_up: "",
    down: "mlp.down_proj",
    router: "mlp.gate",
    expert_gate: "mlp.experts.{}.gate_proj",
    expert_up: "mlp.experts.{}.up_proj",
    expert_down: "mlp.experts.{}.down_proj",
    stacked_gate: "",
    stacked_up: "",
    stacked_down: "",
    shared_gate: "mlp.shared_expert.gate_proj",
    shared_up: "mlp.shared_expert.up_proj",
    shared_down: "mlp.shared_expert.down_proj",
    shared_router: "mlp.shared_expert_gate",
};

/// Phi-3 and GLM: fused projections.
pub const FUSED: Names =
    Names { fused_qkv: "self_attn.qkv_proj", fused_gate_up: "mlp.gate_up_proj", ..LLAMA };

/// GLM-4-0414: fused gate and up, norms on both sides.
pub const GLM4: Names = Names {
    attention_post_norm: "post_self_attn_layernorm",
    feed_forward_post_norm: "post_mlp_layernorm",
    ..FUSED
};

/// Gemma 2 and 3: norms on both sides.
pub const GEMMA2: Names = Names {
    attention_post_norm: "post_attention_layernorm",
    feed_forward_norm: "pre_feedforward_layernorm",
    feed_forward_post_norm: "post_feedforward_layernorm",
    ..LLAMA
};

/// OLMo 2: norms after the branches only.
pub const OLMO2: Names = Names {
    attention_norm: "",
    attention_post_norm: "post_attention_layernorm",
    feed_forward_norm: "",
    feed_forward_post_norm: "post_feedforward_layernorm",
    ..LLAMA
};

/// StarCoder2: an ungated network.
pub const STARCODER2: Names = Names { up: "mlp.c_fc", down: "mlp.c_proj", ..LLAMA };

/// StableLM: the norm of each head is a tensor of its own, `q_layernorm.norms.{head}`.
pub const STABLELM: Names =
    Names { query_norm: "self_attn.q_layernorm", key_norm: "self_attn.k_layernorm", ..LLAMA };

/// Mixtral.
pub const MIXTRAL: Names = Names {
    router: "block_sparse_moe.gate",
    expert_gate: "block_sparse_moe.experts.{}.w1",
    expert_up: "block_sparse_moe.experts.{}.w3",
    expert_down: "block_sparse_moe.experts.{}.w2",
    ..LLAMA
};

/// GPT-2.
pub const GPT2: Names = Names {
    embedding: "transformer.wte",
    position: "transformer.wpe",
    final_norm: "transformer.ln_f",
    layer: "transformer.h.{}.",
    attention_norm: "ln_1",
    feed_forward_norm: "ln_2",
    fused_qkv: "attn.c_attn",
    output: "attn.c_proj",
    up: "mlp.c_fc",
    down: "mlp.c_proj",
    ..LLAMA
};

/// GPT-NeoX (Pythia).
pub const GPT_NEOX: Names = Names {
    embedding: "gpt_neox.embed_in",
    final_norm: "gpt_neox.final_layer_norm",
    head: "embed_out",
    layer: "gpt_neox.layers.{}.",
    fused_qkv: "attention.query_key_value",
    output: "attention.dense",
    up: "mlp.dense_h_to_4h",
    down: "mlp.dense_4h_to_h",
    ..LLAMA
};

/// What llama.cpp writes into GGUF files, for every family.
pub const GGUF: Names = Names {
    embedding: "token_embd",
    position: "position_embd",
    final_norm: "output_norm",
    head: "output",
    layer: "blk.{}.",
    attention_norm: "attn_norm",
    attention_post_norm: "post_attention_norm",
    feed_forward_norm: "ffn_norm",
    feed_forward_post_norm: "post_ffw_norm",
    query: "attn_q",
    key: "attn_k",
    value: "attn_v",
    fused_qkv: "attn_qkv",
    output: "attn_output",
    query_norm: "attn_q_norm",
    key_norm: "attn_k_norm",
    gate: "ffn_gate",
    up: "ffn_up",
    fused_gate_up: "ffn_up",
    down: "ffn_down",
    router: "ffn_gate_inp",
    expert_gate: "ffn_gate.{}",
    expert_up: "ffn_up.{}",
    expert_down: "ffn_down.{}",
    stacked_gate: "ffn_gate_exps",
    stacked_up: "ffn_up_exps",
    stacked_down: "ffn_down_exps",
    shared_gate: "ffn_gate_shexp",
    shared_up: "ffn_up_shexp",
    shared_down: "ffn_down_shexp",
    shared_router: "ffn_gate_inp_shexp",
};
