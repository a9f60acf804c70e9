"""Parting a data set so that no prompt is on two sides, by nothing but a seed and the texts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from hashlib import blake2b

from mlxpref.data.recipe import Recipe
from mlxpref.data.stored import pick
from mlxpref.data.words import counted
from mlxpref.errors import DataError, UsageError
from mlxpref.records import Conditioned, Prompt, Scored


def place_in_line(seed: int, key: str) -> bytes:
    """A place in line that depends on the seed and the key alone."""
    return blake2b(f"{seed}:{key}".encode("utf8", "surrogatepass"), digest_size=16).digest()


def split_by_prompt(
    examples: Sequence[Scored], *, fractions: Mapping[str, float], seed: int
) -> dict[str, Sequence[Scored]]:
    """Part a data set so that one prompt is never on two sides.

    Prompts are lined up by a hash of seed and text, and each split takes from the line until it
    holds its fraction of the examples (at least one prompt); "train" gets the rest. Order within a
    split is that of the data. A prompt is the same whatever white space stands around its turns.

    Args:
        fractions: split → share of the examples, each > 0, together < 1 without "train", else 1.

    Raises:
        UsageError: fractions that cannot be. DataError: too few prompts to fill every split.
    """
    wanted = {name: share for name, share in fractions.items() if name != "train"}
    total = sum(fractions.values())
    whole = math.isclose(total, 1) if "train" in fractions else total < 1
    if not whole or any(not 0 < share < 1 for share in wanted.values()):
        raise UsageError(
            f"fractions of a split are above 0 and leave something to train on: {dict(fractions)}"
        )
    keys = [place_in_line(seed, _prompt_key(example.prompt)) for example in examples]
    sizes: dict[bytes, int] = {}
    for key in keys:
        sizes[key] = sizes.get(key, 0) + 1
    line = sorted(sizes, reverse=True)
    home: dict[bytes, str] = {}
    for done, (name, share) in enumerate(wanted.items(), start=1):
        held, others = 0, len(wanted) - done + 1  # a prompt is left for every later split and for train
        while len(line) > others and held < max(1, round(share * len(examples))):
            key = line.pop()
            home[key] = name
            held += sizes[key]
    places: dict[str, list[int]] = {name: [] for name in ("train", *wanted)}
    for at, key in enumerate(keys):
        places[home.get(key, "train")].append(at)
    if not all(places.values()):
        raise DataError(f"{len(sizes)} different prompts are too few to split into {', '.join(places)}")
    return {name: pick(examples, own) for name, own in places.items()}


def _prompt_key(prompt: Prompt) -> str:
    return "\x1e".join(f"{message.role}\x1f{message.content.strip()}" for message in prompt)


class Leaks:
    """Looks at the rows of both splits as they pass: prompts that are in both make figures that are too good."""

    def __init__(self, recipe: Recipe | None) -> None:
        self.recipe = recipe
        self.asked: dict[str, set[bytes]] = {"train": set(), "valid": set()}

    def watch(self, split: str, rows: Iterable[Conditioned]) -> Iterator[Conditioned]:
        """The rows; what they ask, goals aside, is remembered by its hash."""
        for row in rows:
            prompt = row.prompt if self.recipe is None else self.recipe.erase(row.prompt)
            said = repr([message.content for message in prompt]).encode("utf8", "surrogatepass")
            self.asked[split].add(blake2b(said, digest_size=16).digest())
            yield row

    def said(self) -> Iterator[str]:
        """A warning, where some are."""
        shared = self.asked["train"] & self.asked["valid"]
        if shared:
            yield (
                f"warning: {counted(len(shared), 'prompt')} in both training and validation rows; "
                "data.valid_fraction splits by prompt"
            )
