"""Every record that travels from a data set to an update, in the order of its way.

``Scored`` → ``Conditioned`` → ``Tokenized`` → ``Batch`` of ``MicroBatch`` → ``Logps`` → ``StepReport``.

Text records are frozen dataclasses, checked where they enter and trusted afterwards. Array records
are ``NamedTuple``s, because the compiled graphs of MLX take those apart and put them together again;
on the spine their arrays are NumPy's, in a machine room that library's own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np

Goal = float | Mapping[str, float]
"""A score asked for: one number, or one number per attribute."""

Half = Literal["chosen", "rejected"]
"""Which side's score is the goal: the best response's own ("chosen"), or another's ("rejected")."""


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation. ``extra`` keeps what else a chat template may read
    (``name``, ``tool_calls``, ``tool_call_id``)."""

    role: str
    content: str
    extra: Mapping[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """The message as chat templates and data files hold it."""
        return {"role": self.role, "content": self.content, **self.extra}

    @classmethod
    def from_dict(cls, message: Mapping[str, Any]) -> Message:
        extra = {
            key: value
            for key, value in message.items()
            if key not in ("role", "content") and value is not None
        }
        return cls(str(message["role"]), str(message.get("content") or ""), extra)


Prompt = tuple[Message, ...]


@dataclass(frozen=True, slots=True)
class Scored:
    """One prompt with K ≥ 2 responses and, where the data have them, their scores.

    Responses stand in the order of the data: in a pair the chosen one first.

    Attributes:
        prompt: the messages before the response; at least one, the last not the assistant's.
        responses: K texts, none empty.
        scores: K finite numbers, higher is better, or None for unscored data.
        attributes: further named scores, each K finite numbers (helpfulness, honesty, …).
        extras: columns carried along by name (``tools``, ``rationale``, ``group``, ``margins``, …); a tuple
            of K entries has one for each response.
        example_id: stable over runs: the data's own id, or a hash of the content.
        where: file and row it came from, for messages; no part of its identity.

    Raises:
        ValueError: a promise above is broken. Sources turn it into a counted ``Dropped``.
    """

    prompt: Prompt
    responses: tuple[str, ...]
    scores: tuple[float, ...] | None
    example_id: str
    attributes: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    extras: Mapping[str, Any] = field(default_factory=dict)
    where: str = field(default="", compare=False)

    @property
    def place(self) -> str:
        """Where a message sends its reader: file and row, or the id of an example made in memory."""
        return self.where or self.example_id

    def __post_init__(self) -> None:
        if not self.prompt or not any(m.content.strip() for m in self.prompt):
            raise ValueError("empty prompt")
        if self.prompt[-1].role == "assistant":
            raise ValueError("prompt ends with an assistant turn")
        if len(self.responses) < 2:
            raise ValueError("fewer than two responses")
        if not all(r.strip() for r in self.responses):
            raise ValueError("empty response")
        columns = {"score": self.scores} if self.scores is not None else {}
        for name, values in {**columns, **self.attributes}.items():
            if len(values) != len(self.responses):
                raise ValueError(f"{name}: {len(values)} for {len(self.responses)} responses")
            if not all(math.isfinite(v) for v in values):
                raise ValueError(f"{name} is not a finite number")


@dataclass(frozen=True, slots=True)
class Conditioned:
    """One prompt that states its goal once, with responses best first *under that goal*.

    Attributes:
        prompt: messages, goal text written in (unless ``goal`` is None).
        responses: K texts; a tie under the goal keeps the order of the source.
        goal: the score asked for, in goal units; None for an unconditioned row.
        goal_text: the exact text that was written into the prompt, or None.
        half: whose score the goal is; None for an unconditioned row.
        scores: K scores in goal units, in the order of ``responses``; None if unscored.
        example_id: id of the source; both halves share it.
        attributes, extras: as in ``Scored``, in the order of ``responses``.
        distances: K squared distances to a goal of several attributes, in the order of ``responses``, so
            rising; None where ``scores`` say it: for one score, and without a goal.
        where: file and row it came from, for messages; no part of its identity.
    """

    prompt: Prompt
    responses: tuple[str, ...]
    goal: Goal | None
    goal_text: str | None
    half: Half | None
    scores: tuple[float, ...] | None
    example_id: str
    attributes: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    extras: Mapping[str, Any] = field(default_factory=dict)
    distances: tuple[float, ...] | None = None
    where: str = field(default="", compare=False)

    @property
    def place(self) -> str:
        """Where a message sends its reader: file and row, or the id."""
        return self.where or self.example_id


_NOTHING = np.zeros(0, np.int32)


@dataclass(frozen=True, slots=True)
class Tokenized:
    """Token ids with the boundary decided, here and never again.

    Attributes:
        prompt_ids: (n_prompt,) int32, ≥ 1 token, ends where the response begins.
        response_ids: K arrays (n_k,) int32, each ≥ 1 token, each ending with the turn's end token
            unless its tail was cut.
        prompt_cut: tokens removed from the body of the prompt.
        response_cut: K counts of tokens removed from the response's tail (end token included).
        weight: of the example in the mean over a batch.
        half, goal, scores, example_id, extras: as in ``Conditioned``; extras now hold numbers only, the
            attributes, and as ``goal_distances`` how far each response is from the goal.
        texts: ids of further texts by name, each like ``response_ids``: one array for a text of the
            example, K for a text of each response.
        leads: tokens between the prompt and the ids of each of ``slots``, read and not scored; () if there
            are none anywhere.
    """

    prompt_ids: np.ndarray
    response_ids: tuple[np.ndarray, ...]
    example_id: str
    scores: tuple[float, ...] | None = None
    goal: Goal | None = None
    half: Half | None = None
    weight: float = 1.0
    prompt_cut: int = 0
    response_cut: tuple[int, ...] = ()
    extras: Mapping[str, Any] = field(default_factory=dict)
    texts: Mapping[str, tuple[np.ndarray, ...]] = field(default_factory=dict)
    leads: tuple[np.ndarray, ...] = ()

    @property
    def slots(self) -> tuple[tuple[np.ndarray, np.ndarray], ...]:
        """(lead, ids) of everything that is scored after the prompt: the K responses, then the texts by name."""
        ids = [*self.response_ids, *(one for name in sorted(self.texts) for one in self.texts[name])]
        return tuple(zip(self.leads or [_NOTHING] * len(ids), ids, strict=True))

    @property
    def n_tokens(self) -> int:
        """Tokens of the prompt once, and of every response and text with its lead."""
        return len(self.prompt_ids) + sum(len(lead) + len(ids) for lead, ids in self.slots)


@dataclass(frozen=True, slots=True)
class Dropped:
    """A row that does not travel on: a short reason (the key it is counted under) and where."""

    reason: str
    where: str = ""
    detail: str = ""


class Shelf(NamedTuple):
    """Response rows of one length. The row begins with the part of the prompt that is not shared.

    Attributes:
        inputs: (R, T) int32 token ids, right-padded with 0.
        prompt: (R,) int32, row of ``MicroBatch.prompts`` that comes before.
    """

    inputs: Any
    prompt: Any


class Hidden(NamedTuple):
    """What a model's frozen layers make of a micro-batch's tokens, in the model's dtype.

    Attributes:
        prompts: (B, P, D); None where P is 0.
        rows: of each shelf (B, T, D).
    """

    prompts: Any
    rows: tuple[Any, ...]


class MicroBatch(NamedTuple):
    """B examples of K responses as arrays of planned shapes; the unit of one forward pass.

    All shared prompt parts of a micro-batch have the same length P and carry no padding: what a
    prompt has beyond P opens its response rows, unscored. P = 0 is the plain forward of whole rows.
    An example has S slots: its K responses, then its further texts by name; S = K without any.

    Attributes:
        prompts: (B, P) int32, the shared first P tokens of each prompt.
        shelves: S shelves of B rows; all B·S rows ranked by length, longest first.
        scored: (N,) int32, positions whose output predicts a scored token, as indices into the
            shelves' positions laid end to end, row after row, shelf after shelf; padded with 0.
        targets: (N,) int32, the token predicted at each of them; padded with 0.
        place: (B, S, L) int32, where scored token t of slot s stands in ``scored``; N where there is none.
        mask: (B, S, L) float32, 1 on scored tokens. Slot 0 is the preferred response.
        weights: (B,) float32, of each example.
        reference: (B, S, L) float32 reference token log-probs in nats, 0 off the mask; or None.
        scores: (B, K) float32, the reward of each response under the row's goal; or None.
        extras: further columns an objective asks for, by name, each (B, …) float32 or int32; of values
            for each token (B, K, L), 0 off the mask.
        hidden: what the frozen layers make of the tokens, where that is known.
    """

    prompts: Any
    shelves: tuple[Shelf, ...]
    scored: Any
    targets: Any
    place: Any
    mask: Any
    weights: Any
    reference: Any = None
    scores: Any = None
    extras: dict[str, Any] = {}  # noqa: RUF012 - never mutated; NamedTuple fields have no factory
    hidden: Hidden | None = None


class Batch(NamedTuple):
    """What the optimiser sees as one: its micro-batches, and which data rows they hold.

    Attributes:
        parts: the micro-batches, in order of execution.
        rows: for each part, the indices (B,) of its examples in the tokenized data.
        workers: for each part, the rank of the worker that computes it; () where all are worker 0's.
    """

    parts: tuple[MicroBatch, ...]
    rows: tuple[tuple[int, ...], ...]
    workers: tuple[int, ...] = ()

    @property
    def n_examples(self) -> int:
        return sum(len(rows) for rows in self.rows)


class Logps(NamedTuple):
    """Token log-probs of one (micro-)batch, for any array library.

    Attributes:
        tokens: (B, K, L) float32, nats, 0 off the mask.
        mask: (B, K, L) float32, 1 on response tokens; ≥ 1 per response.
    """

    tokens: Any
    mask: Any

    @property
    def sums(self) -> Any:
        """(B, K): log-prob of each whole response, nats."""
        return (self.tokens * self.mask).sum(-1)

    @property
    def lengths(self) -> Any:
        """(B, K): scored tokens of each response."""
        return self.mask.sum(-1)

    @property
    def means(self) -> Any:
        """(B, K): nats per response token."""
        return self.sums / self.lengths


@dataclass(frozen=True, slots=True)
class StepReport:
    """What one update did. Arrays are NumPy, over all examples of the batch in row order.

    Attributes:
        loss: mean loss of the batch (weighted by example weight).
        losses: (B,) loss of each example.
        policy_sums, reference_sums: (B, K) log-probs before the update, nats; reference or None. K of
            the longest list; NaN where an example has fewer responses.
        lengths: (B, K) response tokens; 0 there.
        grad_norm: global norm before clipping.
        skipped: the step was not finite and changed nothing.
    """

    loss: float
    losses: np.ndarray
    policy_sums: np.ndarray
    reference_sums: np.ndarray | None
    lengths: np.ndarray
    grad_norm: float
    skipped: bool


def stack_lists(parts: Sequence[np.ndarray], fill: float) -> np.ndarray:
    """Arrays (b, k) one under the other, (B, K) with the largest k; the shorter ones filled up on the right."""
    most = max(part.shape[1] for part in parts)
    wide = [np.pad(part, ((0, 0), (0, most - part.shape[1])), constant_values=fill) for part in parts]
    return np.concatenate(wide)


@dataclass(slots=True)
class Counts:
    """Kept and dropped rows of one stage, with the reason and the first places of each.

    ``notes`` counts kept rows that something happened to (their prompt was cut, …).
    """

    kept: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    first: dict[str, list[str]] = field(default_factory=dict)
    notes: dict[str, int] = field(default_factory=dict)

    def drop(self, row: Dropped) -> None:
        """Count a dropped row, remembering the first three places of its reason, each once."""
        self.dropped[row.reason] = self.dropped.get(row.reason, 0) + 1
        places = self.first.setdefault(row.reason, [])
        if row.where and len(places) < 3 and row.where not in places:
            places.append(row.where)

    def lines(self) -> Iterator[str]:
        """One line a reason, most frequent first: ``dropped 12: empty response (train.jsonl:7, …)``,
        then one a note: ``kept 3: prompt cut to fit max_length``."""
        for reason, n in sorted(self.dropped.items(), key=lambda item: -item[1]):
            places = ", ".join(self.first.get(reason, ()))
            more = ", …" if n > len(self.first.get(reason, ())) and places else ""
            yield f"dropped {n}: {reason}" + (f" ({places}{more})" if places else "")
        for what, n in sorted(self.notes.items(), key=lambda item: -item[1]):
            yield f"kept {n}: {what}"
