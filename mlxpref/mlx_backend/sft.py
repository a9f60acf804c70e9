"""mlx-lm's supervised step on the rows of pairs: what a preference step is measured against."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.tuner.trainer import default_loss, grad_checkpoint
from mlx_lm.tuner.utils import linear_to_lora_layers
from mlx_lm.utils import load_model

from mlxpref.errors import ConfigError
from mlxpref.folders import n_trained
from mlxpref.mlx_backend.optimizers import make_optimizer
from mlxpref.mlx_backend.policy import Policy
from mlxpref.records import Tokenized

PAD_TO = 32
"""mlx-lm pads a batch to one more than a multiple of this."""


class SupervisedStep:
    """The step of ``mlx_lm.tuner.trainer.train``: its loss on whole logits, its LoRA layers, one compiled function.

    The model is mlx-lm's, loaded anew; its frozen weights are the policy's own arrays, so that they are in memory
    once. The buffer cache is left as it is (mlx-lm empties it after every step, which costs it a little).

    Args:
        policy: whose weights, adapter settings and optimiser it takes.
        optimizer, optimizer_options, weight_decay: as ``make_step`` has them.
        learning_rate: of every update.

    Raises:
        ConfigError: the policy trains its weights themselves, not an adapter.
    """

    def __init__(
        self,
        policy: Policy,
        *,
        optimizer: str = "adamw",
        optimizer_options: Mapping[str, Any] | None = None,
        weight_decay: float = 0.0,
        learning_rate: float = 1e-5,
    ):
        if policy.fine_tune_type == "full" or not policy.plain_layers:
            raise ConfigError("no supervised step beside full fine-tuning: both would move the same weights")
        self.model = _twin(policy)
        self.checkpointed = policy.network.grad_checkpoint
        count = n_trained(policy.fine_tune_type, policy.num_layers, len(self.model.layers))
        lora = policy.lora_parameters
        linear_to_lora_layers(self.model, count, lora, policy.fine_tune_type == "dora")
        mx.eval(self.model.parameters())
        self.optimizer = make_optimizer(optimizer, weight_decay, optimizer_options)
        self.optimizer.learning_rate = learning_rate
        self.optimizer.init(self.model.trainable_parameters())
        self._state = [self.model.state, self.optimizer.state, mx.random.state]
        value_and_grad = nn.value_and_grad(self.model, default_loss)

        @partial(mx.compile, inputs=self._state, outputs=self._state)
        def step(batch: mx.array, lengths: mx.array) -> mx.array:
            (loss, _), gradients = value_and_grad(self.model, batch, lengths)
            self.optimizer.update(self.model, gradients)
            return loss

        self._step = step

    def __call__(self, rows: Sequence[Tokenized]) -> float:
        """One update on every response of these rows as a row of its own; its loss, nats per response token."""
        batch, lengths = padded(rows)
        self.model.train()
        with _checkpointing(self.model) if self.checkpointed else nullcontext():
            loss = self._step(mx.array(batch), mx.array(lengths))
            mx.eval(self._state, loss)
        return float(loss.item())

    @property
    def state_bytes(self) -> int:
        """Of the adapter and the optimiser's moments."""
        held = [*tree_flatten(self.model.trainable_parameters()), *tree_flatten(self.optimizer.state)]
        return sum(value.nbytes for _, value in held if isinstance(value, mx.array))


def padded(rows: Sequence[Tokenized]) -> tuple[np.ndarray, np.ndarray]:
    """(K·B, T) int32 prompts with a response each, right-padded as mlx-lm does, and (K·B, 2) where the response
    begins and ends."""
    whole = [(len(row.prompt_ids), np.concatenate([row.prompt_ids, *slot])) for row in rows for slot in row.slots]
    longest = max(len(ids) for _, ids in whole)
    batch = np.zeros((len(whole), 1 + PAD_TO * -(-longest // PAD_TO)), np.int32)
    for at, (_, ids) in enumerate(whole):
        batch[at, : len(ids)] = ids
    return batch, np.array([(start, len(ids)) for start, ids in whole], np.int32)


def _twin(policy: Policy) -> nn.Module:
    """The base as mlx-lm has it, frozen, over the arrays of the policy's base."""
    model, _ = load_model(policy.path, lazy=True)
    with _plain(policy) as base:
        quantised = {name: module for name, module in base.named_modules() if "scales" in module}
        if quantised and not any("scales" in module for _, module in model.named_modules()):

            def chosen(name: str, module: nn.Module) -> Any:
                like = quantised.get(name)
                return False if like is None else {"group_size": like.group_size, "bits": like.bits}

            nn.quantize(model, class_predicate=chosen)
        model.update(base.parameters())
    model.freeze()
    return model


@contextmanager
def _plain(policy: Policy) -> Iterator[nn.Module]:
    """The policy's model with its adapter out."""
    policy.model.update_modules(tree_unflatten([(name, plain) for name, _, plain in policy.plain_layers]))
    try:
        yield policy.model
    finally:
        policy.model.update_modules(tree_unflatten([(name, adapted) for name, adapted, _ in policy.plain_layers]))


@contextmanager
def _checkpointing(model: nn.Module) -> Iterator[None]:
    """mlx-lm's gradient checkpointing, which it puts into the layers' class; taken out again at the end."""
    kind = type(model.layers[0])
    held = kind.__call__
    grad_checkpoint(model.layers[0])
    try:
        yield
    finally:
        kind.__call__ = held
