"""Time of a whole run over pairs as long as those of a data file: mlx-lm-lora's training loop against ours.

    python scripts/bench_run.py --data train.jsonl                      # 64 pairs, 3 epochs, as long as they are
    python scripts/bench_run.py --data train.jsonl --like hh            # the same, cut to HH's medians
    python scripts/bench_run.py --quick                                 # does it run at all: seconds

From the model loaded to the adapter saved: reference log-probs, padding, tracing and every step. Each run has a process
of its own, they take turns, medians count. The ids are random; lengths alone are the file's. Prints a table; writes
bench_run.json and .md into --out.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]  # started as a script, from anywhere

from bench.cases import Setting, present, tasks_of  # noqa: E402 - found by the line above
from bench.contestants import TABLE  # noqa: E402 - found by the line above
from bench.measuring import REST, Contender, environment  # noqa: E402 - found by the line above
from bench.model import TINY, Dims  # noqa: E402 - found by the line above
from bench.pairs import Lengths, file_lengths, make_pairs, shape_lengths  # noqa: E402 - found by the line above
from bench.tables import lines_table, markdown, surroundings, surroundings_line  # noqa: E402 - found by the line above

RUNS = [name for name, one in TABLE.items() if one.whole]


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    names, skipped = present(options.peers)
    for line in skipped:
        print(line, flush=True)
    like = "tiny" if options.quick else options.like
    lengths, dims = _lengths(options), replace(TINY if options.quick else Dims(), kind=options.model)
    if options.layers and not options.quick:
        dims = replace(dims, layers=options.layers)
    setting = Setting(
        dims, like, options.blas, options.batch_size,
        threads=options.threads, micro_batch_tokens=options.micro_batch_tokens,
    )  # fmt: skip
    told = {"data": options.data.name if options.data else None, "like": like, "pairs": len(lengths),
            "longest": options.longest, "epochs": options.epochs, "batch_size": options.batch_size,
            "blas": options.blas, "dims": asdict(dims)}  # fmt: skip
    file = options.out / f"bench_run_{like}.json"
    runs = _earlier(file, names, told) if options.add else {name: [] for name in names}
    _measure(runs, setting, lengths, options)
    walls = {name: median(run["wall"] for run in those) for name, those in runs.items()}
    figures: dict[str, float] = {}
    if "mlxpref" in runs:
        figures |= {f"run_{key}": runs["mlxpref"][0][key] for key in ("padded", "computed")}
        if "mlx-lm-lora" in walls:
            figures["run_vs_mlx_lm_lora"] = walls["mlx-lm-lora"] / walls["mlxpref"]
    around = surroundings(names)
    report = {**around, **told, "skipped": skipped, "derived": figures, "runs": runs}
    text = "\n\n".join([
        surroundings_line(around), f"{_said(lengths)}; {options.epochs} epochs, {options.batch_size} pairs a step",
        _table(runs), lines_table({(like, options.blas): figures}),
    ])  # fmt: skip
    options.out.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(report, indent=1) + "\n")
    file.with_suffix(".md").write_text(text + "\n")
    print(f"\n{text}", flush=True)
    return 0


def _lengths(options: argparse.Namespace) -> list[Lengths]:
    if options.quick:
        return shape_lengths("tiny", 2 * options.batch_size)
    if options.data is None:
        raise SystemExit("bench_run.py: --data FILE.jsonl says how long the pairs are; or take --quick")
    try:
        return file_lengths(options.data, options.pairs, like=options.like, longest=options.longest)
    except (OSError, ValueError, KeyError) as error:
        raise SystemExit(f"bench_run.py: {options.data}: {error}") from error


def _earlier(file: Path, names: Sequence[str], told: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Runs of a call before this one. SystemExit if its settings were others."""
    known = json.loads(file.read_text()) if file.exists() else {**told, "runs": {}}
    if other := [f"{key} {known.get(key)}" for key, value in told.items() if known.get(key) != value]:
        raise SystemExit(f"bench_run.py: {file} is of other runs ({', '.join(other)}): leave --add out")
    return {name: known["runs"].get(name, []) for name in names}


def _measure(
    runs: dict[str, list[dict[str, Any]]], setting: Setting, lengths: Sequence[Lengths], options: argparse.Namespace
) -> None:
    """Add figures of further runs of each contestant; a fresh process for each, in turn."""
    env = environment(blas=setting.blas, threads=setting.threads)
    with tempfile.TemporaryDirectory(prefix="bench-") as place:
        folder = Path(place)
        pairs = make_pairs(lengths, setting.dims.vocabulary)
        tasks = tasks_of(setting, list(runs), pairs, folder, gradients=False)
        for _ in range(options.repeats):
            for task in tasks:
                seed = len(runs[task.contestant])
                contender = Contender(replace(task, epochs=options.epochs, seed=seed), folder, env)
                try:
                    time.sleep(0.0 if options.quick else REST)
                    run = contender.ask("step")
                finally:
                    contender.close()
                run["above_weights"] = run["peak"] - sum(contender.facts[key] for key in ("weights", "reference"))
                runs[task.contestant].append(run)
                print(f"{task.contestant}: {run['wall']:.2f} s", file=sys.stderr, flush=True)


def _table(runs: dict[str, list[dict[str, Any]]]) -> str:
    rows = []
    for name, those in runs.items():
        wall, cpu, above = (median(run[key] for run in those) for key in ("wall", "cpu", "above_weights"))
        each = ", ".join(f"{run['wall']:.1f}" for run in those)
        rows.append((TABLE[name].title, f"{wall:.2f}", f"{cpu:.2f}", f"{above / 1e6:.0f}", each))
    return markdown(("run", "wall s", "CPU s", "peak above weights MB", "each run, wall s"), rows)


def _said(lengths: Sequence[Lengths]) -> str:
    prompts = sorted(one.prompt for one in lengths)
    responses = sorted(n for one in lengths for n in one[1:])
    middle = f"prompts of {median(prompts):.0f} tokens (to {prompts[-1]})"
    return f"{len(lengths)} pairs, {middle}, responses of {median(responses):.0f} (to {responses[-1]}) in the middle"


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", type=Path, help="JSON lines with prompt, chosen, rejected: how long the pairs are")
    add("--like", choices=("uf", "hh"), default="uf", help="hh: cut to medians of 128 and 60 tokens")
    add("--pairs", type=int, default=64, help="drawn from the file")
    add("--longest", type=int, default=1024, help="tokens of a prompt with a response; longer pairs are left out")
    add("--epochs", type=int, default=3)
    add("--batch-size", type=int, default=4, help="pairs of a step")
    add("--repeats", type=int, default=3, help="runs of each")
    add("--blas", choices=("stock", "preloaded"), default="preloaded", help="MLX's own on Linux, or a fast one")
    add("--model", choices=("qwen2", "llama"), default="qwen2")
    add("--layers", type=int, help="8 by default")
    add("--peers", type=lambda value: value.split(","), default=RUNS, help=f"of {','.join(RUNS)}")
    add("--micro-batch-tokens", type=int, default=8192, help="token positions that ours computes at once")
    add("--threads", type=int, default=2, help="of the BLAS, for everybody")
    add("--out", type=Path, default=Path("benchmarks"), help="folder for table and JSON")
    add("--add", action="store_true", help="to the runs that an earlier call with the same settings left in --out")
    add("--quick", action="store_true", help="a minimal model, for a look whether everything runs")
    options = parser.parse_args(arguments)
    if unknown := [name for name in options.peers if name not in RUNS]:
        parser.error(f"--peers: unknown: {', '.join(unknown)}; of {', '.join(RUNS)}")
    if options.pairs % options.batch_size:
        parser.error(f"--pairs {options.pairs}: mlx-lm-lora leaves out what fills no batch of {options.batch_size}")
    return options


if __name__ == "__main__":
    raise SystemExit(main())
