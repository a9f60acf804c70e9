"""Plant faults in one backend, and see which rows of ``mlxpref parity`` find them.

    python scripts/plant_faults.py --model qwen3 --steps 10

A check that has never failed proves nothing. Each fault here is one that such code has had: what is planted is the
smallest change that makes it, around a backend's own functions, so that all else stays as it is. Exit code 1 if a
fault is not found, or if the comparison fails without any.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mlxpref import backends
from mlxpref.objectives import resolve_objective
from mlxpref.parity import Row, Settings, compare_traces
from mlxpref.parity.cases import Case, built_in_models, prepare_case, run_cases, with_fitting_scale
from mlxpref.records import Batch, Logps, MicroBatch

OBJECTIVE = {"name": "dpo", "label_smoothing": 0.1}


class Faulty:
    """A backend some of whose functions are replaced."""

    def __init__(self, backend: Any, **replaced: Callable[..., Any]):
        self._backend = backend
        vars(self).update(replaced)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)


class FaultyStep:
    """A step that sees every batch through ``change``."""

    def __init__(self, step: Any, change: Callable[[Batch], Batch]):
        self._step, self._change = step, change

    def __call__(self, batch: Batch, learning_rate: float) -> Any:
        return self._step(self._change(batch), learning_rate)

    def evaluate(self, batch: Batch) -> Any:
        return self._step.evaluate(self._change(batch))

    def gradients(self, batch: Batch) -> Any:
        return self._step.gradients(self._change(batch))


# --- the faults ---


def mask_shifted(backend: Any) -> Faulty:
    """Every scored token is the one before: the prompt's last is scored, and the end of the turn is not."""

    def shifted(part: MicroBatch) -> MicroBatch:
        flat = np.concatenate([np.asarray(shelf.inputs).ravel() for shelf in part.shelves])
        n = int(np.asarray(part.mask).sum())
        scored, targets = np.array(part.scored), np.array(part.targets)
        targets[:n] = flat[scored[:n]]
        scored[:n] = np.maximum(scored[:n] - 1, 0)
        return part._replace(scored=scored, targets=targets)

    def token_logps(policy: Any, micro_batch: MicroBatch, *, reference: bool = False) -> Logps:
        found: Logps = backend.token_logps(policy, shifted(micro_batch), reference=reference)
        return found

    def make_step(*given: Any, **options: Any) -> FaultyStep:
        step = backend.make_step(*given, **options)
        return FaultyStep(step, lambda batch: batch._replace(parts=tuple(map(shifted, batch.parts))))

    return Faulty(backend, token_logps=token_logps, make_step=make_step)


def scale_doubled(backend: Any) -> Faulty:
    """The low-rank term counts twice."""

    def load_policy(path: str, *, lora_parameters: Mapping[str, Any], **options: Any) -> Any:
        doubled = {**lora_parameters, "scale": 2 * lora_parameters["scale"]}
        return backend.load_policy(path, lora_parameters=doubled, **options)

    return Faulty(backend, load_policy=load_policy)


def bias_correction_off(backend: Any) -> Faulty:
    """Adam's moments start from zero and are taken as they are, which is MLX's own default."""
    return _stepping(backend, lambda options: {"optimizer_options": {"bias_correction": False}})


def weight_decay_off(backend: Any) -> Faulty:
    """An accepted option that does nothing."""
    return _stepping(backend, lambda options: {"weight_decay": 0.0})


def clipping_off(backend: Any) -> Faulty:
    """Gradients of any norm are taken whole."""
    return _stepping(backend, lambda options: {"max_grad_norm": None})


def _stepping(backend: Any, change: Callable[[Mapping[str, Any]], dict[str, Any]]) -> Faulty:
    def make_step(policy: Any, objective: Any, **options: Any) -> Any:
        return backend.make_step(policy, objective, **{**options, **change(options)})

    return Faulty(backend, make_step=make_step)


def smoothing_dropped(backend: Any) -> Faulty:
    """The loss forgets its option."""

    def make_step(policy: Any, objective: Any, **options: Any) -> Any:
        spec = [{**term, "label_smoothing": 0.0} for term in objective.spec]
        return backend.make_step(policy, resolve_objective(spec), **options)

    return Faulty(backend, make_step=make_step)


def reference_with_dropout(backend: Any) -> Faulty:
    """The reference's forward pass runs as in training: one in a hundred of its embeddings' values is dropped."""
    import torch

    def dropped(module: Any, inputs: Any, output: Any) -> Any:
        return torch.nn.functional.dropout(output, 0.01)

    def token_logps(policy: Any, micro_batch: MicroBatch, *, reference: bool = False) -> Logps:
        hook = policy.model.get_input_embeddings().register_forward_hook(dropped) if reference else None
        try:
            found: Logps = backend.token_logps(policy, micro_batch, reference=reference)
        finally:
            if hook is not None:
                hook.remove()
        return found

    return Faulty(backend, token_logps=token_logps)


def wrong_rope_base(backend: Any) -> Faulty:
    """Positions turn at other speeds: the base of the rotary embedding is a tenth larger."""

    def load_policy(path: str, **options: Any) -> Any:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(shutil.copytree(path, Path(scratch) / "model"))
            file = folder / "config.json"
            config = json.loads(file.read_text(encoding="utf-8"))
            file.write_text(json.dumps({**config, "rope_theta": 1.1 * config["rope_theta"]}), encoding="utf-8")
            return backend.load_policy(str(folder), **options)

    return Faulty(backend, load_policy=load_policy)


FAULTS: dict[str, Callable[[Any], Faulty]] = {
    "mask shifted by one": mask_shifted,
    "LoRA scale ×2": scale_doubled,
    "bias correction off": bias_correction_off,
    "label smoothing dropped": smoothing_dropped,
    "reference with dropout": reference_with_dropout,
    "wrong rope base": wrong_rope_base,
    "weight decay off": weight_decay_off,
    "clipping off": clipping_off,
}
"""Fault → what plants it in a backend."""

OF_TORCH = ("reference with dropout",)
"""Those that reach into PyTorch's modules."""


def found_by(sound: Mapping[str, np.ndarray], faulty: Any, case: Case) -> list[Row]:
    """The rows of the comparison, those beyond their tolerance first, farthest beyond first."""
    ((_, arrays),) = run_cases(faulty, [case])
    return sorted(compare_traces(sound, arrays), key=lambda row: -row.excess)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="qwen3", help="built-in model (default: qwen3)")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--sound", default="mlx", help="backend without faults (default: mlx)")
    parser.add_argument("--faulty", default="torch", help="backend that is given them (default: torch)")
    given = parser.parse_args(arguments)
    sound, other = backends.get(given.sound), backends.get(given.faulty)
    with tempfile.TemporaryDirectory() as scratch:
        (model,) = built_in_models(Path(scratch), [given.model])
        settings = Settings(objective=OBJECTIVE, steps=given.steps)
        (case,) = with_fitting_scale(sound, [prepare_case(model, settings)])
        ((_, arrays),) = run_cases(sound, [case])
        plants: dict[str, Callable[[Any], Any]] = {"none": lambda backend: backend, **FAULTS}
        if given.faulty != "torch":
            for fault in OF_TORCH:
                del plants[fault]
        missed = 0
        for fault, plant in plants.items():
            rows = found_by(arrays, plant(other), case)
            beyond = [row for row in rows if not row.ok]
            missed += bool(beyond) == (fault == "none")
            print(_line(fault, beyond, rows), flush=True)
    return int(missed > 0)


def _line(fault: str, beyond: Sequence[Row], rows: Sequence[Row]) -> str:
    shown = [f"{row.quantity} {row.largest:.1e} ({row.excess:,.0f} times)" for row in beyond[:4]]
    more = f"; {len(beyond) - 4} more" if len(beyond) > 4 else ""
    said = "; ".join(shown) + more if beyond else f"nothing; nearest is {rows[0].quantity}, {rows[0].excess:.2f} times"
    return f"| {fault} | {len(beyond)} of {len(rows)} | {said} |"


if __name__ == "__main__":
    sys.exit(main())
