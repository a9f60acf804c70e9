"""Texts from a policy, by mlx-lm's own batched generation."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import mlx.core as mx
from mlx_lm.generate import batch_generate
from mlx_lm.sample_utils import make_sampler

from mlxpref.mlx_backend.policy import Policy

PREFILL_TOKENS = 8 * 2048
"""Most prompt tokens, padding included, computed in one pass: what mlx-lm's own default sizes allow."""


def generate(
    policy: Policy,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    adapter: bool = True,
) -> list[str]:
    """One text per prompt, in the order given.

    Args:
        prompts: token ids, each ending where the response begins.
        max_tokens: most tokens of a response.
        temperature: 0 takes the most likely token.
        top_p: nucleus share; 1 for no limit.
        seed: of the sampling.
        adapter: False asks the reference instead.
    """
    mx.random.seed(seed)
    policy.model.eval()
    sampler = make_sampler(temp=temperature, top_p=top_p if top_p < 1 else 0.0)
    with nullcontext() if adapter else policy.as_reference():
        result = batch_generate(
            policy.model,
            policy.tokenizer,
            [list(prompt) for prompt in prompts],
            max_tokens=max_tokens,
            sampler=sampler,
            return_token_ids=True,
            completion_batch_size=len(prompts),  # all decoded side by side: a step costs the same for few
            prefill_batch_size=_prefill_rows(prompts),
        )
    return [_text(policy, ids) for ids in result.token_ids]


def _prefill_rows(prompts: Sequence[Sequence[int]]) -> int:
    """How many prompts go through the model at once. A pass holds at most 2048 tokens of each."""
    longest = min(2048, max((1, *map(len, prompts))))
    return max(1, min(len(prompts), PREFILL_TOKENS // longest))


def _text(policy: Policy, ids: Sequence[int]) -> str:
    """The text of generated tokens as `mlx_lm generate` shows it (a tokenizer's ``decode`` may differ by a
    space)."""
    detokenizer = policy.tokenizer.detokenizer
    detokenizer.reset()
    for token in ids:
        detokenizer.add_token(token)
    detokenizer.finalize()
    return detokenizer.text
