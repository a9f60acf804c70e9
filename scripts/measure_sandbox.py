"""Measure the sandbox over several seeds, with controls, and hold it to its tolerances.

    python scripts/measure_sandbox.py --seeds 1 2 3 --out measured

Each seed trains and asks what the quickstart does, and the controls: goals that say nothing, halves of a pair in
different updates, the loss of the paper alone. Exit code 1 if a tolerance does not hold.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path

from mlxpref.sandbox.measured import Measured
from mlxpref.sandbox.quickstart import Watch, quickstart
from mlxpref.sandbox.trials import CONTROLS, TRIALS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--out", type=Path, default=Path("measured"))
    parser.add_argument("--no-controls", action="store_true", help="what the quickstart trains, and no more")
    options = parser.parse_args()
    failed = 0
    print("seed model            no goal    1-3   8-10  at 10 spearman  sens. good los.")
    for seed in options.seeds:
        began = time.perf_counter()
        trials = TRIALS if options.no_controls else (*TRIALS, *CONTROLS)
        models = {one.name: one for one in quickstart(options.out, seed=seed, trials=trials, watch=Watch()).models}
        for one in models.values():
            print(f"{seed:<5}{line(one)}", flush=True)
        for what, holds in tolerances(models):
            failed += not holds
            print(f"{seed:<5}{'ok' if holds else 'FAILED':<7}{what}")
        print(f"{seed:<5}{time.perf_counter() - began:.0f} s", flush=True)
    raise SystemExit(bool(failed))


def line(one: Measured) -> str:
    low, high = ([at.mean for at in one.asked if at.goal in goals] for goals in ((1, 2, 3), (8, 9, 10)))
    asked = [sum(low) / len(low), sum(high) / len(high), one.at(10).mean] if one.steerable else []
    figures = [f"{value:>7.2f}" for value in asked] or ["      -"] * 3
    sensitivity = "-" if one.sensitivity is None else f"{one.sensitivity[0]:.2f}"
    displaced = "-" if one.displaced is None else f"{one.displaced[0]:.1f}"
    return (
        f"{one.title:<16}{one.unasked.mean:>8.2f}{''.join(figures)}{one.spearman or 0:>9.2f}"
        f"{sensitivity:>7}{displaced:>10}"
    )


def tolerances(models: dict[str, Measured]) -> Iterator[tuple[str, bool]]:
    """What has to hold for every seed."""
    base, steered = models["base"], models["ra-dpo"]
    yield "goals 8-10 score 4.5 more than goals 1-3", steered.range >= 4.5
    yield "Spearman of goal and score over samples at least 0.75", (steered.spearman or 0) >= 0.75
    yield "asked for 10, two points above the base", steered.at(10).mean >= base.unasked.mean + 2
    yield "goal sensitivity above 4 nats", (steered.sensitivity or (0,))[0] > 4
    for name in ("dpo", "dpo-same-loss"):
        if (found := models[name].sensitivity) is not None:
            yield f"goal sensitivity of {name} below 0.3 nats", abs(found[0]) < 0.3
    if "shuffled" in models:
        yield "goals shuffled: Spearman below 0.2", abs(models["shuffled"].spearman or 0) < 0.2


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit(130) from None
