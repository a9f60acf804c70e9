"""A sweep on disk: what is there of every run, and whether it is what the sweep means.

``runs/NAME`` are run folders like any other, ``results/NAME.json`` what was measured of each, ``sweep.json`` the
settings that all runs have alike.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mlxpref.ablate.grid import Grid, Point, deciding, differences, shared_settings
from mlxpref.ablate.results import Result, file_digest, kept
from mlxpref.config_layers import check_config, read_yaml
from mlxpref.errors import RunError, raise_all
from mlxpref.files import write_text
from mlxpref.loop import MAX_SKIPPED_IN_ROW
from mlxpref.runs import ADAPTER, CONFIG, METRICS, RunFolder

RECORD = "sweep.json"
VERSION = 1

State = Literal["new", "unfinished", "unmeasured", "done", "failed"]
"""Of a point: nothing is there; a run is begun; it is trained and lacks what is asked of it now; all is there;
it failed."""


@dataclass(frozen=True, slots=True)
class Looked:
    """A point as it lies in the folder: ``result`` is what was kept of it, ``said`` what is odd about that."""

    point: Point
    state: State
    result: Result | None = None
    said: tuple[str, ...] = ()


def check_record(grid: Grid, out: Path) -> None:
    """RunError if the folder is not a sweep's, or was begun with other settings."""
    file = out / RECORD
    if not file.is_file():
        _check_free(out)
        return
    try:
        before = json.loads(file.read_text(encoding="utf-8"))["settings"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"{file}: cannot be read ({error}); choose another --out") from error
    raise_all(
        differences(before, shared_settings(grid)),
        RunError,
        f"{out}: this sweep was begun with other settings. Put them back, or choose another --out:",
    )


def _check_free(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise RunError(f"{out}: is a file, not a folder; choose another --out")
    names = sorted(one.name for one in out.iterdir() if not one.name.startswith(".")) if out.is_dir() else []
    if names:
        raise RunError(f"{out}: is not empty ({', '.join(names[:3])}) and holds no sweep; choose another --out")


def record(grid: Grid, out: Path) -> None:
    """Write down what all runs have alike, once."""
    if not (out / RECORD).is_file():
        found = {"version": VERSION, "settings": shared_settings(grid)}
        write_text(out / RECORD, json.dumps(found, indent=1, ensure_ascii=False) + "\n")


def look(point: Point, out: Path, *, most_rows: int | None, asked: str | None, retry_failed: bool) -> Looked:
    """What is there of a point.

    Args:
        most_rows, asked: what is measured now, as in ``Result``; ``asked`` None asks nothing.

    Raises:
        RunError: it was begun with another configuration.
    """
    folder = Path(point.config(out).output.adapter_path)
    if (folder / CONFIG).is_file():
        before = deciding(check_config(read_yaml(folder / CONFIG), where=str(folder / CONFIG)))
        raise_all(
            differences(before, deciding(point.config(out))),
            RunError,
            f"{folder}: this run was begun with other settings. Put them back, or choose another --out:",
        )
    result, damage = kept(point.name, out / "results")
    begun: State = "unfinished" if (folder / CONFIG).is_file() else "new"
    if result is None:
        return Looked(point, begun, said=(damage,) if damage else ())
    if result.status == "failed":
        return Looked(point, begun if retry_failed else "failed", result)
    if file_digest(folder / ADAPTER[0]) != result.adapter:
        return Looked(point, begun, said=(f"{folder}: its adapter is not the one that was measured",))
    same = asked in (None, result.asked) and result.most_rows == most_rows
    return Looked(point, "done" if same else "unmeasured", result)


# --- one run folder ---


def not_finite(folder: Path) -> str | None:
    """Why the run stopped for good, if it did: its last steps were not finite. The same however often it is asked."""
    last = RunFolder(folder).last_checkpoint()
    if last is None or last.state["skipped_in_row"] < MAX_SKIPPED_IN_ROW:
        return None
    n = last.state["skipped_in_row"]
    return (
        f"not finite: the gradients of {n} steps in a row ({last.step - n + 1} to {last.step}). Lower "
        "optimizer.learning_rate, warm up, or take model.dtype float32"
    )


def trained(folder: Path) -> dict[str, Any]:
    """What a run folder says of a run that is at its end."""
    run = RunFolder(folder)
    last, facts = run.last_checkpoint(), run.facts()
    assert last is not None
    return {
        "step": last.step,
        "n_steps": facts["plan"]["steps"],
        "skipped": last.state["skipped"],
        "stopped": last.state["stopped"],
        "adapter": file_digest(folder / ADAPTER[0]),
        "data": {key: facts["data"][key] for key in ("fingerprint", "train_rows", "valid_rows")},
        "evaluation": _last_evaluation(folder / METRICS),
    }


def _last_evaluation(file: Path) -> dict[str, Any]:
    """Metrics ``eval_…`` of the last line that has some, with its step; empty where none has."""
    for line in reversed(file.read_text(encoding="utf-8").splitlines()):
        found = json.loads(line)
        evaluated = {key: value for key, value in found.items() if key.startswith("eval_")}
        if evaluated:
            return {"step": found["step"], **evaluated}
    return {}
