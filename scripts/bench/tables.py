"""Tables for people: a comparison's contestants, and the lines with their bounds."""

from __future__ import annotations

import math
import platform
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from bench.cases import TOLERANCE, Case
from bench.contestants import TABLE, versions


class Line(NamedTuple):
    """One figure that is to stay within a bound.

    Attributes:
        key: of ``Case.derived``, or of a run's figures.
        sense: "≥" or "≤".
        bounds: by shape, and where they differ by "shape/blas".
    """

    key: str
    title: str
    sense: str
    bounds: Mapping[str, float]


LINES = (
    Line("step_vs_mlx_lm_lora", "step time, mlx-lm-lora's DPO ÷ ours", "≥", {"uf": 2.5, "hh": 4.2}),
    Line("memory_vs_mlx_lm_lora", "peak memory above weights, ours ÷ mlx-lm-lora's", "≤", {"uf": 0.40, "hh": 0.28}),
    Line("run_vs_mlx_lm_lora", "whole run of 3 epochs, mlx-lm-lora ÷ ours", "≥", {"uf": 2.5, "hh": 3.2}),
    Line("step_vs_sft", "step time, ours ÷ mlx-lm's SFT on the same rows", "≤", {"uf": 0.62, "hh": 0.38}),
    Line("step_vs_mlx_tune", "step time, mlx-tune's DPO ÷ ours", "≥", {}),
    Line("torch_vs_trl", "step time on PyTorch, TRL ÷ ours", "≥", {"uf": 1.4, "hh": 1.8}),
    Line("torch_vs_trl_precomputed", "… TRL with reference precomputed ÷ ours", "≥", {"uf": 1.15, "hh": 1.35}),
    Line("reference_pass", "reference pass ÷ training step, per pair", "≤", {"uf": 0.45, "hh": 0.45}),
    Line("padded", "padded ÷ real tokens, the step's batch", "≤", {}),
    Line("computed", "positions computed ÷ tokens, prompts once, the step's batch", "≤", {}),
    Line("run_padded", "padded ÷ real tokens, the whole run", "≤", {"uf": 1.12, "hh": 1.18}),
    Line("run_computed", "positions computed ÷ tokens, prompts once, the whole run", "≤", {}),
    Line(
        "matmul_share", "minimum FLOPs ÷ matmul rate ÷ step time", "≥",
        {"uf/stock": 0.75, "uf/preloaded": 0.45, "hh/stock": 0.75, "hh/preloaded": 0.45},
    ),
    Line("agreement", "gradient, relative to the plain step's", "≤", {"uf": TOLERANCE, "hh": TOLERANCE}),
    Line("torch_agreement", "gradient on PyTorch, the same", "≤", {"uf": TOLERANCE, "hh": TOLERANCE}),
)  # fmt: skip


def bound_of(line: Line, shape: str, blas: str) -> float | None:
    return line.bounds.get(f"{shape}/{blas}", line.bounds.get(shape))


def verdict(line: Line, value: float, shape: str, blas: str) -> str:
    """The bound and whether it holds: "≥ 2.5 ok", "≤ 0.4 MISSED"; "" without a bound."""
    bound = bound_of(line, shape, blas)
    if bound is None:
        return ""
    holds = not math.isnan(value) and (value >= bound if line.sense == "≥" else value <= bound)
    return f"{line.sense} {_plain(bound)} {'ok' if holds else 'MISSED'}"


HEAD = ("contestant", "wall s", "CPU s", "peak above weights MB", "second model MB", "gradient off by")


def contestants_table(case: Case) -> str:
    """A Markdown table: a row for each contestant, medians over the rounds."""
    rows = []
    for name, one in case.measured.items():
        off = "–" if one.agreement is None else f"{one.agreement:.1e}"
        mark = " DISAGREES" if name in case.disagreeing else ""
        second = one.facts.get("reference", 0) / 1e6
        rows.append((TABLE[name].title, f"{median(one.wall):.3f}", f"{median(one.cpu):.3f}", f"{one.above / 1e6:.0f}",
                     f"{second:.0f}" if second else "–", off + mark))  # fmt: skip
    return markdown(HEAD, rows)


def lines_table(figures: Mapping[tuple[str, str], Mapping[str, float]]) -> str:
    """The lines with their bounds, a column for each (shape, BLAS)."""
    columns = list(figures)
    head = ("figure", *(f"{shape}, {blas} BLAS" for shape, blas in columns))
    rows = []
    for line in LINES:
        if any(line.key in figures[at] for at in columns):
            rows.append((line.title, *(_cell(line, figures[at].get(line.key), *at) for at in columns)))
    return markdown(head, rows)


def _cell(line: Line, value: float | None, shape: str, blas: str) -> str:
    if value is None:
        return "–"
    return f"{_plain(value)} {verdict(line, value, shape, blas)}".strip()


def _plain(value: float) -> str:
    return f"{value:.1e}" if 0 < abs(value) < 1e-3 else f"{value:.2f}"


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose columns line up."""
    widths = [max(len(str(row[i])) for row in (head, *rows)) for i in range(len(head))]

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(str(cell).ljust(width) for cell, width in zip(cells, widths, strict=True)) + " |"

    return "\n".join([line(head), "|" + "|".join("-" * (width + 2) for width in widths) + "|", *map(line, rows)])


def surroundings(names: Sequence[str]) -> dict[str, Any]:
    """Machine, versions and commit, without which no figure is worth anything."""
    system = platform.platform()
    return {
        "machine": {"processor": _processor(), "cores": _cores(), "memory_gb": _memory(), "system": system},
        "versions": {"python": platform.python_version(), **versions(names)},
        "commit": _commit(),
    }  # fmt: skip


def surroundings_line(found: Mapping[str, Any]) -> str:
    machine = found["machine"]
    said = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    return (
        f"{machine['processor']}, {machine['cores']} cores, {machine['memory_gb']:.0f} GB, {machine['system']}; "
        f"{said}; commit {found['commit']}"
    )


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _cores() -> int:
    import os

    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _memory() -> float:
    import os

    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9


def _commit() -> str:
    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    try:
        commit, changed = git("rev-parse", "--short=12", "HEAD"), git("status", "--porcelain", "--untracked-files=no")
    except OSError:
        return "unknown"
    return (commit or "unknown") + (" with changes" if changed else "")
