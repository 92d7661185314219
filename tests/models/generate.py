"""Write the golden cases: tiny random checkpoints and what Hugging Face transformers computes from them.

    python tests/models/generate.py [case ...]

Each ``golden/<case>/`` receives ``config.json`` and ``model.safetensors`` exactly as ``save_pretrained`` writes them, and
``expected.safetensors`` with

========================= ======= ===========================================================================
``token_ids``             int64   (tokens,) one text
``logits``                float32 (tokens, vocabulary) after every token of that text, teacher-forced
``prompt_tokens``         int64   (1,) how many of ``token_ids`` greedy decoding starts from
``greedy``                int64   (generated,) the continuation
========================= ======= ===========================================================================

The reference runs in float32 from the stored (mostly bfloat16) weights, with eager attention. Every greedy step leads the
runner-up by more than ``MARGIN``, never yields the end-of-sequence token, and every tensor and every listed configuration
field changes the logits; seeds are tried in order until all of that holds, so the same files come out of every run with
the same versions of torch and transformers. A case's folder is emptied first: run ``generate_gguf.py`` afterwards.

Two ropes depend on the length of the text, and the reference follows what a batch-invariant engine can promise:

* *dynamic NTK*: a token at position p is rotated for a text of p + 1 tokens, and cached keys keep the rotation they were
  written with. That is what transformers computes when it is fed one token at a time through a KV cache, and what
  ``token_by_token`` does; its one-pass forward (all tokens rotated for the final length) gives other numbers.
* *longrope*: all tokens use the long factors once the text is longer than the original maximum. Greedy decoding therefore
  recomputes the whole text at every step (no cache), so a text that crosses the limit is computed anew.
"""

from __future__ import annotations

import argparse
import collections
import json
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from golden_case import Case
from golden_cases import CASES
from safetensors.torch import load_file, save_file

GOLDEN = Path(__file__).parent / "golden"
MARGIN = 1e-2  # between the best and the second-best logit of every greedy step
SENSITIVITY = 2e-2  # least change of some logit when a tensor or a listed field changes
SEEDS = 400
TENSORS_THAT_CANCEL = ("k_proj.bias",)  # softmax ignores a constant added to every score; see check_tensors


def random_weights(model: torch.nn.Module, seed: int) -> None:
    """Fill `model` so that no part of it is near identity, zero or saturation.

    Parameters
    ----------
    model : torch.nn.Module
        A causal language model; changed in place.
    seed : int
        Seed of the generator (NumPy's PCG64, whose stream is fixed for good, unlike torch's).
    """
    generator = np.random.Generator(np.random.PCG64(seed))
    gemma = "Gemma" in type(model).__name__
    norm_centre = 0.4 if gemma else 1.0  # Gemma multiplies by 1 + weight
    for name, parameter in model.named_parameters():
        values = generator.standard_normal(tuple(parameter.shape)).astype(np.float32)
        if name.endswith("bias"):
            values *= 0.3
        elif parameter.ndim == 1:
            values = norm_centre + 0.25 * values
        elif "embed" in name or "wte" in name or "wpe" in name:
            # a tied head on a loud embedding would only repeat the last token; Gemma multiplies by sqrt(hidden)
            values *= 0.12 if gemma else 0.3
        else:
            fan_in = parameter.shape[0] if "GPT2" in type(model).__name__ else parameter.shape[-1]
            values *= (1.8 if any(key in name for key in ("q_proj", "k_proj", "qkv", "query", "gate.")) else 1.4) / np.sqrt(
                fan_in
            )
        with torch.no_grad():
            parameter.copy_(torch.from_numpy(values))


def token_logits(model: Any, token_ids: list[int], token_by_token: bool) -> torch.Tensor:
    """Logits (tokens, vocabulary) after every token of one text, float32."""
    text = torch.tensor([token_ids])
    with torch.no_grad():
        if not token_by_token:
            return model(text, use_cache=False).logits[0]
        cache = transformers.DynamicCache()
        steps = [model(text[:, i : i + 1], past_key_values=cache, use_cache=True).logits[0] for i in range(len(token_ids))]
    return torch.cat(steps)


def greedy(model: Any, prompt: list[int], count: int, token_by_token: bool, forbidden: int) -> list[int] | None:
    """`count` greedy tokens after `prompt`, or None where a step is too close or yields `forbidden`."""
    text = list(prompt)
    for _ in range(count):
        best = token_logits(model, text, token_by_token)[-1].topk(2)
        if float(best.values[0] - best.values[1]) <= MARGIN or int(best.indices[0]) == forbidden:
            return None
        text.append(int(best.indices[0]))
    return text[len(prompt) :]


def configuration(case: Case, changes: dict[str, Any] | None = None) -> Any:
    """The transformers configuration of `case`, with some fields changed."""
    model_class = getattr(transformers, case.model)
    config_class = model_class.config_class
    if case.model == "Gemma3ForCausalLM":
        config_class = transformers.Gemma3TextConfig
    # copied deeply: configurations fill in the dictionaries that they are given
    return config_class(**json.loads(json.dumps({**case.config, **(changes or {})})))


def save_checkpoint(case: Case, folder: Path, seed: int) -> None:
    """Write config.json and the weights of `case` into `folder`."""
    model = getattr(transformers, case.model)(configuration(case))
    random_weights(model, seed)
    stored = model.to(getattr(torch, case.dtype))
    size = sum(tensor.numel() * tensor.element_size() for tensor in stored.state_dict().values())
    shard_size = size // case.shards + 8192 if case.shards > 1 else size + 1
    stored.save_pretrained(folder, max_shard_size=shard_size)
    (folder / "generation_config.json").unlink(missing_ok=True)
    if case.published_names:
        use_published_names(folder / "model.safetensors")


def use_published_names(path: Path) -> None:
    """Rename GPT-2's tensors as the checkpoints on the hub have them, and add their causal masks."""
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in load_file(path).items()}
    layers = sum(name.endswith("attn.c_attn.weight") for name in tensors)
    for layer in range(layers):
        tensors[f"h.{layer}.attn.bias"] = torch.ones(1, 1, 64, 64, dtype=torch.bfloat16).tril()
    save_file(tensors, path, metadata={"format": "pt"})


def load_reference(case: Case, folder: Path, config: Any = None) -> Any:
    """The float32 reference model of a saved checkpoint, with another configuration if one is given."""
    options = {"config": config} if config is not None else {}
    model = getattr(transformers, case.model).from_pretrained(folder, dtype=torch.float32, attn_implementation="eager", **options)
    return model.eval()


def difference(first: torch.Tensor, second: torch.Tensor) -> float:
    """Largest absolute difference of two logit arrays."""
    return float((first - second).abs().max())


def insensitive(case: Case, folder: Path, model: Any, token_ids: list[int], logits: torch.Tensor) -> Iterator[str]:
    """Names of tensors and configuration fields of `case` that do not move the logits."""
    for name, parameter in model.named_parameters():
        kept = parameter.detach().clone()
        with torch.no_grad():
            parameter.copy_(kept.flip(0) if kept.shape[0] > 1 else -kept)
        changed = difference(token_logits(model, token_ids, case.token_by_token), logits)
        with torch.no_grad():
            parameter.copy_(kept)
        # a key bias adds nearly the same score everywhere when positions are not rotated
        if changed < (1e-4 if name.endswith(TENSORS_THAT_CANCEL) else SENSITIVITY):
            yield f"{name} ({changed:.1e})"
    for name, changes in case.ablations.items():
        other = load_reference(case, folder, configuration(case, changes))
        changed = difference(token_logits(other, token_ids, case.token_by_token), logits)
        if changed < SENSITIVITY:
            yield f"{name} ({changed:.1e})"


def write_old_config(case: Case, folder: Path, token_ids: list[int], logits: torch.Tensor) -> None:
    """Write config.v4.json, and check that transformers reads the same model from it."""
    if case.old_config is None:
        return
    settings = json.loads((folder / "config.json").read_text())
    settings["torch_dtype"] = settings.pop("dtype")
    settings["transformers_version"] = "4.40.0"
    for key, value in case.old_config.items():
        settings.pop(key, None)
        if value is not None or key == "rope_scaling":
            settings[key] = value
    text = json.dumps(settings, indent=2, sort_keys=True) + "\n"
    (folder / "config.v4.json").write_text(text)
    with tempfile.TemporaryDirectory() as scratch:
        shutil.copy(folder / "model.safetensors", scratch)
        (Path(scratch) / "config.json").write_text(text)
        other = load_reference(case, Path(scratch))
    changed = difference(token_logits(other, token_ids, case.token_by_token), logits)
    if changed != 0.0:
        raise SystemExit(f"{case.name}: config.v4.json gives other logits, by {changed:.1e}")


def attempt(case: Case, folder: Path, seed: int) -> str | None:
    """Write `case` from one seed; a reason where the seed will not do."""
    save_checkpoint(case, folder, seed)
    model = load_reference(case, folder)
    vocabulary = model.config.vocab_size
    generator = np.random.Generator(np.random.PCG64([seed, 1]))
    token_ids = [int(token) for token in generator.integers(0, vocabulary, case.tokens)]
    prompt = token_ids[: case.prompt_tokens]
    continuation = greedy(model, prompt, case.generated, case.token_by_token, model.config.eos_token_id)
    if continuation is None:
        return "a greedy step is too close, or ends the text"
    if len(set(continuation)) < 6:
        return "greedy decoding repeats itself"
    logits = token_logits(model, token_ids, case.token_by_token)
    same = list(insensitive(case, folder, model, token_ids, logits))
    if same:
        return "no effect: " + ", ".join(same)
    write_old_config(case, folder, token_ids, logits)
    expected = {
        "token_ids": torch.tensor(token_ids),
        "logits": logits.contiguous(),
        "prompt_tokens": torch.tensor([case.prompt_tokens]),
        "greedy": torch.tensor(continuation),
    }
    save_file(expected, folder / "expected.safetensors")
    return None


def generate(case: Case) -> None:
    """Write the folder of `case`, from the first seed that meets every condition."""
    folder = GOLDEN / case.name
    folder.mkdir(parents=True, exist_ok=True)
    first_seed = zlib.crc32(case.name.encode()) % 1_000_000
    reasons: collections.Counter[str] = collections.Counter()
    for number in range(SEEDS):
        for old in folder.iterdir():
            old.unlink()
        reason = attempt(case, folder, first_seed + number)
        if reason is None:
            size = sum(path.stat().st_size for path in folder.iterdir())
            print(f"{case.name:26} seed {first_seed + number} after {number + 1}, {size / 1024:.0f} KiB", flush=True)
            return
        reasons[reason] += 1
    raise SystemExit(f"{case.name}: no seed of {SEEDS} will do: {reasons.most_common(4)}")


def main() -> None:
    """Generate the cases named on the command line, or all of them."""
    parser = argparse.ArgumentParser(description="Write the golden cases.")
    parser.add_argument("cases", nargs="*", help="names from golden_cases.py; all of them by default")
    chosen = parser.parse_args().cases
    unknown = set(chosen) - {case.name for case in CASES}
    if unknown:
        parser.error(f"no such case: {', '.join(sorted(unknown))}")
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    for case in CASES:
        if not chosen or case.name in chosen:
            generate(case)


if __name__ == "__main__":
    main()
