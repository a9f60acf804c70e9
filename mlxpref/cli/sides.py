"""The sides of a comparison as a command line names them: checked before any model is loaded, then asked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from mlxpref.cli import console
from mlxpref.cli.policies import named_recipe, open_policy
from mlxpref.cli.sampling import sampling
from mlxpref.cli.unfinished import Keep
from mlxpref.conversion import as_mlx_folder
from mlxpref.data.recipe import Recipe
from mlxpref.errors import DataError, MlxprefError, UsageError
from mlxpref.evaluate.sides import Side, is_file, read_side
from mlxpref.folders import read_base
from mlxpref.generate import NO_GOAL, Question, ask_all, generate, parse_goal
from mlxpref.hub import model_folder
from mlxpref.records import Goal


@dataclass(frozen=True, slots=True)
class Policy:
    """A side that has to be asked.

    Attributes:
        name: as it was given.
        adapter: its folder, or None for a model without one.
        model: folder or id; of an adapter its base, where that is not what the adapter says.
        goal: what it is asked for; None: nothing.
        recipe: that writes the goal.
    """

    name: str
    adapter: str | None
    model: str | None
    goal: Goal | None
    recipe: Recipe | None

    def as_record(self) -> dict[str, Any]:
        """JSON-safe."""
        return {
            "name": self.name, "adapter": self.adapter, "model": self.model,
            "goal": dict(self.goal) if isinstance(self.goal, Mapping) else self.goal,
            "recipe": None if self.recipe is None else self.recipe.as_dict(),
        }  # fmt: skip


def named_side(name: str, questions: Sequence[Question], *, base: str | None = None) -> Side | Policy:
    """A side: a file of responses, ``adapter``, ``adapter@goal``, or a model; checked as far as that goes without
    loading weights. ``base`` is that of an adapter whose own is not where it was.

    Raises:
        UsageError: a goal that this side cannot be asked for. DataError, AdapterError, ModelError: a file, adapter or
            model that cannot be used, or a prompt that cannot take the goal.
    """
    if is_file(name):
        return read_side(Path(name), questions)
    where, at, goal = name.rpartition("@") if "@" in name and not Path(name).exists() else (name, "", "")
    if at and not goal:
        raise UsageError(f"{name}: there is no goal after @; write for example {where}@top")
    if not (Path(where) / "adapter_config.json").is_file():
        if goal:
            raise UsageError(f"{name}: {where} is no adapter folder; a goal after @ is for one")
        model_folder(where, weights=False)
        return Policy(name, None, where, None, None)
    recipe = named_recipe(where, None, model=base)
    base = _moved(where, base)
    side = Policy(name, where, base, _goal(name, where, goal, recipe), recipe)
    _check_prompts(side, questions)
    return side


def _moved(adapter: str, base: str | None) -> str | None:
    """The given base, where the one that the adapter names cannot be found; else None. ModelError if neither can."""
    try:
        its = read_base(as_mlx_folder(adapter), None)
        model_folder(its.path, revision=its.revision, weights=False)
        return None
    except MlxprefError:
        if base is None:
            raise
    as_mlx_folder(adapter, model=base)
    model_folder(base, weights=False)
    return base


def _goal(name: str, where: str, text: str, recipe: Recipe | None) -> Goal | None:
    if recipe is None:
        if text not in ("", NO_GOAL):
            raise UsageError(f"{name}: this adapter was trained without goals; leave @{text} out")
        return None
    try:
        return parse_goal(text or "top", recipe)
    except UsageError as error:
        said = str(error).replace(f"--goal {text}", f"{name}").replace("--goal ", f"{where}@")
        raise UsageError(said) from error


def _check_prompts(side: Policy, questions: Sequence[Question]) -> None:
    if side.goal is None or side.recipe is None:
        return
    for place, question in enumerate(questions):
        try:
            side.recipe.write(question.prompt, side.goal)
        except DataError as error:
            raise DataError(f"{side.name}, prompt {place}: {error}") from error


def about(side: Side | Policy) -> dict[str, Any]:
    """What made a side, JSON-safe."""
    return side.as_record() if isinstance(side, Policy) else {"name": side.name, "file": side.name}


def asked_side(side: Side | Policy, questions: Sequence[Question], options: Mapping[str, Any], keep: Keep) -> Side:
    """What it answers: what a file holds, or what a policy writes with these options of the command, which ``keep``
    gets as it comes."""
    if isinstance(side, Side):
        return side
    opened = open_policy(
        adapter_path=side.adapter, model=side.model, revision=None, dtype=options["dtype"], recipe_path=None,
        backend=options["backend"],
    )  # fmt: skip
    asked = ask_all(questions, [side.goal], opened.recipe, opened.tokenizer)
    asked = [each for each in asked for _ in range(options["samples"])]
    with console.progress(f"responses of {side.name}", len(asked)) as at:
        answers = generate(
            asked, opened.backend, opened.policy, **sampling(options), on_progress=lambda done, total: at(done),
            on_answers=partial(keep, of=side.name),
        )  # fmt: skip
    return Side.of(side.name, answers, len(questions))
