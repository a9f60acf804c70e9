"""Sandbox runs broken on purpose, and healthy ones: what `mlxpref diagnose` says of each.

    python scripts/broken_runs.py                        # all of them, some five minutes on two cores
    python scripts/broken_runs.py labels-flipped healthy # these
    python scripts/broken_runs.py --out runs/broken      # and keep the run folders
    python scripts/broken_runs.py --seed 5               # with another seed than the rules were tried on

Prints a table (docs/reading-a-run.md has it): what came first, beside what should. Exit code 1 where they differ.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]  # started as a script, from anywhere

from mlxpref.config_layers import load_config  # noqa: E402 - found by the line above
from mlxpref.data.tokenization import load_tokenizer  # noqa: E402 - found by the line above
from mlxpref.diagnosis import diagnose, read_record  # noqa: E402 - found by the line above
from mlxpref.sandbox import FILES  # noqa: E402 - found by the line above
from mlxpref.train import train  # noqa: E402 - found by the line above

Row = dict[str, Any]
Rows = list[Row]

RATE = 3e-3
"""Of a healthy run."""

STEPS = {"training.iters": 120, "training.steps_per_eval": 30, "training.save_every": 120}


@dataclass(frozen=True)
class Broken:
    """A run and what should be said of it first; None: no alarm and no warning.

    Attributes:
        settings: over ``configs/sandbox.yaml``.
        rows: what becomes of the training rows.
        after: two runs that have to be there before: the adapter trained on, and the one its reference comes from.
    """

    wanted: str | None
    settings: dict[str, Any] = field(default_factory=dict)
    rows: Callable[[Rows], Rows] = list
    after: tuple[str, str] | None = None


def flipped(rows: Rows) -> Rows:
    """Each response with the other's scores."""
    return [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in rows]


def shuffled(rows: Rows) -> Rows:
    """Each pair with the scores of another, in either order: what is asked for says nothing of a response."""
    draw = random.Random(0)
    scores = [draw.sample((row["score_chosen"], row["score_rejected"]), 2) for row in rows]
    draw.shuffle(scores)
    return [{**row, "score_chosen": one, "score_rejected": two} for row, (one, two) in zip(rows, scores, strict=True)]


def same_texts(rows: Rows) -> Rows:
    """Nine of ten rows with one response twice."""
    return [row if place % 10 == 0 else {**row, "rejected": row["chosen"]} for place, row in enumerate(rows)]


def one_length(rows: Rows) -> Rows:
    """Responses cut off after ten tokens."""
    tokenizer = load_tokenizer(str(FILES / "model"))

    def cut(text: str) -> str:
        return str(tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)[:10]))

    return [{**row, **{side: cut(row[side]) for side in ("chosen", "rejected")}} for row in rows]


def tied(rows: Rows) -> Rows:
    """Every other pair with one score twice."""
    return [row if place % 2 else {**row, "score_rejected": row["score_chosen"]} for place, row in enumerate(rows)]


RUNS: dict[str, Broken] = {
    "healthy": Broken(None),
    "healthy-other-seed": Broken(None, {"training.seed": 1}),
    "healthy-without-goals": Broken(None, {"relabel": None, "batching.keep_together": False}),
    "rate-times-100": Broken("learning-rate-too-high", {"optimizer.learning_rate": 100 * RATE}),
    "beta-tiny": Broken("beta-too-small", {"objective": [{"name": "dpo", "beta": 1e-5}]}),
    "labels-flipped": Broken("labels-flipped", rows=flipped),
    "goals-shuffled": Broken("goal-ignored", rows=shuffled),
    "reference-wrong": Broken("other-reference", {"reference.momentum": 3}, after=("healthy", "labels-flipped")),
    "chosen-is-rejected": Broken("most-rows-dropped", rows=same_texts),
    "one-length": Broken("one-length", rows=one_length),
    "no-warm-up": Broken("no-warm-up", {"optimizer.learning_rate": 10 * RATE, "optimizer.schedule.warmup_ratio": 0}),
    "frozen-adapter": Broken("nothing-trained", {"adapter.lora_parameters.scale": 0}),
    "ties-kept": Broken("contradicting-rows", {"relabel.ties": "keep", "relabel.min_gap": 0}, tied),
    "rate-by-10000": Broken("learning-rate-too-low", {"optimizer.learning_rate": RATE / 10_000}),
}


def make(name: str, folder: Path, seed: int = 0) -> Path:
    """Train a run of the table into a folder beside the others; its run folder."""
    broken, target = RUNS[name], folder / name
    if (target / "run.json").is_file():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    source = folder / f"{name}.jsonl"
    rows = [json.loads(line) for line in (FILES / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    source.write_text("".join(json.dumps(row) + "\n" for row in broken.rows(rows)), encoding="utf-8")
    settings = {
        "model.path": str(FILES / "model"),
        "data.source": str(source),
        "data.valid": str(FILES / "valid.jsonl"),
        "output.adapter_path": str(target),
        **STEPS,
        **broken.settings,
    }
    settings["training.seed"] = settings.get("training.seed", 0) + seed
    if broken.after is not None:
        start, previous = (str(make(before, folder, seed)) for before in broken.after)
        settings |= {"adapter.init_from": start, "reference.previous": previous}
    train(load_config(ROOT / "configs" / "sandbox.yaml", list(settings.items())))
    return target


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(RUNS)}; all by default")
    parser.add_argument("--out", type=Path, help="keep the run folders here")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="added to every run's own; 0 by default")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.names if name not in RUNS]
    if unknown:
        parser.error(f"no such run: {', '.join(unknown)}")
    with tempfile.TemporaryDirectory() as aside:
        return _table(options.names or list(RUNS), options.out or Path(aside), options.seed)


def _table(names: Sequence[str], folder: Path, seed: int) -> int:
    wrong = 0
    print("| run | should come first | came first | evidence |\n|---|---|---|---|")
    for name in names:
        found = diagnose(read_record(make(name, folder, seed)))
        wanted = RUNS[name].wanted
        loud = [one for one in found if one.severity != "note"]
        first = loud[0].name if loud else None
        wrong += first != wanted
        evidence = loud[0].evidence if loud else ", ".join(one.name for one in found)
        print(f"| {name} | {wanted or 'nothing'} | {first or 'nothing'} | {evidence} |", flush=True)
    print(f"\n{len(names) - wrong} of {len(names)} right")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
