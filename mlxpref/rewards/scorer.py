"""What a scorer is, how one is named, and the check that its numbers pass before anybody uses them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any, Protocol

from mlxpref.errors import MlxprefError, ScoreError, UsageError, raise_all
from mlxpref.records import Prompt

MOST_SHOWN = 5
"""Things that an error names one by one."""


class Scorer(Protocol):
    """Says how good responses are: one finite number each, higher is better, on any scale.

    Prompts come as they were asked by people, without a goal in them: what was asked for is no part
    of what was achieved.
    """

    def __call__(self, prompts: Sequence[Prompt], responses: Sequence[str], /) -> Sequence[float]: ...


def load_scorer(name: str) -> Scorer:
    """The scorer called ``module:function``, for example ``my_scores:politeness``.

    The function takes two lists of the same length, prompts (tuples of ``Message``) and response
    texts, and returns one number for each. ``module:object.method`` works, too.

    Raises:
        UsageError: the name has another form, its module cannot be imported, or it names nothing that
            can be called.
    """
    module, colon, path = name.partition(":")
    if not (module and colon and path):
        raise UsageError(f"scorer {name!r}: write module:function, for example my_scores:politeness")
    found: Any = _module(name, module)
    for part in path.split("."):
        if not hasattr(found, part):
            where = getattr(found, "__name__", type(found).__name__)
            raise UsageError(f"scorer {name!r}: there is no {part} in {where}{_others(found)}")
        found = getattr(found, part)
    if isinstance(found, type) or not callable(found):
        kind = "a class; name an object of it" if isinstance(found, type) else f"of type {type(found).__name__}"
        raise UsageError(f"scorer {name!r}: it is {kind}. A scorer is a function of prompts and responses")
    scorer: Scorer = found
    return scorer


def _module(name: str, module: str) -> Any:
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        wanted = error.name or module
        if module == wanted or module.startswith(f"{wanted}."):
            remedy = "install it, or put its folder on PYTHONPATH (PYTHONPATH=. for the current one)"
        else:
            remedy = f"{module} needs it; install it"
        raise UsageError(f"scorer {name!r}: no module {wanted}; {remedy}") from error
    except Exception as error:  # the module is somebody else's code: anything can go wrong in it
        raise UsageError(
            f"scorer {name!r}: {module} cannot be imported ({type(error).__name__}: {error}); mend it first"
        ) from error


def _others(found: Any) -> str:
    names = sorted(key for key, value in getattr(found, "__dict__", {}).items() if callable(value) and key[0] != "_")
    return f"; there is {', '.join(names[:MOST_SHOWN])}" if names else ""


def score_all(scorer: Scorer, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
    """The scorer's numbers, one for each response, checked.

    Args:
        prompts: of each response, without a goal in it.
        responses: texts, as many as prompts.

    Raises:
        ScoreError: not one number for each response, or numbers that are not finite; it says which.
    """
    called = scorer_name(scorer)
    if len(prompts) != len(responses):
        raise ScoreError(f"{called}: {len(prompts)} prompts for {len(responses)} responses; give one prompt for each")
    try:
        found = scorer(prompts, responses)
    except MlxprefError:
        raise
    except Exception as error:  # somebody else's code: anything can go wrong in it
        raise ScoreError(f"{called} failed: {type(error).__name__}: {error}") from error
    return checked_numbers(called, found, responses)


def checked_numbers(called: str, found: Any, responses: Sequence[str]) -> list[float]:
    """What a scorer or judge returned, as one finite number for each response.

    Raises:
        ScoreError: it is something else; it says what and where.
    """
    try:
        values = list(found)
    except TypeError as error:
        raise ScoreError(
            f"{called} returned {type(found).__name__}; it is to return a list with one number for each response"
        ) from error
    if len(values) != len(responses):
        raise ScoreError(
            f"{called} returned {len(values)} scores for {len(responses)} responses; it is to return one for each, "
            "in their order"
        )
    scores = [_number(value) for value in values]
    wrong = [i for i, score in enumerate(scores) if score is None]
    shown = [f"response {i} ({_short(responses[i])}): {values[i]!r}" for i in wrong[:MOST_SHOWN]]
    if len(wrong) > MOST_SHOWN:
        shown.append(f"and {len(wrong) - MOST_SHOWN} more")
    raise_all(shown, ScoreError, f"{called} returned scores that are no finite numbers:")
    return [score for score in scores if score is not None]


def scorer_name(scorer: Callable[..., Any]) -> str:
    """For messages and reports: a function's name, else the name of an object's class."""
    return str(getattr(scorer, "__qualname__", None) or type(scorer).__qualname__)


def _number(value: Any) -> float | None:
    """The value as a float; None if it is text, missing or not finite."""
    try:
        number = None if isinstance(value, str | bytes) else float(value)
    except (TypeError, ValueError):
        return None
    return number if number is not None and math.isfinite(number) else None


def _short(text: str) -> str:
    return repr(text if len(text) <= 30 else text[:29] + "…")
