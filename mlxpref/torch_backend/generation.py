"""Texts from a policy, by transformers' own generation."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from transformers.generation.logits_process import LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

from mlxpref.errors import ModelError
from mlxpref.torch_backend.policy import Policy


@torch.no_grad()
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
    torch.manual_seed(seed)
    policy.model.eval()
    ends = _end_tokens(policy)
    longest = max(map(len, prompts))
    ids = torch.tensor([[ends[0]] * (longest - len(one)) + list(one) for one in prompts], device=policy.device)
    mask = torch.tensor([[0] * (longest - len(one)) + [1] * len(one) for one in prompts], device=policy.device)
    with nullcontext() if adapter else policy.as_reference():
        found = policy.model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=max_tokens, eos_token_id=ends, pad_token_id=ends[0],
            do_sample=temperature > 0, top_k=0, logits_processor=_shapers(temperature, top_p),
        )  # fmt: skip
    return [_text(policy, row.tolist(), set(ends)) for row in found[:, longest:]]


def _shapers(temperature: float, top_p: float) -> LogitsProcessorList:
    """The nucleus first, of the model's own probabilities, then the temperature: mlx-lm's order."""
    shapers = LogitsProcessorList()
    if temperature > 0 and top_p < 1:
        shapers.append(TopPLogitsWarper(top_p))
    if temperature > 0 and temperature != 1:
        shapers.append(TemperatureLogitsWarper(temperature))
    return shapers


def _end_tokens(policy: Policy) -> list[int]:
    """Tokens that end a response: the model's, else the tokenizer's.

    Raises:
        ModelError: neither names one.
    """
    given = policy.config.get("eos_token_id")
    found = given if isinstance(given, list) else [] if given is None else [given]
    if not found and policy.tokenizer.eos_token_id is not None:
        found = [policy.tokenizer.eos_token_id]
    if not found:
        raise ModelError(f"{policy.path}: neither config.json nor the tokenizer names an eos token")
    return found


def _text(policy: Policy, ids: list[int], ends: set[int]) -> str:
    """The text before the first end token, without the space it may begin with, as mlx-lm shows it."""
    stop = next((index for index, token in enumerate(ids) if token in ends), len(ids))
    return str(policy.tokenizer.decode(ids[:stop], clean_up_tokenization_spaces=False)).removeprefix(" ")
