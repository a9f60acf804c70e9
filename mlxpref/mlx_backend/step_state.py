"""What a checkpoint keeps of a step besides the adapter: float32 masters, moments, random state, and what the
objective carries on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten, tree_map

from mlxpref.errors import RunError
from mlxpref.mlx_backend.adapter import write_safetensors

STATE = "step_state.safetensors"


def save(step: Any, folder: Path) -> None:
    """Write ``step_state.safetensors``: float32 masters, random state, what optimiser and objective carry from
    step to step, and a reference that moves."""
    state = {f"masters.{name}": value for name, value in step.policy.masters.items()}
    state |= {f"optimizer.{name}": value for name, value in tree_flatten(step.optimizer.state)}
    state |= {f"objective.{name}": value for name, value in tree_flatten(step.state)}
    if step.moving is not None:
        state |= {f"reference.{name}": value for name, value in step.moving.save().items()}
    state["random"] = step.random
    write_safetensors(folder / STATE, state)


def load(step: Any, folder: Path) -> None:
    """Take up what ``save`` wrote, bit for bit.

    Raises:
        RunError: the file is missing, damaged, or of a run with other parameters.
    """
    file = folder / STATE
    try:
        state = mx.load(str(file))
    except (RuntimeError, ValueError) as error:
        raise RunError(f"{file}: cannot be read ({error})") from error
    masters = {n.removeprefix("masters."): v for n, v in state.items() if n.startswith("masters.")}
    if {n: v.shape for n, v in masters.items()} != {n: v.shape for n, v in step.policy.masters.items()}:
        raise RunError(f"{file}: holds other parameters than this configuration trains")
    names = [f"optimizer.{name}" for name, _ in tree_flatten(step.optimizer.state)]
    if missing := [name for name in names if name not in state]:
        raise RunError(f"{file}: was written by another optimizer (no {missing[0]})")
    own = [f"objective.{name}" for name, _ in tree_flatten(step.state)]
    if missing := [name for name in own if name not in state]:
        raise RunError(f"{file}: was written by a run with another objective (no {missing[0]})")
    # In the order they had: sums over parameters, such as the gradient's norm, follow it to the last bit.
    step.policy.set_masters({name: masters[name] for name in step.policy.masters})
    known = iter(own)
    step.state = tree_map(lambda _: state[next(known)], step.state)
    if step.moving is not None:
        step.moving.load({n.removeprefix("reference."): v for n, v in state.items() if n.startswith("reference.")})
    moments = iter(names)  # parameter names hold dots: take the structure from the live state
    step.optimizer.state = tree_map(lambda _: state[next(moments)], step.optimizer.state)
    step.random = state["random"]
