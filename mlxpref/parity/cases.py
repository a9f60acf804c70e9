"""Cases of a comparison: which model, on which rows, with which objective; and what a backend computes of each."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from mlxpref import sandbox
from mlxpref.config import Config
from mlxpref.config_layers import check_config
from mlxpref.folders import model_config
from mlxpref.hub import model_folder
from mlxpref.objectives import TABLE, Objective, resolve_objective
from mlxpref.parity.models import BUILT_IN, write_model
from mlxpref.parity.trace import Settings, open_policy, run_trace, token_logps, without_experts
from mlxpref.prepare import prepare
from mlxpref.records import Tokenized

SANDBOX = "sandbox"
"""Name of the sandbox's own model among the built-in ones."""

OBJECTIVES: tuple[Any, ...] = (
    {"name": "dpo", "label_smoothing": 0.1}, "simpo", {"name": "ipo", "beta": 0.5}, "kto", "lipo", "ld_dpo",
)  # fmt: skip
"""One of each kind: of the margin, without a reference, with a fixed target, coupled over the batch, of lists, by
token. DPO's labels are smoothed so that a backend that drops the option is found."""

EXAMPLES = 16
"""Of the sandbox's held-out data; each pair gives two rows."""

MAX_LENGTH = 256

CHANGE = 2.5
"""Nats by which an adapter changes the log-prob of a response at most, root mean square."""

SOME = 8
"""Rows that are enough to see it."""

OnStep = Callable[[str, int, int], None]
"""Called with what is computed, updates done, updates to do."""


@dataclass(frozen=True, slots=True)
class Model:
    """A model to compare.

    Attributes:
        name: for people, and in exports.
        path: its folder, or hub id.
        built_in: the architecture, of a model that is written anew on every machine; "sandbox"; or None.
    """

    name: str
    path: str
    built_in: str | None = None


def built_in_models(folder: Path, names: Collection[str] | None = None) -> list[Model]:
    """The built-in models, written into ``folder``; by default all of them, the sandbox's own last."""
    wanted = (*BUILT_IN, SANDBOX) if names is None else names
    return [
        Model(name, str(sandbox.MODEL if name == SANDBOX else write_model(name, folder / name)), name)
        for name in wanted
    ]


@dataclass(frozen=True, slots=True)
class Case:
    """One model and objective with the rows they meet.

    Attributes:
        fingerprint: of the model's config and weights; "" until a backend has loaded it.
        n_groups: different values of the column ``groups``.
        told: what the backend said of the policy: ``way``, ``parameters``, ``trainable``.
    """

    model: Model
    settings: Settings
    rows: Sequence[Tokenized]
    n_groups: int = 1
    fingerprint: str = ""
    told: Mapping[str, Any] | None = None

    @property
    def objective(self) -> str:
        return resolve_objective(self.settings.objective).name


def prepare_case(
    model: Model, settings: Settings, data: Mapping[str, Any] | None = None, *, relabelled: bool = True
) -> Case:
    """Rows for an objective, tokenized for a model.

    Args:
        data: the section ``data`` of a configuration, and ``tokenization`` if wanted; without a ``source`` the
            sandbox's held-out pairs, or its lists where the objective reads lists.
        relabelled: write scores into the prompts as goals.

    Raises:
        MlxprefError: what ``prepare`` says of data that lack something.
    """
    objective = resolve_objective(settings.objective)
    section = dict(data or {})
    if "source" not in section:
        section |= _data(objective)
    found = prepare(_config(model.path, section, relabelled), needs=objective.needs)
    config = model_config(model_folder(model.path, weights=False))
    return Case(model, without_experts(config, settings.resolved()), found.train, max(1, len(found.groups)))


def _data(objective: Objective) -> dict[str, Any]:
    lists = any(TABLE[spec["name"]].lists for spec in objective.spec)
    examples = EXAMPLES // 2 if lists else EXAMPLES  # a list gives a row for each of its scores
    return {"source": str(sandbox.LISTS if lists else sandbox.TEST), "limit": examples}


def _config(path: str, data: Mapping[str, Any], relabelled: bool) -> Config:
    sections = dict(data)
    tokenization = sections.pop("tokenization", {"max_length": MAX_LENGTH})
    values = {"model": {"path": path}, "data": sections, "tokenization": tokenization}
    return check_config({**values, "relabel": {}} if relabelled else values)


def with_fitting_scale(backend: ModuleType, cases: Sequence[Case]) -> list[Case]:
    """Cases of one model, with an adapter that changes the log-prob of a response by some nats.

    Too small, and both halves of a relabelled pair have the same slope towards opposite sides: the batch's gradient
    is the rounding that is left. Too large, and the model says nonsense. How much a deviation of 0.1 does depends on
    the model by orders of magnitude, so the scale is found: the power of two that a trace then has in its settings.
    """
    found: dict[str, float] = {}
    fitted = []
    for case in cases:
        key = repr(replace(case.settings, objective=None))
        if key not in found:
            with memory_policy(backend):
                found[key] = _fitting_scale(backend, case)
        lora = {**case.settings.lora_parameters, "scale": found[key]}
        fitted.append(replace(case, settings=replace(case.settings, lora_parameters=lora)))
    return fitted


def _fitting_scale(backend: ModuleType, case: Case) -> float:
    rows = case.rows[:SOME]
    policy = open_case(backend, case)
    values = policy.values()
    reference = _sums(token_logps(backend, policy, rows, reference=True))
    scale = 1.0
    for power in range(6, -10, -1):
        scale = 2.0**power
        factor = scale / float(case.settings.lora_parameters["scale"])
        policy.set_values({name: v * factor if name.endswith("lora_b") else v for name, v in values.items()})
        changes = _sums(token_logps(backend, policy, rows)) - reference
        if math.sqrt(float(np.mean(changes**2))) <= CHANGE:
            break
    return scale


def _sums(logps: Sequence[Sequence[np.ndarray]]) -> np.ndarray:
    return np.array([values.sum() for row in logps for values in row])


def run_cases(
    backend: ModuleType, cases: Sequence[Case], on_step: OnStep | None = None
) -> Iterator[tuple[Case, dict[str, np.ndarray]]]:
    """What a backend computes of cases of one model, which it loads once for each kind of adapter.

    Yields:
        the case with the model's fingerprint, and its arrays.
    """
    opened: dict[str, Any] = {}
    for case in cases:
        with memory_policy(backend):
            key = repr((case.model.path, replace(case.settings, objective=None)))
            if key not in opened:
                opened.clear()  # one model in memory at a time
                opened[key] = open_case(backend, case)
            policy = opened[key]
            told = {"way": policy.way, "parameters": policy.n_parameters, "trainable": policy.n_trainable}
            found = replace(case, fingerprint=policy.base_fingerprint, told=told)
            report = None if on_step is None else _reporter(on_step, f"{case.model.name}, {case.objective}")
            arrays = run_trace(backend, policy, case.rows, case.settings, n_groups=case.n_groups, on_step=report)
        yield found, arrays


def open_case(backend: ModuleType, case: Case) -> Any:
    """The case's policy in a backend."""
    return open_policy(backend, case.model.path, case.settings)


def _reporter(on_step: OnStep, what: str) -> Callable[[int, int], None]:
    return lambda done, total: on_step(what, done, total)


@contextmanager
def memory_policy(backend: Any) -> Iterator[None]:
    """The backend's own, where it has one."""
    if hasattr(backend, "set_memory_policy"):
        with backend.set_memory_policy():
            yield
    else:
        yield
