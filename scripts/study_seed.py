"""The claims of reward-augmented DPO in the sandbox, table by table.

    python scripts/study_seed.py top                  # one table: trains what it needs
    python scripts/study_seed.py top --workers 2      # two arms at a time, a thread each
    python scripts/study_seed.py top --seeds 1 2      # fewer seeds
    python scripts/study_seed.py --tune top           # the rates that were tried for its arms
    python scripts/study_seed.py --list

Arms, rates and seeds are fixed in scripts/study/arms.py. What was measured is kept in --out and not measured twice;
an interrupted study goes on. docs/study.md has the tables, their run times, and what they say.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import active_children, get_context
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]  # started as a script, from anywhere

from study.arms import ENDS, SEEDS, TABLES, Arm, Table  # noqa: E402 - found by the line above
from study.measuring import arms, measured, prepare  # noqa: E402 - found by the line above

from mlxpref.evaluate.statistics import mean_interval, spearman  # noqa: E402 - found by the line above

Figures = dict[str, Any]
Job = tuple[Arm, int, float | None]
"""An arm, a seed, and a rate to try or None."""

THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")

ASKED: dict[str, Callable[[Figures], float | None]] = {
    "no goal": lambda one: _mean(one, "none"),
    "goal 2": lambda one: _mean(one, "2"),
    "goal 6": lambda one: _mean(one, "6"),
    "goal 10": lambda one: _mean(one, "10"),
    "Spearman": lambda one: _spearman(one),
    "sensitivity": lambda one: _log_prob(one, "sensitivity"),
    "losers: own goal": lambda one: _log_prob(one, "good_rejected", "own"),
    "top goal": lambda one: _log_prob(one, "good_rejected", "top"),
    "none": lambda one: _log_prob(one, "good_rejected", "none"),
}
"""Columns of the sandbox's tables: heading, and where a figure stands in an arm's."""

PREFERRED: dict[str, Callable[[Figures], float | None]] = {
    "right: no goal": lambda one: _log_prob(one, "accuracy", "unconditioned"),
    "top goal": lambda one: _log_prob(one, "accuracy", "top"),
    "chosen's goal": lambda one: _log_prob(one, "accuracy", "chosen"),
    "rejected's goal": lambda one: _log_prob(one, "accuracy", "rejected"),
    "sensitivity": lambda one: _log_prob(one, "sensitivity"),
    "losers: own goal": lambda one: _log_prob(one, "good_rejected", "own"),
    "top goal ": lambda one: _log_prob(one, "good_rejected", "top"),
    "none": lambda one: _log_prob(one, "good_rejected", "none"),
}
"""Columns of tables that nothing is written for."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="*", choices=[[], *TABLES], metavar="TABLE", help=f"of {', '.join(TABLES)}")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--out", type=Path, default=Path("study"), help="where runs and figures are kept")
    parser.add_argument("--workers", type=int, default=1, help="arms trained at a time")
    parser.add_argument("--tune", action="store_true", help="instead: try the rates, on requests for tuning")
    parser.add_argument("--list", action="store_true", help="the tables and their arms")
    options = parser.parse_args(arguments)
    if options.list or not options.tables:
        for name, table in TABLES.items():
            print(f"{name}: {table.title}\n    {', '.join(arm.name for arm in table.arms)}")
        return 0
    out = options.out.resolve()
    for name in options.tables:
        print(f"\n### {TABLES[name].title}\n", flush=True)
        if options.tune:
            _tune(TABLES[name], out, options.workers)
        else:
            _table(name, options.seeds, out, options.workers)
    return 0


# --- measuring ---


def _all_measured(jobs: Sequence[Job], out: Path, workers: int) -> list[Figures]:
    """In the order of the jobs; judges are trained before those who wait for them."""
    judges = [(arms()[arm.judge], seed, None) for arm, seed, _ in jobs if arm.judge]
    for name in THREADS if workers > 1 else ():
        os.environ.setdefault(name, "1")
    prepare([arm for arm, _, _ in jobs], out)
    found: list[Figures] = []
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:  # it says so where a process has died
        for wave in (judges, jobs):
            asked, found = [(*job, out) for job in wave], []
            try:
                for job, one in zip(asked, pool.map(_measured, asked), strict=True):
                    print(f"{job[0].name}, seed {job[1]}: {one['seconds']['all']:.0f} s", file=sys.stderr, flush=True)
                    found.append(one)
            except BaseException:  # Ctrl-C, too: none of those that wait is begun
                for child in active_children():
                    child.terminate()
                raise
    return found


def _measured(job: tuple[Arm, int, float | None, Path]) -> Figures:
    arm, seed, rate, out = job
    return measured(arm, seed, out, rate=rate)


def _mean(figures: Figures, goal: str) -> float | None:
    scores = figures["asked"]["scores"].get(goal)
    return None if scores is None else fmean(scores)


def _spearman(figures: Figures) -> float | None:
    """Of goal and score over single responses; of the same goals for every arm."""
    scores = figures["asked"]["scores"]
    found = [(goal, score) for goal in ENDS for score in scores.get(f"{goal:g}", ())]
    return spearman([goal for goal, _ in found], [score for _, score in found])


def _log_prob(figures: Figures, *path: str) -> float | None:
    found: Any = figures.get("log_probs")
    for name in path:
        found = None if found is None else found.get(name)
    return found


# --- tables ---


def _table(name: str, seeds: Sequence[int], out: Path, workers: int) -> None:
    table = TABLES[name].arms
    rivals = [arms()[arm.rival] for arm in table if arm.rival and arm.rival not in [one.name for one in table]]
    asked = [*table, *rivals]
    jobs: list[Job] = [(arm, seed, None) for arm in asked for seed in seeds]
    found = iter(_all_measured(jobs, out, workers))
    by_arm = {arm.name: [next(found) for _ in seeds] for arm in asked}
    if name == "attributes":
        _print_attributes(by_arm[table[0].name])
        return
    columns = PREFERRED if name == "text" else ASKED
    rows = ["| arm |", *(f" {heading} |" for heading in columns), " less its rival |", " s a seed |"]
    print("".join(rows) + "\n|" + "---|" * (len(columns) + 3))
    for arm in table:
        mine = by_arm[arm.name]
        cells = [_spread([figure(one) for one in mine]) for figure in columns.values()]
        rival = _difference(mine, arm.best, by_arm[arm.rival], arms()[arm.rival].best) if arm.rival else "–"
        seconds = fmean(one["seconds"]["all"] for one in mine)
        print(f"| {arm.name} | {' | '.join(cells)} | {rival} | {seconds:.0f} |")


def _spread(values: Iterable[float | None]) -> str:
    """Mean ± standard deviation over seeds."""
    found = list(values)
    known = [value for value in found if value is not None]
    if not known or len(known) < len(found):
        return "–"
    return f"{fmean(known):.2f} ± {stdev(known):.2f}" if len(known) > 1 else f"{known[0]:.2f}"


def _difference(mine: Sequence[Figures], goal: str, other: Sequence[Figures], its_goal: str) -> str:
    """Mean, each seed's, and ± half of the 95 % interval over requests, the same that both were asked."""
    scores = np.array([one["asked"]["scores"][goal] for one in mine])
    less = scores - np.array([one["asked"]["scores"][its_goal] for one in other])
    interval = mean_interval(less.mean(0), range(less.shape[1]))
    assert interval is not None
    each = ", ".join(f"{value:+.2f}" for value in less.mean(1))
    return f"{less.mean():+.2f} ({each}; requests ± {(interval[1] - interval[0]) / 2:.2f})"


def _tune(table: Table, out: Path, workers: int) -> None:
    """Three rates each; while the best is the lowest or highest of them, the next one on that side, too."""
    arms_of = {arm.name: arm for arm in table.arms if len(arm.rates) > 1 and arm.steps}
    tried: dict[str, dict[float, float]] = {name: {} for name in arms_of}
    wanted = [(name, rate) for name, arm in arms_of.items() for rate in arm.rates]
    while wanted:
        jobs: list[Job] = [(arms_of[name], seed, rate) for name, rate in wanted for seed in table.tuning_seeds]
        found = iter(_all_measured(jobs, out, workers))
        for name, rate in wanted:
            scores = [next(found)["asked"]["scores"][arms_of[name].best] for _ in table.tuning_seeds]
            tried[name][rate] = fmean(map(fmean, scores))
        beyond = [(name, _beyond(by_rate)) for name, by_rate in tried.items()]
        wanted = [(name, rate) for name, rate in beyond if rate is not None]
    print("| arm | rate: score at its best goal | best rate |\n|---|---|---|")
    for name, by_rate in tried.items():
        said = ", ".join(f"{rate:g}: {score:.2f}" for rate, score in sorted(by_rate.items()))
        print(f"| {name} | {said} | {_best(by_rate):g} |", flush=True)


def _best(scores: dict[float, float]) -> float:
    return max(scores, key=lambda rate: scores[rate])


def _beyond(scores: dict[float, float]) -> float | None:
    """The rate that follows on the side where the best one stands at the edge; None where it does not."""
    best, steps = _best(scores), {min(scores): 1 / 3, max(scores): 3.0}
    return float(f"{best * steps[best]:.0e}") if best in steps else None


def _print_attributes(found: Sequence[Figures]) -> None:
    print("| varied | goal | content | form |\n|---|---|---|---|")
    for varied, by_goal in found[0]["attributes"].items():
        for goal in by_goal:
            cells = [_spread(one["attributes"][varied][goal][name] for one in found) for name in ("content", "form")]
            print(f"| {varied} | {goal} | {' | '.join(cells)} |")


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
