"""The claims of reward-augmented DPO in the sandbox, table by table; no confirming run was made yet.

    python scripts/study_seed.py top                  # one table: trains what it needs, some minutes an arm and seed
    python scripts/study_seed.py top --seeds 1 2      # fewer seeds
    python scripts/study_seed.py --tune top           # the rates that were tried for its arms
    python scripts/study_seed.py --list

Arms and seeds are fixed in scripts/study/arms.py. What was measured is kept in --out and not measured twice; an
interrupted study goes on. Means over seeds, ± their standard deviation.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]  # started as a script, from anywhere

from study.arms import RATES, SEEDS, TABLES, TUNING_SEED, Arm  # noqa: E402 - found by the line above
from study.measuring import base_figures, measured  # noqa: E402 - found by the line above

COLUMNS: tuple[tuple[str, Callable[[dict[str, Any]], float | None]], ...] = (
    ("no goal", lambda one: one["asked"]["means"]["none"]),
    ("goal 2", lambda one: one["asked"]["means"].get("2")),
    ("goal 6", lambda one: one["asked"]["means"].get("6")),
    ("goal 10", lambda one: one["asked"]["means"].get("10")),
    ("Spearman", lambda one: one["asked"]["spearman"]),
    ("sensitivity, nats", lambda one: one["log_probs"]["sensitivity"]),
    ("good losers: own goal", lambda one: one["log_probs"]["good_rejected"]["own"]),
    ("top goal", lambda one: one["log_probs"]["good_rejected"]["top"]),
    ("no goal ", lambda one: one["log_probs"]["good_rejected"]["none"]),
)
"""Heading, and where a figure stands in an arm's."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="*", choices=[[], *TABLES], metavar="TABLE", help=f"of {', '.join(TABLES)}")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--out", type=Path, default=Path("study"), help="where runs and figures are kept")
    parser.add_argument("--tune", action="store_true", help="instead: every rate, on the requests for tuning")
    parser.add_argument("--list", action="store_true", help="the tables and their arms")
    options = parser.parse_args(arguments)
    if options.list or not options.tables:
        for name, table in TABLES.items():
            print(f"{name}: {table.title}\n    {', '.join(arm.name for arm in table.arms)}")
        return 0
    for name in options.tables:
        print(f"\n### {TABLES[name].title}\n", flush=True)
        if options.tune:
            _tune(TABLES[name].arms, options.out)
        elif name == "attributes":
            _attributes(TABLES[name].arms[0], options.seeds, options.out)
        else:
            _table(TABLES[name].arms, options.seeds, options.out)
    return 0


def _table(arms: Sequence[Arm], seeds: Sequence[int], out: Path) -> None:
    headings = [heading for heading, _ in COLUMNS]
    print(f"| arm | {' | '.join(headings)} | s a seed |\n|{'---|' * (len(headings) + 2)}", flush=True)
    base = [base_figures(out, seed)["asked"]["means"]["none"] for seed in seeds]
    print(f"| base | {_spread(base)} |{' |' * len(headings)}", flush=True)
    for arm in arms:
        found = [measured(arm, seed, out) for seed in seeds]
        cells = [_spread([figure(one) for one in found]) for _, figure in COLUMNS]
        print(f"| {arm.name} | {' | '.join(cells)} | {fmean(one['seconds']['all'] for one in found):.0f} |", flush=True)


def _spread(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    if len(known) < len(values) or not known:
        return "–"
    return f"{fmean(known):.2f} ± {stdev(known):.2f}" if len(known) > 1 else f"{known[0]:.2f}"


def _tune(arms: Sequence[Arm], out: Path) -> None:
    print("| arm | rate | top goal, or none |\n|---|---|---|", flush=True)
    for arm in arms:
        for rate in sorted({arm.rate, *RATES}):
            goals = arm.goals[-1:]
            found = measured(replace(arm, rate=rate, goals=goals), TUNING_SEED, out, tuning=True)["asked"]["means"]
            print(f"| {arm.name} | {rate:g} | {found[f'{goals[0]:g}' if goals else 'none']:.2f} |", flush=True)


def _attributes(arm: Arm, seeds: Sequence[int], out: Path) -> None:
    found = [measured(arm, seed, out)["attributes"] for seed in seeds]
    print("| varied | goal | content | form |\n|---|---|---|---|")
    for varied in found[0]:
        for goal in found[0][varied]:
            cells = [_spread([one[varied][goal][name] for one in found]) for name in ("content", "form")]
            print(f"| {varied} | {goal} | {' | '.join(cells)} |")


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
