"""Screened heads: the token is the whole head's, bounds hold, and engines write the same with them and without."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from device import Device, device, rounded
from samples import PROMPTS, choices, kinds, same_choices

from infer import LLM, SamplingParams
from infer.gpu import screen as module
from infer.gpu import weights
from infer.gpu.arrays import Rows
from infer.gpu.executor import GREEDY as GREEDY_KIND
from infer.gpu.executor import Executor
from infer.gpu.operations import ARGMAX_BYTES
from infer.gpu.packing import sizes
from infer.gpu.runner import Runner, Size
from infer.gpu.screen import COUNTED, FOUND_BYTES, MOST_ROWS, ROUGH, Normed, Screen, ScreenOperations

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

pytestmark = pytest.mark.usefixtures("gpu")

EPSILON = 1e-5
GREEDY = SamplingParams(max_tokens=200, temperature=0.0, ignore_eos=True)


def screen_of(gpu: Device, head: np.ndarray) -> Screen:
    """A screen before a head."""
    weight = gpu.weight(head, "bf16")
    needed = (*sizes(*head.shape, ROUGH.packed)[:2], 8 * len(head), MOST_ROWS * FOUND_BYTES)
    values, scales, bounds, found = map(gpu.zeros, needed)
    rough = module.Weight(values, *head.shape, "int8", scales=scales, group=ROUGH.packed.group)
    made = Screen(weight, rough, bounds, found, gpu.blank(MOST_ROWS, head.shape[1], "bf16"))
    gpu.ops.make_screen(made, gpu.zeros(4))
    return made


def dice(seed: int) -> Any:
    return np.random.default_rng(seed)


def head_of(kind: str, rows: int, columns: int) -> np.ndarray:
    """Weights of a head."""
    normal = dice(3).standard_normal((rows, columns), np.float32) * np.float32(0.02)
    if kind == "heavy":
        normal *= np.exp(dice(4).standard_normal((rows, columns), np.float32) * 1.5)
        normal[:, :: max(columns // 7, 1)] *= 30
    elif kind == "near":  # many rows that differ by one rounding of one number
        normal[1:1000] = normal[0]
        normal[np.arange(1, 1000), dice(5).integers(0, columns, 999)] *= np.float32(1.0079)
        normal[5000:6000] = normal[:1000]
    elif kind == "equal":
        normal[:] = normal[0]
    elif kind == "small":
        normal *= np.float32(1e-6)
    return normal


def put(gpu: Device, x: np.ndarray) -> Rows:
    return gpu.rows(x, "bf16", x.shape[1] + 8)


def both(gpu: Device, made: Screen, x: np.ndarray, normed: bool) -> tuple[Any, Any, Any, int]:
    """What the screen chooses and what `argmax` does, all logits, and how many candidates there were."""
    count, (rows, columns) = len(x), (made.head.rows, made.head.columns)
    source, logits, scratch = put(gpu, x), gpu.blank(count, rows, "f32"), gpu.blank(count, columns, "bf16")
    norm = Normed(gpu.vector(1 + 0.1 * dice(6).standard_normal(columns)), EPSILON) if normed else None
    chosen, expected, before = gpu.zeros(4 * count), gpu.zeros(4 * count), counted(gpu, made)
    assert gpu.ops.screens(source, logits, made, norm)
    for _ in range(2):  # the second finds what the first leaves
        gpu.ops.choose_screened(source, logits, made, norm, chosen)
    if norm and count <= 8:
        gpu.ops.norm_linear(source, logits, made.head, norm.weight, EPSILON, scratch)
    else:
        if norm:
            gpu.ops.norm(source, scratch, "rms", EPSILON, norm.weight)
        for first in range(0, count, 16):  # as the streaming product adds
            part = (scratch if norm else source).from_row(first, min(16, count - first))
            gpu.ops.linear(part, logits.from_row(first, part.rows), made.head)
    gpu.ops.argmax(logits, expected, gpu.zeros(count * ARGMAX_BYTES))
    found = counted(gpu, made) - before
    return gpu.ints(chosen, count), gpu.ints(expected, count), gpu.read(logits), found // 2


def counted(gpu: Device, made: Screen) -> int:
    return int(gpu.ints(made.found, MOST_ROWS * FOUND_BYTES // 8, np.uint64)[COUNTED :: FOUND_BYTES // 8].sum())


SHAPES = ((32768, 128), (40004, 128), (33000, 2048), (32768, 4096), (32776, 8192))


CASES = [(shape, "normal") for shape in SHAPES] + [(SHAPES[2], kind) for kind in ("heavy", "near", "equal", "small")]


@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize(("shape", "kind"), CASES)
def test_tokens_are_those_of_the_whole_head(shape: tuple[int, int], kind: str, normed: bool) -> None:
    gpu, head = device(), head_of(kind, *shape)
    made = screen_of(gpu, head)
    for count in (1, 2, 3, 8, 9, 16, 33, 64) if shape[1] < 4096 else (1, 7, 32, 64):
        x = dice(count).standard_normal((count, shape[1]))
        if kind == "near":
            x[0] = head[0] * 50  # then the first of the likes of row 0 wins, or one that differs by an ulp
        chosen, expected, logits, found = both(gpu, made, x, normed)
        assert (chosen == expected).all(), (count, chosen, expected)
        assert (chosen == logits.argmax(-1)).all()
        assert count <= found <= count * shape[0]
        if kind == "normal" and shape[1] >= 2048:
            assert found < 400 * count
        if kind == "equal":
            assert (chosen == 0).all()
            assert found == count * shape[0]
        if not normed and shape == SHAPES[1]:
            exact = rounded(x, "bf16") @ rounded(head, "bf16").T
            best = np.take_along_axis(exact, chosen[:, None].astype(np.int64), 1)[:, 0]
            assert (best >= exact.max(-1) - 1e-5 * np.abs(exact).max()).all()


@pytest.mark.parametrize("kind", ["normal", "heavy", "small"])
@pytest.mark.parametrize("columns", [128, 2048, 4096])
def test_bounds_hold(kind: str, columns: int) -> None:
    gpu, head = device(), head_of(kind, 32776, columns)
    made = screen_of(gpu, head)
    x = dice(8).standard_normal((12, columns)) * np.exp(dice(9).standard_normal((12, columns)) * 2)
    bounds, others = gpu.ints(made.bounds, 2 * len(head), np.float32).astype(np.float64).reshape(2, -1)
    lengths_of_rows = np.linalg.norm(rounded(head, "bf16"), axis=-1)
    for count in (4, 12):
        source, logits, exact = put(gpu, x[:count]), gpu.blank(count, len(head), "f32"), gpu.blank(count, len(head), "f32")
        gpu.ops.choose_screened(source, logits, made, None, gpu.zeros(4 * count))
        gpu.ops.linear(source, exact, made.head)
        rows, found, product = rounded(x[:count], "bf16"), gpu.read(logits), gpu.read(exact)
        lengths, true = np.linalg.norm(rows, axis=-1)[:, None], rows @ rounded(head, "bf16").T
        margins = bounds * lengths
        if count > 8:  # what a logit is at most, where it may be the greatest
            margins = margins + others * errors_of_digits(rows)[:, None]
            left_out = np.isnan(found)
            found = np.where(left_out, product, found - margins)
            assert (product * left_out <= product.max(-1, keepdims=True)).all()
            assert not left_out.all()
            assert left_out.any() or kind == "small", "whose bounds are too wide"
        ratio = np.abs(found - product) / margins
        assert ratio.max() <= 1 + 1e-3
        assert ratio.max() > 0.01, "and are no wild ones"
        rounding = (columns / 8 + 128) * 2.0**-23 * lengths_of_rows * lengths
        assert (np.abs(product - true) <= rounding).all()
        assert kind != "normal" or columns < 2048 or (margins < 0.0095 * lengths_of_rows * lengths).all()


def errors_of_digits(rows: np.ndarray) -> np.ndarray:
    """By how much rows of numbers differ from integers of 16 bits times a power of two."""
    scales = 2.0 ** (np.floor(np.log2(np.abs(rows).max(-1, keepdims=True))) - 14)
    return np.linalg.norm(rows - scales * np.clip(np.rint(rows / scales), -32639, 32639), axis=-1)


@pytest.mark.parametrize("normed", [True, False])
def test_what_is_no_number_is_told(normed: bool) -> None:
    gpu, columns = device(), 512
    head = head_of("normal", 32768, columns)
    made = screen_of(gpu, head)
    x = dice(10).standard_normal((8, columns))
    x[1, 7], x[2, 9], x[3, 5], x[4], x[5], x[6] = np.nan, np.inf, -np.inf, 0, x[5] * 3e36, x[6] * 1e-36
    chosen, expected, _, _ = both(gpu, made, x, normed)
    assert (chosen == expected).all(), (chosen, expected)
    assert (chosen[1:4] == -1).all()
    assert chosen[4] == 0
    few, many = [0, 7, 4], [*range(8), *range(8)]
    chosen, expected, _, _ = both(gpu, made, x[many], normed)
    assert (chosen == expected).all(), (chosen, expected)
    assert (chosen[[1, 2, 3, 9, 10, 11]] == -1).all()
    for value in (np.nan, np.inf, -np.inf):
        head[777, 13] = value
        for rows in (few[:2], many):
            chosen, expected, _, _ = both(gpu, screen_of(gpu, head), x[rows], normed)
            assert (chosen == expected).all()
    head[777] = 3e38
    for rows in (few, many):
        chosen, expected, _, _ = both(gpu, screen_of(gpu, head), x[rows], normed)
        assert (chosen == expected).all()


# ---- engines


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., LLM]]:
    """Open LLMs in bfloat16, of small vocabularies with screens or none; the bundled model's head is expanded."""
    original = weights.plan
    opened: list[LLM] = []

    def plan(formats: Any) -> Any:
        known = list(formats)
        return None if sum(count for count, _, _ in known) == 8192 else original(known)

    def open_one(screened: bool, model: Any = None, **options: Any) -> LLM:
        monkeypatch.setattr("infer.gpu.weights.plan", plan)
        monkeypatch.setattr(module, "LEAST_ROWS", 64 if screened else 1 << 30)
        sizes = {"max_num_seqs": 16, "max_num_batched_tokens": 256, "kv_cache_memory_bytes": 256 << 20, "dtype": "auto"}
        opened.append(LLM(model, **{"device": "cuda", **sizes, **options}))
        return opened[-1]

    yield open_one
    for llm in opened:
        llm.close()


@pytest.fixture
def screened(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of each launch of a screened head."""
    seen: list[int] = []
    original = ScreenOperations.choose_screened

    def choose(self: Any, source: Rows, *more: Any) -> None:
        seen.append(source.rows)
        original(self, source, *more)

    monkeypatch.setattr(ScreenOperations, "choose_screened", choose)
    return seen


def tokens(llm: LLM, prompts: list[Any], params: Any) -> list[list[int]]:
    return [list(output.outputs[0].token_ids) for output in llm.generate(prompts, params)]


def write_folder(folder: Path) -> Path:
    """The shape of Llama 1B, with three layers."""
    sizes = {"hidden_size": 2048, "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 8192, "head_dim": 64}
    kind = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 128256, "hidden_act": "silu"}
    more = {"num_hidden_layers": 3, "rms_norm_eps": 1e-5, "max_position_embeddings": 4096, "tie_word_embeddings": True}
    text = json.dumps({**kind, **sizes, **more, "bos_token_id": 1, "eos_token_id": 2})
    (folder / "config.json").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, bool]]:
    """Rows of each screened step, and whether the whole head chooses the same from the same rows; Python launches all steps."""
    seen: list[tuple[int, bool]] = []
    original = Runner.enqueue

    def enqueue(self: Runner, work: Any) -> Any:
        outcome = original(self, work)
        size, executor = Size(*self.launcher.size(work)), self._executor
        if work.draw_kind == GREEDY_KIND and work.logit_rows and all(work.drawn) and executor.screens(size.wanted):
            found = [np.empty(work.logit_rows, np.int32) for _ in range(2)]
            self._device.download(found[0], executor.choices)
            launch = self._launch(size, GREEDY_KIND)
            launch.rows = size.wanted
            step, fields = executor._steps[-1]
            step(launch, **fields)
            executor.choose(launch)
            self._device.download(found[1], executor.choices)
            self._device.synchronize()
            seen.append((size.wanted, bool((found[0] == found[1]).all())))
        return outcome

    monkeypatch.setattr(Runner, "enqueue", enqueue)
    monkeypatch.setattr(Runner, "_hand_over", lambda *_: None)
    return seen


@pytest.mark.parametrize("options", [{}, {"enforce_eager": True}], ids=str)
def test_engines_choose_as_with_the_whole_head(options: dict[str, Any], start: Any, checked: list[tuple[int, bool]]) -> None:
    llm = start(True, **options)
    for count in (1, 3, 8, 16):
        tokens(llm, (PROMPTS * 6)[:count], GREEDY)
    assert all(same for _, same in checked)
    assert len(checked) > 500
    assert {1, 4, 8, 16} <= {rows for rows, _ in checked}


def test_random_weights(start: Any, checked: list[tuple[int, bool]], tmp_path: Path) -> None:
    llm = start(True, write_folder(tmp_path), load_format="dummy", max_model_len=512, enable_prefix_caching=False)
    prompts = [dice(count).integers(3, 128256, 40).tolist() for count in range(8)]
    for count in (1, 3, 8):
        tokens(llm, prompts[:count], GREEDY)
    assert all(same for _, same in checked)
    assert len(checked) > 500


@pytest.mark.parametrize(
    "options",
    [
        {"speculative_config": {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_min": 1, "prompt_lookup_max": 3}},
        {"speculative_config": {"method": "draft_model", "num_speculative_tokens": 3}},
    ],
    ids=["ngram", "draft"],
)
def test_speculation(options: dict[str, Any], start: Any, checked: list[tuple[int, bool]]) -> None:
    llm = start(True, **options)
    for count in (1, 3):
        tokens(llm, PROMPTS[:count], GREEDY)
    assert all(same for _, same in checked)
    assert len(checked) > 40


def test_mixed_requests_and_logits_for_the_caller(start: Any, screened: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps in which somebody samples, or wants logits or log-probabilities, take the whole head; all of one engine."""
    llm, found = start(True, enforce_eager=True, enable_prefix_caching=False), []
    for has_screen in (True, False):
        if not has_screen:
            monkeypatch.setattr(Executor, "screens", lambda *_: False)
        own: list[Any] = [tokens(llm, PROMPTS[:1], GREEDY), llm.logits([1, 2, 3, 4, 5]).tolist()]
        own.append(tokens(llm, PROMPTS, [GREEDY, SamplingParams(max_tokens=40, temperature=0.8, seed=3), GREEDY]))
        # One after the other: how prompts that come together are shared out among steps is a matter of time.
        own.append([choice for params in kinds() for choice in choices(llm, [params])])
        found.append(own)
        assert bool(screened) == has_screen
        screened.clear()
    assert found[0][:3] == found[1][:3]
    assert same_choices(found[0][3], found[1][3])


def test_what_the_core_launches_is_the_same(start: Any, screened: list[int]) -> None:
    llm = start(True, enable_prefix_caching=False)
    found = [tokens(llm, PROMPTS[:1], GREEDY) for _ in range(4)]
    before = len(screened)
    found.append(tokens(llm, PROMPTS[:1], GREEDY))
    assert len(screened) == before, "nobody launches the kernels one by one any more"
    assert all(one == found[0] for one in found)


def test_only_screened_steps_are_handed_over(start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of greedy steps, the core launches screened ones alone."""
    handed: list[tuple[int | None, bool]] = []
    original = Runner._hand_over

    def hand_over(self: Runner, size: Any, kind: int | None, graph: Any) -> None:
        handed.append((kind, graph is self._graphs.get((size, kind, True))))
        original(self, size, kind, graph)

    monkeypatch.setattr(Runner, "_hand_over", hand_over)
    llm = start(True)
    for _ in range(3):
        tokens(llm, PROMPTS[:1], GREEDY)
    assert (0, True) in handed
    assert (0, False) not in handed


def test_a_screen_that_does_not_pay_is_given_up(start: Any, screened: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_SHARE", 1 << 40)
    llm = start(True, enforce_eager=True)
    tokens(llm, PROMPTS[:1], GREEDY)
    assert 0 < len(screened) < 10


def test_deterministic_engines_have_none(start: Any, screened: list[int]) -> None:
    tokens(start(True, deterministic=True), PROMPTS[:1], GREEDY)
    assert not screened
