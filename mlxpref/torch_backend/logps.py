"""Token log-probs of a micro-batch: its tokens through the model, response positions through its head.

Where the model allows it (see ``probe``), a micro-batch whose prompts are shared is read as one stream (see
``prefix``). Otherwise each response row is put behind its own copy of the prompt; attention is causal and rows are
padded on the right, so padding changes nothing and no mask is needed.

Hidden states that predict a response token meet the vocabulary a chunk at a time. A log-prob depends on its own hidden
state only: where the head stays as it is, the gradient of each is computed along with it, and the backward pass is one
multiplication. Else a chunk's logits are made again in the backward pass.

Where an objective asks for more than log-probs, chunks that are made again give it: ``overlap``, log Σ_v π(v)² (a
constant), and ``token_kl``, KL(reference ‖ policy) over the vocabulary.
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
from mlxpref.torch_backend.prefix import Sharing, Stream, stream_of
from mlxpref.torch_backend.sharding import Sharded

CHUNK_BYTES = 16e6
"""Most bytes of float32 logits at once on a CPU, whose caches then hold them, and 16 times that elsewhere (at least 64
and at most 2048 rows of them)."""


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
        sharing: how prompts are read once for all their responses; None where every row is read whole.
    """

    def __init__(self, model: Any, *, vocabulary: int):
        self.model = model
        self.vocabulary = vocabulary
        self.body_name = model.base_model_prefix
        self.split_head = hasattr(model, self.body_name) and model.get_output_embeddings() is not None
        self.outer: tuple[str, ...] = ()
        self.root: Sharded | None = None
        self.sharing: Sharing | None = None

    @property
    def device(self) -> torch.device:
        return self.model.get_input_embeddings().weight.device

    def hidden(self, ids: Tensor, **more: Tensor) -> Tensor:
        """(R, T) ids → (R, T, D) hidden states, or (R, T, V) logits when the head is not split.

        Args:
            more: arguments of the model's.
        """
        with parametrize.cached():
            if not self.split_head:
                return self.model(input_ids=ids, use_cache=False, **more).logits
            return getattr(self.model, self.body_name)(input_ids=ids, use_cache=False, **more).last_hidden_state

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
        if shared and self.sharing is not None:
            stream = stream_of(batch, padded=batch.prompts.device.type != "cpu")
            return self._streamed(self.sharing, stream)[stream.where[batch.scored]]
        whole = [torch.cat([batch.prompts[shelf.prompt], shelf.inputs], 1) for shelf in batch.shelves]
        hidden = self._at_once(whole) if self.root is not None else [self.hidden(ids) for ids in whole]
        return torch.cat([one[:, shared:].flatten(0, 1) for one in hidden])[batch.scored]

    def _streamed(self, sharing: Sharing, stream: Stream) -> Tensor:
        """(N, D) hidden states of a stream."""
        with sharing.reading(stream):
            # A mask of ones says that positions which begin again are no other texts: rules are asked, not applied.
            return self.hidden(
                stream.ids, position_ids=stream.positions, attention_mask=torch.ones_like(stream.ids)
            )[0]

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
        hidden, targets = self._rows(batch), batch.targets
        if hidden.device.type == "cpu":  # elsewhere to count them would mean to wait for the device
            n = int(batch.mask.sum())
            hidden, targets = hidden[:n], targets[:n]
        differentiate = torch.is_grad_enabled()
        if not statistics and (not differentiate or (hidden.requires_grad and self.split_head and not self.outer)):
            found = [_Scores.apply(hidden, targets, self) if differentiate else self._scored(hidden, targets)]
        else:
            found = self._by_chunks(hidden, targets, batch, statistics)
        return [_laid(values, batch) for values in found]

    def _by_chunks(
        self, hidden: Tensor, targets: Tensor, batch: MicroBatch, statistics: Sequence[str]
    ) -> list[Tensor]:
        beside = batch.extras["reference_hidden"] if "token_kl" in statistics else hidden
        found: list[list[Tensor]] = []
        for part in self._chunks(hidden):
            given = hidden[part], targets[part], beside[: len(hidden)][part], statistics
            if torch.is_grad_enabled():
                found.append(checkpoint(self._of_chunk, *given, use_reentrant=False))
            else:
                found.append(self._of_chunk(*given))
        return [torch.cat(values) for values in zip(*found, strict=True)]

    def _chunks(self, hidden: Tensor) -> list[slice]:
        most = CHUNK_BYTES * (1 if hidden.device.type == "cpu" else 16)
        size = max(64, min(2048, int(most / (4 * self.vocabulary))))
        return [slice(start, start + size) for start in range(0, len(hidden), size)]

    def _scored(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """(N,) float32 log-probs of the targets."""
        found = []
        for part in self._chunks(hidden):
            logits = self.head(hidden[part]).float()
            found.append(logits.gather(-1, targets[part, None])[:, 0] - _normaliser(logits)[0])
        return torch.cat(found)

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


class _Scores(torch.autograd.Function):
    """Log-probs by a head that stays as it is, and with each the gradient of its hidden state."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, targets: Tensor, network: Network) -> Tensor:
        """(N, D), (N,) → (N,) float32."""
        logps = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        slopes = torch.empty_like(hidden)
        for part in network._chunks(hidden):
            with torch.enable_grad():
                given = hidden[part].detach().requires_grad_(True)
                logits = network.head(given)
            wanted = targets[part, None]
            values = logits.detach().float()
            normaliser, probs = _normaliser(values)
            logps[part] = values.gather(-1, wanted)[:, 0] - normaliser
            probs.scatter_add_(-1, wanted, torch.full_like(wanted, -1, dtype=probs.dtype))
            (slopes[part],) = torch.autograd.grad(logits, given, probs.to(logits.dtype))
        ctx.save_for_backward(slopes.neg_())
        return logps

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor, None, None]:
        (slopes,) = ctx.saved_tensors
        return (slopes * cotangents[0][:, None]).to(slopes.dtype), None, None


def _normaliser(logits: Tensor) -> tuple[Tensor, Tensor]:
    """(n, V) → (n,) the logarithm of the sum of their exponentials, and their softmax (n, V).

    The largest logit and its probability, at least 1 / V, say the former without a pass of exponentials of its own.
    """
    probs = logits.softmax(-1)
    largest, at = logits.max(-1)
    return largest - probs.gather(-1, at[:, None])[:, 0].log(), probs


def _laid(flat: Tensor, batch: MicroBatch) -> Tensor:
    """(n,), the first of the N scored positions → (B, S, L), 0 off the responses."""
    return torch.cat([flat, flat.new_zeros(len(batch.targets) + 1 - len(flat))])[batch.place]
