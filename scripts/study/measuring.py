"""Train an arm, ask it, and read its log-probs; what was measured is kept, and is not measured twice."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mlxpref import backends, sandbox
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
from mlxpref.sandbox.quickstart import HIGH
from mlxpref.train import train
from study.arms import BATCH, Arm
from study.worlds import write_world

TEMPERATURE, MAX_TOKENS, TOGETHER, MAX_LENGTH = 0.7, 128, 200, 256
REQUESTS, JUDGED = 200, 120


def measured(arm: Arm, seed: int, folder: Path, *, tuning: bool = False) -> dict[str, Any]:
    """Figures of an arm on one seed.

    Args:
        folder: of the study; what is there already is taken from it.
        tuning: ask the first half of the requests, on which settings are chosen, not the second.
    """
    place = folder / "arms" / f"{arm.name}-rate-{arm.rate:g}-seed-{seed}{'-tuning' if tuning else ''}"
    key = hashlib.sha256(json.dumps([asdict(arm), seed, tuning, versions()], sort_keys=True).encode()).hexdigest()
    file = place.with_suffix(".json")
    if file.is_file() and (found := json.loads(file.read_text(encoding="utf-8")))["key"] == key:
        return dict(found)
    data = write_world(arm.world, folder / "worlds", base=_base_writes)
    began = time.perf_counter()
    last = RunFolder(place).last_checkpoint()
    if last is None or last.step < arm.steps:
        done = train(_config(arm, data, place, folder, seed), resume=(place / CONFIG).is_file())
        if done.interrupted is not None:
            raise KeyboardInterrupt
    trained = time.perf_counter() - began
    figures = {"key": key, "arm": arm.name, "seed": seed, "commit": commit()}
    figures |= _figures(arm, place, folder, seed, tuning)
    figures["seconds"] = {"train": trained, "all": time.perf_counter() - began}
    write_text(file, json.dumps(figures, indent=1) + "\n")
    return figures


def base_figures(folder: Path, seed: int) -> dict[str, Any]:
    """Of the base, asked for nothing."""
    room = backends.get()
    policy = room.load_policy(str(sandbox.MODEL), trainable=False)
    return {"asked": _asked(room, policy, None, (), seed, _requests(tuning=False))}


def _config(arm: Arm, data: Path, place: Path, folder: Path, seed: int) -> Any:
    settings: dict[str, Any] = {
        "model.path": str(sandbox.MODEL), "data.source": str(data), "data.strict": True,
        "tokenization.max_length": MAX_LENGTH, "batching.batch_size": BATCH, "batching.keep_together": True,
        "adapter.num_layers": -1, "adapter.lora_parameters": {"rank": 16, "scale": 2.0}, "objective": arm.objective,
        "reference.store": str(folder / "reference"), "optimizer.learning_rate": arm.rate,
        "optimizer.schedule": {"name": "cosine", "warmup_ratio": 0.05}, "training.iters": arm.steps,
        "training.save_every": arm.steps, "training.keep_last": 1, "training.seed": seed,
        "training.steps_per_report": arm.steps, "output.adapter_path": str(place),
    }  # fmt: skip
    if arm.relabel is not None:
        settings["relabel"] = dict(arm.relabel)
    return load_config(None, list({**settings, **arm.settings}.items()))


def _figures(arm: Arm, place: Path, folder: Path, seed: int, tuning: bool) -> dict[str, Any]:
    room = backends.get()
    with room.set_memory_policy():
        policy = room.load_adapter(str(place))
        recipe = adapter_recipe(place)
        if recipe is not None and recipe.attributes:
            return {"attributes": _attributes(room, policy, recipe, seed)}
        asked = _asked(room, policy, recipe, arm.goals, seed, _requests(tuning=tuning))
        if tuning:
            return {"asked": asked}
        return {"asked": asked, "log_probs": _log_probs(room, policy, recipe, folder)}


def _asked(
    room: Any, policy: Any, recipe: Recipe | None, goals: Sequence[float], seed: int, requests: Sequence[str]
) -> dict[str, Any]:
    """Mean gold score asked for nothing and for each goal; rank correlation over single responses."""
    curve = control_curve(
        [text_question(text) for text in requests], (None, *goals), gold.score, room, policy,
        load_tokenizer(str(sandbox.MODEL)), recipe, temperature=TEMPERATURE, max_tokens=MAX_TOKENS,
        batch_size=TOGETHER, seed=seed, top=9.0,
    )  # fmt: skip
    means = {"none" if one.goal is None else f"{one.goal:g}": one.mean for one in curve.per_goal}
    shares = {"none" if one.goal is None else f"{one.goal:g}": one.top_share for one in curve.per_goal}
    return {"means": means, "top_share": shares, "spearman": curve.spearman}


def _attributes(room: Any, policy: Any, recipe: Recipe, seed: int) -> dict[str, Any]:
    """Mean content and form by the goal of each, the other at 5."""
    found: dict[str, Any] = {}
    tokenizer, requests = load_tokenizer(str(sandbox.MODEL)), _requests(tuning=False)
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
            f"{goal:g}": {name: sum(getattr(one, name) for one in of) / len(of) for name in ("content", "form")}
            for goal, of in by_goal.items()
        }
    return found


def _log_probs(room: Any, policy: Any, recipe: Recipe | None, folder: Path) -> dict[str, Any]:
    """Goal sensitivity, and by what is asked how much likelier good responses became that lost their pair."""
    store, tokenizer = ReferenceStore(folder / "reference", policy.fingerprint), load_tokenizer(str(sandbox.MODEL))

    def views(examples: list[Scored]) -> dict[str, Any]:
        return evaluate(examples, room, policy, tokenizer, recipe=recipe, store=store, max_length=MAX_LENGTH,
                        high_score=HIGH).metrics  # fmt: skip

    pairs = _test()
    good = [one for one in pairs if one.scores is not None and HIGH <= min(one.scores) < max(one.scores)]
    changes = {name: view["change"]["high_score_rejected"]["sum"] for name, view in views(good)["views"].items()}
    own = "rejected" if recipe is not None else "unconditioned"
    return {
        "sensitivity": views(pairs[len(pairs) // 2 :][:JUDGED])["goal_sensitivity"]["mean"],
        "good_rejected": {"own": changes[own], "top": changes.get("top"), "none": changes["unconditioned"]},
    }


def _test() -> list[Scored]:
    return list(read_source(open_source(SourceSpec(path=str(sandbox.TEST))), strict=True)[0])


def _requests(*, tuning: bool) -> list[str]:
    pairs = _test()
    half = pairs[: len(pairs) // 2] if tuning else pairs[len(pairs) // 2 :]
    return [one.prompt[0].content for one in half[:REQUESTS]]


def _base_writes(prompts: list[str]) -> list[str]:
    room = backends.get()
    policy = room.load_policy(str(sandbox.MODEL), trainable=False)
    asked = ask_all([text_question(text) for text in prompts], [None], None, load_tokenizer(str(sandbox.MODEL)))
    answers = generate(asked, room, policy, max_tokens=MAX_TOKENS, temperature=1.0, seed=0, batch_size=TOGETHER)
    return [answer.text for answer in answers]
