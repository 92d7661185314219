"""Fused steps: what neighbouring steps become where one kernel does the work of several, and the methods that enqueue them.

`fuse` rewrites a program in passes, each a pattern of neighbours. A buffer that a fused kernel no longer writes must not be
read by any later step before something else has filled it; `is_dead` sees to that, so no pattern knows families. Programs stay
the shared truth: with `fused=False` the executor runs them as they are, and the tests compare the two.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from infer.gpu.arrays import RopeTable, Rows
    from infer.gpu.attention import AttentionPlan
    from infer.gpu.executor import AttentionPlans, Launch
    from infer.gpu.memory import KvPages
    from infer.gpu.weights import Weights

    Place = tuple[int, int, int]
    Step = tuple[str, dict[str, Any]]

READS = {
    "add_position": ("rows",),
    "norm": ("input",),
    "linear": ("input",),
    "rope": ("rows",),
    "write_kv": ("keys", "values"),
    "attend": ("queries",),
    "gated_activation": ("gate", "up"),
    "activation": ("rows",),
    "add": ("destination", "source"),
    "add_gated": ("destination", "source", "gate"),
    "route": ("logits",),
    "experts": ("input",),
    "select": ("input",),
    "scale": ("rows",),
    "softcap": ("rows",),
    "add_norm": ("destination", "source"),
    "linear_add": ("input", "destination"),
    "linear_gated": ("input",),
    "norm_linear": ("input",),
    "norm_linear_gated": ("input",),
    "norm_gated_add": ("input", "destination"),
    "rope_write_kv": ("qkv",),
    "norm_qkv": ("input",),
}
"""The columns that a step reads, by the names of its fields."""

FILLS = (
    "embed",
    "norm",
    "linear",
    "attend",
    "gated_activation",
    "experts",
    "select",
    "linear_gated",
    "norm_linear",
    "norm_linear_gated",
)
"""Steps that fill their `output` without reading it."""


def overlap(one: Place, other: Place) -> bool:
    """Whether two places share columns."""
    return one[0] == other[0] and one[1] < other[1] + other[2] and other[1] < one[1] + one[2]


def covers(one: Place, other: Place) -> bool:
    """Whether a place has all columns of another."""
    return one[0] == other[0] and one[1] <= other[1] and other[1] + other[2] <= one[1] + one[2]


def is_dead(later: list[Step], place: Place) -> bool:
    """Whether no later step reads these columns before all of them are filled anew."""
    for kind, fields in later:
        if any(overlap(fields[name], place) for name in READS.get(kind, ())):
            return False
        if kind in FILLS and covers(fields["output"], place):
            return True
    return True


def fuse(steps: list[Step], weights: Weights, heads: int) -> list[Step]:
    """Return the program with neighbours merged, as far as there are kernels for it."""
    fused = _fuse_attention(steps, weights, heads)
    for merge in (_merge_add, _merge_gated, _merge_norm, _merge_qkv, _merge_gated_add, _merge_add_norm):
        fused = _merge_pairs(fused, weights, merge)
    return fused


def _merge_pairs(steps: list[Step], weights: Weights, merge: Any) -> list[Step]:
    merged: list[Step] = []
    place = 0
    while place < len(steps):
        pair = steps[place : place + 2]
        found = merge(pair[0], pair[1], steps[place + 2 :], weights) if len(pair) == 2 else None
        merged.append(steps[place] if found is None else found)
        place += 1 if found is None else 2
    return merged


def _merge_add(first: Step, second: Step, later: list[Step], weights: Weights) -> Step | None:
    """``linear``, ``add``: ``linear_add``."""
    if (first[0], second[0]) != ("linear", "add") or second[1]["source"] != first[1]["output"]:
        return None
    source, target, weight = first[1]["input"], second[1]["destination"], first[1]["weight"]
    if overlap(source, target) or not is_dead(later, first[1]["output"]):
        return None
    return "linear_add", {"input": source, "destination": target, "weight": weight, "scale": second[1]["scale"]}


def _merge_gated(first: Step, second: Step, later: list[Step], weights: Weights) -> Step | None:
    """``linear``, ``gated_activation``: ``linear_gated``."""
    if (first[0], second[0]) != ("linear", "gated_activation"):
        return None
    (buffer, start, width), fields = first[1]["output"], second[1]
    halves = (buffer, start, width // 2), (buffer, start + width // 2, width // 2)
    if (fields["gate"], fields["up"]) != halves or not is_dead(later, first[1]["output"]):
        return None
    return "linear_gated", {
        "input": first[1]["input"],
        "output": fields["output"],
        "weight": first[1]["weight"],
        "activation": fields["activation"],
        "scratch": first[1]["output"],
    }


def _is_plain_rms(step: Step, weights: Weights) -> bool:
    return step[0] == "norm" and step[1]["kind"] == "rms" and step[1]["groups"] == 1 and not weights.vectors[step[1]["weight"]][1]


def _merge_norm(first: Step, second: Step, later: list[Step], weights: Weights) -> Step | None:
    """``norm``, ``linear`` or ``linear_gated``: the norm as part of the product."""
    if not _is_plain_rms(first, weights) or second[0] not in ("linear", "linear_gated"):
        return None
    normed = first[1]["output"]
    if second[1]["input"] != normed or not is_dead(later, normed):
        return None
    norm = {"norm": first[1]["weight"], "epsilon": first[1]["epsilon"], "normed": normed}
    return f"norm_{second[0]}", {**second[1], **norm, "input": first[1]["input"]}


def _merge_qkv(first: Step, second: Step, later: list[Step], weights: Weights) -> Step | None:
    """``norm_linear``, ``rope_write_kv`` without norms of its own: ``norm_qkv``."""
    if (first[0], second[0]) != ("norm_linear", "rope_write_kv") or first[1]["output"] != second[1]["qkv"]:
        return None
    fields = second[1]
    if fields["rope"] is None or fields["query_norm"] is not None:
        return None
    product = {name: first[1][name] for name in ("input", "weight", "norm", "epsilon", "normed")}
    return "norm_qkv", {**product, **{name: fields[name] for name in ("qkv", "layer", "rope", "style")}}


def _merge_gated_add(first: Step, second: Step, later: list[Step], weights: Weights) -> Step | None:
    """``norm_linear_gated``, ``linear_add`` of its output: ``norm_gated_add``."""
    if (first[0], second[0]) != ("norm_linear_gated", "linear_add") or second[1]["input"] != first[1]["output"]:
        return None
    inner, target = first[1]["output"], second[1]["destination"]
    if any(overlap(first[1][name], target) for name in ("output", "normed", "scratch")) or not is_dead(later, inner):
        return None
    fields = {name: value for name, value in first[1].items() if name != "output"}
    last = {name: second[1][name] for name in ("destination", "scale")}
    return "norm_gated_add", {**fields, **last, "inner": inner, "down": second[1]["weight"]}


def _merge_add_norm(first: Step, second: Step, later: list[Step], weights: Weights) -> Step | None:
    """``add``, ``norm`` of the sum to another place: ``add_norm``."""
    if first[0] != "add" or second[0] != "norm" or second[1]["groups"] != 1:
        return None
    total, fields = first[1]["destination"], second[1]
    if fields["input"] != total or overlap(fields["output"], total) or overlap(fields["output"], first[1]["source"]):
        return None
    return "add_norm", {**first[1], **{name: fields[name] for name in ("output", "kind", "epsilon", "weight")}}


def _fuse_attention(steps: list[Step], weights: Weights, heads: int) -> list[Step]:
    """Norms and rotation of queries and keys, and ``write_kv``: ``rope_write_kv``."""
    fused: list[Step] = []
    for place, step in enumerate(steps):
        fused.append(step)
        if step[0] == "write_kv" and (found := _attention(fused, steps[place + 1 :], weights, heads)) is not None:
            count, merged = found
            fused[-count:] = [merged]
    return fused


def _attention(steps: list[Step], later: list[Step], weights: Weights, heads: int) -> tuple[int, Step] | None:
    """Return how many steps up to a ``write_kv`` are one, and which."""
    fields = steps[-1][1]
    keys, values = fields["keys"], fields["values"]
    buffer, start, width = keys
    queries = (buffer, 0, start)
    if values != (buffer, start + width, width) or not (is_dead(later, keys) and is_dead(later, values)):
        return None
    found: dict[tuple[str, Place], dict[str, Any]] = {}
    count = 1
    for kind, own in reversed(steps[:-1]):
        target = own.get("rows") if kind == "rope" else own.get("output")
        if kind not in ("norm", "rope") or target not in (queries, keys) or (kind, target) in found:
            break
        if kind == "norm" and (("rope", target) not in found or not _is_head_norm(own, weights, start // heads)):
            return None
        found[kind, target] = own
        count += 1
    turns = found.get(("rope", queries)), found.get(("rope", keys))
    norms = found.get(("norm", queries)), found.get(("norm", keys))
    if (turns[0] is None) != (turns[1] is None) or (norms[0] is None) != (norms[1] is None):
        return None
    turn, query, key = turns[0], norms[0], norms[1]
    return count, (
        "rope_write_kv",
        {
            "qkv": (buffer, 0, start + 2 * width),
            "layer": fields["layer"],
            "rope": turn["rope"] if turn else None,
            "style": turn["style"] if turn else "half",
            "query_norm": query["weight"] if query else None,
            "key_norm": key["weight"] if key else None,
            "epsilon": query["epsilon"] if query else 0.0,
        },
    )


def _is_head_norm(fields: dict[str, Any], weights: Weights, head_dim: int) -> bool:
    """Whether a norm is a root mean square in place, with one weight for all heads."""
    _, bias, length = weights.vectors[fields["weight"]]
    per_head = fields["input"][2] // fields["groups"] == head_dim == length
    return fields["input"] == fields["output"] and fields["kind"] == "rms" and not bias and per_head


class FusedSteps:
    """One method per kind of fused step."""

    _operations: Any
    _weights: Weights
    _constants: dict[str, Any]
    pages: KvPages
    plans: AttentionPlans
    _attention: dict[int, AttentionPlan]

    @property
    def _any_plan(self) -> AttentionPlan:
        """Return one of the step's plans, which say alike whether anything but decode attention runs."""
        return next(iter(self._attention.values()))

    def _rows(self, launch: Launch, place: Place) -> Rows:
        raise AssertionError(f"{type(self).__name__} has buffers")

    def _table(self, rope: int | None, style: str) -> RopeTable | None:
        return None if rope is None else self._weights.rope(rope, style)

    def add_norm(
        self,
        launch: Launch,
        destination: Place,
        source: Place,
        scale: float,
        output: Place,
        kind: str,
        epsilon: float,
        weight: int,
    ) -> None:
        """``destination += scale * source``, and its norm."""
        total, branch = self._rows(launch, destination), self._rows(launch, source)
        pointer, bias, _ = self._weights.vectors[weight]
        self._operations.add_norm(total, branch, scale, self._rows(launch, output), kind, epsilon, pointer, bias)

    def linear_add(self, launch: Launch, input: Place, destination: Place, weight: int, scale: float) -> None:
        """``destination += scale * (input times a matrix)``."""
        source, target = self._rows(launch, input), self._rows(launch, destination)
        self._operations.linear_add(source, target, self._weights.matrices[weight], scale)

    def linear_gated(
        self,
        launch: Launch,
        input: Place,
        output: Place,
        weight: int,
        activation: str,
        scratch: Place,
    ) -> None:
        """A gated activation of two products."""
        source, target, both = (self._rows(launch, place) for place in (input, output, scratch))
        self._operations.linear_gated(source, target, self._weights.matrices[weight], activation, both)

    def norm_linear(
        self,
        launch: Launch,
        input: Place,
        output: Place,
        weight: int,
        norm: int,
        epsilon: float,
        normed: Place,
    ) -> None:
        """A product of normed rows."""
        source, target, scratch = (self._rows(launch, place) for place in (input, output, normed))
        pointer = self._weights.vectors[norm][0]
        self._operations.norm_linear(source, target, self._weights.matrices[weight], pointer, epsilon, scratch)

    def norm_linear_gated(
        self,
        launch: Launch,
        input: Place,
        output: Place,
        weight: int,
        activation: str,
        scratch: Place,
        norm: int,
        epsilon: float,
        normed: Place,
    ) -> None:
        """A gated activation of two products of normed rows."""
        source, target, rows, both = (self._rows(launch, place) for place in (input, output, normed, scratch))
        matrix, pointer = self._weights.matrices[weight], self._weights.vectors[norm][0]
        self._operations.norm_linear_gated(source, target, matrix, activation, pointer, epsilon, rows, both)

    def norm_gated_add(
        self,
        launch: Launch,
        input: Place,
        inner: Place,
        destination: Place,
        weight: int,
        down: int,
        activation: str,
        scratch: Place,
        norm: int,
        epsilon: float,
        normed: Place,
        scale: float,
    ) -> None:
        """A gated activation of two products of normed rows, and a product of that, added."""
        places = (input, inner, destination, normed, scratch)
        source, middle, target, rows, both = (self._rows(launch, place) for place in places)
        first, second = self._weights.matrices[weight], self._weights.matrices[down]
        pointer = self._weights.vectors[norm][0]
        self._operations.norm_gated_add(source, middle, target, first, second, activation, pointer, epsilon, scale, rows, both)

    def rope_write_kv(
        self,
        launch: Launch,
        qkv: Place,
        layer: int,
        rope: int | None,
        style: str,
        query_norm: int | None,
        key_norm: int | None,
        epsilon: float,
    ) -> None:
        """Norms and rotation of queries and keys, and storing."""
        norms = [0 if norm is None else self._weights.vectors[norm][0] for norm in (query_norm, key_norm)]
        rows, pages = self._rows(launch, qkv), self.pages.layers[layer]
        table, heads = self._table(rope, style), self._constants["heads"]
        self._operations.rope_write_kv(launch.inputs, rows, pages, heads, table, *norms, epsilon, self._any_plan)

    def norm_qkv(
        self,
        launch: Launch,
        input: Place,
        qkv: Place,
        weight: int,
        norm: int,
        epsilon: float,
        normed: Place,
        layer: int,
        rope: int,
        style: str,
    ) -> None:
        """Queries, keys and values of normed rows, rotated and stored."""
        source, rows, scratch = (self._rows(launch, place) for place in (input, qkv, normed))
        matrix, pages, table = self._weights.matrices[weight], self.pages.layers[layer], self._weights.rope(rope, style)
        pointer, heads = self._weights.vectors[norm][0], self._constants["heads"]
        self._operations.qkv(launch.inputs, source, rows, matrix, pages, heads, table, pointer, epsilon, scratch, self._any_plan)
