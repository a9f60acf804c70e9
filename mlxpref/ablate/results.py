"""What is kept of each finished run, in a file of its own beside the run folders; damage is noticed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from mlxpref.evaluate.control import Sample
from mlxpref.files import write_text

VERSION = 1


@dataclass(frozen=True, slots=True)
class Result:
    """One run, at its end.

    Attributes:
        name: of the point. settings, seed: which one.
        status, reason: "failed" and why, or "done".
        step, n_steps, skipped: steps done, of so many; those that were not finite.
        stopped: why it ended early by itself, or None.
        adapter: sha256 of what was measured.
        data: fingerprint and numbers of rows.
        most_rows: limit on validation rows that was asked for.
        figures: of log-probs, by name.
        evaluation: metrics of the last evaluation while training, ``eval_…``.
        asked: what was asked of it, by hash; None for nothing.
        answers: scores of its answers, by name.
    """

    name: str
    settings: Mapping[str, Any]
    seed: int
    status: Literal["done", "failed"]
    reason: str | None = None
    step: int | None = None
    n_steps: int | None = None
    skipped: int = 0
    stopped: str | None = None
    adapter: str | None = None
    data: Mapping[str, Any] = field(default_factory=dict)
    most_rows: int | None = None
    figures: Mapping[str, Any] = field(default_factory=dict)
    evaluation: Mapping[str, Any] = field(default_factory=dict)
    asked: str | None = None
    answers: Mapping[str, Any] = field(default_factory=dict)

    @property
    def measured(self) -> dict[str, float | None]:
        """Every figure of the table by name."""
        answers = {name: self.answers.get(name) for name in ("score", "range", "spearman")}
        return {**answers, **{name: value for name, value in self.figures.items() if name != "rows"}}


def keep(result: Result, folder: Path, samples: Sequence[Sample] | None = None) -> None:
    """Write the answers, if there are new ones, then the result. RunError if the disk refuses."""
    if samples is not None:
        lines = "".join(json.dumps(sample.as_record(), ensure_ascii=False) + "\n" for sample in samples)
        write_text(folder / f"{result.name}.samples.jsonl", lines)
    found = asdict(result)
    write_text(
        folder / f"{result.name}.json",
        json.dumps({"version": VERSION, "sha256": _digest(found), **found}, indent=1, ensure_ascii=False) + "\n",
    )


def kept(name: str, folder: Path) -> tuple[Result | None, str | None]:
    """What was kept of a point, or None; and what is wrong with the file, if it is there and damaged."""
    file = folder / f"{name}.json"
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        values = {one.name: found[one.name] for one in fields(Result)}
        if found["version"] != VERSION or found["sha256"] != _digest(values) or values["name"] != name:
            raise ValueError("its content is not what was written")
        return Result(**values), None
    except FileNotFoundError:
        return None, None
    except (OSError, ValueError, KeyError, TypeError) as error:
        return None, f"{file} is damaged ({error}); the run is measured again"


def _digest(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def file_digest(file: Path) -> str | None:
    """sha256 of a file; None where there is none."""
    if not file.is_file():
        return None
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
