"""``mlxpref quickstart``: the method at work on a small written world, and what came of it."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlxpref.callbacks import RunStart
from mlxpref.cli import console
from mlxpref.errors import UsageError
from mlxpref.evaluate.control import Achieved
from mlxpref.sandbox.measured import TOP, Measured, texts
from mlxpref.sandbox.quickstart import Found, Watch, quickstart

if TYPE_CHECKING:
    from mlxpref.loop import TrainResult

SHOWN_GOALS = (2.0, 6.0, 10.0)
SHOWN_REQUESTS = (0, 1)

WHAT_IT_IS = """\
A small written world: requests for a note about an animal, and replies that earn
1 to 10 points, read from their words: five for the facts, five for the form.
Three copies of a tiny model learn from the same scored pairs of replies:
  RA-DPO          reward-augmented DPO: each pair twice, the score asked for in the prompt
  DPO             the pairs as they are
  DPO, same loss  the same, with the two terms of loss that RA-DPO has here, too"""

LEGEND = """
score        mean points of 200 replies or fewer, ± half of its 95 % interval
Spearman     rank correlation of score asked for and earned, over single replies:
             1 obeys, 0 does not hear
sensitivity  how far the score asked for turns round which of two replies is more
             probable, nats (natural logarithm), ± its standard error
good losers  change of log-probability, nats a reply, of good replies that lose
             their pair: far below 0, they are unlearnt
RA-DPO and "DPO, same loss" have label smoothing and a likelihood term, which the
paper's recipe has not.
"""

EPILOG = """\b
Example:
  mlxpref quickstart
  mlxpref quickstart --quick --out /tmp/quickstart
"""


@click.command(epilog=EPILOG)
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("quickstart"),
    show_default=True,
    help="Folder for what is made; what is finished there is kept.",
)
@click.option(
    "--seed",
    type=click.IntRange(0, 2**32 - 1),
    default=0,
    show_default=True,
    metavar="N",
    help="Of training and asking.",
)
@click.option("--quick", is_flag=True, help="Two minutes instead of four: fewer pairs, steps and requests.")
def command(out: Path, seed: int, quick: bool) -> None:
    """See the method at work: train on a small written world, ask for every quality, and look.

    A model of 0.6 million parameters that comes with mlxpref learns from scored pairs what quality it is
    asked for. Plain DPO, on the same pairs for as many steps, stands beside it. No network is used.
    """
    console.say(WHAT_IT_IS)
    if out == Path():
        raise UsageError("--out names no folder")
    watch = Display()
    before = signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        found = quickstart(out, seed=seed, quick=quick, watch=watch)
    except KeyboardInterrupt:
        watch.stop()
        console.note("stopped; what is finished is kept: the same command goes on from here")
        raise
    finally:
        watch.stop()
        signal.signal(signal.SIGTERM, before)
    show(found)


class Display(Watch):
    """Says each stage as it begins, and how far it is."""

    def __init__(self) -> None:
        self._progress = console.Stages()
        self._n_stages = 0
        self._said: set[str] = set()
        self._n_steps = 0

    def on_stage(self, title: str) -> None:
        self._progress.close()
        self._n_stages += 1
        console.say(f"\n{self._n_stages}. {title}")

    def on_note(self, text: str) -> None:
        if text.startswith("warning: "):
            self._warn(text.removeprefix("warning: "))
        else:
            console.note(f"   {text.replace(f'{Path.cwd()}{os.sep}', '')}")

    def on_progress(self, what: str, done: int, total: int) -> None:
        if console.is_terminal(stderr=True):  # seconds each: no lines in a log for them
            self._progress(what, done, total)

    def on_start(self, start: RunStart) -> None:
        device = (start.facts.get("starts") or [{}])[-1].get("device", {})
        for remark in device.get("remarks", ()):
            self._warn(remark)
        for line in start.lines:
            if line.startswith("warning: "):
                self._warn(line.removeprefix("warning: "))
        self._n_steps = start.n_steps

    def _warn(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            console.warn(text)

    def on_step(self, step: int, metrics: Mapping[str, float]) -> None:
        self._progress("steps", step, self._n_steps)

    def on_interrupt(self, signal_number: int) -> None:
        name = "Ctrl-C" if signal_number == signal.SIGINT else signal.Signals(signal_number).name
        os.write(2, f"\n{name}: finishing this step, then saving (Ctrl-C again stops at once)\n".encode())

    def on_end(self, result: TrainResult) -> None:
        shown = ("loss", "rewards/accuracies")
        figures = ", ".join(f"{key} {result.metrics[key]:.3f}" for key in shown if key in result.metrics)
        console.note(f"   step {result.step}: {figures}")

    def stop(self) -> None:
        self._progress.close()


# --- what came of it ---


def show(found: Found) -> None:
    """Texts, table, sentences, picture, and what to do next."""
    _show_texts(found)
    console.say()
    console.table(
        ("model", "asked for", "score", f"{TOP:g} or more", "Spearman", "sensitivity", "good losers"),
        [row for model in found.models for row in _rows(model)],
        title="What was achieved on held-out requests",
    )
    console.say(LEGEND)
    console.say("\nFound:")
    for sentence in found.said:
        console.say(f"- {sentence}")
    console.say(f"\nPicture: {_short(found.picture)}")
    console.say(f"All figures: {_short(found.folder / 'results.json')}")
    console.say("\nNext:")
    for line in _next(found):
        console.say(f"  {line}")


def _show_texts(found: Found) -> None:
    base, steered = found.models[:2]
    console.say("\nReplies to requests it has never seen; in brackets the points they earn:")
    for index in SHOWN_REQUESTS:
        console.say(f"\n> {found.requests[index]}")
        for sample in texts(base, [None], index):
            console.say(f"  base ({sample.score:.0f}): {sample.text}")
        for sample in texts(steered, SHOWN_GOALS, index):
            console.say(f"  asked for {sample.goal:g} ({sample.score:.0f}): {sample.text}")


def _rows(model: Measured) -> Iterator[tuple[Any, ...]]:
    """The model's own figures beside its answers without a goal; for a steered one a row for each goal."""
    sensitivity = None
    if model.sensitivity is not None:
        sensitivity = "{:.1f} ± {:.1f}".format(*model.sensitivity).replace("-0.0", "0.0")
    displaced = None if model.displaced is None else round(model.displaced[0], 1)
    spearman = None if model.spearman is None else round(model.spearman, 2)
    yield model.title, "–", *_achieved(model.unasked), spearman, sensitivity, displaced
    if model.steerable:
        for one in model.asked:
            yield "", f"{one.goal:g}", *_achieved(one), None, None, None


def _achieved(one: Achieved) -> tuple[str, str]:
    half = "" if one.interval is None else f" ± {(one.interval[1] - one.interval[0]) / 2:.1f}"
    return f"{one.mean:.2f}{half}", f"{one.top_share or 0:.0%}"


def _next(found: Found) -> Iterator[str]:
    program, adapter, pairs = (
        shlex.quote(_short(path)) for path in (_program(), found.folder / "ra-dpo", found.pairs)
    )
    yield f"{program} generate {shlex.quote(found.requests[2])} --adapter-path {adapter} --goal 1 --goal 10"
    yield f"head -n 3 {pairs}    # your own pairs look like this"
    yield f"{program} relabel {pairs} --preview 2    # and this is what a model learns from"


def _program() -> Path:
    """What to call: ``mlxpref`` where that is this one, else the file beside this Python."""
    own = Path(sys.executable).with_name("mlxpref")
    found = shutil.which("mlxpref")
    return Path("mlxpref") if found is not None and (not own.exists() or own.samefile(found)) else own


def _short(path: Path) -> str:
    """As seen from here, where that is shorter; a bare name stays one."""
    return str(path) if path.parent == Path() else min(os.path.relpath(path), str(path), key=len)
