"""What each worker of a group does for ``test_workers.py``: several runs one after another, or one to be killed."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np

from mlxpref import mlx_backend
from mlxpref.config_layers import load_config, parse_setting
from mlxpref.data.batching import collate_step
from mlxpref.data.plan import plan_steps
from mlxpref.errors import MlxprefError
from mlxpref.mlx_backend.step import Step
from mlxpref.objectives import resolve_objective
from mlxpref.records import Tokenized
from mlxpref.train import train
from mlxpref.workers import Workers

counts: list[tuple[str, int]] = []
"""(what, sums over all workers that it made), of every update and evaluated batch."""


def count_sums() -> None:
    def counting(name: str, what: str) -> None:
        plain = getattr(Step, name)

        def call(self: Step, *given: Any) -> Any:
            before = self.workers.n_sums
            report = plain(self, *given)
            counts.append((what, self.workers.n_sums - before))
            return report

        setattr(Step, name, call)

    counting("__call__", "update")
    counting("evaluate", "evaluation")


def signal_at(update: int, number: int) -> None:
    """Send this process a signal in the middle of an update, between its gradients and the sum."""
    plain, done = Step._added, [0]

    def added(self: Step, trees: list[Any]) -> list[Any]:
        done[0] += isinstance(trees[0], dict) and "tokens" not in trees[0]
        if done[0] == update:
            done[0] += 1
            os.kill(os.getpid(), number)
        return plain(self, trees)

    Step._added = added  # type: ignore[method-assign]  # a stand-in


# --- a step whose random state and reference depend on the part ---


def rows_of(n: int) -> list[Tokenized]:
    draw = np.random.default_rng(0)

    def ids() -> np.ndarray:
        return draw.integers(3, 300, draw.integers(4, 40)).astype(np.int32)

    return [Tokenized(ids(), (ids(), ids()), example_id=str(i)) for i in range(n)]


def moving_steps(model: str, objective: str, workers: Workers, *, n_workers: int) -> dict[str, np.ndarray]:
    """Trained values after four updates with dropout, towards a reference that moves in every one."""
    lora = {"rank": 4, "scale": 4.0, "dropout": 0.2}
    policy = mlx_backend.load_policy(model, num_layers=2, lora_parameters=lora)
    step = mlx_backend.make_step(
        policy,
        resolve_objective(objective),
        optimizer="sgd",
        reference_update={"kind": "soft", "alpha": 0.5, "every": 1},
        workers=workers,
    )
    rows = rows_of(14)
    plan = plan_steps(rows, batch_size=5, iters=4, micro_batch_tokens=400, n_workers=n_workers)
    for parts in plan.steps:
        step(collate_step(rows, parts), 0.5)
    return policy.values()


# --- in a group ---


def several_runs(folder: Path) -> None:
    """Runs whose results the tests compare with one process's."""
    group = mlx_backend.workers()
    said: dict[str, Any] = {"size": group.size}
    count_sums()

    def run(name: str, *settings: str, resume: bool = False) -> None:
        counts.clear()
        changed = [f"output.adapter_path={folder / name}", *settings]
        config = load_config(folder / "run.yaml", [parse_setting(text) for text in changed])
        try:
            result = train(config, resume=resume)
            said[name] = {"step": result.step, "interrupted": result.interrupted, "counts": list(counts)}
        except MlxprefError as error:
            said[name] = {"error": str(error), "type": type(error).__name__}

    run("dpo")
    run("kto", "objective=kto")
    run("single", "batching.batch_size=1", "training.iters=3", "training.steps_per_eval=0")
    run("onward", "output.adapter_path=" + str(folder / "begun"), resume=True)
    run("other", f"training.seed={group.rank}")
    for objective in ("dpo", "kto"):
        values = moving_steps(str(folder / "model"), objective, group, n_workers=2)
        np.savez(folder / f"moving-{objective}-{group.rank}.npz", **values)
    if group.rank == 1:
        signal_at(3, signal.SIGINT)
    run("stopped")
    (folder / f"said-{group.rank}.json").write_text(json.dumps(said))


def main() -> None:
    what, folder, *arguments = sys.argv[1:]
    if what == "several":
        several_runs(Path(folder))
        return
    # The command itself, worker 1 of which is killed in its sixth update.
    from mlxpref.cli import main as command

    if os.environ["MLX_RANK"] == "1":
        signal_at(6, signal.SIGKILL)
    command(arguments, prog_name="mlxpref")


if __name__ == "__main__":
    main()
