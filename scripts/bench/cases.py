"""One comparison: contestants of one group, in one shape, on one BLAS; and what its figures come to."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from bench.contestants import TABLE, missing
from bench.flops import minimum_flops
from bench.measuring import REST, Measured, disagreement, environment, measure
from bench.model import Dims, lora_start, write_model
from bench.pairs import Lengths, Pair, make_pairs, save_pairs, shape_lengths
from bench.worker import WITNESS_FILE, Task

WITNESS = "plain"
"""Whose gradient, in float64, all are compared with."""

OWN = ("mlxpref", "plain")
"""Whose failure ends a comparison; another's is reported."""

TOLERANCE = 1e-5
"""Relative; above it two gradients are not of one loss."""

REFERENCE_PAIRS = 40
"""Pairs of a reference pass: many more than a step has, as in a run, so that each finds others of its length."""


@dataclass(frozen=True)
class Setting:
    """What all contestants of a comparison share."""

    dims: Dims
    shape: str
    blas: str = "preloaded"
    batch_size: int = 4
    repeats: int = 5
    warm_up: int = 2
    threads: int = 2
    micro_batch_tokens: int = 8192
    grad_checkpoint: bool = False
    rest: float = REST
    seconds: float = float("inf")


@dataclass
class Case:
    """A comparison's figures.

    Attributes:
        measured: by contestant.
        flops: the least one step needs.
        derived: by the keys of ``tables.LINES``.
        skipped: one line for each contestant that is not here or did not get to its first step.
    """

    setting: Setting
    group: str
    measured: dict[str, Measured]
    flops: float
    derived: dict[str, float]
    skipped: list[str] = field(default_factory=list)

    @property
    def disagreeing(self) -> list[str]:
        """Contestants whose gradient is another than the witness's."""
        found = ((name, one.agreement) for name, one in self.measured.items())
        return [name for name, apart in found if apart is not None and not apart <= TOLERANCE]

    def as_json(self) -> dict[str, Any]:
        measured = {name: one.summary() for name, one in self.measured.items()}
        return {**asdict(self.setting), "group": self.group, "minimum_flops": self.flops, "derived": self.derived,
                "disagreeing": self.disagreeing, "skipped": self.skipped, "measured": measured}  # fmt: skip


def present(names: Sequence[str]) -> tuple[list[str], list[str]]:
    """Those of the contestants that can run here, and a line for each of the others."""
    said = {name: missing(name) for name in names}
    return [name for name, why in said.items() if why is None], [why for why in said.values() if why]


def run_case(
    setting: Setting, names: Sequence[str], folder: Path, watch: Callable[[str], None] = lambda line: None
) -> Case:
    """Measure contestants of one group; the witness is among them, measured or not.

    Args:
        folder: for the model, the pairs and the gradients.
    """
    groups = {TABLE[name].group for name in names}
    if len(groups) != 1:
        raise ValueError(f"contestants of several groups: {sorted(names)}")
    pairs = case_pairs(setting)
    tasks = tasks_of(setting, [*names, *({WITNESS} - {*names})], pairs, folder)
    env = environment(blas=setting.blas, threads=setting.threads)
    if WITNESS not in names:  # its gradient alone: it is not timed beside another library's
        measure(tasks[-1:], folder, env, repeats=0, warm_up=0, watch=watch)
        tasks = tasks[:-1]
    also = {"mlxpref": ("reference", "rate"), "mlxpref-torch": ("reference",)}
    failed: list[str] = []
    found = measure(
        tasks, folder, env, repeats=setting.repeats, warm_up=setting.warm_up, rest=setting.rest, also=also,
        seconds=setting.seconds, watch=watch,
        optional={name: failed.append for name in names if not name.startswith(OWN)},
    )  # fmt: skip
    for task in tasks:
        if task.contestant in found and task.gradients and Path(task.gradients).exists():
            found[task.contestant].agreement = disagreement(Path(task.gradients), folder / WITNESS_FILE)
    flops = minimum_flops(folder / "model", pairs[: setting.batch_size])
    return Case(setting, groups.pop(), found, flops, derived(found, setting.batch_size, flops), failed)


def case_pairs(setting: Setting) -> list[Pair]:
    """The pairs of the step, and after them more of their kind for the reference pass."""
    lengths = shape_lengths(setting.shape, setting.batch_size)
    more = shape_lengths(setting.shape, max(0, REFERENCE_PAIRS - len(lengths)), seed=1)
    return make_pairs([*lengths, *more], setting.dims.vocabulary)


def tasks_of(
    setting: Setting, names: Sequence[str], pairs: Sequence[Pair | Lengths], folder: Path, *, gradients: bool = True
) -> list[Task]:
    """Write what the contestants read into the folder; a task for each."""
    write_model(setting.dims, folder / "model")
    np.savez(folder / "lora.npz", **lora_start(setting.dims))
    save_pairs(pairs, folder / "pairs.npz")
    files = {key: str(folder / name) for key, name in
             (("model", "model"), ("lora", "lora.npz"), ("pairs", "pairs.npz"))}  # fmt: skip
    return [
        Task(
            name, **files, gradients=str(folder / f"{name}.npz") if gradients and name != "sft" else None,
            batch_size=setting.batch_size, micro_batch_tokens=setting.micro_batch_tokens,
            grad_checkpoint=setting.grad_checkpoint, threads=setting.threads,
        )
        for name in names
    ]  # fmt: skip


def derived(found: Mapping[str, Measured], batch_size: int, flops: float) -> dict[str, float]:
    """The ratios that the acceptance lines are about, of those contestants that were measured."""
    wall = {name: float(np.median(one.wall)) for name, one in found.items()}
    ratios: dict[str, float] = {}
    if "mlxpref" in found:
        ours = found["mlxpref"]
        if "mlx-lm-lora" in found:
            ratios["step_vs_mlx_lm_lora"] = wall["mlx-lm-lora"] / wall["mlxpref"]
            ratios["memory_vs_mlx_lm_lora"] = ours.above / found["mlx-lm-lora"].above
        if "sft" in found:
            ratios["step_vs_sft"] = wall["mlxpref"] / wall["sft"]
        if "mlx-tune" in found:
            ratios["step_vs_mlx_tune"] = wall["mlx-tune"] / wall["mlxpref"]
        ratios["reference_pass"] = float(np.median(ours.other["wall_per_pair"])) * batch_size / wall["mlxpref"]
        ratios["padded"] = 1 / (1 - ours.facts["padding"])
        ratios["computed"] = ours.facts["slots"] / ours.facts["tokens"]
        ratios["matmul_share"] = flops / float(np.median(ours.other["rate"])) / wall["mlxpref"]
        ratios["agreement"] = _number(ours.agreement)
    if "mlxpref-torch" in found:
        for name, key in (("trl", "torch_vs_trl"), ("trl-precomputed", "torch_vs_trl_precomputed")):
            if name in found:
                ratios[key] = wall[name] / wall["mlxpref-torch"]
        ratios["torch_agreement"] = _number(found["mlxpref-torch"].agreement)
    return ratios


def _number(agreement: float | None) -> float:
    return float("nan") if agreement is None else agreement

