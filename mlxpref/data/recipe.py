"""The conditioning recipe: the words that state a goal, where they stand, and which scale they mean.

Training writes goals with it, generation asks with it; it travels in the adapter, so both use the
same words. Everything here is a function from values to new values.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from difflib import get_close_matches
from string import Formatter
from typing import Any, Literal

from jinja2.exceptions import TemplateError

from mlxpref.data.scale import IDENTITY, MAX_DECIMALS, Range, ScoreMap, check_range
from mlxpref.data.words import counted
from mlxpref.errors import DataError, ScoreError, UsageError
from mlxpref.records import Goal, Message, Prompt, Scored

Carrier = Literal["system", "first_user"]

VERSION = 1

_FIRST_SENTENCE = (
    "You are an assistant that generates responses for the instruction while implicitly achieving the "
    "following target scores (on a scale of {low}-{high}, where {low} is lowest and {high} is highest):"
)
SEED_TEMPLATE = _FIRST_SENTENCE + "\nOverall score: {score}."
"""The wording of the reward-augmented DPO code (arXiv 2410.08067)."""

ATTRIBUTES_TEMPLATE = _FIRST_SENTENCE + "\n{goals}"
"""The same first sentence, then a line ``Name: value.`` for each attribute. The lines are ours."""

OVERALL = "overall"
"""Among the attributes this name is the score itself, where the data hold no attribute of that name."""

_NUMBER = r"-?\d+(?:\.\d+)?(?:e[+-]?\d+)?"


def format_number(value: float, decimals: int | None = None) -> str:
    """A score as the prompt writes it, in training and in generation alike.

    ``8.0`` → ``8``, ``8.5`` → ``8.5``, ``7.3333333`` → ``7.3333333`` (the seed's way); with
    ``decimals`` always so many: ``format_number(8, 1)`` is ``8.0``. ScoreError if not finite.
    """
    value = float(value)
    if not math.isfinite(value):
        raise ScoreError(f"a goal is a finite number, not {value}")
    if decimals is not None:
        return f"{round(value, decimals) + 0.0:.{decimals}f}"  # + 0.0: no "-0"
    return str(int(value)) if value.is_integer() else repr(value)


def goal_words(goal: Goal | None) -> str:
    """For people: ``goal 8.5``, ``goal honesty 4, helpfulness 5``, ``no goal``."""
    if goal is None:
        return "no goal"
    named = goal.items() if isinstance(goal, Mapping) else [("", goal)]
    return "goal " + ", ".join(f"{name} {format_number(value)}".strip() for name, value in named)


@dataclass(frozen=True)
class Recipe:
    """How a goal is written into a prompt.

    Attributes:
        template: the goal text. ``{low}`` and ``{high}`` are the ends of the goal range. Stated once:
            ``{score}``; or, for several attributes, ``{goals}`` (a line ``Name: value.`` for each) or
            every attribute by its name (``{helpfulness}``). A brace that is meant is doubled.
        carrier: "system": the system message, before what it already says; "first_user": the first
            user turn, likewise. A blank line between.
        score_range: the scale of the data, declared; a score off it is an error. None: not declared.
        goal_range: the scale the text names.
        mapping: score → goal.
        number_format: None as in the seed, or a fixed number of decimals; goals are rounded to it,
            so that two scores that read the same are the same goal.
        top_goal: what to ask for when nobody says; by default the upper end of the goal range.
        attributes: names of the scores that are asked for together; empty: the one score.
        attribute_mappings: score → goal for each attribute.

    Raises:
        UsageError: the template does not state the goal, or not once, or names what there is not.
    """

    template: str = SEED_TEMPLATE
    carrier: Carrier = "system"
    score_range: Range | None = None
    goal_range: Range = (1.0, 10.0)
    mapping: ScoreMap = IDENTITY
    number_format: int | None = None
    top_goal: Goal = None  # type: ignore[assignment]  # filled in below
    attributes: tuple[str, ...] = ()
    attribute_mappings: Mapping[str, ScoreMap] = field(default_factory=dict)
    _pattern: re.Pattern[str] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.carrier not in ("system", "first_user"):
            raise UsageError(f"unknown carrier {self.carrier!r}; one of system, first_user")
        if self.number_format is not None and not 0 <= self.number_format <= MAX_DECIMALS:
            raise UsageError(
                f"the number format is a count of decimals, 0 to {MAX_DECIMALS}, not {self.number_format}"
            )
        check_range("the goal range", self.goal_range)
        if any(self._round(bound) != bound for bound in self.goal_range):
            raise UsageError(
                f"the goal range {self.goal_range} needs more than {counted(self.number_format or 0, 'decimal')}"
            )
        check_template(self.template, self.attributes)
        maps = {name: self.attribute_mappings.get(name, IDENTITY) for name in self.attributes}
        object.__setattr__(self, "attribute_mappings", maps)
        numbers = dict.fromkeys(self.attributes or ("score",), _NUMBER)
        pattern = self._fill(numbers, re.escape) + r"(?=\n\n|\Z)"
        object.__setattr__(self, "_pattern", re.compile(pattern))
        top = self.goal_range[1] if self.top_goal is None else self.top_goal
        if self.attributes and not isinstance(top, Mapping):
            top = dict.fromkeys(self.attributes, top)
        object.__setattr__(self, "top_goal", self.check_goal(top))

    # --- words ---

    def goal_text(self, goal: Goal) -> str:
        """The text that states this goal. UsageError if the goal is not one of this recipe."""
        goal = self.check_goal(goal)
        named = goal if isinstance(goal, Mapping) else {"score": goal}
        values = {name: format_number(value, self.number_format) for name, value in named.items()}
        return self._fill(values, str)

    def _fill(self, values: Mapping[str, str], quote: Callable[[str], str]) -> str:
        """The template with these values for goals and everything else passed through ``quote``."""
        low, high = (quote(format_number(bound)) for bound in self.goal_range)
        lines = (f"{quote(label(name) + ': ')}{values[name]}{quote('.')}" for name in self.attributes)
        words = {**values, "low": low, "high": high, "goals": quote("\n").join(lines)}
        return "".join(quote(text) + (words[name] if name else "") for text, name in _pieces(self.template))

    def write(self, prompt: Prompt, goal: Goal) -> tuple[Prompt, str]:
        """A new prompt that states the goal, and the text that states it.

        The text comes first in its message, so its first occurrence there is the goal even if the
        user happens to quote the sentence further down.

        Raises:
            UsageError: the goal is off the goal range or of another shape than this recipe's.
            DataError: the prompt states a goal already (:meth:`erase` it first), or has no user turn
                to carry one.
        """
        text = self.goal_text(goal)
        if self.states_goal(prompt):
            raise DataError("the prompt already states a goal")
        at = self._place(prompt)
        if at is None and self.carrier == "first_user":
            raise DataError("no user turn to carry the goal")
        if at is None:
            return (Message("system", text), *prompt), text
        said = prompt[at].content
        content = f"{text}\n\n{said}" if said.strip() else text
        return (*prompt[:at], replace(prompt[at], content=content), *prompt[at + 1 :]), text

    def erase(self, prompt: Prompt) -> Prompt:
        """The prompt without the goal that :meth:`write` put there; as it is when it states none.

        A system message that holds nothing but the goal goes with it.
        """
        at = self._place(prompt)
        stated = self._stated(prompt)
        if at is None or stated is None:
            return prompt
        rest = prompt[at].content[stated.end() :].removeprefix("\n\n")
        kept = () if not rest and self.carrier == "system" else (replace(prompt[at], content=rest),)
        return (*prompt[:at], *kept, *prompt[at + 1 :])

    def states_goal(self, prompt: Prompt) -> bool:
        """Whether a goal, in these words and any number, stands where this recipe writes it."""
        return self._stated(prompt) is not None

    def _stated(self, prompt: Prompt) -> re.Match[str] | None:
        at = self._place(prompt)
        return None if at is None else self._pattern.match(prompt[at].content)

    def _place(self, prompt: Prompt) -> int | None:
        """Index of the message that carries the goal, or None where there is no such message yet."""
        if self.carrier == "system":
            return 0 if prompt and prompt[0].role in ("system", "developer") else None
        return next((i for i, message in enumerate(prompt) if message.role == "user"), None)

    # --- numbers ---

    def check_goal(self, goal: Goal) -> Goal:
        """The goal, rounded as it will be written. UsageError if off the range, or of another shape."""
        if isinstance(goal, Mapping) != bool(self.attributes):
            wanted = ", ".join(self.attributes) if self.attributes else "one number"
            raise UsageError(f"this recipe asks for {wanted}; got the goal {goal!r}")
        if not isinstance(goal, Mapping):
            return self._check_value("goal", goal)
        if set(goal) != set(self.attributes):
            raise UsageError(f"this recipe asks for {', '.join(self.attributes)}; got {', '.join(goal)}")
        return {name: self._check_value(name, goal[name]) for name in self.attributes}

    def _check_value(self, name: str, value: float) -> float:
        low, high = self.goal_range
        if not low <= value <= high:
            raise UsageError(f"{name} {value:g} is off this recipe's scale, {low:g}-{high:g}")
        return self._round(value)

    def _round(self, value: float) -> float:
        return float(value) if self.number_format is None else round(float(value), self.number_format)

    def scores(self, example: Scored) -> tuple[float, ...] | None:
        """(K,) the example's scores in goal units; of a several-attribute recipe the score itself
        where there is one, else the mean of the attributes. None if unscored.

        Raises:
            ScoreError: a score off the declared range, or off a goal range that takes scores as they are.
        """
        if self.attributes and example.scores is None:
            columns = self.goals(example)
            return None if columns is None else tuple(sum(c) / len(c) for c in columns)
        if example.scores is None:
            return None
        declared = None if self.attributes else self.score_range
        return tuple(self._convert("score", v, self.mapping, declared) for v in example.scores)

    def goals(self, example: Scored) -> tuple[tuple[float, ...], ...] | None:
        """(K, A) each response's own scores in goal units, A = 1 without attributes. None if unscored.

        Raises:
            ScoreError: as in :meth:`scores`.
            DataError: the example lacks an attribute.
        """
        if not self.attributes:
            scores = self.scores(example)
            return None if scores is None else tuple((score,) for score in scores)
        columns = []
        for name in self.attributes:
            raw = raw_scores(example, name)
            if raw is None and example.scores is None and not example.attributes:
                return None
            if raw is None:
                raise DataError(f"no attribute {name!r}")
            declared = None if name == OVERALL else self.score_range
            columns.append([self._convert(name, v, self.attribute_mappings[name], declared) for v in raw])
        return tuple(zip(*columns, strict=True))

    def _convert(self, name: str, value: float, mapping: ScoreMap, declared: Range | None) -> float:
        scale = declared or (self.goal_range if mapping.kind == "identity" else None)
        if scale is not None and not scale[0] <= value <= scale[1]:
            raise ScoreError(f"{name} {value:g} is off the scale {scale[0]:g}-{scale[1]:g}")
        return self._round(mapping(value))

    # --- files ---

    def as_dict(self) -> dict[str, Any]:
        """JSON-safe; :meth:`from_dict` gives an equal recipe back."""
        return {
            "version": VERSION,
            "template": self.template,
            "carrier": self.carrier,
            "score_range": None if self.score_range is None else list(self.score_range),
            "goal_range": list(self.goal_range),
            "mapping": self.mapping.as_dict(),
            "number_format": self.number_format,
            "top_goal": dict(self.top_goal) if isinstance(self.top_goal, Mapping) else self.top_goal,
            "attributes": list(self.attributes),
            "attribute_mappings": {name: m.as_dict() for name, m in self.attribute_mappings.items()},
        }

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> Recipe:
        """The recipe that ``as_dict`` wrote. DataError if it is damaged or of a later version."""
        if stored.get("version") != VERSION:
            raise DataError(f"a recipe of version {stored.get('version')!r}; this mlxpref reads {VERSION}")
        wanted = {f.name for f in fields(cls) if f.init} | {"version"}
        if set(stored) != wanted:
            raise DataError(f"a recipe with fields {sorted(stored)}; needed {sorted(wanted)}")
        try:
            given = {name: value for name, value in stored.items() if name != "version"}
            given["score_range"] = given["score_range"] and check_range("score_range", given["score_range"])
            given["goal_range"] = check_range("goal_range", given["goal_range"])
            given["attributes"] = tuple(given["attributes"])
            given["mapping"] = ScoreMap.from_dict(given["mapping"])
            maps = given["attribute_mappings"]
            given["attribute_mappings"] = {name: ScoreMap.from_dict(maps[name]) for name in maps}
            return cls(**given)
        except (TypeError, ValueError, AttributeError, UsageError) as error:
            raise DataError(f"a damaged recipe: {error}") from error


def label(attribute: str) -> str:
    """``instruction_following`` → ``Instruction following``; the overall score is ``Overall score``."""
    return "Overall score" if attribute == OVERALL else attribute.replace("_", " ").capitalize()


def raw_scores(example: Scored, attribute: str) -> tuple[float, ...] | None:
    """(K,) scores of an example under an attribute, in the units of the data; None if it has none."""
    if attribute in example.attributes:
        return example.attributes[attribute]
    return example.scores if attribute == OVERALL else None


def _pieces(template: str) -> Iterator[tuple[str, str | None]]:
    """(literal text, placeholder or None) pairs of a template. UsageError on a stray brace."""
    try:
        for text, name, spec, conversion in Formatter().parse(template):
            if spec or conversion:
                raise UsageError(f"the placeholder {{{name}}} takes no format; use the number format")
            yield text, name
    except ValueError as error:
        raise UsageError(f"the template has a stray brace ({error}); write {{{{ for one") from error


def check_template(template: str, attributes: tuple[str, ...]) -> None:
    """UsageError unless the template states the goal exactly once and names nothing unknown."""
    if not template.strip() or template != template.strip():
        raise UsageError("a template is text without space around it (chat templates may cut that off)")
    if {"low", "high", "score", "goals"} & set(attributes) or len(set(attributes)) < len(attributes):
        raise UsageError(f"attribute names must differ, and not be a placeholder's: {', '.join(attributes)}")
    named = [name for _, name in _pieces(template) if name is not None]
    known = ["low", "high", *(("goals", *attributes) if attributes else ("score",))]
    for name in named:
        if name not in known:
            near = get_close_matches(name, known, 1) or known[-1:]
            raise UsageError(f"the template names {{{name}}}; there is {{{'}, {'.join(known)}}}; {near[0]}?")
    stated = sorted(name for name in named if name not in ("low", "high"))
    if stated not in ([["goals"], sorted(attributes)] if attributes else [["score"]]):
        needed = "{goals}, or each attribute by its name," if attributes else "{score}"
        raise UsageError(f"the template must hold {needed} exactly once: {template!r}")


def resolve_carrier(tokenizer: Any) -> Carrier:
    """Where this tokenizer's chat template lets a goal stand: ask it to render a system message.

    "system" if the text of a system message comes out once, before a conversation of one turn and of
    more; "first_user" if the template refuses it, drops it, or there is no template at all.
    """
    if not getattr(tokenizer, "chat_template", None):
        return "first_user"
    mark = "mlxpref-asks-for-a-system-role"
    turns = [{"role": role, "content": role} for role in ("user", "assistant", "user")]
    for conversation in (turns[:1], turns):
        messages = [{"role": "system", "content": mark}, *conversation]
        try:
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except (TemplateError, TypeError, ValueError):
            return "first_user"
        if text.count(mark) != 1:
            return "first_user"
    return "system"
