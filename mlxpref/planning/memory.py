"""How much memory a run takes at its peak, part by part: arithmetic on a model's sizes and a plan's shapes.

What stays for the backward pass was found for each operation by changing one size at a time (docs/planning.md). In
numbers a position, of a layer that is differentiated: the input of each norm; one input for all modules that read the
same one, if any of them trains; queries, keys and values after rotation; what the activation of the MLP needs; the
narrow middle of each adapter; and the scores of attention, which have a file of their own.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from mlxpref.data.shapes import Shape
from mlxpref.planning.attention import scores
from mlxpref.planning.dims import Dims, Matrix
from mlxpref.steps import head_rows

MLP_KEPT, SWIGLU_KEPT, SWIGLU_KEPT_ON_CPU = 4, 2, 3
"""Arrays of the inner width that the MLP's product keeps: gate, up, the gate's sigmoid and the activated gate; of a
gate through SiLU the first two, on a CPU three. Its result is an input of the next module."""

HEAD_ARRAYS, HEAD_MOST = 8, 25
"""Arrays of (scored rows x vocabulary) that the head has at once; and of a chunk's size, however many chunks there
are. Buffers are given out some tasks ahead of the computation, so those of several chunks are alive together."""

HEAD_HIDDEN = 3
"""Arrays of (scored rows x hidden) beside the head: the last norm's output, the rows picked, their slopes."""

BACKWARD_HIDDEN, BACKWARD_INNER, BACKWARD_QUERIES = 6, 4, 4
"""Arrays of each width that the backward pass of one layer has at once, beside what was kept."""

CHECKPOINTED_LAYERS = 1.5
"""Layers that are made again at once: the next begins while what the last one left is still there."""

FORWARD_LAYERS = 1.0
"""Of a pass without gradients: how many layers' worth of arrays are alive at once."""

MOMENTS: Mapping[str, float] = {"adam": 2, "adamw": 2, "sgd": 1, "muon": 1, "lion": 1, "adafactor": 0.1}
"""Float32 copies of the trainable parameters that an optimiser carries from step to step."""

_READS = (
    ("attention input", re.compile(r"(q|k|v|qkv|Wqkv|c_attn|query_key_value|query|key|value)(_proj)?$")),
    ("attention output", re.compile(r"(o_proj|out_proj|attn\.c_proj|attention\.dense)$")),
    ("mlp inner", re.compile(r"(down_proj|w2|fc2|dense_4h_to_h|mlp\.c_proj|fc_out)$")),
    ("mlp input", re.compile(r"(gate_proj|up_proj|gate_up_proj|w1|w3|fc1|c_fc|dense_h_to_4h|fc_in|gate|router)$")),
)
"""Which array a module reads, by the end of its name."""


@dataclass(frozen=True, slots=True)
class Trained:
    """What trains, and how.

    Attributes:
        fine_tune_type: "lora", "dora" or "full".
        layers: that train, counted from the last.
        rank: of the adapter; 0 of full fine-tuning.
        keys: modules that are adapted, by name; None: all.
        dropout: there is some.
        grad_checkpoint: layers are computed again in the backward pass.
        optimizer: its name.
        from_adapter: it starts from one, whose values stay as the reference.
        blocks: attention goes block by block wherever it can; see :mod:`.attention`.
        on_cpu: the head's chunks are those of a CPU; see :func:`mlxpref.steps.head_rows`.
    """

    fine_tune_type: str
    layers: int
    rank: int
    keys: tuple[str, ...] | None = None
    dropout: bool = False
    grad_checkpoint: bool = False
    optimizer: str = "adamw"
    from_adapter: bool = False
    blocks: bool = True
    on_cpu: bool = True

    def first(self, dims: Dims) -> int:
        """Index of the lowest layer that trains."""
        return max(0, dims.layers - self.layers)

    def adapted(self, dims: Dims) -> list[Matrix]:
        """The weights with an adapter, or that train themselves."""
        first, whole = self.first(dims), self.fine_tune_type == "full" and self.layers >= dims.layers
        if self.fine_tune_type == "full":
            return [m for m in dims.matrices if whole or (m.layer is not None and m.layer >= first)]
        return [
            m for m in dims.matrices
            if (m.layer is not None and m.layer >= first and (self.keys is None or _named(m.name, self.keys)))
            or (m.layer is None and self.keys is not None and m.name in self.keys)
        ]  # fmt: skip

    def parameters(self, dims: Dims) -> int:
        """How many numbers train."""
        adapted = self.adapted(dims)
        if self.fine_tune_type == "full":
            return sum(matrix.size for matrix in adapted)
        magnitudes = sum(matrix.outputs for matrix in adapted) if self.fine_tune_type == "dora" else 0
        return sum(matrix.copies * self.rank * (matrix.inputs + matrix.outputs) for matrix in adapted) + magnitudes


def _named(name: str, keys: Iterable[str]) -> bool:
    """Experts have other paths in a checkpoint than in the model: there the last part decides."""
    last = name.rpartition(".")[2]
    return name in keys or ("experts" in name and any(key.rpartition(".")[2] == last for key in keys))


@dataclass(frozen=True, slots=True)
class Peak:
    """Bytes by part at the moment of a phase that needs most.

    Attributes:
        phase: which it is: "update of weights", "gradients", "reference pass".
        shape: of the micro-batch.
        parts: name → bytes.
    """

    phase: str
    parts: Mapping[str, int]
    shape: Shape | None = None

    @property
    def total(self) -> int:
        return sum(self.parts.values())


def training_peak(dims: Dims, trained: Trained, shapes: Sequence[Shape], *, accumulated: bool) -> Peak:
    """The highest moment of the training steps.

    Args:
        shapes: of their micro-batches.
        accumulated: some step has several micro-batches, whose gradients are added up.
    """
    held = _held(dims, trained)
    n = trained.parameters(dims)
    gradients = 4 * n * (2 if accumulated else 1)
    found = [
        Peak("gradients", {**held, "gradients": gradients, **_activations(dims, trained, shape)}, shape)
        for shape in shapes
    ]
    copies = 2 + MOMENTS[trained.optimizer]  # new masters and moments, and the gradients clipped
    fresh = int(4 * n * copies) + (dims.width * n if dims.width < 4 else 0)
    found.append(Peak("update of weights", {**held, "gradients": 4 * n, "new weights and moments": fresh}))
    return max(found, key=lambda peak: peak.total)


def pass_peak(dims: Dims, trained: Trained, shapes: Sequence[Shape], phase: str = "reference pass") -> Peak:
    """The highest moment of a pass without gradients."""
    held = _held(dims, trained)
    found = [Peak(phase, {**held, **_forward(dims, shape, trained)}, shape) for shape in shapes]
    found = found or [Peak(phase, held)]
    return max(found, key=lambda peak: peak.total)


def _held(dims: Dims, trained: Trained) -> dict[str, int]:
    """What is there from the first step to the last."""
    n = trained.parameters(dims)
    moments = int(4 * n * MOMENTS[trained.optimizer])
    if trained.fine_tune_type == "full":
        masters = 4 * n if dims.width < 4 else 0  # in float32 the model's own weights are the masters
        started = dims.width * n
        return {"weights": dims.weights, "starting weights, float32 masters": masters + started, "moments": moments}
    copy = dims.width * n if dims.width < 4 else 0
    started = dims.width * n if trained.from_adapter else 0
    return {"weights": dims.weights, "adapter, float32 masters": 4 * n + copy + started, "moments": moments}


# --- gradients ---


def _activations(dims: Dims, trained: Trained, shape: Shape) -> dict[str, int]:
    first = trained.first(dims)
    inside, last = dims.layers - first, dims.layers - 1
    prompts, rows = shape.n * shape.prompt, shape.n * sum(shape.rows)
    kept = {layer: _kept(dims, trained, layer) for layer in {first, last}}  # all but the last are alike
    of_rows, of_prompts = kept[last] * rows, kept[first] * prompts
    served = sum(shape.n * shape.prompt * 2 * dims.keys for _ in shape.rows)
    attention = _attention(dims, trained, shape)
    final = 2 * dims.hidden * prompts  # of the prompts the last layer only makes keys and values
    if not trained.grad_checkpoint:
        whole = inside * (of_rows + served) + (inside - 1) * of_prompts + final
        scored = inside * attention.kept - attention.kept_of_prompts
        working = _backward(dims, trained, shape) + attention.working
    else:
        whole = inside * (dims.hidden * (rows + prompts) + served + 2 * dims.keys * prompts)
        between = max(of_rows + served, of_prompts)
        scored = 0
        layer = _backward(dims, trained, shape) + attention.working + dims.width * between + attention.kept
        working = int(CHECKPOINTED_LAYERS * layer)
    head = _head(dims, shape, trained.on_cpu)
    parts = {
        "kept for the backward pass": dims.width * whole,
        "attention scores": scored,
    }
    if head >= working:
        return {**parts, "head": head}
    return {**parts, "backward pass of a layer": working}


def _kept(dims: Dims, trained: Trained, layer: int) -> int:
    """Numbers a position that a layer keeps, without served keys and scores of attention."""
    adapted = [matrix for matrix in trained.adapted(dims) if matrix.layer == layer]
    inputs: dict[str, int] = {}
    for matrix in adapted:
        active = dims.experts if matrix.copies > 1 and _reads(matrix) == "mlp inner" else 1
        inputs[_reads(matrix)] = max(inputs.get(_reads(matrix), 0), active * matrix.inputs)
    numbers = dims.norms * dims.hidden + sum(inputs.values())
    numbers += dims.queries + 2 * dims.keys + (dims.queries + dims.keys if dims.head_norms else 0)
    numbers += dims.queries if trained.blocks else 0  # attention's result, in its own layout
    swiglu = SWIGLU_KEPT_ON_CPU if trained.on_cpu else SWIGLU_KEPT
    numbers += (swiglu if dims.swiglu else MLP_KEPT) * dims.inner * dims.experts
    if dims.experts > 1:
        numbers += 2 * dims.experts * dims.hidden  # each expert's input and output
    narrow = [trained.rank * (dims.experts if matrix.copies > 1 else 1) for matrix in adapted]
    numbers += sum(narrow)
    if trained.dropout:
        numbers += sum(matrix.inputs for matrix in adapted)
    if trained.fine_tune_type == "dora":
        numbers += sum(matrix.outputs for matrix in adapted)
    return numbers


def _reads(matrix: Matrix) -> str:
    return next((what for what, pattern in _READS if pattern.search(matrix.name)), matrix.name)


@dataclass(frozen=True, slots=True)
class _Attention:
    """Bytes of one layer: kept (of prompts apart, too), and alive while the largest call runs."""

    kept: int
    kept_of_prompts: int
    working: int


def _attention(dims: Dims, trained: Trained, shape: Shape) -> _Attention:
    def call(queries: int, keys: int) -> tuple[int, int]:
        found = scores(
            rows=shape.n, heads=dims.heads, queries=queries, keys=keys, width=dims.width, blocks=trained.blocks
        )
        return found.kept * (3 if dims.capped else 1), found.working

    prompts = call(shape.prompt, shape.prompt) if shape.prompt else (0, 0)
    rows = [call(length, shape.prompt + length) for length in shape.rows]
    return _Attention(
        kept=prompts[0] + sum(kept for kept, _ in rows),
        kept_of_prompts=prompts[0],
        working=max(working for _, working in [prompts, *rows]),
    )


def _backward(dims: Dims, trained: Trained, shape: Shape) -> int:
    """Bytes that the backward pass of one layer has at once, without scores."""
    positions = shape.n * max(shape.prompt, *shape.rows)
    numbers = BACKWARD_HIDDEN * dims.hidden + BACKWARD_INNER * dims.inner * dims.experts
    numbers += BACKWARD_QUERIES * dims.queries
    largest = max((matrix.inputs * matrix.outputs for matrix in dims.matrices if matrix.layer is not None), default=0)
    whole = 2 * largest if dims.quantised else 0
    whole += 4 * largest if trained.fine_tune_type == "dora" else 0
    return dims.width * (positions * numbers + whole)


def _head(dims: Dims, shape: Shape, on_cpu: bool) -> int:
    """Bytes of the head: the logits of a few chunks, and hidden rows beside them."""
    chunk = head_rows(dims.vocabulary, on_cpu=on_cpu)
    logits = min(HEAD_ARRAYS * shape.scored, HEAD_MOST * chunk) * dims.vocabulary * 4
    return logits + HEAD_HIDDEN * shape.n * sum(shape.rows) * dims.hidden * dims.width


# --- without gradients ---


def _forward(dims: Dims, shape: Shape, trained: Trained) -> dict[str, int]:
    positions = shape.n * (shape.prompt + sum(shape.rows))
    numbers = 6 * dims.hidden + 3 * dims.inner * dims.experts + 2 * dims.queries + 4 * dims.keys
    served = dims.layers * 2 * dims.keys * shape.n * shape.prompt
    most = max(
        scores(rows=shape.n, heads=dims.heads, queries=length, keys=shape.prompt + length, width=dims.width,
               blocks=trained.blocks).working
        for length in shape.rows
    )  # fmt: skip
    working = int(FORWARD_LAYERS * positions * numbers * dims.width) + most
    head_or_layer = max(working, _head(dims, shape, trained.on_cpu))
    return {"keys and values of prompts": dims.width * served, "head or a layer": head_or_layer}
