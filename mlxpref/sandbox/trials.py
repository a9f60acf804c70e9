"""What the quickstart trains and measures: the same pairs and as many steps for each. Plain DPO and its version
with the same loss stand one and two changes away from the steered model; each control changes one thing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlxpref import sandbox
from mlxpref.config import Config
from mlxpref.config_layers import check_config

BETA = 0.1
PLAIN: Any = {"name": "dpo", "beta": BETA}
REGULARISED: Any = [{"name": "dpo", "beta": BETA, "label_smoothing": 0.1}, {"name": "sft", "weight": 1.0}]
"""DPO with smoothed labels and a likelihood term on the preferred response. The paper's recipe has neither;
on a model as small as this one the two keep replies whole sentences, and bear a ten times higher rate."""


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

GAP = 3
"""Points the two scores of a pair are apart, at least: nearer pairs teach little in few steps."""

MAX_LENGTH = 256
"""Tokens of a request and a reply."""

FULL = Size(pairs=1400, steps=350, requests=200, judged=120)
QUICK = Size(pairs=600, steps=150, requests=60, judged=60)


@dataclass(frozen=True, slots=True)
class Trial:
    """One model to train.

    Attributes:
        name: of its folder.
        title: for people.
        objective: as a configuration has it.
        relabelled: train on relabelled pairs, goals in the prompts; else on the pairs as they are.
        shuffled: deal the goals out anew among the relabelled rows, so that they say nothing.
        keep_together: both halves of a pair in one update.
        learning_rate: highest rate, chosen for each loss (``docs/sandbox.md``).
    """

    name: str
    title: str
    objective: Any
    relabelled: bool
    shuffled: bool = False
    keep_together: bool = True
    learning_rate: float = 3e-3


REWARD_AUGMENTED = Trial("ra-dpo", "RA-DPO", REGULARISED, relabelled=True)
DPO = Trial("dpo", "DPO", PLAIN, relabelled=False, learning_rate=3e-4)
SAME_LOSS = Trial("dpo-same-loss", "DPO, same loss", REGULARISED, relabelled=False)
TRIALS = (REWARD_AUGMENTED, DPO, SAME_LOSS)
"""Of the quickstart; the steered one first."""

SHUFFLED = Trial("shuffled", "goals shuffled", REGULARISED, relabelled=True, shuffled=True)
APART = Trial("apart", "halves apart", REGULARISED, relabelled=True, keep_together=False)
BARE = Trial("ra-dpo-bare", "RA-DPO, bare", PLAIN, relabelled=True)
CONTROLS = (SHUFFLED, APART, BARE)
"""What the quickstart's steered model is to be told from: without meaning in the goals, with the halves of a pair in
different updates, and with the loss of the paper alone."""


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
        "batching": {"batch_size": BATCH, "keep_together": trial.keep_together},
        "adapter": {"num_layers": -1, "lora_parameters": {"rank": 16, "scale": 2.0}},
        "objective": trial.objective,
        "reference": {"store": str(store)},
        "optimizer": {"learning_rate": trial.learning_rate, "schedule": {"name": "cosine", "warmup_ratio": 0.05}},
        "training": {"iters": size.steps, "steps_per_report": 50, "save_every": 100, "keep_last": 1, "seed": seed},
        "output": {"adapter_path": str(folder)},
    }
    return check_config(values)
