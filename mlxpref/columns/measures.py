"""What models say of rows: one model in memory at a time, each row of token ids computed once.

Log-probs are those of the passes that training uses: batched by length, the reference's kept in its store.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mlxpref.columns.rows import Row
from mlxpref.columns.wanted import Base, Place
from mlxpref.conversion import as_mlx_folder
from mlxpref.data.batching import collate
from mlxpref.data.plan import plan_pass
from mlxpref.data.render import turn_end
from mlxpref.data.tokenization import encode_prompt
from mlxpref.generate import Asked, generate
from mlxpref.records import Conditioned, Tokenized
from mlxpref.reference import PASS_SHAPES, ReferenceStore, kinds_of, policy_logps, reference_logps
from mlxpref.rewards import ches_scores

Report = Callable[[str, int, int], None]
"""Called with (what is computed, rows done, rows to do)."""


@dataclass(frozen=True)
class Tools:
    """How to compute.

    Attributes:
        backend: the machine room.
        bases: the base model of each policy.
        tokenizers: of each base model.
        store: folder of reference log-probs; None keeps and uses none.
        dtype: of unquantised weights; None keeps the checkpoint's.
        micro_batch_tokens: padded tokens of one forward pass.
        max_tokens: of a generated response.
        normalised: CHES by token counts.
        say, report: get words, and how far it is.
    """

    backend: Any
    bases: Mapping[Place, Base]
    tokenizers: Mapping[Base, Any]
    store: Path | None = None
    dtype: str | None = None
    micro_batch_tokens: int = 8192
    max_tokens: int = 256
    normalised: bool = False
    say: Callable[[str], None] = lambda line: None
    report: Report = lambda what, done, total: None

    def progress(self, what: str) -> Callable[[int, int], None]:
        return lambda done, total: self.report(what, done, total)


@dataclass
class Measured:
    """What one policy says of each row; only what was asked for is filled.

    Attributes:
        own, base: (K,) log-probs of whole responses under the policy and its base, nats.
        lengths: (K,) tokens that were summed.
        plain: (K,) log-probs without the special tokens, nats; plain_lengths: how many are left.
        ches: a number each, squared units of the hidden states.
        third: a response each.
    """

    own: list[np.ndarray] = field(default_factory=list)
    base: list[np.ndarray] = field(default_factory=list)
    lengths: list[np.ndarray] = field(default_factory=list)
    plain: list[np.ndarray] = field(default_factory=list)
    plain_lengths: list[np.ndarray] = field(default_factory=list)
    ches: list[float] = field(default_factory=list)
    third: list[str] = field(default_factory=list)


def measure_all(measures: Mapping[Place, Collection[str]], rows: Sequence[Row], tools: Tools) -> dict[Place, Measured]:
    """Each policy's measures of all rows; a policy leaves memory before the next one comes.

    Raises:
        AdapterError, ModelError: a policy cannot be loaded. RunError: a log-prob is not finite.
    """
    found = {}
    for place, wanted in measures.items():
        found[place] = _measure(place, wanted, rows, tools)
        gc.collect()  # compiled functions and their policy refer to each other
    return found


def _measure(place: Place, wanted: Collection[str], rows: Sequence[Row], tools: Tools) -> Measured:
    key = tools.bases[place]
    policy = _load(place, tools)
    tokens = [row.tokens[key] for row in rows]
    found = Measured()
    if {"own", "plain"} & set(wanted):
        _fill(found, wanted, tokens, _own_logps(place, policy, tokens, tools), special_tokens(tools.tokenizers[key]))
    if "base" in wanted:
        found.base = [_sums(logps) for logps in _base_logps(place, policy, tokens, tools)]
    if "ches" in wanted:
        found.ches = _ches(place, policy, rows, tokens, tools)
    if "third" in wanted:
        found.third = _third(place, policy, rows, tokens, tools)
    return found


def adapter_folder(place: Place) -> Path:
    """Where the adapter of a place lies in mlx-lm's form."""
    return as_mlx_folder(str(place.adapter), model=place.model)


def _load(place: Place, tools: Tools) -> Any:
    tools.say(f"loading {place.name}")
    if place.adapter is None:
        return tools.backend.load_policy(str(place.model), revision=place.revision, dtype=tools.dtype, trainable=False)
    policy = tools.backend.load_adapter(adapter_folder(place), model_path=place.model, dtype=tools.dtype)
    for text in policy.notes:
        tools.say(f"warning: {text}")
    return policy


# --- log-probs -----------------------------------------------------------------------------------


def _own_logps(place: Place, policy: Any, tokens: Sequence[Tokenized], tools: Tools) -> list[list[np.ndarray]]:
    """Of the policy itself; a model without an adapter is its own reference, whose log-probs are stored."""
    if place.adapter is None:
        return _base_logps(place, policy, tokens, tools)
    return policy_logps(
        tokens, tools.backend, policy,
        micro_batch_tokens=tools.micro_batch_tokens, on_progress=tools.progress(f"log-probs of {place.name}"),
    )  # fmt: skip


def _base_logps(place: Place, policy: Any, tokens: Sequence[Tokenized], tools: Tools) -> list[list[np.ndarray]]:
    store = None if tools.store is None else ReferenceStore(tools.store, policy.fingerprint)
    for line in store.said if store is not None else ():
        tools.say(f"warning: {line}")
    base, _ = tools.bases[place]
    logps, counts = reference_logps(
        tokens, tools.backend, policy, store,
        micro_batch_tokens=tools.micro_batch_tokens, on_progress=tools.progress(f"log-probs of {base}"),
    )  # fmt: skip
    tools.say(f"{base}: {counts}")
    return logps


def _fill(
    found: Measured, wanted: Collection[str], tokens: Sequence[Tokenized], logps: Sequence[Sequence[np.ndarray]],
    special: Collection[int],
) -> None:  # fmt: skip
    found.own = [_sums(values) for values in logps]
    found.lengths = [np.array([len(ids) for ids in row.response_ids]) for row in tokens]
    if "plain" in wanted:
        kept = [[plain_tokens(ids, special) for ids in row.response_ids] for row in tokens]
        found.plain = [_sums([v[own] for v, own in zip(*pair, strict=True)]) for pair in zip(logps, kept, strict=True)]
        found.plain_lengths = [np.array([own.sum() for own in row]) for row in kept]


def _sums(logps: Sequence[np.ndarray]) -> np.ndarray:
    """K arrays (n_k,) → (K,) float64."""
    return np.array([values.sum(dtype=np.float64) for values in logps])


def special_tokens(tokenizer: Any) -> frozenset[int]:
    """Ids of the tokens that are no text: the end of a turn, and what else the tokenizer calls special."""
    return frozenset((*tokenizer.all_special_ids, turn_end(tokenizer).token))


def plain_tokens(ids: np.ndarray, special: Collection[int]) -> np.ndarray:
    """(n,) ids → (n,) bool: what is text."""
    return ~np.isin(ids, list(special))


# --- hidden states -------------------------------------------------------------------------------


def _ches(place: Place, policy: Any, rows: Sequence[Row], tokens: Sequence[Tokenized], tools: Tools) -> list[float]:
    found = [0.0] * len(rows)
    for index, sums in _hidden_pass(place, policy, tokens, tools):
        lengths = [len(ids) for ids in tokens[index].response_ids]
        found[index] = _highest_ches(sums, lengths if tools.normalised else None, rows[index].preferred)
    return found


def _highest_ches(sums: np.ndarray, lengths: Sequence[int] | None, preferred: int) -> float:
    """(K, D) → the CHES score of the preferred response with another; of several the highest."""
    others = [k for k in range(len(sums)) if k != preferred]
    chosen, rejected = np.repeat(sums[[preferred]], len(others), 0), sums[others]
    if lengths is None:
        return float(ches_scores(chosen, rejected).max())
    return float(ches_scores(chosen, rejected, [lengths[preferred]] * len(others), [lengths[k] for k in others]).max())


def _hidden_pass(
    place: Place, policy: Any, tokens: Sequence[Tokenized], tools: Tools
) -> Iterator[tuple[int, np.ndarray]]:
    """(row, its (K, D) sums of hidden states), in order of length."""
    plan = plan_pass(
        tokens,
        micro_batch_tokens=tools.micro_batch_tokens,
        share_prompts=policy.share_prompts,
        max_shapes=max(PASS_SHAPES, kinds_of(tokens)),
    )
    done = 0
    for part in (part for step in plan.steps for part in step):
        yield from zip(part.rows, tools.backend.hidden_sums(policy, collate(tokens, part)), strict=True)
        done += len(part.rows)
        tools.report(f"hidden states of {place.name}", done, len(tokens))


# --- responses -----------------------------------------------------------------------------------


def _third(place: Place, policy: Any, rows: Sequence[Row], tokens: Sequence[Tokenized], tools: Tools) -> list[str]:
    """A greedily decoded response to each prompt; equal prompts are asked once, those of like length together."""
    tokenizer = tools.tokenizers[tools.bases[place]]
    asked = [_ask(index, row.text, one, tokenizer) for index, (row, one) in enumerate(zip(rows, tokens, strict=True))]
    distinct = {one.ids: one for one in reversed(asked)}
    ordered = sorted(distinct.values(), key=lambda one: (len(one.ids), one.ids))
    answers = generate(
        ordered, tools.backend, policy,
        max_tokens=tools.max_tokens, on_progress=tools.progress(f"responses of {place.name}"),
    )  # fmt: skip
    texts = {answer.asked.ids: answer.text for answer in answers}
    return [texts[one.ids] for one in asked]


def _ask(index: int, row: Conditioned, tokens: Tokenized, tokenizer: Any) -> Asked:
    """The row's prompt as generation reads it, cut where training cuts it."""
    cut = tokens.prompt_cut > 0
    ids = tokens.prompt_ids.tolist() if cut else encode_prompt(row.prompt, tokenizer, tools=row.extras.get("tools"))
    return Asked(index, row.prompt, row.goal, tuple(ids))
