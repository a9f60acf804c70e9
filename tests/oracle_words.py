"""What the oracle is written in: examples, golden values, rows, ``sg``, slopes, and the words of the formulas."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

Tokens = Sequence[float]
"""Log-probs of the tokens of one response, nats."""
State = tuple[Any, ...]
"""What a stateful objective carries from batch to batch, in the order of the package's NamedTuple."""


@dataclass(frozen=True)
class Example:
    """Responses best first; a column an objective does not use may be absent.

    ``texts``: log-probs of further texts, one list of tokens for each text of that name, ``third``, ``gold``,
    ``rationale`` and ``mismatched`` having one, ``instructions`` one for each response.
    ``extras``: every other column by its name.
    """

    policy: Sequence[Tokens]
    reference: Sequence[Tokens]
    scores: Sequence[float] = ()
    extras: Mapping[str, Any] = field(default_factory=dict)
    texts: Mapping[str, Sequence[Tokens]] = field(default_factory=dict)
    texts_reference: Mapping[str, Sequence[Tokens]] = field(default_factory=dict)


@dataclass(frozen=True)
class Golden:
    """Loss, ∂/∂ℓ_w and ∂/∂ℓ_l on the examples A and B, to six places.

    ``extras``, ``texts`` and ``texts_reference`` are columns to add to both examples; ``states``, the state
    before A and the state before B. A and B are each a batch by itself. Only ``cases`` need be read.
    """

    options: Mapping[str, Any]
    a: tuple[float, float, float]
    b: tuple[float, float, float]
    extras: Mapping[str, Any] = field(default_factory=dict)
    texts: Mapping[str, Sequence[Tokens]] = field(default_factory=dict)
    texts_reference: Mapping[str, Sequence[Tokens]] = field(default_factory=dict)
    states: tuple[State | None, State | None] = (None, None)

    def cases(self) -> list[tuple[Example, State | None, tuple[float, float, float]]]:
        """(example with its columns, state before it or None, (loss, ∂/∂ℓ_w, ∂/∂ℓ_l)) for A and for B."""

        def filled(x: Example) -> Example:
            return replace(
                x,
                extras={**x.extras, **self.extras},
                texts={**x.texts, **self.texts},
                texts_reference={**x.texts_reference, **self.texts_reference},
            )

        return [(filled(A), self.states[0], self.a), (filled(B), self.states[1], self.b)]


@dataclass(frozen=True)
class Row:
    """One objective: its loss, option values beside the defaults, golden values.

    ``loss`` takes an example; a ``batch`` row's takes a list of them and gives as many losses, whose mean is the
    batch's; with a ``start`` it takes (examples, state) and gives (losses, new state). ``run`` hides which.
    """

    loss: Callable[..., Any]
    points: Sequence[Mapping[str, Any]]
    golden: Sequence[Golden]
    batch: bool = False
    start: State | None = None

    def run(
        self, examples: Sequence[Example], options: Mapping[str, Any], state: State | None = None
    ) -> tuple[list[float], State | None]:
        """Losses of a batch and the state after it; ``state`` None: the start."""
        if not self.batch:
            return [self.loss(x, **options) for x in examples], None
        if self.start is None:
            return self.loss(examples, **options), None
        return self.loss(examples, self.start if state is None else state, **options)


@dataclass(frozen=True)
class Value:
    """A single published value: the SUM of the losses of ``examples`` as one batch, to within ``within``."""

    name: str
    options: Mapping[str, Any]
    examples: Sequence[Example]
    total: float
    within: float = 6e-7
    state: State | None = None
    said: str = ""


ORACLE: dict[str, Row] = {}


def row(*points: Mapping[str, Any], golden: Sequence[Golden] = ()) -> Callable[[Any], Any]:
    """Enter a function under its name. Every option needs a point at which it is not the default."""

    def enter(loss: Callable[..., float]) -> Callable[..., float]:
        ORACLE[loss.__name__] = Row(loss, points, golden)
        return loss

    return enter


def batch_row(
    *points: Mapping[str, Any], golden: Sequence[Golden] = (), start: State | None = None
) -> Callable[[Any], Any]:
    """Enter a function of a whole batch; with ``start``, of a batch and a state."""

    def enter(loss: Callable[..., Any]) -> Callable[..., Any]:
        ORACLE[loss.__name__] = Row(loss, points, golden, batch=True, start=start)
        return loss

    return enter


# --- constants ---------------------------------------------------------------------------------

_hooks: list[Callable[[Any], Any]] = []


@contextmanager
def _hooked(hook: Callable[[Any], Any]) -> Iterator[None]:
    _hooks.append(hook)
    try:
        yield
    finally:
        _hooks.pop()


def sg(value: Any) -> Any:
    """The value, which every difference of ``frozen`` sees as a constant: the sg[·] of the formulas.

    A formula must come to the same ``sg`` in the same order wherever it is evaluated.
    """
    return _hooks[-1](value) if _hooks else value


def frozen(loss: Callable[[Any], Any], at: Any) -> Callable[[Any], Any]:
    """``loss`` with every ``sg`` held at what it was at the point ``at``."""
    kept: list[Any] = []

    def keep(value: Any) -> Any:
        kept.append(value)
        return value

    with _hooked(keep):
        loss(at)

    def held(x: Any) -> Any:
        rest = list(kept)
        with _hooked(lambda _: rest.pop(0)):
            result = loss(x)
        assert not rest, "fewer constants than at the unmoved point"
        return result

    return held


# --- slopes ------------------------------------------------------------------------------------


def _slopes(
    loss: Callable[[Any], Any],
    at: Any,
    read: Callable[[Example], Sequence[Tokens]],
    write: Callable[[Example, list[list[float]]], Example],
    step: float,
) -> list[Any]:
    """∂ Σ loss / ∂ each token of what ``read`` gives; a list of these where ``at`` is a list of examples."""
    held = frozen(loss, at)

    def total(x: Any) -> float:
        got = held(x)
        return math.fsum(got) if isinstance(got, list) else got

    def of_one(whole: Callable[[Example], Any], x: Example) -> list[list[float]]:
        def moved(k: int, t: int, by: float) -> float:
            rows = [list(tokens) for tokens in read(x)]
            rows[k][t] += by
            return total(whole(write(x, rows)))

        return [
            [(moved(k, t, step) - moved(k, t, -step)) / (2 * step) for t in range(len(tokens))]
            for k, tokens in enumerate(read(x))
        ]

    if isinstance(at, Example):
        return of_one(lambda x: x, at)
    return [of_one(lambda y, i=i: [*at[:i], y, *at[i + 1 :]], x) for i, x in enumerate(at)]


def token_slopes(loss: Callable[[Any], Any], at: Any, step: float = 1e-5) -> list[Any]:
    """∂ Σ loss / ∂ each policy token log-prob, by central differences.

    ``at`` is an example, or a list of them for a loss of a batch: then one such result for each example.
    """
    return _slopes(loss, at, lambda x: x.policy, lambda x, rows: replace(x, policy=rows), step)


def text_slopes(loss: Callable[[Any], Any], at: Any, name: str, step: float = 1e-5) -> list[Any]:
    """The same for the policy's log-probs of the text(s) ``name``."""
    return _slopes(
        loss,
        at,
        lambda x: x.texts[name],
        lambda x, rows: replace(x, texts={**x.texts, name: rows}),
        step,
    )


def kl_slopes(loss: Callable[[Any], Any], at: Any, step: float = 1e-5) -> list[Any]:
    """The same for the column ``token_kl``."""
    return _slopes(
        loss,
        at,
        lambda x: x.extras["token_kl"],
        lambda x, rows: replace(x, extras={**x.extras, "token_kl": rows}),
        step,
    )


# --- examples ----------------------------------------------------------------------------------


def even(total: float, n: int) -> list[float]:
    """n tokens that share a log-prob evenly."""
    return [total / n] * n


A = Example([even(-48, 24), even(-62, 30)], [even(-51, 24), even(-58.5, 30)], (8, 5.5))
B = replace(A, policy=[even(-52, 24), even(-57, 30)])


def random_examples(n: int, k: int = 2, seed: int = 0) -> list[Example]:
    """Responses of 1 to 9 tokens, log-probs in (-4, -0.01), distinct scores falling with the slot.

    Every column and text is there, drawn by a generator of their own, so that a further one moves no token.
    """
    rng = random.Random(seed)
    further = random.Random(f"columns of {seed}")

    def example() -> Example:
        lengths = [rng.randint(1, 9) for _ in range(k)]
        policy = [[-rng.uniform(0.01, 4) for _ in range(length)] for length in lengths]
        reference = [[-rng.uniform(0.01, 4) for _ in range(length)] for length in lengths]
        return Example(policy, reference, sorted((rng.uniform(1, 10) for _ in range(k)), reverse=True))

    return [_with_columns(example(), further) for _ in range(n)]


def _with_columns(x: Example, rng: random.Random) -> Example:
    def numbers(low: float, high: float, n: int = len(x.policy)) -> list[float]:
        return [rng.uniform(low, high) for _ in range(n)]

    def tokens(low: float, high: float) -> list[list[float]]:
        return [numbers(low, high, len(response)) for response in x.policy]

    first = rng.randrange(min(len(response) for response in x.policy))
    extras = {
        "attributes": [numbers(1, 10, 3) for _ in x.policy],
        "win_rates": numbers(0, 1),
        "previous": [math.fsum(response) + rng.uniform(-2, 2) for response in x.policy],
        "aligned_logps": numbers(-3, -1),
        "margin_rewards": numbers(-2, 2),
        "confidence": rng.uniform(0.2, 1),
        "groups": rng.randrange(2),
        "token_weights": tokens(0, 2),
        "divergence": [[float(t >= first) for t in range(len(response))] for response in x.policy],
        "overlap": tokens(-3, -0.01),
        "token_kl": tokens(0, 1),
    }
    lengths = {name: [rng.randint(1, 6)] for name in ("third", "gold", "rationale", "mismatched")}
    lengths["instructions"] = [rng.randint(1, 6) for _ in x.policy]
    texts = {name: [numbers(-3.9, -0.02, n) for n in ns] for name, ns in lengths.items()}
    reference = {name: [numbers(-3.9, -0.02, n) for n in ns] for name, ns in lengths.items()}
    # A policy that likes the mismatched text more than the reference does: else KTO's K would often be 0.
    texts["mismatched"] = [numbers(-3, -0.02, n) for n in lengths["mismatched"]]
    reference["mismatched"] = [[t - rng.uniform(-0.01, 0.9) for t in text] for text in texts["mismatched"]]
    return replace(x, extras=extras, texts=texts, texts_reference=reference)


def pair(a_w: float, a_l: float, scores: Sequence[float] = (8, 5.5)) -> Example:
    """Two responses of one token with these log-ratios."""
    return Example([[a_w - 100], [a_l - 100]], [[-100.0], [-100.0]], scores)


def responses(r: Sequence[float], scores: Sequence[float]) -> Example:
    """Responses of one token with these log-ratios."""
    return Example([[a - 100] for a in r], [[-100.0] for _ in r], scores)


# --- words of the formulas ---------------------------------------------------------------------


def log_sigma(z: float) -> float:
    """log of the logistic function."""
    return min(z, 0.0) - math.log1p(math.exp(-abs(z)))


def sigma(z: float) -> float:
    return math.exp(log_sigma(z))


def log_sum_exp(values: Sequence[float]) -> float:
    top = max(values)
    return top + math.log(math.fsum(math.exp(v - top) for v in values))


def log_ratio(x: Example, k: int) -> float:
    """a of response k: 0 the chosen, 1 the rejected."""
    return math.fsum(x.policy[k]) - math.fsum(x.reference[k])


def delta(x: Example) -> float:
    return log_ratio(x, 0) - log_ratio(x, 1)


def text_log_ratio(x: Example, name: str, k: int = 0) -> float:
    return math.fsum(x.texts[name][k]) - math.fsum(x.texts_reference[name][k])


def score_gap(x: Example) -> float:
    """δ."""
    return x.scores[0] - x.scores[1]


def mean(tokens: Tokens) -> float:
    return math.fsum(tokens) / len(tokens)


def smoothed(z: float, label_smoothing: float) -> float:
    """A2."""
    return -(1 - label_smoothing) * log_sigma(z) - label_smoothing * log_sigma(-z)
