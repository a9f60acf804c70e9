"""Weights of the base that PEFT saves beside the factors: nothing to convert, as long as they are the base's."""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np

from mlxpref.conversion.bases import Base
from mlxpref.conversion.folders import PeftAdapter
from mlxpref.errors import ModelError
from mlxpref.files import safetensors_header
from mlxpref.hub import model_folder
from mlxpref.names import is_token_table
from mlxpref.tensors import FLOATS, Tensor, tensors_of

ROUNDING = 2.0**-7
"""Relative; the copy may be in bfloat16 where the base is not."""


def altered(peft: PeftAdapter, base: Base, name: re.Pattern[str]) -> list[str]:
    """Copies that are not what the base has: resized or trained. mlx-lm's adapters cannot hold them.

    Args:
        name: matches a copy's name; its first group is the module.
    """
    copies = {match[1]: tensor for key, tensor in peft.tensors.items() if (match := name.fullmatch(key))}
    if not copies:
        return []
    weights = _weights(base)
    return [
        f"{module}: saved whole, {tensor.shape}, and not as the base model has it (resized, or trained); mlx-lm's "
        "adapters hold factors alone"
        for module, tensor in copies.items()
        if not _same(tensor, _own(module, weights))
    ]


def _weights(base: Base) -> dict[str, Tensor]:
    """All tensors of the base that are floating-point."""
    found: dict[str, Tensor] = {}
    for file in sorted(model_folder(base.name, revision=base.revision).glob("model*.safetensors")):
        try:
            found |= tensors_of(file, safetensors_header(file))
        except (OSError, ValueError) as error:
            raise ModelError(f"{file}: damaged or cut off ({error}); fetch the model again") from error
    return {name: tensor for name, tensor in found.items() if tensor.dtype in FLOATS}


def _own(module: str, weights: Mapping[str, Tensor]) -> Tensor | None:
    """The base's weight of a module; its file may leave out the path's beginning. A tied head is the embedding."""
    path = f".{module}.weight"
    there = next((tensor for name, tensor in weights.items() if path.endswith(f".{name}")), None)
    if there is None and module.endswith("lm_head"):
        return next((weights[name] for name in weights if is_token_table(name.removesuffix(".weight"))), None)
    return there


def _same(copy: Tensor, own: Tensor | None) -> bool:
    if own is None or own.shape != copy.shape:
        return False
    return bool(np.allclose(copy.read(), own.read(), rtol=ROUNDING, atol=1e-7))
