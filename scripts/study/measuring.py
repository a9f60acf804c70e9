"""Train an arm, ask it, and read its log-probs; what was measured is kept, and is not measured twice."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any

from mlxpref import backends, sandbox
from mlxpref.columns import Wanted, add_columns
from mlxpref.config_layers import load_config
from mlxpref.data.recipe import Recipe
from mlxpref.data.sources import SourceSpec, open_source, read_source
from mlxpref.data.tokenization import load_tokenizer
from mlxpref.evaluate import control_curve, evaluate
from mlxpref.facts import commit, versions
from mlxpref.files import write_text
from mlxpref.generate import adapter_recipe, ask_all, generate, text_question
from mlxpref.records import Scored
from mlxpref.reference import ReferenceStore
from mlxpref.runs import CONFIG, RunFolder
from mlxpref.sandbox import gold
from mlxpref.sandbox.examples import pairs
from mlxpref.train import train
from study.arms import BATCH, STRONG, TABLES, Arm
from study.worlds import assets, nearness, read_text_pairs, write_world

TEMPERATURE, MAX_TOKENS, TOGETHER = 0.7, 128, 200
MAX_LENGTH = 256
"""Of the sandbox's rows."""

REQUESTS, TUNING_REQUESTS = 400, 200
JUDGED, LOSERS = 200, 200
"""Held-out pairs whose log-probs are read: any, and such whose rejected response is a good one."""

HIGH, TEXT_HIGH = 6.0, 8.0
"""A response of at least this score is a good one: in the sandbox, in UltraFeedback."""


LIMITS = (TEMPERATURE, MAX_TOKENS, TOGETHER, REQUESTS, TUNING_REQUESTS, JUDGED, LOSERS, HIGH, TEXT_HIGH)
"""What figures depend on beside the adapter."""


HERE = Path(__file__).resolve().parent


APART = ("cli", "diagnosis", "doctor", "report", "torch_backend")


@cache
def code() -> str:
    """A digest of what turns an arm into figures: the packages of mlxpref that take part, the worlds, this file."""
    package = HERE.parent.parent / "mlxpref"
    files = [file for file in package.rglob("*.py") if file.relative_to(package).parts[0] not in APART]
    return _digest([file.read_text(encoding="utf-8") for file in (*sorted(files), Path(__file__), HERE / "worlds.py")])


@cache
def _content(folder: str) -> str:
    """A digest of a folder's files."""
    return _digest([[file.name, hashlib.sha256(file.read_bytes()).hexdigest()]
                    for file in sorted(Path(folder).iterdir()) if file.is_file()])  # fmt: skip


def arms() -> dict[str, Arm]:
    """Every arm of every table, by name."""
    return {arm.name: arm for arm in (STRONG, *(arm for table in TABLES.values() for arm in table.arms))}


def prepare(of: Sequence[Arm], folder: Path) -> None:
    """Write all data and models that these arms share."""
    for world in dict.fromkeys(arm.world for arm in of):
        write_world(world, _worlds(folder, world), base=_base_writes)
    if any(arm.model == "strong" for arm in of):
        write_world(STRONG.world, _worlds(folder, STRONG.world))
        strong = _strong(folder)
        if not strong.is_dir():
            measured(STRONG, 0, folder)
            aside = strong.with_name(f"{strong.name}.part")
            adapter = _place(STRONG, 0, folder, STRONG.rate)
            asked = ("--model", sandbox.MODEL, "--adapter-path", adapter, "--save-path", aside)
            subprocess.run([sys.executable, "-m", "mlx_lm", "fuse", *map(str, asked)], check=True, stdout=sys.stderr)
            aside.rename(strong)


def measured(arm: Arm, seed: int, folder: Path, *, rate: float | None = None) -> dict[str, Any]:
    """Figures of an arm on one seed; taken from the study's folder where they are there already.

    Args:
        rate: one to try: ask other requests than those of the tables, for the best there is alone.
    """
    tuning = rate is not None
    rate = arm.rate if rate is None else rate
    place = _place(arm, seed, folder, rate)
    key = _digest([*LIMITS, arm.goals, versions(), code()])
    file = place.with_name(f"{place.name}-{'tuning' if tuning else 'figures'}-{key}.json")
    if file.is_file():
        return dict(json.loads(file.read_text(encoding="utf-8")))
    began = time.perf_counter()
    _train(arm, _data(arm, seed, folder), place, folder, seed, rate)
    trained = time.perf_counter() - began
    figures: dict[str, Any] = {"arm": arm.name, "rate": rate, "seed": seed, "commit": commit()}
    figures |= _figures(arm, place, folder, seed, tuning)
    figures["seconds"] = {"train": trained, "all": time.perf_counter() - began}
    write_text(file, json.dumps(figures) + "\n")
    return figures


def _place(arm: Arm, seed: int, folder: Path, rate: float) -> Path:
    """The run folder: its name has a digest of all that the adapter in it depends on."""
    data = hashlib.sha256(_data(arm, seed, folder).read_bytes()).hexdigest()
    model = _model(arm, folder)
    content = Path(model).name if arm.model == "strong" else _content(model)  # its name is such a digest
    key = _digest([_settings(arm, rate), content, data, versions(), code()])
    return folder / "arms" / f"{arm.name}-rate-{rate:g}-seed-{seed}-{key}"


def _digest(of: Any) -> str:
    return hashlib.sha256(json.dumps(of, sort_keys=True).encode()).hexdigest()[:10]


# --- data and training ---


def _worlds(folder: Path, world: str) -> Path:
    """Of data: other code, another base or other texts, other data."""
    of = assets() / "data" / "ultrafeedback" if world == "ultrafeedback" else sandbox.MODEL
    return folder / "worlds" / _digest([code(), _content(str(of))])


def _references(folder: Path) -> Path:
    return folder / "reference" / code()


def _data(arm: Arm, seed: int, folder: Path) -> Path:
    world = write_world(arm.world, _worlds(folder, arm.world), base=_base_writes)
    if not arm.judge:
        return world
    judge = arms()[arm.judge]
    adapter = _place(judge, seed, folder, judge.rate)
    scored = _worlds(folder, arm.world) / f"{world.stem}-by-{adapter.name}"
    if not scored.is_dir():
        measured(judge, seed, folder)
        wanted = Wanted(add=("implicit_reward",), adapters=(str(adapter),))
        add_columns(SourceSpec(path=str(world)), scored, wanted, max_length=MAX_LENGTH, file_format="jsonl")
    (file,) = scored.glob("*.jsonl")
    return file


def _train(arm: Arm, data: Path, place: Path, folder: Path, seed: int, rate: float) -> None:
    last = RunFolder(place).last_checkpoint()
    if arm.steps == 0 or (last is not None and last.step >= arm.steps):
        return
    done = train(_config(arm, data, place, folder, seed, rate), resume=(place / CONFIG).is_file())
    if done.interrupted is not None:
        raise KeyboardInterrupt


def _config(arm: Arm, data: Path, place: Path, folder: Path, seed: int, rate: float) -> Any:
    paths = {
        "model.path": _model(arm, folder), "data.source": str(data), "reference.store": str(_references(folder)),
        "output.adapter_path": str(place), "training.seed": seed,
    }  # fmt: skip
    return load_config(None, list({**_settings(arm, rate), **paths}.items()))


def _settings(arm: Arm, rate: float) -> dict[str, Any]:
    """All of the configuration but paths and seed."""
    settings: dict[str, Any] = {
        "batching.batch_size": BATCH, "data.score": "implicit_reward" if arm.judge else None,
        "batching.keep_together": True, "tokenization.max_length": MAX_LENGTH, "adapter.num_layers": -1,
        "adapter.lora_parameters": {"rank": 16, "scale": 2.0}, "objective": arm.objective,
        "optimizer.learning_rate": rate, "optimizer.schedule": {"name": "cosine", "warmup_ratio": 0.05},
        "training.iters": arm.steps, "training.save_every": arm.steps, "training.keep_last": 1,
        "training.steps_per_report": arm.steps,
    }  # fmt: skip
    if arm.relabel is not None:
        settings["relabel"] = dict(arm.relabel)
    return {**settings, **arm.settings}


def _model(arm: Arm, folder: Path) -> str:
    if arm.model == "strong":
        return str(_strong(folder))
    return str(sandbox.MODEL if arm.model == "sandbox" else assets() / "models" / arm.model)


def _strong(folder: Path) -> Path:
    return folder / "models" / _place(STRONG, 0, folder, STRONG.rate).name


# --- figures ---


def _figures(arm: Arm, place: Path, folder: Path, seed: int, tuning: bool) -> dict[str, Any]:
    room = backends.get()
    with room.set_memory_policy() if arm.steps else nullcontext():
        policy = room.load_adapter(str(place)) if arm.steps else room.load_policy(_model(arm, folder), trainable=False)
        recipe = adapter_recipe(place) if arm.steps else None
        if tuning:
            return {"asked": _asked(arm, room, policy, recipe, seed, _requests("valid", TUNING_REQUESTS), best=True)}
        if recipe is not None and recipe.attributes:
            return {"attributes": _attributes(room, policy, recipe, seed)}
        figures: dict[str, Any] = {}
        if arm.world != "ultrafeedback":
            figures["asked"] = _asked(arm, room, policy, recipe, seed, _requests("test", REQUESTS))
        if arm.steps and not arm.judge and arm.world != "peak":  # held-out pairs have gold scores, on their scale
            figures["log_probs"] = _log_probs(arm, room, policy, recipe, folder)
        return figures


def _asked(
    arm: Arm, room: Any, policy: Any, recipe: Recipe | None, seed: int, requests: Sequence[str], *, best: bool = False
) -> dict[str, Any]:
    """Scores, request by request, asked for nothing and for each goal (``best``: the highest alone)."""
    goals, scorer = arm.goals[-1:] if best else arm.goals, nearness if arm.world == "peak" else gold.score
    curve = control_curve(
        [text_question(text) for text in requests], (None, *goals), scorer, room, policy,
        load_tokenizer(str(sandbox.MODEL)), recipe, temperature=TEMPERATURE, max_tokens=MAX_TOKENS,
        batch_size=TOGETHER, seed=seed, top=9.0,
    )  # fmt: skip
    found: dict[str, Any] = {"scores": {}}
    for name in ("top_share", "distinct", "words"):
        found[name] = {_name(one.goal): getattr(one, name) for one in curve.per_goal}
    for sample in sorted(curve.samples, key=lambda one: one.index):
        found["scores"].setdefault(_name(sample.goal), []).append(sample.score)
    return found


def _name(goal: Any) -> str:
    return "none" if goal is None else f"{goal:g}"


def _attributes(room: Any, policy: Any, recipe: Recipe, seed: int) -> dict[str, Any]:
    """Mean content and form by the goal of each, the other at 5."""
    found: dict[str, Any] = {}
    tokenizer, requests = load_tokenizer(str(sandbox.MODEL)), _requests("test", REQUESTS)
    for varied in recipe.attributes:
        goals = [{**dict.fromkeys(recipe.attributes, 5.0), varied: float(value)} for value in range(6)]
        asked = ask_all([text_question(text) for text in requests], goals, recipe, tokenizer)
        answers = generate(asked, room, policy, max_tokens=MAX_TOKENS, temperature=TEMPERATURE, seed=seed,
                           batch_size=TOGETHER)  # fmt: skip
        by_goal: dict[float, list[gold.Gold]] = {}
        for answer in answers:
            assert isinstance(answer.asked.goal, Mapping)
            at = gold.gold(requests[answer.asked.index], answer.text)
            by_goal.setdefault(answer.asked.goal[varied], []).append(at)
        found[varied] = {
            f"{goal:g}": {name: fmean(getattr(one, name) for one in of) for name in ("content", "form")}
            for goal, of in by_goal.items()
        }
    return found


def _log_probs(arm: Arm, room: Any, policy: Any, recipe: Recipe | None, folder: Path) -> dict[str, Any]:
    """What is preferred, goal by goal, and how much likelier good responses became that lost their pair."""
    store, tokenizer = ReferenceStore(_references(folder), policy.fingerprint), load_tokenizer(_model(arm, folder))
    real = arm.world == "ultrafeedback"
    high, limit = (TEXT_HIGH, arm.settings["tokenization.max_length"]) if real else (HIGH, MAX_LENGTH)

    def look(examples: Sequence[Scored]) -> dict[str, Any]:
        return evaluate(examples, room, policy, tokenizer, recipe=recipe, store=store, max_length=limit,
                        high_score=high).metrics  # fmt: skip

    held_out, losers = _held_out(folder, "ultrafeedback" if real else "sandbox", high)
    found, of_losers = look(held_out), look(losers)["views"]
    changes = {name: view["change"]["high_score_rejected"]["sum"] for name, view in of_losers.items()}
    return {
        "sensitivity": found["goal_sensitivity"]["mean"],
        "accuracy": {name: view["accuracy"] for name, view in found["views"].items()},
        "good_rejected": {
            "own": changes["rejected" if recipe is not None else "unconditioned"],
            "top": changes.get("top"),
            "none": changes["unconditioned"],
        },
    }


# --- what is asked about ---


@cache
def _drawn(split: Any, n: int, seed: int) -> list[dict[str, Any]]:
    return pairs(n, split, seed=seed)


def _requests(split: str, n: int) -> list[str]:
    """Of the sandbox's world, drawn for this study alone."""
    return [row["prompt"] for row in _drawn(split, n, 2026)]


def _held_out(folder: Path, kind: str, high: float) -> tuple[list[Scored], list[Scored]]:
    """Any pairs whose scores differ, and those among them whose rejected response is a good one."""
    file = _worlds(folder, kind) / f"held-out-{kind}.jsonl"
    if not file.is_file():
        rows = read_text_pairs("eval") if kind == "ultrafeedback" else _drawn("test", 3000, 2027)
        write_text(file, "".join(json.dumps(row) + "\n" for row in rows))
    found = read_source(open_source(SourceSpec(path=str(file))), strict=True)[0]
    apart = [one for one in found if one.scores is not None and min(one.scores) < max(one.scores)]
    return apart[:JUDGED], [one for one in apart if one.scores is not None and high <= min(one.scores)][:LOSERS]


def _base_writes(prompts: list[str]) -> list[str]:
    room = backends.get()
    policy = room.load_policy(str(sandbox.MODEL), trainable=False)
    asked = ask_all([text_question(text) for text in prompts], [None], None, load_tokenizer(str(sandbox.MODEL)))
    answers = generate(asked, room, policy, max_tokens=MAX_TOKENS, temperature=1.0, seed=0, batch_size=TOGETHER)
    return [answer.text for answer in answers]
