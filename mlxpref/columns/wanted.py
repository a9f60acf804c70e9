"""What is to be added, and which models say it: checked before anything is read or loaded."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from mlxpref.errors import AdapterError, ModelError
from mlxpref.facts import check_fits, read_adapter_folder
from mlxpref.hub import model_folder

COLUMNS = {
    "previous": "log-prob of each response under the adapter, the previous iterate (inpo)",
    "aligned_logps": "mean log-prob per token of each response under aligned models, averaged over them (poft)",
    "margin_rewards": "beta times log-ratio, adapter to base, of each response; of each of several adapters (modpo)",
    "implicit_reward": "the same as a score, which `mlxpref relabel` reads by this name",
    "density_ratio": "a score, too: mean over a response's tokens of the strong model's log-prob less the weak one's",
    "third": "a greedily decoded response of the model, or of the adapter, to each prompt (selm, xpo, vpo)",
    "confidence": "how alike the adapter and the previous one rank a row's responses, 0 to 1 (cream)",
    "ches": "how much a pair lowers the probability of both its responses, for `mlxpref relabel --drop-top ches:SHARE`",
}
"""What can be added, and what it is."""

SCORES = ("implicit_reward", "density_ratio", "ches")
"""Columns that speak before goals are written: of data that are not relabelled yet."""

_FOR = {
    "beta": ("margin_rewards", "implicit_reward"),
    "length_penalty": ("implicit_reward",),
    "max_tokens": ("third",),
    "normalised": ("ches",),
    "strong": ("density_ratio",),
    "weak": ("density_ratio",),
    "previous_adapter": ("confidence", "implicit_reward"),
}
"""Options, by the columns they act on."""

_ONE_ADAPTER = ("implicit_reward", "confidence")
_ONE_POLICY = ("previous", "third", "ches")
_GIVEN_WHOLE = ("third", "ches")
"""Columns that need nothing more done to what is measured."""


Base = tuple[str, str | None]
"""A model and its revision; the tokenizer is its own."""


@dataclass(frozen=True, slots=True)
class Place:
    """A policy by where it lies: a model, or an adapter on its base.

    Attributes:
        model: folder or hub id; None is the base that the adapter names.
        adapter: folder; None is the model by itself.
        revision: of a hub id.
    """

    model: str | None = None
    adapter: str | None = None
    revision: str | None = None

    @property
    def name(self) -> str:
        """What to call it in a message."""
        return str(self.adapter or self.model)

    def base(self) -> Base:
        """The model under it.

        Raises:
            AdapterError: the folder is no adapter, names no base, or was made for another model.
            ModelError: no such model.
        """
        if self.adapter is None:
            model_folder(str(self.model), revision=self.revision, weights=False)
            return str(self.model), self.revision
        config, header = read_adapter_folder(Path(self.adapter), self.adapter)
        named = self.model or config.get("model")
        if not named:
            raise AdapterError(f"{self.adapter}: adapter_config.json names no base model; give one with --model")
        stored = (config.get("mlxpref") or {}).get("model") or {}
        revision = stored.get("revision") if self.model is None else None
        shapes = {name: entry["shape"] for name, entry in header.items()}
        folder = model_folder(str(named), revision=revision, weights=False)
        check_fits(shapes, folder, f"{self.adapter}: this adapter was made for another model than {named}:")
        return str(named), revision


@dataclass(frozen=True)
class Wanted:
    """What is asked for. None: the default, where there is one.

    Attributes:
        add: names of :data:`COLUMNS`.
        models, adapters: folders or hub ids. One model beside adapters is their base.
        previous_adapter: the iterate before, for ``confidence``; ``implicit_reward`` is measured against it.
        strong, weak: models or adapters of ``density_ratio``.
        revision: of one model on the hub.
        beta: of ``margin_rewards`` and ``implicit_reward``, > 0 (0.1).
        length_penalty: score units taken off ``implicit_reward`` for each character, ≥ 0 (0).
        max_tokens: of ``third``, ≥ 1 (256).
        normalised: divide the sums of ``ches`` by the numbers of tokens.
    """

    add: tuple[str, ...]
    models: tuple[str, ...] = ()
    adapters: tuple[str, ...] = ()
    previous_adapter: str | None = None
    strong: str | None = None
    weak: str | None = None
    revision: str | None = None
    beta: float | None = None
    length_penalty: float | None = None
    max_tokens: int | None = None
    normalised: bool = False

    # --- who says it ---

    @property
    def policies(self) -> tuple[Place, ...]:
        """The adapters; without any, the models."""
        if not self.adapters:
            return tuple(Place(model, revision=self.revision) for model in self.models)
        return tuple(Place(self._base, adapter) for adapter in self.adapters)

    @property
    def previous(self) -> Place:
        """The iterate before."""
        return Place(self._base, self.previous_adapter)

    @property
    def siblings(self) -> tuple[Place, Place]:
        """The strong and the weak policy."""
        return _place(str(self.strong)), _place(str(self.weak))

    @property
    def _base(self) -> str | None:
        return self.models[0] if len(self.models) == 1 else None

    def measures(self) -> dict[Place, set[str]]:
        """Place → what is measured of it: "own" and "base" log-probs, "plain" ones, "ches", "third"."""
        found: dict[Place, set[str]] = {}
        for place, what in self._measured():
            found.setdefault(place, set()).add(what)
        return found

    def _measured(self) -> Iterator[tuple[Place, str]]:
        for column in self.add:
            if column == "density_ratio":
                yield from ((place, "plain") for place in self.siblings)
                continue
            for place in self.policies:
                yield place, column if column in _GIVEN_WHOLE else "own"
                if column in ("margin_rewards", "confidence") or self._against_base(column):
                    yield place, "base"
            if column == "confidence" or (column == "implicit_reward" and self.previous_adapter is not None):
                yield self.previous, "own"

    def _against_base(self, column: str) -> bool:
        return column == "implicit_reward" and self.previous_adapter is None

    # --- what is wrong with it ---

    def problems(self) -> Iterator[str]:
        """Contradictions and omissions, in words with the remedy."""
        unknown = [name for name in self.add if name not in COLUMNS]
        for name in unknown:
            near = get_close_matches(name, COLUMNS, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            yield f"--add {name}: {hint}there is {', '.join(COLUMNS)}"
        if not self.add:
            yield f"nothing to add: give --add, one of {', '.join(COLUMNS)}"
        if unknown or not self.add:
            return
        yield from self._lacking()
        yield from self._idle()
        yield from self._out_of_range()

    def _lacking(self) -> Iterator[str]:
        n = len(self.adapters)
        for column in self.add:
            if column in _ONE_ADAPTER and n != 1:
                yield f"{column} is measured under one adapter: give --adapter-path once, not {n} times"
            if column == "margin_rewards" and n == 0:
                yield "margin_rewards come from adapters: give --adapter-path FOLDER, once for each reward"
            if column == "aligned_logps" and not self.policies:
                yield "aligned_logps come from aligned models: give --model or --adapter-path, once for each"
            if column in _ONE_POLICY and len(self.policies) != 1:
                yield f"{column} comes from one policy: give --model, or --adapter-path, once"
        if "confidence" in self.add and self.previous_adapter is None:
            yield "confidence compares two adapters: give --previous-adapter FOLDER, too"
        if "density_ratio" in self.add and None in (self.strong, self.weak):
            yield "density_ratio compares two models: give --strong and --weak"
        if self.adapters and len(self.models) > 1:
            yield "--model beside --adapter-path is the adapters' base: give it once"
        if self.revision is not None and (self.adapters or len(self.models) != 1):
            yield "--model-revision is for one --model on the hub; an adapter names its own"

    def _idle(self) -> Iterator[str]:
        for option, columns in _FOR.items():
            if getattr(self, option) not in (None, False) and not set(columns) & set(self.add):
                yield f"--{option.replace('_', '-')} acts on {' and '.join(columns)} only: leave it out"
        if set(self.add) == {"density_ratio"} and (self.models or self.adapters):
            yield "density_ratio reads --strong and --weak: leave --model and --adapter-path out"

    def _out_of_range(self) -> Iterator[str]:
        if self.beta is not None and not 0 < self.beta < math.inf:
            yield f"--beta {self.beta:g}: a number above 0"
        if self.length_penalty is not None and not 0 <= self.length_penalty < math.inf:
            yield f"--length-penalty {self.length_penalty:g}: score units for each character, 0 or more"
        if self.max_tokens is not None and self.max_tokens < 1:
            yield f"--max-tokens {self.max_tokens}: 1 or more"

    def unusable_policies(self) -> Iterator[str]:
        """What is wrong with the adapters and models, as far as it can be known without loading any."""
        for place in self.measures():
            try:
                place.base()
            except (AdapterError, ModelError) as error:
                yield str(error)

    def as_dict(self) -> dict[str, Any]:
        """What was given, JSON-safe."""
        given = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in given.items()
            if value not in (None, False, ())
        }


def _place(path: str) -> Place:
    """A folder with an ``adapter_config.json`` is an adapter, anything else a model."""
    return Place(adapter=path) if (Path(path) / "adapter_config.json").is_file() else Place(path)
