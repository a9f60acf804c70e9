"""Time, memory and gradient of one DPO step: ours, other people's, and a plain one, in turn, on one machine.

    python scripts/bench_step.py                                 # both shapes, everybody who is installed
    python scripts/bench_step.py --shape hh --peers mlxpref,mlx-lm-lora,sft
    python scripts/bench_step.py --blas stock --peers mlxpref,plain
    python scripts/bench_step.py --sweep vocabulary              # ours alone: memory against the vocabulary
    python scripts/bench_step.py --sweep length                  # … and against the length of one pair
    python scripts/bench_step.py --quick                         # does it run at all: seconds

Each contestant has a process of its own with the same model, pairs, LoRA start and BLAS, is warmed up, and then makes
a step when it is its turn; medians count. Prints tables; writes bench_step.json, .md and .png (bars of time and
memory) into --out. Exit code 1 if a contestant's gradient is not that of the plain step.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]  # started as a script, from anywhere

from bench.cases import Case, Setting, present, run_case  # noqa: E402 - found by the line above
from bench.contestants import TABLE  # noqa: E402 - found by the line above
from bench.model import TINY, Dims  # noqa: E402 - found by the line above
from bench.picture import draw_cases, title_of  # noqa: E402 - found by the line above
from bench.sweeps import SWEEPS, sweep_table  # noqa: E402 - found by the line above
from bench.tables import contestants_table, lines_table, surroundings, surroundings_line  # noqa: E402 - found as above

STOCK = {"layers": 2, "vocabulary": 4096}
"""MLX's own BLAS on Linux is some thirty times slower: fewer layers, and as many words as keep the head's share."""


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    if options.sweep:
        return _sweep(options)
    names, skipped = present(options.peers)
    for line in skipped:
        print(line, flush=True)
    cases = []
    for setting in _settings(options):
        for group in ("mlx", "torch"):
            those = [name for name in names if TABLE[name].group == group]
            if not those or (group == "torch" and setting.blas == "stock"):
                continue  # PyTorch brings a BLAS of its own
            with tempfile.TemporaryDirectory(prefix="bench-") as folder:
                case = run_case(setting, those, Path(folder), _watch)
            for line in case.skipped:
                print(line, flush=True)
            case.skipped = [*skipped, *case.skipped]
            cases.append(case)
            print(f"\n{_title(case)}\n\n{contestants_table(case)}", flush=True)
            _write(cases, out, names)
    return int(any(case.disagreeing for case in cases))


def _settings(options: argparse.Namespace) -> list[Setting]:
    blases = ("stock", "preloaded") if options.blas == "both" else (options.blas,)
    if options.quick:
        dims = replace(TINY, kind=options.model)
        return [Setting(dims, "tiny", blas, options.batch_size, 2, 1, options.threads, rest=0.0) for blas in blases]
    shapes = ("uf", "hh") if options.shape == "both" else (options.shape,)
    found = []
    for blas in blases:
        given = {"layers": options.layers, "vocabulary": options.vocabulary, "kind": options.model}
        sizes = {**(STOCK if blas == "stock" else {}), **{key: value for key, value in given.items() if value}}
        found += [
            Setting(
                Dims(**sizes), shape, blas, options.batch_size, options.repeats, options.warm_up,
                options.threads, options.micro_batch_tokens, seconds=options.seconds,
            )
            for shape in shapes
        ]  # fmt: skip
    return found


def _title(case: Case) -> str:
    setting, dims = case.setting, case.setting.dims
    rounds = min(len(one.wall) for one in case.measured.values())
    return (
        f"{title_of(case)}: {setting.batch_size} pairs a step, {dims.kind} of width "
        f"{dims.hidden}, {dims.layers} layers, {dims.vocabulary} words; medians of {rounds} steps"
    )


def _write(cases: Sequence[Case], out: Path, names: Sequence[str]) -> None:
    """Everything so far, after each comparison: a later one may be interrupted."""
    around = surroundings(names)
    report = {**around, "cases": [case.as_json() for case in cases]}
    (out / "bench_step.json").write_text(json.dumps(report, indent=1) + "\n")
    figures: dict[tuple[str, str], dict[str, float]] = {}
    for case in cases:
        figures.setdefault((case.setting.shape, case.setting.blas), {}).update(case.derived)
    lines = lines_table(figures)
    parts = [surroundings_line(around), lines, *(f"{_title(case)}\n\n{contestants_table(case)}" for case in cases)]
    (out / "bench_step.md").write_text("\n\n".join(parts) + "\n")
    draw_cases(cases, out / "bench_step.png")
    print(f"\n{lines}", flush=True)


def _sweep(options: argparse.Namespace) -> int:
    kind = options.model
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        points = SWEEPS[options.sweep](Path(folder), kind=kind, quick=options.quick, watch=_watch)
    around = surroundings(["mlxpref"])
    report = {**around, "sweep": options.sweep, "points": [point._asdict() for point in points]}
    file = options.out / f"bench_{options.sweep}.json"
    file.write_text(json.dumps(report, indent=1) + "\n")
    print(f"{surroundings_line(around)}\n\n{sweep_table(points)}", flush=True)
    return 0


def _watch(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--shape", choices=("uf", "hh", "both"), default="both", help="lengths like UltraFeedback's or HH's")
    add("--blas", choices=("stock", "preloaded", "both"), default="preloaded", help="MLX's own on Linux, or a fast one")
    add("--batch-size", type=int, default=4, help="pairs of a step")
    add("--repeats", type=int, default=5, help="rounds that count")
    add("--seconds", type=float, default=float("inf"), help="after which no comparison begins another round")
    add("--warm-up", type=int, default=2, help="steps of each before")
    add("--model", choices=("qwen2", "llama"), default="qwen2")
    add("--vocabulary", type=int, help=f"words; 16384, and {STOCK['vocabulary']} with the stock BLAS")
    add("--layers", type=int, help=f"8, and {STOCK['layers']} with the stock BLAS")
    add("--peers", type=_names, default=list(TABLE), help=f"of {','.join(TABLE)}; all that are installed by default")
    add("--micro-batch-tokens", type=int, default=8192, help="token positions that ours computes at once")
    add("--threads", type=int, default=2, help="of the BLAS and of PyTorch, for everybody")
    add("--sweep", choices=sorted(SWEEPS), help="memory of our step alone against one size")
    add("--out", type=Path, default=Path("benchmarks"), help="folder for tables, JSON and picture")
    add("--quick", action="store_true", help="a minimal model, for a look whether everything runs")
    return parser.parse_args(arguments)


def _names(value: str) -> list[str]:
    names = [name.strip() for name in value.split(",") if name.strip()]
    if unknown := [name for name in names if name not in TABLE]:
        raise argparse.ArgumentTypeError(f"unknown: {', '.join(unknown)}; one of {', '.join(TABLE)}")
    return names


if __name__ == "__main__":
    raise SystemExit(main())
