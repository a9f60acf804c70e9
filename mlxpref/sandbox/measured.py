"""What one model of the quickstart does: answers at every goal, scored, and what it prefers; kept on disk."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlxpref.errors import RunError
from mlxpref.evaluate.control import Achieved, ControlCurve, Sample, curve_of
from mlxpref.files import write_text

TOP = 9.0
"""Scores from here on are called the best."""

JUDGED = ("sensitivity", "displaced")
"""What is known from log-probs, not from samples."""


@dataclass(frozen=True, slots=True)
class Measured:
    """One model, measured.

    Attributes:
        name, title: as those of its trial; "base" without one.
        steerable: it was trained to be asked for a goal.
        curve: answers at the goals 1–10, and without a goal.
        sensitivity: mean and standard error of the goal sensitivity, nats; None for the base, which is its
            own reference.
        displaced: mean change of log-prob of good replies that lose their pair, nats a reply, and how many there
            are; likewise.
    """

    name: str
    title: str
    steerable: bool
    curve: ControlCurve
    sensitivity: tuple[float, float] | None = None
    displaced: tuple[float, int] | None = None

    @property
    def asked(self) -> tuple[Achieved, ...]:
        """At each goal, rising."""
        return tuple(one for one in self.curve.per_goal if one.goal is not None)

    @property
    def unasked(self) -> Achieved:
        """Without a goal."""
        return next(one for one in self.curve.per_goal if one.goal is None)

    def at(self, goal: float) -> Achieved:
        """At a goal that was asked for. StopIteration at another."""
        return next(one for one in self.asked if one.goal == goal)

    @property
    def spearman(self) -> float | None:
        """Of goal and score over the samples; None where all score alike."""
        found = self.curve.spearman
        assert not isinstance(found, Mapping)
        return found

    @property
    def range(self) -> float:
        """Mean score at the goals 8–10 less that at 1–3, of those that were asked for."""
        high, low = ([one.mean for one in self.asked if one.goal in goals] for goals in ((8, 9, 10), (1, 2, 3)))
        return sum(high) / len(high) - sum(low) / len(low)

    def as_record(self) -> dict[str, Any]:
        """Figures, JSON-safe."""
        return {
            "title": self.title,
            "goal_sensitivity": None if self.sensitivity is None else list(self.sensitivity),
            "high_score_rejected_change": None if self.displaced is None else list(self.displaced),
            "range": self.range,
            **self.curve.as_record(),
        }


def keep(measured: Measured, key: str, folder: Path) -> None:
    """Write what was measured: the samples, then the figures that say they are whole."""
    samples = "".join(json.dumps(sample.as_record()) + "\n" for sample in measured.curve.samples)
    write_text(folder / f"{measured.name}.samples.jsonl", samples)
    told = {name: getattr(measured, name) for name in ("title", "steerable", *JUDGED)}
    figures = {"key": key, "samples": _digest(samples), **told}
    write_text(folder / f"{measured.name}.json", json.dumps(figures) + "\n")


def kept(name: str, key: str, folder: Path, *, seed: int) -> Measured | None:
    """What was measured of the same thing before, by its key; None if that is not there.

    Raises:
        RunError: the file is there and damaged.
    """
    file = folder / f"{name}.json"
    if not file.exists():
        return None
    try:
        figures = json.loads(file.read_text(encoding="utf-8"))
        if figures["key"] != key:
            return None
        text = (folder / f"{name}.samples.jsonl").read_text(encoding="utf-8")
        if _digest(text) != figures["samples"]:
            raise ValueError("its samples are of another measurement")
        samples = [Sample(**json.loads(line)) for line in text.splitlines()]
        judged = {one: figures[one] and tuple(figures[one]) for one in JUDGED}
        curve = curve_of(samples, top=TOP, seed=seed)
        return Measured(name, figures["title"], figures["steerable"], curve, **judged)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"{file}: cannot be read ({error}); delete it, and it is measured again") from error


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def texts(measured: Measured, goals: Sequence[float | None], index: int) -> list[Sample]:
    """The answers to one request at these goals."""
    of: dict[Any, Sample] = {sample.goal: sample for sample in measured.curve.samples if sample.index == index}
    return [of[goal] for goal in goals]
