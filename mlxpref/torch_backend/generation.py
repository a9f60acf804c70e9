"""Texts from a policy, by transformers' own generation."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch

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
    # Said in full: a model's own generation_config would bring its top_k and its penalties.
    how = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0} if temperature else {
        "do_sample": False, "temperature": None, "top_p": None, "top_k": None
    }  # fmt: skip
    with nullcontext() if adapter else policy.as_reference():
        found = policy.model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=max_tokens, eos_token_id=ends, pad_token_id=ends[0],
            repetition_penalty=1.0, num_beams=1, **how,
        )  # fmt: skip
    return [_text(policy, row.tolist(), set(ends)) for row in found[:, longest:]]


def _end_tokens(policy: Policy) -> list[int]:
    """Tokens that end a response: the model's, else the tokenizer's."""
    given = policy.config.get("eos_token_id")
    found = given if isinstance(given, list) else [] if given is None else [given]
    own = policy.tokenizer.eos_token_id
    return found if own is None or own in found else [*found, own]


def _text(policy: Policy, ids: list[int], ends: set[int]) -> str:
    """The text before the first end token."""
    stop = next((index for index, token in enumerate(ids) if token in ends), len(ids))
    return str(policy.tokenizer.decode(ids[:stop], clean_up_tokenization_spaces=False))
