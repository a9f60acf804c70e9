"""What the quickstart trains and measures: the same pairs and as many steps for each, one thing changed at a
time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlxpref import sandbox
from mlxpref.config import Config
from mlxpref.config_layers import check_config

BETA = 0.3
PLAIN: Any = {"name": "dpo", "beta": BETA}
REGULARISED: Any = [{"name": "dpo", "beta": BETA, "label_smoothing": 0.1}, {"name": "sft", "weight": 1.0}]
"""DPO with smoothed labels and a likelihood term on the preferred response. The paper's recipe has neither;
on a model as small as this one the two keep replies readable."""


@dataclass(frozen=True, slots=True)
class Size:
    """How much of everything.

    Attributes:
        pairs: scored pairs to train on.
        steps: updates of each trial, of ``BATCH`` rows.
        requests: held-out requests that every model answers at every goal.
        judged: held-out pairs whose log-probs are looked at.
    """

    pairs: int
    steps: int
    requests: int
    judged: int


BATCH = 8
"""Rows of an update."""

MAX_LENGTH = 256
"""Tokens of a request and a reply."""

FULL = Size(pairs=2000, steps=500, requests=200, judged=200)
QUICK = Size(pairs=600, steps=150, requests=60, judged=100)


@dataclass(frozen=True, slots=True)
class Trial:
    """One model to train.

    Attributes:
        name: of its folder.
        title: for people.
        relabelled: train on relabelled pairs, goals in the prompts; else on the pairs as they are.
        objective: as a configuration has it.
    """

    name: str
    title: str
    relabelled: bool
    objective: Any


DPO = Trial("dpo", "DPO", False, PLAIN)
SAME_LOSS = Trial("dpo-same-loss", "DPO, same loss", False, REGULARISED)
REWARD_AUGMENTED = Trial("ra-dpo", "RA-DPO", True, REGULARISED)
TRIALS = (REWARD_AUGMENTED, DPO, SAME_LOSS)


def configuration(trial: Trial, data: Path, folder: Path, size: Size, *, seed: int, store: Path) -> Config:
    """The trial's run: everything but data, objective and folder is the same in all of them.

    Args:
        data: the pairs, or the folder they were relabelled into.
        store: of reference log-probs.
    """
    values: Mapping[str, Any] = {
        "model": {"path": str(sandbox.MODEL)},
        "data": {"source": str(data), "strict": True},
        "tokenization": {"max_length": MAX_LENGTH},
        "batching": {"batch_size": BATCH},
        "adapter": {"num_layers": -1, "lora_parameters": {"rank": 8, "scale": 2.0}},
        "objective": trial.objective,
        "reference": {"store": str(store)},
        "optimizer": {"learning_rate": 1e-3, "schedule": {"name": "cosine", "warmup_ratio": 0.05}},
        "training": {"iters": size.steps, "steps_per_report": 50, "save_every": 100, "keep_last": 1, "seed": seed},
        "output": {"adapter_path": str(folder)},
    }
    return check_config(values)
