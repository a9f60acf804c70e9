"""Low-rank terms of several modules that read the same input, in one product.

mlx-lm's LoRA layer computes ``y + scale · ((x A) B)`` for itself. Queries, keys and values read one input, and so do
the two halves of a gated MLP: their factors A stand side by side here, x is read once forward and once backward, and
the scale is put on the narrow product. The wide product is added where y already is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.tuner.lora import LoRALinear

TOGETHER = (("q_proj", "k_proj", "v_proj"), ("wq", "wk", "wv"), ("gate_proj", "up_proj"), ("w1", "w3"))
"""Names of sister modules that are called with one input."""

Groups = Mapping[int, tuple[LoRALinear, ...]]
"""By ``id`` of a module: all modules that read its input, itself included."""


def groups_of(model: nn.Module) -> Groups:
    """Which of a model's LoRA layers share an input, by the names they have in their parent."""
    found: dict[int, tuple[LoRALinear, ...]] = {}
    for _, parent in model.named_modules():
        for names in TOGETHER:
            sisters = tuple(parent[name] for name in names if name in parent and type(parent[name]) is LoRALinear)
            if len(sisters) > 1 and len({one.lora_a.shape[0] for one in sisters}) == 1:
                found |= {id(one): sisters for one in sisters}
    return found


class LowRank:
    """How LoRA layers are computed while one pass is traced."""

    def __init__(self, groups: Groups):
        self._groups = groups
        self._known: dict[int, tuple[mx.array, mx.array]] = {}

    def __call__(self, module: LoRALinear, x: mx.array) -> mx.array:
        """(…, D) → (…, O), what the module's own call gives."""
        return mx.addmm(module.linear(x), self._narrow(module, x), module.lora_b.astype(x.dtype))

    def _narrow(self, module: LoRALinear, x: mx.array) -> mx.array:
        """(…, r): scale · x A."""
        dropped = module.training and module.dropout._p_1 < 1
        sisters = (module,) if dropped else self._groups.get(id(module), (module,))
        if len(sisters) == 1:
            return module.scale * (module.dropout(x) @ module.lora_a.astype(x.dtype))
        known = self._known.get(id(module))
        if known is None or known[0] is not x:
            self._compute(sisters, x)
            known = self._known[id(module)]
        return known[1]

    def _compute(self, sisters: Sequence[LoRALinear], x: mx.array) -> None:
        factors = mx.concatenate([(one.scale * one.lora_a).astype(x.dtype) for one in sisters], axis=1)
        widths = [one.lora_a.shape[1] for one in sisters]
        cuts = [sum(widths[: index + 1]) for index in range(len(widths) - 1)]
        for one, narrow in zip(sisters, mx.split(x @ factors, cuts, axis=-1), strict=True):
            self._known[id(one)] = (x, narrow)
