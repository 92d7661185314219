"""What a golden case is: one tiny random checkpoint, described by its Hugging Face configuration.

A case exists to exercise one thing that a family does differently, and ``ablations`` says which: every listed change of
the configuration must change the logits, or the generator refuses the case. Sizes are small on purpose (the folder is in
the repository) and uneven on purpose (vocabulary 83, intermediate size 40), so that no kernel can rely on round numbers.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

Settings = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One golden case.

    Attributes
    ----------
    name : str
        Folder name under ``golden/``.
    model : str
        Class name in transformers; its ``config_class`` takes ``config``.
    config : dict
        Keyword arguments of the configuration.
    ablations : dict
        Name -> changes to ``config`` that keep every tensor's shape and must change the logits.
    old_config : dict or None
        Keys that turn the saved configuration into its transformers v4 form (``None`` deletes a key), written as
        ``config.v4.json``.
    tokens, prompt_tokens, generated : int
        Length of the teacher-forced text, of its prefix that greedy decoding starts from, and of the continuation.
    dtype : str
        How the checkpoint stores its weights.
    token_by_token : bool
        Compute the reference one token at a time through a KV cache (dynamic NTK rope: see ``generate.py``).
    shards : int
        Number of safetensors files; more than one adds an index.
    published_names : bool
        GPT-2 only: name tensors as the published checkpoints do (no ``transformer.`` prefix, and a causal mask per layer
        that means nothing).
    quantized : tuple of str
        GGUF block formats that ``generate_gguf.py`` writes beside the plain GGUF file.
    """

    name: str
    model: str
    config: Settings
    ablations: dict[str, Settings] = field(default_factory=dict)
    old_config: Settings | None = None
    tokens: int = 44
    prompt_tokens: int = 22
    generated: int = 20
    dtype: str = "bfloat16"
    token_by_token: bool = False
    shards: int = 1
    published_names: bool = False
    quantized: tuple[str, ...] = ()


def common(**changes: Any) -> Settings:
    """Return the sizes that most cases share, with some changed."""
    settings: Settings = {
        "vocab_size": 80,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    settings.update(changes)
    return settings


def rope(rope_type: str, theta: float = 10000.0, **parameters: Any) -> Settings:
    """Return a ``rope_parameters`` dictionary as transformers 5 spells it."""
    return {"rope_type": rope_type, "rope_theta": theta, **parameters}


DEFAULT_ROPE = {"rope_parameters": rope("default")}
# Scaled ropes use two heads of 16: eight frequencies show more of a ramp than four.
WIDE_HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1}
