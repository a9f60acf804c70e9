"""A reference that follows the policy: its weights are moved towards the policy's every so many updates.

The mixture is exact in the merged weights. Two adapters cannot be mixed factor by factor, so the reference
holds each adapted module whole, with its adapter merged in; the policy keeps its adapter.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from mlxpref.errors import RunError
from mlxpref.mlx_backend.policy import Policy

Parameters = dict[str, mx.array]


class MovingReference:
    """θ_ref ← α θ + (1 − α) θ_ref every so many updates (TR-DPO, arXiv:2404.09656).

    Attributes:
        n_updates: updates of the policy so far.
    """

    def __init__(self, policy: Policy, *, kind: Literal["soft", "hard"], alpha: float = 0.6, every: int = 512):
        """Let the policy's reference, the policy as it is now, follow it from here on.

        Args:
            kind: "soft" mixes, "hard" copies the policy.
            alpha: the policy's share in a soft mixture.
            every: updates of the policy between two of the reference.
        """
        self.policy = policy
        self.share = alpha if kind == "soft" else 1.0
        self.every = every
        self.n_updates = 0
        self._weights = self._merged()
        self._place()

    def follow(self) -> None:
        """Count one update of the policy, and move if it is time."""
        self.n_updates += 1
        if self.n_updates % self.every:
            return
        fresh, held = self._merged(), self._weights
        self._weights = {name: self.share * value + (1 - self.share) * held[name] for name, value in fresh.items()}
        self._place()

    def save(self) -> Parameters:
        """Float32 weights by name, and the count of updates, as a checkpoint keeps them."""
        return {**self._weights, "n_updates": mx.array(self.n_updates)}

    def load(self, state: Mapping[str, mx.array]) -> None:
        """What ``save`` gave, bit for bit. RunError: it is of a run whose reference did not move."""
        missing = [name for name in (*self._weights, "n_updates") if name not in state]
        if missing:
            raise RunError(f"the checkpoint is of a run whose reference did not move (no {missing[0]})")
        self.n_updates = int(state["n_updates"].item())
        self._weights = {name: state[name] for name in self._weights}
        self._place()

    def _merged(self) -> Parameters:
        """The policy's weights where it trains, adapters merged in, float32."""
        policy = self.policy
        found = policy.trainable()
        if policy.fine_tune_type != "full":
            found = {
                f"{name}.{key}": value
                for name, module, _ in policy.plain_layers
                for key, value in tree_flatten(_fused(module).parameters())
            }
        return {name: value.astype(mx.float32) for name, value in found.items()}

    def _place(self) -> None:
        """Put the weights where ``Policy.as_reference`` looks."""
        policy = self.policy
        if policy.fine_tune_type == "full":
            dtypes = {name: value.dtype for name, value in policy.trainable().items()}
            policy.initial = {name: value.astype(dtypes[name]) for name, value in self._weights.items()}
            mx.eval(policy.initial)
            return
        policy.moving = {}
        for name, adapted, _ in policy.plain_layers:
            module = _fused(adapted)  # not frozen: what a compiled forward takes as arguments is what trains
            own = {key: value.astype(kind.dtype) for key, kind, value in self._of(name, module)}
            module.update(tree_unflatten(list(own.items())))
            policy.moving[name] = module
            mx.eval(module.parameters())

    def _of(self, name: str, module: nn.Module) -> list[tuple[str, mx.array, mx.array]]:
        return [(key, like, self._weights[f"{name}.{key}"]) for key, like in tree_flatten(module.parameters())]


def _fused(module: nn.Module) -> nn.Module:
    """A LoRA or DoRA module as a plain one with dense weights."""
    return module.fuse(dequantize=True)
