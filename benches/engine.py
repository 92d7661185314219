"""What the engine saves: a shared prefix, pages from the disk, tokens that were guessed, waiting for others' prompts.

    python benches/engine.py [--model FILE] [--draft FILE] [--threads 2] [--rounds 5]

prefix: time to the first token of a 2,000-token prompt, cold, and when all but its last tokens were computed before.
restore: the same for a prompt whose keys and values lie in `kv_offload_dir`, in an engine that has just been started.
ngram, draft_model: tokens per second with `speculative_config` over without, on texts that repeat themselves and on stories.
stall: the longest that a running completion waits for a token while a prompt of as many tokens comes in, with `step_time_target`
and without.

Each figure is a ratio of the better of `--rounds` runs of either side, taken in turn; what is compared is checked to be equal,
token for token. Kept in `benches/results/engine-*.json`.
"""

from __future__ import annotations

import argparse
import itertools
import os
import random
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from record import RESULTS, origin, save

from infer import LLM, RequestOutput, SamplingParams

ONE = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)


def _timed(llm: LLM, prompt: Any, params: SamplingParams) -> tuple[float, RequestOutput]:
    start = time.perf_counter()
    output = llm.generate(prompt, params, use_tqdm=False)[0]
    return time.perf_counter() - start, output


def _prompt(dice: random.Random, count: int, vocabulary: int) -> list[int]:
    return [dice.randrange(4, vocabulary) for _ in range(count)]


def prefix(arguments: argparse.Namespace, tokens: int) -> dict[str, Any]:
    """A shared prefix, cold and warm."""
    cold, warm = [], []
    with LLM(arguments.model, threads=arguments.threads) as llm, LLM(arguments.model, threads=arguments.threads) as other:
        dice = random.Random(3)
        for _ in range(arguments.rounds):
            prompt = _prompt(dice, tokens, llm.info.vocabulary_size)
            endings = [_prompt(dice, 16, llm.info.vocabulary_size) for _ in range(2)]
            cold.append(_timed(llm, prompt + endings[0], ONE)[0])
            seconds, found = _timed(llm, prompt + endings[1], ONE)
            warm.append(seconds)
            expected = _timed(other, prompt + endings[1], ONE)[1]
            assert found.outputs[0].token_ids == expected.outputs[0].token_ids
    return {"prompt_tokens": tokens + 16, "cold_seconds": cold, "warm_seconds": warm, "ratio": min(cold) / min(warm)}


def restore(arguments: argparse.Namespace, tokens: int) -> dict[str, Any]:
    """A prompt whose pages a process before left on the disk."""
    cold, warm, shares = [], [], []
    dice = random.Random(4)
    for _ in range(arguments.rounds):
        with tempfile.TemporaryDirectory() as folder:
            options: dict[str, Any] = {"threads": arguments.threads, "kv_offload_dir": Path(folder) / "pages"}
            with LLM(arguments.model, **options) as llm:
                prompt = _prompt(dice, tokens, llm.info.vocabulary_size)
                seconds, expected = _timed(llm, prompt, ONE)
                cold.append(seconds)
            with LLM(arguments.model, **options) as llm:
                seconds, found = _timed(llm, prompt, ONE)
                warm.append(seconds)
                shares.append(llm.metrics()["cached_tokens"] / tokens)
            assert found.outputs[0].token_ids == expected.outputs[0].token_ids
    return {
        "prompt_tokens": tokens,
        "recompute_seconds": cold,
        "restore_seconds": warm,
        "restored_share": min(shares),
        "ratio": min(cold) / min(warm),
    }


TEXTS = {
    "copying": [
        "one two three four five six seven eight nine ten " * 8,
        "The wolf said: little pig, little pig, let me come in. The pig said: no, no, by the hair of my chin. " * 5,
    ],
    "stories": [
        "Once upon a time there was a king who had three daughters, and",
        "The wind blew over the hill and the little boy",
        "There was once a fisherman who lived with his wife",
        "In the middle of the wood stood a house, and in it",
    ],
}


COUNTERS = ("drafted_tokens", "accepted_tokens", "generated_tokens", "decode_steps")


def speculation(arguments: argparse.Namespace, config: dict[str, Any], temperature: float) -> dict[str, Any]:
    """Guessing, beside plain decoding."""
    params = SamplingParams(max_tokens=128, temperature=temperature, seed=5, ignore_eos=True)
    found = {}
    with (
        LLM(arguments.model, threads=arguments.threads) as plain,
        LLM(arguments.model, threads=arguments.threads, speculative_config=config) as guessing,
    ):
        for name, texts in TEXTS.items():
            best = {"plain": 0.0, "guessing": 0.0}
            before = guessing.metrics()
            for text in texts:
                times: dict[str, list[float]] = {"plain": [], "guessing": []}
                for _ in range(arguments.rounds):
                    seconds, expected = _timed(plain, text, params)
                    times["plain"].append(seconds)
                    seconds, output = _timed(guessing, text, params)
                    times["guessing"].append(seconds)
                    assert output.outputs[0].token_ids == expected.outputs[0].token_ids
                for side, seconds in times.items():
                    best[side] += min(seconds)
            counts = {field: guessing.metrics()[field] - before[field] for field in COUNTERS}
            per_step = counts["generated_tokens"] / counts["decode_steps"]
            found[name] = {"seconds": best, "ratio": best["plain"] / best["guessing"], "tokens_per_step": per_step, **counts}
    return {"config": {key: str(value) for key, value in config.items()}, "temperature": temperature, **found}


def stall(arguments: argparse.Namespace, tokens: int) -> dict[str, Any]:
    """A prompt that comes in beside a running completion."""
    found: dict[str, Any] = {}
    for name, target in (("with", 0.1), ("without", None)):
        gaps, firsts = [], []
        with LLM(arguments.model, threads=arguments.threads, step_time_target=target) as llm:
            dice = random.Random(6)
            _timed(llm, _prompt(dice, tokens // 2, llm.info.vocabulary_size), ONE)
            for _ in range(arguments.rounds):
                stream = llm.stream([5, 6, 7], SamplingParams(max_tokens=1000, ignore_eos=True))
                prompt = _prompt(dice, tokens, llm.info.vocabulary_size)
                next(stream)
                with ThreadPoolExecutor(1) as pool:
                    waiting = pool.submit(_timed, llm, prompt, ONE)
                    times = [time.perf_counter()]
                    while not waiting.done():
                        next(stream)
                        times.append(time.perf_counter())
                stream.close()
                gaps.append(max(late - soon for soon, late in itertools.pairwise(times)))
                firsts.append(waiting.result()[0])
        found[name] = {"longest_gap": min(gaps), "time_to_first_token": min(firsts)}
    return {"prompt_tokens": tokens, **found, "ratio": found["without"]["longest_gap"] / found["with"]["longest_gap"]}


def main() -> None:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser(description="What prefix cache, disk and speculation save.")
    parser.add_argument("--model", default=None, help="as for LLM; the bundled model unless said")
    parser.add_argument("--draft", default=None, help="a draft model for it; the bundled model brings its own")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--tokens", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="*", default=["prefix", "restore", "ngram", "draft_model", "stall"])
    arguments = parser.parse_args()
    result: dict[str, Any] = {}
    if "prefix" in arguments.only:
        result["prefix"] = prefix(arguments, arguments.tokens)
    if "restore" in arguments.only:
        result["restore"] = restore(arguments, arguments.tokens)
    for method, more in (("ngram", {}), ("draft_model", {"model": arguments.draft})):
        if method in arguments.only and (method == "ngram" or arguments.draft or arguments.model is None):
            drafts = 2 if method == "draft_model" else 4  # what LLM takes unless told otherwise
            config = {"method": method, "num_speculative_tokens": drafts, **more}
            result[method] = [speculation(arguments, config, temperature) for temperature in (0.0, 0.8)]
    if "stall" in arguments.only:
        result["stall"] = stall(arguments, arguments.tokens)
    name = Path(arguments.model).stem if arguments.model else "tinylm"
    path = save(RESULTS, f"engine-{name}", {**result, **origin()})
    for part_name, one in result.items():
        for part in one if isinstance(one, list) else [one]:
            ratios = {key: part[key]["ratio"] for key in TEXTS if key in part} or {"": part["ratio"]}
            note = f" at temperature {part['temperature']}" if "temperature" in part else ""
            print(f"{part_name}{note}: " + ", ".join(f"{key} {ratio:.2f}x".strip() for key, ratio in ratios.items()))
    print(path)


if __name__ == "__main__":
    main()
