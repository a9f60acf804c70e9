"""Token log-probs of a micro-batch: whole rows through the model, response positions through its head.

Each response row is put behind its own copy of the prompt; attention is causal and rows are padded on the right,
so padding changes nothing and no mask is needed. Hidden states that predict a response token meet the vocabulary
a chunk at a time, and a chunk's logits are made again in the backward pass.

Where an objective asks for more than log-probs, the same chunks give it: ``overlap``, log Σ_v π(v)² (a constant),
and ``token_kl``, KL(reference ‖ policy) over the vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

from mlxpref.records import Logps, MicroBatch
from mlxpref.torch_backend.sharding import Sharded

CHUNK_BYTES = 64e6
"""Most bytes of float32 logits at once (at least 64 and at most 2048 rows of them)."""


class _Hidden:
    """What a body's forward pass gives, as far as heads look: hidden states given beforehand."""

    def __init__(self, hidden: Tensor):
        self.last_hidden_state = hidden

    def __getitem__(self, index: Any) -> Any:
        return self.last_hidden_state if index == 0 else ()

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)
        return None


class _Body(nn.Module):
    """Stands in for a model's body while its head is called."""

    def __init__(self, hidden: Tensor):
        super().__init__()
        self._given = _Hidden(hidden)

    def forward(self, *args: Any, **kwargs: Any) -> _Hidden:
        return self._given


class Network:
    """A causal language model of transformers split into body and head.

    Attributes:
        vocabulary: V, which decides how many rows meet the head at once.
        split_head: whether head and body can be told apart (``check`` finds out); otherwise whole rows of logits
            are made.
        outer: names of trainable parameters outside the layers, which the head may use.
        root: through which everything goes where the weights are sharded; else None.
    """

    def __init__(self, model: Any, *, vocabulary: int):
        self.model = model
        self.vocabulary = vocabulary
        self.body_name = model.base_model_prefix
        self.split_head = hasattr(model, self.body_name) and model.get_output_embeddings() is not None
        self.outer: tuple[str, ...] = ()
        self.root: Sharded | None = None

    @property
    def device(self) -> torch.device:
        return self.model.get_input_embeddings().weight.device

    def hidden(self, ids: Tensor) -> Tensor:
        """(R, T) ids → (R, T, D) hidden states, or (R, T, V) logits when the head is not split."""
        with parametrize.cached():
            if not self.split_head:
                return self.model(input_ids=ids, use_cache=False).logits
            return getattr(self.model, self.body_name)(input_ids=ids, use_cache=False).last_hidden_state

    def head(self, hidden: Tensor) -> Tensor:
        """(N, D) → (N, V) logits by the model's own head: soft-caps and scales included."""
        if not self.split_head:
            return hidden
        with self._body_replaced(hidden[None]):
            ids = torch.zeros((1, hidden.shape[0]), dtype=torch.long, device=hidden.device)
            return self.model(input_ids=ids, use_cache=False).logits[0]

    @contextmanager
    def _body_replaced(self, hidden: Tensor) -> Iterator[None]:
        body = self.model._modules[self.body_name]
        self.model._modules[self.body_name] = _Body(hidden)
        try:
            yield
        finally:
            self.model._modules[self.body_name] = body

    @torch.no_grad()
    def check(self) -> None:
        """Compare head and body with the whole model on a few tokens; take whole rows where they differ."""
        if not self.split_head:
            return
        ids = torch.arange(1, 9, device=self.device)[None] % self.vocabulary
        whole = self.model(input_ids=ids, use_cache=False).logits[0].float()
        try:
            split = self.head(self.hidden(ids)[0]).float()
        except (TypeError, AttributeError, RuntimeError):
            self.split_head = False
            return
        scale = 1e-4 if whole.dtype == torch.float32 and self.model.dtype == torch.float32 else 5e-2
        self.split_head = bool((whole - split).abs().max() <= scale * whole.abs().max().clamp(min=1.0))

    def rows(self, batch: MicroBatch) -> Tensor:
        """(N, D) hidden states that predict a scored token, in the order of ``batch.targets``."""
        return self._rows(batch) if self.root is None else self.root(self._rows, batch)

    def _rows(self, batch: MicroBatch) -> Tensor:
        shared = batch.prompts.shape[1]
        whole = [torch.cat([batch.prompts[shelf.prompt], shelf.inputs], 1) for shelf in batch.shelves]
        hidden = self._at_once(whole) if self.root is not None else [self.hidden(ids) for ids in whole]
        return torch.cat([one[:, shared:].flatten(0, 1) for one in hidden])[batch.scored]

    def _at_once(self, whole: Sequence[Tensor]) -> list[Tensor]:
        """Hidden states of several shelves by one pass: all workers go through sharded weights equally often."""
        longest = max(ids.shape[1] for ids in whole)
        hidden = self.hidden(torch.cat([nn.functional.pad(ids, (0, longest - ids.shape[1])) for ids in whole]))
        pieces = hidden.split([len(ids) for ids in whole])
        return [piece[:, : ids.shape[1]] for piece, ids in zip(pieces, whole, strict=True)]

    def token_values(self, batch: MicroBatch, statistics: Sequence[str] = ()) -> tuple[Logps, dict[str, Tensor]]:
        """Log-probs of every scored token, float32 nats, and the statistics asked for by name, each (B, S, L).

        Args:
            statistics: of "overlap" and "token_kl"; the latter needs the extra ``reference_hidden``, as ``rows`` of
                the reference gives it.
        """
        call = self._token_values
        found = call(batch, statistics) if self.root is None else self.root(call, batch, statistics)
        return Logps(found[0], batch.mask), dict(zip(statistics, found[1:], strict=True))

    def _token_values(self, batch: MicroBatch, statistics: Sequence[str]) -> list[Tensor]:
        hidden = self._rows(batch)
        beside = batch.extras["reference_hidden"] if "token_kl" in statistics else hidden
        found: list[list[Tensor]] = []
        size = max(64, min(2048, int(CHUNK_BYTES / (4 * self.vocabulary))))
        for start in range(0, len(hidden), size):
            part = slice(start, start + size)
            given = hidden[part], batch.targets[part], beside[part], statistics
            if torch.is_grad_enabled():
                found.append(checkpoint(self._of_chunk, *given, use_reentrant=False))
            else:
                found.append(self._of_chunk(*given))
        return [_laid(torch.cat(values), batch.place) for values in zip(*found, strict=True)]

    def _of_chunk(self, hidden: Tensor, targets: Tensor, beside: Tensor, statistics: Sequence[str]) -> list[Tensor]:
        """(n,) float32 log-probs of the targets, then each statistic."""
        logps = self.head(hidden).float().log_softmax(-1)
        found = [logps.gather(-1, targets[:, None])[:, 0]]
        for name in statistics:
            if name == "overlap":
                found.append((2 * logps).logsumexp(-1).detach())
            else:
                reference = self.head(beside).float().log_softmax(-1).detach()
                found.append((reference.exp() * (reference - logps)).sum(-1))
        return found


def _laid(flat: Tensor, place: Tensor) -> Tensor:
    """(N,) → (B, S, L), 0 off the responses."""
    return torch.cat([flat, flat.new_zeros(1)])[place]
