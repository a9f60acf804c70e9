"""A language model as a judge: it reads a question and two responses; its log-probs of two letters are the verdict."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from mlxpref.data.tokenization import tokenize
from mlxpref.errors import DataError
from mlxpref.records import Conditioned, Dropped, Message, Prompt, Tokenized
from mlxpref.reference import policy_logps

LETTERS = ("A", "B")

LONGEST = 8192
"""Tokens of a question with both responses."""

TEMPLATE = """\
Here is a conversation and two responses to its last turn. Say which of the two is the better response: the one that \
is more helpful, more correct, and closer to what was asked. Neither length nor order is a merit.

[Conversation]
{conversation}

[Response A]
{first}

[Response B]
{second}

Which response is better? Answer with one letter, A or B."""
"""What the judge is asked; ``--judge-template`` replaces it."""

FIELDS = ("{conversation}", "{first}", "{second}")

_FIELD = re.compile(r"\{(conversation|first|second)\}")


def check_template(template: str) -> None:
    """DataError if the judge would not be shown everything."""
    missing = [field for field in FIELDS if field not in template]
    if missing:
        raise DataError(f"the judge's template lacks {', '.join(missing)}")


def check_prompts(prompts: Sequence[Prompt], tokenizer: Any, template: str, *, max_length: int = LONGEST) -> None:
    """DataError for a prompt that leaves a judge no room for the responses: before anything is asked or loaded."""
    for place, prompt in enumerate(prompts):
        _row(place, prompt, "", "", tokenizer, template, max_length)


class ModelJudge:
    """A judge whose verdict is P(A) / (P(A) + P(B)), the log-probs of both letters behind the question.

    Args:
        backend, policy, tokenizer: of the judging model.
        template: with the three ``FIELDS``.
        max_length: tokens of a pair at most; a longer one is an error, since a judge should not guess at what it
            was not shown.
        on_progress: called with (pairs judged, pairs).

    Attributes:
        letters: of each pair judged so far P(A) + P(B): how likely the model is to give a verdict at all.

    Raises:
        DataError: a template without its fields; when judging, a pair that is too long.
    """

    def __init__(
        self,
        backend: Any,
        policy: Any,
        tokenizer: Any,
        *,
        template: str = TEMPLATE,
        max_length: int = LONGEST,
        on_progress: Callable[[int, int], None] | None = None,
    ):
        check_template(template)
        self._backend, self._policy, self._tokenizer = backend, policy, tokenizer
        self._template, self._max_length, self._on_progress = template, max_length, on_progress
        self.letters: list[float] = []

    def __call__(
        self, prompts: Sequence[Prompt], shown_first: Sequence[str], shown_second: Sequence[str]
    ) -> list[float]:
        """(N,) probabilities that what is shown first is the better one."""
        rows = [
            _row(place, *pair, self._tokenizer, self._template, self._max_length)
            for place, pair in enumerate(zip(prompts, shown_first, shown_second, strict=True))
        ]
        logps = policy_logps(rows, self._backend, self._policy, on_progress=self._on_progress)
        sums = np.array([[float(np.sum(of_letter, dtype=np.float64)) for of_letter in of_row] for of_row in logps])
        if not rows:
            return []
        self.letters += np.exp(sums).sum(1).tolist()
        return (1 / (1 + np.exp(np.clip(sums[:, 1] - sums[:, 0], -700, 700)))).tolist()


def _row(
    place: int, prompt: Prompt, first: str, second: str, tokenizer: Any, template: str, max_length: int
) -> Tokenized:
    """The question as the judge reads it, and its two answers."""
    shown = {"conversation": _written(prompt), "first": first.strip(), "second": second.strip()}
    text = _FIELD.sub(lambda found: shown[found[1]], template)
    asked = Conditioned((Message("user", text),), LETTERS, None, None, None, None, str(place))
    row = tokenize(asked, tokenizer, max_length=max_length, truncation="drop")
    if isinstance(row, Dropped):
        raise DataError(f"the judge cannot read pair {place}: {row.reason} {row.detail}".rstrip())
    # Judges that would go on after the letter would be measured by how they end.
    return replace(row, response_ids=tuple(ids[:-1] if len(ids) > 1 else ids for ids in row.response_ids))


def _written(prompt: Prompt) -> str:
    """A conversation as text; one turn without its role."""
    if len(prompt) == 1:
        return prompt[0].content.strip()
    return "\n\n".join(f"{message.role}: {message.content.strip()}" for message in prompt)
