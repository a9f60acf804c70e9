"""The decorator ``@objective``, and the table it fills.

A signature is a declaration, read once, when the module is imported:

- positional parameters are **columns**, told apart by their annotation: log-probs (``policy`` and
  ``reference``), numbers by response, example or token, and the log-probs of further texts. ``policy`` and
  ``lengths`` every batch has, ``reference`` is computed when needed, ``overlap`` and ``token_kl`` come from the
  model; all others must be in the data, and are asked for before a model loads.
- the annotation of ``policy`` says what the formula looks at: ``Logps``, two responses (longer lists
  are lifted to pairs, see :mod:`.lift`); ``ListLogps``, all K of them; ``BatchLogps``, pairs whose
  losses depend on each other.
- ``TextLogps`` is a text of the example beside its responses (a third response, a rationale);
  ``PerResponseLogps`` one a response. The same name with ``_reference`` is its reference.
- a parameter ``state`` is for a formula that carries numbers from step to step: the function returns
  ``(losses, new state)``. Its default is the state at step 0, a ``NamedTuple`` of arrays or numbers, or
  a function of the options (and of ``n_groups``, if it has such a parameter).
- keyword-only parameters are the **options**, with their default and, by annotation, their range.

Formulas with ``BatchLogps`` or a ``state`` get a whole batch at once, however it was split to go through the
model: see ``Objective.apply_parts``.

The docstring declares the rest: its first line, one line per option under ``Args:``, a line
``Source:``, where other programs call the formula something else, ``Also known as:``, and where its form
could not be confirmed from a source, ``Unverified:`` and a name that begins with ``experimental_``.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, create_model

from mlxpref.records import Logps

Lift = Literal["first_two", "best_worst", "best_rest", "all_pairs"]
"""How a formula for pairs reads a list of K > 2 responses; see :mod:`mlxpref.objectives.lift`."""


@dataclass(frozen=True, slots=True)
class Column:
    """What an annotation says of a column: one value a response, example or token, real or an index."""

    per: Literal["response", "example", "token"]
    integer: bool = False


@dataclass(frozen=True, slots=True)
class Text:
    """What an annotation says of log-probs of further texts: one an example, or one a response."""

    per: Literal["response", "example"]


@dataclass(frozen=True, slots=True)
class Scope:
    """What an annotation says of ``policy``: whether a formula sees whole lists, or whole batches."""

    lists: bool = False
    batch: bool = False


PerResponse = Annotated[Any, Column("response")]
"""(B, K) or (B, K, M) real numbers, in the order of the responses."""
PerExample = Annotated[Any, Column("example")]
"""(B,) or (B, …) real numbers."""
PerExampleIndex = Annotated[Any, Column("example", integer=True)]
"""(B,) integers from 0, such as a group's number."""
PerToken = Annotated[Any, Column("token")]
"""(B, K, L) real numbers, 0 off the mask."""
TextLogps = Annotated[Logps, Text("example")]
"""(B, 1, L) log-probs of one further text of each example."""
PerResponseLogps = Annotated[Logps, Text("response")]
"""(B, K, L) log-probs of one further text of each response."""
ListLogps = Annotated[Logps, Scope(lists=True)]
"""Log-probs of all K responses, best first."""
BatchLogps = Annotated[Logps, Scope(batch=True)]
"""Log-probs of the pairs of a whole batch: permuting or splitting it may change the losses."""

Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
FlipRate = Annotated[float, Field(ge=0, lt=0.5)]
"""A probability that a label is wrong: at ½ labels say nothing, above it their contrary."""

ALWAYS_THERE = frozenset({"policy", "lengths"})
FROM_MODEL = frozenset({"overlap", "token_kl"})
"""Per-token columns that a backend computes beside the log-probs."""
RESERVED = frozenset({"name", "weight", "lift", "weighting"})
EXPERIMENTAL = "experimental_"

Weighting = Literal["none", "wpo"]
"""By what each pair's loss is multiplied; see :mod:`mlxpref.objectives.weighting`."""

Kind = Column | Scope | Text


@dataclass(frozen=True, slots=True)
class Option:
    """One keyword of a formula: its annotation, default and line of documentation."""

    name: str
    annotation: Any
    default: Any
    help: str


@dataclass(frozen=True)
class Entry:
    """One objective as its signature and docstring declare it.

    Attributes:
        name: of the function, and in a configuration.
        family: the module it lives in (``margin``, ``policy_only``, …).
        columns: the positional parameters but ``state``.
        lists: it takes all K responses; otherwise the first two, and longer lists are lifted.
        batch: its losses depend on the whole batch, by ``BatchLogps`` or by a state.
        start: the default of ``state``; None without one.
        summary, doc, source, aliases: from the docstring; ``aliases`` are other programs' names.
        unverified: what of its form no source confirms; empty for all but the experimental ones.
    """

    name: str
    family: str
    function: Callable[..., Any]
    columns: Mapping[str, Kind]
    options: Mapping[str, Option]
    lists: bool
    batch: bool
    start: Any
    summary: str
    doc: str
    source: str
    aliases: tuple[str, ...]
    unverified: str = ""

    @property
    def experimental(self) -> bool:
        return bool(self.unverified)

    @cached_property
    def texts(self) -> Mapping[str, str]:
        """Further texts the data must hold, each "example" or "response"."""
        names = {name.removesuffix("_reference"): kind for name, kind in self.columns.items()}
        return {name: kind.per for name, kind in sorted(names.items()) if isinstance(kind, Text)}

    @cached_property
    def needs(self) -> frozenset[str]:
        """What the data, the reference pass or the model must supply: ``reference``, ``scores``, ``third``, …"""
        own = {n for n, kind in self.columns.items() if not (isinstance(kind, Text) and n.endswith("_reference"))}
        referred = {"reference"} if len(own) < len(self.columns) else set()
        return frozenset(own | referred) - ALWAYS_THERE

    @cached_property
    def model(self) -> type[BaseModel]:
        """The options as a pydantic model: unknown names, wrong types and ranges are its errors.

        Text that reads as a number counts as one (YAML takes ``1e-5`` for text). Objectives for
        pairs have two options more, ``lift`` and ``weighting``; those that couple a batch have one way to read
        lists, and no weighting.
        """
        fields: dict[str, Any] = {
            o.name: (Annotated[o.annotation, Field(description=o.help)], o.default)
            for o in self.options.values()
        }
        if not self.lists:
            fields["lift"] = (Literal["best_worst"], "best_worst") if self.batch else (Lift, "first_two")
        if not self.lists and not self.batch:  # losses of a sorted batch are nobody's own
            fields["weighting"] = (Weighting, "none")
        config = ConfigDict(extra="forbid", allow_inf_nan=False)
        return create_model(self.name, __config__=config, **fields)

    @cached_property
    def schema(self) -> dict[str, Any]:
        """The options as JSON Schema: types, ranges, defaults, descriptions."""
        return self.model.model_json_schema()

    def describe(self, option: str) -> str:
        """``float > 0, default 0.1`` and the like, for tables and messages."""
        facts = self.schema["properties"][option]
        return f"{_kind(facts)}, default {facts['default']}"


TABLE: dict[str, Entry] = {}
"""Every objective by name, in the order of definition."""

F = TypeVar("F", bound=Callable[..., Any])


def objective(function: F) -> F:
    """Enter a formula into the table; the function itself is returned unchanged.

    Raises:
        TypeError: the signature or the docstring does not declare what it must (for its author).
    """
    entry = read_declaration(function)
    if entry.name in TABLE:
        raise TypeError(f"objective {entry.name} is defined twice")
    TABLE[entry.name] = entry
    return function


def read_declaration(function: Callable[..., Any]) -> Entry:
    """What the signature and docstring of a formula declare. Raises TypeError, see ``objective``."""
    name, doc = function.__name__, inspect.getdoc(function) or ""
    hints = get_type_hints(function, include_extras=True)
    helps = _args_section(doc)
    columns: dict[str, Kind] = {}
    options: dict[str, Option] = {}
    start: Any = None
    for parameter in inspect.signature(function).parameters.values():
        where, hint = f"objective {name}, parameter {parameter.name}", hints.get(parameter.name)
        if parameter.kind is parameter.KEYWORD_ONLY:
            if parameter.default is parameter.empty or hint is None or parameter.name in RESERVED:
                taken = ", ".join(sorted(RESERVED))
                raise TypeError(f"{where}: an option has a type, a default, and a name other than {taken}")
            if parameter.name not in helps:
                raise TypeError(f"{where}: not described under Args: in the docstring")
            options[parameter.name] = Option(parameter.name, hint, parameter.default, helps[parameter.name])
        elif parameter.name == "state":
            if parameter.default in (parameter.empty, None):
                raise TypeError(f"{where}: its default is the state at step 0")
            start = parameter.default
        else:
            columns[parameter.name] = _column(hint, where)
    scope = columns.get("policy")
    if not isinstance(scope, Scope):
        raise TypeError(f"objective {name}: needs a parameter `policy: Logps`")
    source, unverified = _line(doc, "Source"), _line(doc, "Unverified")
    if not source:
        raise TypeError(f"objective {name}: the docstring has no line `Source: …`")
    if bool(unverified) != name.startswith(EXPERIMENTAL):
        raise TypeError(f"objective {name}: a line `Unverified: …` and a name {EXPERIMENTAL}… go together")
    return Entry(
        name=name,
        family=function.__module__.rpartition(".")[2],
        function=function,
        columns=columns,
        options=options,
        lists=scope.lists,
        batch=scope.batch or start is not None,
        start=start,
        summary=doc.partition("\n")[0].rstrip("."),
        doc=doc,
        source=source.rstrip("."),
        aliases=tuple(re.findall(r"(\w+) *(?:\([^)]*\))? *(?:;|$)", _line(doc, "Also known as"))),
        unverified=unverified,
    )


def _column(hint: Any, where: str) -> Kind:
    if hint is Logps:
        return Scope()
    if get_origin(hint) is Annotated:
        for mark in get_args(hint)[1:]:
            if isinstance(mark, Kind):
                return mark
    known = (
        "Logps, ListLogps, BatchLogps, PerResponse, PerExample, PerExampleIndex, PerToken, TextLogps or "
        "PerResponseLogps"
    )
    raise TypeError(f"{where}: annotate a column with {known}")


def _args_section(doc: str) -> dict[str, str]:
    """``name: text`` entries of a docstring's ``Args:``, continuation lines joined."""
    section = re.search(r"^Args:\n((?:[ \t]+.*\n?|\n)*)", doc, re.MULTILINE)
    helps: dict[str, str] = {}
    names: list[str] = []
    for line in inspect.cleandoc(section[1]).splitlines() if section else ():
        entry = re.match(r"(\w+(?:, \w+)*): (.*)", line)
        if entry:
            names = entry[1].split(", ")
            helps |= dict.fromkeys(names, entry[2])
        elif line.strip():
            helps |= {name: f"{helps[name]} {line.strip()}" for name in names}
    return helps


def _line(doc: str, key: str) -> str:
    """The text after ``key:`` up to the next blank line or key, joined into one line."""
    found = re.search(rf"^{key}: (.*(?:\n(?!\s*$|[A-Z][\w ]*:).*)*)", doc, re.MULTILINE)
    return " ".join(found[1].split()).rstrip(".") if found else ""


def _kind(facts: Mapping[str, Any]) -> str:
    """A JSON Schema type in a few words: ``float ≥ 0 and < 0.5``, ``token or response``."""
    if "enum" in facts or "const" in facts:
        return " or ".join(map(str, facts.get("enum", [facts.get("const")])))
    if "anyOf" in facts:
        return " or ".join(map(_kind, facts["anyOf"]))
    words = {"number": "float", "integer": "int", "boolean": "true or false", "array": "list"}
    signs = {"exclusiveMinimum": ">", "minimum": "≥", "exclusiveMaximum": "<", "maximum": "≤"}
    limits = " and ".join(f"{sign} {facts[key]:g}" for key, sign in signs.items() if key in facts)
    kind = words.get(facts.get("type", ""), facts.get("type", "any"))
    return f"{kind} {limits}".strip()
