"""What each process that ``test_torch_workers.py`` starts does: several runs, or one in which worker 1 is killed."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from mlxpref import torch_backend
from mlxpref.config_layers import load_config, parse_setting
from mlxpref.torch_backend.step import Step
from mlxpref.train import train

FULL = (
    "adapter={fine_tune_type: full, num_layers: -1}",
    "optimizer.learning_rate=1e-4",
    "training.grad_checkpoint=true",
)
FSDP = (*FULL, "training.fsdp=true")


def counted(name: str, found: list[int]) -> None:
    """Write down how many sums over all workers each call of a step makes."""
    plain = getattr(Step, name)

    def call(self: Step, *given: Any) -> Any:
        before = self.workers.n_sums
        report = plain(self, *given)
        found.append(self.workers.n_sums - before)
        return report

    setattr(Step, name, call)


def killed_at(update: int) -> None:
    """End this process as a lost machine would, in the middle of an update."""
    plain, done = Step._differentiated, [0]

    def differentiated(self: Step, batch: Any) -> Any:
        done[0] += 1
        if done[0] == update:
            os.kill(os.getpid(), signal.SIGKILL)
        return plain(self, batch)

    Step._differentiated = differentiated  # type: ignore[method-assign]  # a stand-in


def several(folder: Path) -> None:
    said: dict[str, Any] = {}
    updates: list[int] = []
    evaluations: list[int] = []
    counted("__call__", updates)
    counted("evaluate", evaluations)

    def run(name: str, *settings: str, resume: bool = False) -> None:
        updates.clear(), evaluations.clear()
        changed = [f"output.adapter_path={folder / name}", *settings]
        result = train(load_config(folder / "run.yaml", [parse_setting(text) for text in changed]), resume=resume)
        said[name] = {"step": result.step, "updates": list(updates), "evaluations": list(evaluations)}

    run("dpo")
    run("kto", "objective=kto")
    run("fsdp", *FSDP)
    run("fsdp-kto", *FSDP, "objective=kto", "training.iters=3")
    run("begun", *FSDP, resume=True)
    (folder / f"said-{torch_backend.workers().rank}.json").write_text(json.dumps(said))


def main() -> None:
    what, folder, *arguments = sys.argv[1:]
    if what == "several":
        several(Path(folder))
        return
    from mlxpref.cli import main as command

    if os.environ["RANK"] == "1":
        killed_at(6)
    command(arguments, prog_name="mlxpref")


if __name__ == "__main__":
    main()
