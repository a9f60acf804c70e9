"""The whole way on the sandbox, in minutes: relabel, reference, train, ask, evaluate, look.

Whatever was finished is kept in the output folder, and an interrupted quickstart goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mlxpref import backends, sandbox
from mlxpref.callbacks import TrainCallback
from mlxpref.config import Config
from mlxpref.config_layers import check_config, read_yaml
from mlxpref.data.recipe import Recipe
from mlxpref.data.relabel_sources import relabel_sources
from mlxpref.data.relabelled import is_relabelled, read_relabelled, write_relabelled
from mlxpref.data.sources import SourceSpec, open_source, read_source
from mlxpref.data.tokenization import load_tokenizer
from mlxpref.errors import MlxprefError, RunError
from mlxpref.evaluate import evaluate
from mlxpref.evaluate.control import ControlCurve, as_curve, control_curve
from mlxpref.facts import commit, versions
from mlxpref.files import write_text
from mlxpref.generate import text_question
from mlxpref.records import Scored
from mlxpref.reference import ReferenceStore
from mlxpref.report import Line, draw_control_curve
from mlxpref.runs import ADAPTER, CONFIG, RunFolder
from mlxpref.sandbox import gold, language, world
from mlxpref.sandbox.findings import headline, sentences
from mlxpref.sandbox.measured import TOP, Measured, keep, kept
from mlxpref.sandbox.trials import FULL, GAP, MAX_LENGTH, QUICK, TRIALS, Size, Trial, configuration
from mlxpref.train import absolute_paths, train

GOALS = (None, *map(float, range(1, 11)))
FEW_GOALS = (None, 2.0, 10.0)
"""For models that never learned what a goal is: enough to see that they do not hear it."""

TEMPERATURE = 0.7
MAX_TOKENS = 128
TOGETHER = 200
"""Requests answered side by side."""

HIGH = 6.0
"""A reply that scores at least this is a good one, also where it loses its pair."""


class Watch(TrainCallback):
    """Listens to a quickstart; every method does nothing, override what is needed."""

    def on_stage(self, title: str) -> None:
        """A stage begins."""


@dataclass(frozen=True, slots=True)
class Found:
    """What a quickstart found.

    Attributes:
        folder: of this seed and size, with the runs in it.
        pairs: the file of scored pairs everything was trained on.
        models: the base first, then the trials.
        requests: what was asked, by ``Sample.index``.
        picture: the control curve.
        said: what was found, in sentences.
    """

    folder: Path
    pairs: Path
    models: tuple[Measured, ...]
    requests: tuple[str, ...]
    picture: Path
    said: tuple[str, ...]


def quickstart(
    out: Path, *, seed: int = 0, quick: bool = False, trials: Sequence[Trial] = TRIALS, watch: Watch | None = None
) -> Found:
    """Train and measure every trial on the sandbox.

    Args:
        out: folder for everything that is made; what is finished there is kept.
        seed: of first weights, order and sampling. The pairs are the same for every seed.
        quick: fewer pairs, steps and requests.
        trials: what to train; the first must be relabelled, and is the one that is drawn.

    Raises:
        KeyboardInterrupt: stopped while training, everything saved.
        RunError: ``out`` holds a run with other settings, or cannot be written.
    """
    return _Quickstart(out.resolve(), seed, QUICK if quick else FULL, tuple(trials), watch or Watch()).go()


@dataclass(frozen=True, slots=True)
class _Quickstart:
    out: Path
    seed: int
    size: Size
    trials: tuple[Trial, ...]
    watch: Watch

    @property
    def folder(self) -> Path:
        return self.out / (f"seed-{self.seed}" + ("-quick" if self.size is QUICK else ""))

    @property
    def store(self) -> Path:
        return self.out / "reference"

    def go(self) -> Found:
        self.watch.on_stage("relabel: each pair becomes two, one per score asked for")
        pairs, relabelled = self._data()
        recipe = read_relabelled(relabelled).recipe
        assert recipe is not None
        configs = {trial.name: self._configuration(trial, pairs, relabelled) for trial in self.trials}
        for trial in self.trials:
            self.watch.on_stage(f"train {trial.title}: {self.size.steps} steps")
            with _stage(self.folder / trial.name):
                self._train(configs[trial.name])
        models = [self._measured(None, None, recipe)]
        models += [self._measured(trial, configs[trial.name], recipe) for trial in self.trials]
        return self._found(pairs, models)

    # --- data ---

    def _data(self) -> tuple[Path, Path]:
        """The file of pairs, and the folder they are relabelled into."""
        lines = clear_pairs(self.size.pairs)
        # A run's settings name its data: other pairs, other settings.
        named = f"{self.size.pairs}-{hashlib.sha256(lines.encode()).hexdigest()[:8]}"
        pairs, folder = self.out / f"pairs-{named}.jsonl", self.out / f"relabelled-{named}"
        if is_relabelled(folder) and pairs.is_file() and pairs.read_bytes() == lines.encode():
            self.watch.on_note(f"{folder}: there already")
            return pairs, folder
        write_text(pairs, lines)
        done = relabel_sources([SourceSpec(path=str(pairs))], {"mapping": "identity"})
        write_relabelled(
            folder, done.splits, done.recipe, counts=done.counts, written_with=done.options, overwrite=folder.exists()
        )
        rows = sum(map(len, done.splits.values()))
        self.watch.on_note(f"{self.size.pairs} pairs, {rows} relabelled rows: {folder}")
        return pairs, folder

    def _configuration(self, trial: Trial, pairs: Path, relabelled: Path) -> Config:
        data = relabelled if trial.relabelled else pairs
        if trial.shuffled:
            data = relabelled.with_name(f"{relabelled.name}-shuffled-{self.seed}")
            if not is_relabelled(data):
                write_shuffled(relabelled, data, seed=self.seed)
        config = configuration(trial, data, self.folder / trial.name, self.size, seed=self.seed, store=self.store)
        return absolute_paths(config)

    # --- training ---

    def _train(self, config: Config) -> None:
        folder = Path(config.output.adapter_path)
        begun = (folder / CONFIG).is_file()
        if begun and check_config(read_yaml(folder / CONFIG)).as_dict() != config.as_dict():
            raise RunError(f"{folder}: holds a run with other settings, of another version or before it was moved")
        if begun and _is_whole(folder, config.training.iters):
            self.watch.on_note(f"{folder}: there already")
            return
        result = train(config, resume=begun, callbacks=[self.watch])
        if result.interrupted is not None:
            raise KeyboardInterrupt

    # --- measuring ---

    def _measured(self, trial: Trial | None, config: Config | None, recipe: Recipe) -> Measured:
        name, title = ("base", "base") if trial is None else (trial.name, trial.title)
        self.watch.on_stage(f"ask {title}")
        folder = self.folder / "measured"
        key = self._key(config, recipe)
        found = kept(name, key, folder, seed=self.seed)
        if found is not None:
            self.watch.on_note(f"{folder / name}.json: there already")
            return found
        backend = backends.get()
        with backend.set_memory_policy():
            if trial is None or config is None:
                policy = backend.load_policy(str(sandbox.MODEL), trainable=False)
                found = Measured(name, title, False, self._curve(backend, policy, recipe, FEW_GOALS))
            else:
                policy = backend.load_adapter(config.output.adapter_path)
                curve = self._curve(backend, policy, recipe, GOALS if trial.relabelled else FEW_GOALS)
                judged = self._judged(backend, policy, recipe, trial)
                found = Measured(name, title, trial.relabelled, curve, **judged)
        keep(found, key, folder)
        return found

    def _curve(self, backend: Any, policy: Any, recipe: Recipe, goals: Sequence[float | None]) -> ControlCurve:
        return control_curve(
            [text_question(request) for request in self._requests()], goals, gold.score,
            backend, policy, load_tokenizer(str(sandbox.MODEL)), recipe,
            temperature=TEMPERATURE, max_tokens=MAX_TOKENS, batch_size=TOGETHER, seed=self.seed, top=TOP,
            on_progress=lambda done, total: self.watch.on_progress("answers", done, total),
        )  # fmt: skip

    def _judged(self, backend: Any, policy: Any, recipe: Recipe, trial: Trial) -> dict[str, Any]:
        """Goal sensitivity, and how good replies that lost their pair changed in log-prob: asked for as the model is
        meant to be asked, with the reply's own score or without a goal."""
        sensitivity = self._log_probs(backend, policy, recipe, held_out(self.size.judged))["goal_sensitivity"]
        views = self._log_probs(backend, policy, recipe, good_losers())["views"]
        change = views["rejected" if trial.relabelled else "unconditioned"]["change"]["high_score_rejected"]
        return {
            "sensitivity": (sensitivity["mean"], sensitivity["error"]),
            "displaced": (change["sum"], change["responses"]),
        }

    def _log_probs(self, backend: Any, policy: Any, recipe: Recipe, examples: list[Scored]) -> dict[str, Any]:
        return evaluate(
            examples, backend, policy, load_tokenizer(str(sandbox.MODEL)),
            recipe=recipe, store=ReferenceStore(self.store, policy.fingerprint), max_length=MAX_LENGTH,
            high_score=HIGH,
            on_progress=lambda what, done, total: self.watch.on_progress(f"{what} log-probs", done, total),
        ).metrics  # fmt: skip

    def _requests(self) -> tuple[str, ...]:
        return tuple(example.prompt[0].content for example in held_out(self.size.requests))

    def _key(self, config: Config | None, recipe: Recipe) -> str:
        """Changes with what is measured: the model, the requests, how they are asked, what judges the replies."""
        asked = [TEMPERATURE, MAX_TOKENS, TOGETHER, MAX_LENGTH, HIGH, TOP, GOALS, FEW_GOALS, recipe.as_dict()]
        judges = (Path(str(room.__file__)) for room in (gold, language, world))
        files = [*sorted(sandbox.MODEL.iterdir()), sandbox.TEST, *judges]
        if config is not None:
            files.append(Path(config.output.adapter_path) / "adapters.safetensors")
        digests = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
        settings = None if config is None else config.as_dict()
        what = [settings, asdict(self.size), self.seed, versions(), commit(), asked, digests]
        return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()

    # --- what came of it ---

    def _found(self, pairs: Path, models: list[Measured]) -> Found:
        steered = models[1]
        picture = self.folder / "control-curve.png"
        draw_control_curve(
            [as_curve(one.title, one.asked) for one in models if one.steerable],
            picture,
            lines=[Line(one.title, one.unasked.mean) for one in models if not one.steerable],
            title=headline(steered),
            x_label="score asked for",
            y_label="score of the answers",
        )
        said = tuple(sentences(models[0], steered, [one for one in models[1:] if not one.steerable]))
        record = {
            "seed": self.seed,
            "size": asdict(self.size),
            "temperature": TEMPERATURE,
            "models": {one.name: one.as_record() for one in models},
            "said": said,
            "versions": versions(),
            "commit": commit(),
        }
        write_text(self.folder / "results.json", json.dumps(record, indent=2) + "\n")
        return Found(self.folder, pairs, tuple(models), self._requests(), picture, said)


def held_out(n: int) -> list[Scored]:
    """``n`` scored pairs of scenes that neither pretraining nor training has seen: of the second half of the test
    file. Settings were chosen looking at the first."""
    examples = _test_pairs()
    return list(examples[len(examples) // 2 :][:n])


def good_losers() -> list[Scored]:
    """Held-out pairs whose worse reply is a good one, at least ``HIGH``."""
    return [one for one in _test_pairs() if one.scores is not None and HIGH <= min(one.scores) < max(one.scores)]


def _test_pairs() -> Sequence[Scored]:
    return read_source(open_source(SourceSpec(path=str(sandbox.TEST))), strict=True)[0]


def clear_pairs(n: int) -> str:
    """Lines of the first ``n`` training pairs whose scores are at least ``GAP`` apart."""
    with sandbox.TRAIN.open(encoding="utf-8") as lines:
        rows = ((line, json.loads(line)) for line in lines)
        return "".join([line for line, row in rows if row["score_chosen"] - row["score_rejected"] >= GAP][:n])


def write_shuffled(relabelled: Path, folder: Path, *, seed: int) -> None:
    """The relabelled rows with their goals dealt out anew: as many of each, and none says anything."""
    found = read_relabelled(relabelled)
    recipe, rows = found.recipe, found.read("train")
    assert recipe is not None
    dealt = np.random.default_rng(seed).permutation(len(rows))
    changed = []
    for row, other in zip(rows, dealt, strict=True):
        goal = rows[other].goal
        assert goal is not None
        prompt, text = recipe.write(recipe.erase(row.prompt), goal)
        changed.append(replace(row, prompt=prompt, goal=goal, goal_text=text))
    write_relabelled(folder, {"train": changed}, recipe)


@contextmanager
def _stage(folder: Path) -> Iterator[None]:
    """What stops a stage says how to begin it anew."""
    try:
        yield
    except MlxprefError as error:
        raise RunError(
            f"{error}\nTo go on, mend that and give the same command again; to begin this stage anew, delete {folder}"
        ) from error


def _is_whole(folder: Path, steps: int | None) -> bool:
    """Whether the run is at its end and its adapter is that of its last checkpoint."""
    last = RunFolder(folder).last_checkpoint()
    if last is None or last.step != steps:
        return False
    return all(
        (folder / name).is_file() and (folder / name).read_bytes() == (last.folder / name).read_bytes()
        for name in ADAPTER
    )
