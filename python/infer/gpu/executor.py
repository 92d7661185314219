"""The program's steps on the device: one method per kind of step, named as the variant of `Step` in rust/model/src/step.rs.

A method only enqueues; it reads what rows there are from the `Launch` at hand. Nothing is allocated after construction, so
whatever a launch enqueues can be captured into a graph and replayed: contents of the step's arrays change, addresses and counts
do not.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from infer.gpu.arrays import ELEMENT_BYTES, Routes, Rows
from infer.gpu.attention import CHUNK_PAGES, AttentionPlan, PlanSize
from infer.gpu.experts import GROUPED_ROWS, ExpertMemory
from infer.gpu.fused import FusedSteps, fuse
from infer.gpu.layers import Layer, Stack
from infer.gpu.memory import Buffers, KvPages
from infer.gpu.operations import ARGMAX_BYTES
from infer.gpu.screen import Normed, Watch, screen_of
from infer.gpu.stacked import layers_of, stack_of

if TYPE_CHECKING:
    from collections.abc import Iterable

    from infer._core import DeviceModel
    from infer.gpu.arrays import Draws, StepInputs
    from infer.gpu.device import Device
    from infer.gpu.screen import Screen
    from infer.gpu.weights import Weights

    Place = tuple[int, int, int]


GREEDY, SAMPLED, FULL = range(3)  # as `DrawKind` in rust/engine/src/draw_layout.rs


@dataclass
class Launch:
    """The rows of one step, padding included, and how many are left after `select`."""

    inputs: StepInputs
    rows: int
    logit_rows: int
    wanted: int
    """Where the numbers of the rows whose logits are wanted are."""
    draws: Draws
    draw_kind: int
    """GREEDY, SAMPLED or FULL: what rows are drawn with at most, now or when the launch is replayed."""
    only_decode: bool
    """No sequence has more rows than decode attention takes, now or when the launch is replayed."""
    plain: bool = False
    """There are more pieces of attention than the plan has room for: the kernel that needs no plan computes it."""
    is_screened: bool = False
    """All rows are drawn greedily, and nobody wants logits: the head is read as far as it matters only."""


class AttentionPlans:
    """Memory of the work lists of attention: one list for each distinct window, working memory for all."""

    def __init__(self, device: Device, windows: Iterable[int], size: PlanSize) -> None:
        self.size = size
        self._scratch = device.allocate(size.scratch_bytes)
        device.clear(self._scratch, size.counter_bytes)
        self._lists = {window: device.allocate(size.plan_bytes) for window in windows}

    def of(self, launch: Launch) -> dict[int, AttentionPlan]:
        """Return the plan of each window."""
        return {
            window: AttentionPlan(pointer, self._scratch, self.size, window, launch.only_decode, launch.plain)
            for window, pointer in self._lists.items()
        }


class Executor(FusedSteps):
    """One model on one device.

    Parameters
    ----------
    device, operations
        The device and its kernels.
    model, weights
        The program and its loaded weights.
    rows, sequences, logit_rows
        The most of each that a step may have.
    fused
        Merge neighbouring steps for which there is one kernel.

    Attributes
    ----------
    pages, plans
        Keys and values, and what attention over them needs; there from `allocate_pages` on.
    copies_pages
        Each step begins with copies of pages, where it has some.
    """

    pages: KvPages
    plans: AttentionPlans

    def __init__(
        self,
        device: Device,
        operations: Any,
        model: DeviceModel,
        weights: Weights,
        rows: int,
        sequences: int,
        logit_rows: int,
        fused: bool = True,
    ) -> None:
        self._device, self._model = device, model
        self._operations, self._weights = operations, weights
        self._constants = model.constants
        self._buffers = Buffers(device, model, rows, logit_rows)
        self._logits = model.logits
        steps, narrow = (
            fuse(each, weights, self._constants["heads"]) if fused else each for each in (model.steps, model.narrow_steps)
        )
        self._steps = [(getattr(self, kind), fields) for kind, fields in steps]
        self._narrow_steps = [(getattr(self, kind), fields) for kind, fields in narrow]
        self._stacked = stack_of(steps)
        self._stack: Stack | None = None
        self._screen = self._make_screen()
        self._watch = Watch(device, self._screen) if self._screen is not None else None
        self._choices = device.allocate(logit_rows * 4)
        self._scratch = device.allocate(logit_rows * ARGMAX_BYTES)
        device.clear(self._scratch, logit_rows * ARGMAX_BYTES)
        self._rows_and_sequences = rows, sequences
        self.copies_pages = False
        self._expert_memory(device, model, rows)
        self._attention: dict[int, AttentionPlan] = {}

    def allocate_pages(self, pages: int, max_model_len: int) -> None:
        """Make room for keys and values, and for the work lists of attention over them."""
        self.pages = KvPages(self._device, self._model, pages)
        windows = {fields["window"] or 0 for kind, fields in self._model.steps if kind == "attend"}
        heads, kv_heads, head_dim = (self._constants[name] for name in ("heads", "kv_heads", "head_dim"))
        size = PlanSize(*self._rows_and_sequences, max_model_len, heads, kv_heads, head_dim)
        size = replace(size, most_items=most_items(size, pages))
        self.plans = AttentionPlans(self._device, windows, size)
        self._make_stack()

    def copy_page(self, source: int, target: int) -> None:
        """Enqueue a copy of a page over another, in all layers."""
        self._operations.copy_page(self.pages.parts, source, target)

    def _make_stack(self) -> None:
        """Keep what all layers in one kernel need on the device, if there is a kernel for them."""
        layers = layers_of(self, [fields for _, fields in self._steps[self._stacked]])
        records = self._operations.layer_records(layers) if layers else None
        if records is None:
            return
        pointer = self._device.allocate(records.nbytes)
        self._device.upload(pointer, records)
        self._device.synchronize()  # the records are not kept here
        scale, softcap = self._constants["attention_scale"], self._constants["attention_softcap"] or 0.0
        self._stack = Stack(layers, pointer, scale, softcap)

    def _expert_memory(self, device: Device, model: DeviceModel, rows: int) -> None:
        used = max((fields["used"] for kind, fields in model.steps if kind == "route"), default=0)
        width = max((fields["width"] for kind, fields in model.steps if kind == "experts"), default=0)
        self._chosen = device.allocate(rows * used * 4)
        self._shares = device.allocate(rows * used * 4)
        inner = device.allocate(rows * used * width * ELEMENT_BYTES[model.element])
        self._inner = Rows(inner, rows * used, width, width, model.element)
        self._routes = Routes(self._chosen, self._shares, used)
        most, rows = max((weight.experts for weight in self._weights.stacks.values()), default=0), min(rows, GROUPED_ROWS)
        parts = rows * used * self._constants["hidden"] * ELEMENT_BYTES[model.element]
        sizes = (most * rows * 4, most * 4, parts)
        self._grouped = ExpertMemory(*(device.allocate(size) for size in sizes)) if most else None

    def logits(self, rows: int) -> Rows:
        """Return where the logits of the wanted rows will be."""
        return self._buffers.rows(self._logits, rows)

    def choose(self, launch: Launch) -> None:
        """Enqueue the choice of each wanted row's token, after `forward`."""
        logits = self.logits(launch.logit_rows)
        if launch.is_screened:
            source, norm = self._before_head(launch.logit_rows)
            self._operations.choose_screened(source, logits, self._screen, norm, self._choices)
        elif launch.draw_kind == GREEDY:
            self._operations.argmax(logits, self._choices, self._scratch)
        else:
            self._operations.sample(logits, launch.draws, self._choices, launch.draw_kind == FULL)

    @property
    def choices(self) -> int:
        """Where the choices will be: int32 (logit rows)."""
        return self._choices

    def forward(self, launch: Launch) -> None:
        """Enqueue all steps."""
        if self.copies_pages:
            self._operations.copy_pages(launch.inputs, self.pages.parts)
        self._attention = self.plans.of(launch)
        for plan in self._attention.values():
            self._operations.attention_plan(launch.inputs, plan)
        # Most rows of prompts end at the last layer's keys and values: what comes after its attention, which may store them, is
        # for logits only.
        steps = self._steps if launch.only_decode else self._narrow_steps
        if not launch.logit_rows:
            steps = steps[: max(place for place, (step, _) in enumerate(steps, 1) if step == self.attend)]
        elif launch.is_screened:
            steps = steps[:-1]
        place = 0
        while place < len(steps):
            if launch.only_decode and place == self._stacked.start and self._run_stack(launch):
                place = self._stacked.stop
                continue
            step, fields = steps[place]
            step(launch, **fields)
            place += 1

    def _make_screen(self) -> Screen | None:
        """Return a screen before the head, if that is the last step."""
        step, fields = self._steps[-1]
        if step not in (self.linear, self.norm_linear) or fields["output"] != self._logits:
            return None
        return screen_of(self._device, self._operations, self._weights.matrices[fields["weight"]])

    def screens(self, rows: int) -> bool:
        """Return whether greedy draws of so many rows need no logits, and are faster without."""
        if self._watch is None or rows == 0 or not self._watch.pays(rows):
            return False
        source, norm = self._before_head(rows)
        return bool(self._operations.screens(source, self.logits(rows), self._screen, norm))

    def watch_screen(self) -> None:
        """Enqueue what lets `screens` know whether the screen pays."""
        if self._watch is not None:
            self._watch.look()

    def _before_head(self, rows: int) -> tuple[Rows, Normed | None]:
        """Return the input of the last step, which is the head, and the norm that is part of it."""
        fields = self._steps[-1][1]
        source = self._buffers.rows(fields["input"], rows)
        if "norm" not in fields:
            return source, None
        pointer = self._weights.vectors[fields["norm"]][0]
        return source, Normed(pointer, fields["epsilon"])

    def layer(self, qkv: dict[str, Any], attend: dict[str, Any], added: dict[str, Any], gated: dict[str, Any]) -> Layer:
        """Return the layer that these steps' fields describe, with buffers of one row."""
        weights = self._weights
        first, attention, gate_up, down = (
            weights.matrices[each] for each in (qkv["weight"], added["weight"], gated["weight"], gated["down"])
        )
        return Layer(
            hidden=self._buffers.rows(qkv["input"], 1),
            qkv=self._buffers.rows(qkv["qkv"], 1),
            attended=self._buffers.rows(attend["output"], 1),
            inner=self._buffers.rows(gated["inner"], 1),
            both=self._buffers.rows(gated["scratch"], 1),
            normed=self._buffers.rows(gated["normed"], 1),
            weights=(first, attention, gate_up, down),
            norms=(weights.vectors[qkv["norm"]][0], weights.vectors[gated["norm"]][0]),
            epsilons=(qkv["epsilon"], gated["epsilon"]),
            scales=(added["scale"], gated["scale"]),
            activation=gated["activation"],
            heads=self._constants["heads"],
            table=weights.rope(qkv["rope"], qkv["style"]),
            pages=self.pages.layers[attend["layer"]],
        )

    def _run_stack(self, own: Launch) -> bool:
        """Enqueue all layers at once, if that is possible for so many rows."""
        stack = self._stack
        return stack is not None and bool(self._operations.layers(own.inputs, self._attention[0], stack))

    def _rows(self, launch: Launch, place: Place) -> Rows:
        return self._buffers.rows(place, launch.rows)

    # ---- one method per kind of step

    def embed(self, launch: Launch, output: Place, scale: float) -> None:
        """Rows of the embedding, times `scale`."""
        self._operations.embed(launch.inputs, self._weights.embedding, self._rows(launch, output), scale)

    def add_position(self, launch: Launch, rows: Place) -> None:
        """Add the learned vector of each row's position."""
        self._operations.add_position(launch.inputs, self._weights.positions, self._rows(launch, rows))

    def norm(
        self,
        launch: Launch,
        input: Place,
        output: Place,
        kind: str,
        groups: int,
        epsilon: float,
        weight: int,
    ) -> None:
        """Normalise groups of columns."""
        pointer, bias, length = self._weights.vectors[weight]
        source, target = self._rows(launch, input), self._rows(launch, output)
        per_group = groups > 1 and length == source.width
        self._operations.norm(source, target, kind, epsilon, pointer, bias, groups, per_group)

    def linear(self, launch: Launch, input: Place, output: Place, weight: int) -> None:
        """Multiply by a matrix, and add its bias."""
        self._operations.linear(self._rows(launch, input), self._rows(launch, output), self._weights.matrices[weight])

    def rope(self, launch: Launch, rows: Place, heads: int, rope: int, style: str) -> None:
        """Rotate heads by their row's position."""
        table = self._weights.rope(rope, style)
        self._operations.rope(launch.inputs, self._rows(launch, rows), heads, table)

    def write_kv(self, launch: Launch, keys: Place, values: Place, layer: int) -> None:
        """Store keys and values of the rows' positions."""
        self._operations.write_kv(launch.inputs, self._rows(launch, keys), self._rows(launch, values), self.pages.layers[layer])

    def attend(self, launch: Launch, queries: Place, output: Place, layer: int, window: int | None) -> None:
        """Attend to the pages of each row's sequence."""
        self._operations.attend(
            launch.inputs,
            self._attention[window or 0],
            self._rows(launch, queries),
            self._rows(launch, output),
            self.pages.layers[layer],
            self._constants["attention_scale"],
            self._constants["attention_softcap"] or 0.0,
        )

    def gated_activation(self, launch: Launch, gate: Place, up: Place, output: Place, activation: str) -> None:
        """``activation(gate) * up``."""
        first, second, target = (self._rows(launch, place) for place in (gate, up, output))
        self._operations.gated_activation(first, second, target, activation)

    def activation(self, launch: Launch, rows: Place, activation: str) -> None:
        """Apply a function to every value."""
        self._operations.activation(self._rows(launch, rows), activation)

    def add(self, launch: Launch, destination: Place, source: Place, scale: float) -> None:
        """``destination += scale * source``."""
        self._operations.add(self._rows(launch, destination), self._rows(launch, source), scale)

    def add_gated(self, launch: Launch, destination: Place, source: Place, gate: Place) -> None:
        """``destination += sigmoid(gate) * source``."""
        self._operations.add_gated(self._rows(launch, destination), self._rows(launch, source), self._rows(launch, gate))

    def route(self, launch: Launch, logits: Place, used: int, renormalise: bool) -> None:
        """Choose experts of each row."""
        routes = Routes(self._chosen, self._shares, used)
        self._operations.route(launch.inputs, self._rows(launch, logits), renormalise, routes)
        self._routes = routes

    def experts(
        self,
        launch: Launch,
        input: Place,
        output: Place,
        gate_up: list[int],
        down: list[int],
        width: int,
        activation: str,
    ) -> None:
        """Weighted sum of the chosen experts' gated networks."""
        inner = Rows(self._inner.pointer, launch.rows * self._routes.used, width, width, self._inner.dtype)
        stacks = self._weights.stacks
        source, target = self._rows(launch, input), self._rows(launch, output)
        self._operations.experts(
            source, target, self._routes, stacks[gate_up[0]], stacks[down[0]], activation, inner, self._grouped
        )

    def select(self, launch: Launch, input: Place, output: Place) -> None:
        """Keep only the rows whose logits are wanted."""
        source = self._buffers.rows(input, launch.inputs.rows)  # all of them, if other columns were selected already, too
        launch.rows = launch.logit_rows
        # Padding repeats row 0, so all rows that are left are of some sequence.
        launch.inputs = replace(launch.inputs, row_sequence=launch.wanted)
        self._operations.select(source, launch.wanted, self._rows(launch, output))

    def scale(self, launch: Launch, rows: Place, scale: float) -> None:
        """Multiply in place."""
        self._operations.scale(self._rows(launch, rows), scale)

    def softcap(self, launch: Launch, rows: Place, cap: float) -> None:
        """``cap * tanh(x / cap)`` in place."""
        self._operations.softcap(self._rows(launch, rows), cap)


SHARING = 4
"""How often each page may be read in a step, by sequences that share it, before plans are too large to be kept room for."""


def most_items(size: PlanSize, pages: int) -> int:
    """Return how many pieces of decode attention there is room for: what all pages make, read several times over."""
    return SHARING * (pages // CHUNK_PAGES) + min(size.rows, 8 * size.sequences)
