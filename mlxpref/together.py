"""A run of several workers: worker 0 has the run folder, and the others have what it tells them."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from mlxpref.config import Config
from mlxpref.config_layers import flat
from mlxpref.data.plan import Plan
from mlxpref.runs import ADAPTER, STATE, Checkpoint, RunFolder, Write, open_run
from mlxpref.workers import Workers

OF_EACH_MACHINE = ("output.", "reference.store", "reference.previous", "model.path", "data.source", "data.valid",
                   "adapter.init_from")  # fmt: skip
"""Keys that say where a machine keeps something; what is there is compared, and not its name."""


class NoRunFolder(RunFolder):
    """The run folder as the other workers have it: they read and write nothing.

    Attributes:
        sharded: every worker holds a slice of the weights, and takes part in bringing them together to be saved.
    """

    def __init__(self, path: Path, *, sharded: bool = False) -> None:
        super().__init__(path)
        self.sharded = sharded

    def begin(self, config: str, facts: Mapping[str, Any]) -> None: ...

    def facts(self) -> dict[str, Any]:
        return {}

    def last_checkpoint(self) -> Checkpoint | None:
        return None

    def rewind(self, checkpoint: Checkpoint | None) -> None: ...

    def log(self, metrics: Mapping[str, Any]) -> None: ...

    def save(self, step: int, write: Write, state: Mapping[str, Any], *, keep_last: int | None) -> Path:
        return self._taken_part(write)

    def save_best(self, write: Write, facts: Mapping[str, Any]) -> Path:
        return self._taken_part(write)

    def _taken_part(self, write: Write) -> Path:
        if self.sharded:
            write(self.path)  # a backend writes sharded weights on worker 0 alone
        return self.path


@contextmanager
def run_folder(path: Path, *, resume: bool, workers: Workers, sharded: bool = False) -> Iterator[RunFolder]:
    """``open_run`` on worker 0, a stand-in on the others.

    Args:
        sharded: every worker holds a slice of the weights.
    """
    if workers.rank > 0:
        yield NoRunFolder(path, sharded=sharded)
        return
    with open_run(path, resume=resume) as run:
        yield run


@contextmanager
def shared_checkpoint(found: Checkpoint | None, workers: Workers) -> Iterator[Checkpoint | None]:
    """Worker 0's checkpoint, on every worker until the end of the block; no common disk is needed.

    Args:
        found: on worker 0, which keeps it.
    """
    if workers.size == 1:
        yield found
        return
    files = [] if found is None else [f for f in sorted(found.folder.iterdir()) if f.name not in (*ADAPTER, STATE)]
    own = None if found is None else [found.step, dict(found.state), [file.name for file in files]]
    told = json.loads(workers.share(json.dumps(own).encode()))
    with tempfile.TemporaryDirectory(prefix="mlxpref-") as aside:
        for index, name in enumerate(told[2] if told else ()):
            content = workers.share(files[index].read_bytes() if files else b"")
            if found is None:
                (Path(aside) / name).write_bytes(content)
        yield found or (Checkpoint(Path(aside), *told[:2]) if told else None)


def check_alike(workers: Workers, config: Config, data: str, policy: Any, plan: Plan) -> None:
    """RunError on every worker unless all have the same settings, data, weights and plan.

    Args:
        data: its fingerprint.
        policy: its trainable values are compared, too, unless it is trained whole.
    """
    if workers.size == 1:
        return
    values = {} if policy.fine_tune_type == "full" else policy.values()
    settings = {k: v for k, v in flat(config.as_dict()).items() if not k.startswith(OF_EACH_MACHINE)}
    workers.check_alike(
        {
            "version of mlxpref": version("mlxpref"),
            **{f"setting {key}": repr(value) for key, value in sorted(settings.items())},
            "data fingerprint": data,
            "weights fingerprint": policy.fingerprint,
            "first trainable weights": _digest(*(values[name] for name in sorted(values))),
            "plan": hashlib.sha256(repr(plan.steps).encode()).hexdigest(),
        },
        "the workers of a run must have the same settings, data and model; give each machine the same files:",
    )


def _digest(*arrays: np.ndarray) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def agreed(workers: Workers, metrics: Callable[[], Mapping[str, float]]) -> Mapping[str, float]:
    """Metrics that decide something, as worker 0 has them: machines of two kinds may differ in the last bit."""
    if workers.size == 1:
        return metrics()
    own = json.dumps(dict(metrics())) if workers.rank == 0 else ""
    return dict(json.loads(workers.share(own.encode())))
