"""A reference that follows the policy: its weights are moved towards the policy's every so many updates.

The mixture is exact in the merged weights. Two adapters cannot be mixed factor by factor, so the reference holds
for each adapted module what its weights differ by from the base's, whole and in float32, beside the base's own
weights (quantised or not). That is a dense matrix a module: more memory than an adapter takes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import mlx.core as mx
import mlx.nn as nn

from mlxpref.errors import ConfigError, RunError
from mlxpref.mlx_backend.policy import Policy

Parameters = dict[str, mx.array]


class _Shifted(nn.Module):
    """A frozen linear or embedding module whose weights are other by ``delta``, float32."""

    def __init__(self, plain: nn.Module, delta: mx.array, *, embeds: bool):
        super().__init__()
        self.plain = plain
        self.delta = delta  # not frozen: what a compiled forward takes as arguments is what trains
        self._embeds = embeds

    def __call__(self, x: mx.array) -> mx.array:
        own = self.plain(x)
        more = self.delta[x] if self._embeds else x.astype(mx.float32) @ self.delta.T
        return own + more.astype(own.dtype)

    def as_linear(self, x: mx.array) -> mx.array:
        """A tied embedding as the head."""
        own = self.plain.as_linear(x)
        return own + (x.astype(mx.float32) @ self.delta.T).astype(own.dtype)


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

        Raises:
            ConfigError: an adapted module is a layer of experts.
        """
        self.policy = policy
        self.share = alpha if kind == "soft" else 1.0
        self.every = every
        self.n_updates = 0
        self._weights = self._own()
        self._place()

    def follow(self) -> None:
        """Count one update of the policy, and move if it is time."""
        self.n_updates += 1
        if self.n_updates % self.every:
            return
        fresh, held = self._own(), self._weights
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

    def _own(self) -> Parameters:
        """Of the policy, float32: trained weights, or how far an adapter moves those of each module."""
        policy = self.policy
        if policy.fine_tune_type == "full":
            return {name: value.astype(mx.float32) for name, value in policy.masters.items()}
        return {name: _moved(name, module, policy.masters) for name, module, _ in policy.plain_layers}

    def _place(self) -> None:
        """Put the weights where ``Policy.as_reference`` looks."""
        policy = self.policy
        if policy.fine_tune_type == "full":
            policy.initial = {name: value.astype(policy.dtypes[name]) for name, value in self._weights.items()}
            mx.eval(policy.initial)
            return
        mx.eval(self._weights)
        policy.moving = {
            name: _Shifted(plain, self._weights[name], embeds="embedding" in module)
            for name, module, plain in policy.plain_layers
        }


def _moved(name: str, module: nn.Module, masters: Mapping[str, mx.array]) -> mx.array:
    """How far an adapter moves a module's weights, in their shape, float32, from the float32 masters."""
    own = {key: masters[f"{name}.{key}"].astype(mx.float32) for key in ("lora_a", "lora_b", "m") if key in module}
    if own["lora_a"].ndim != 2:
        raise ConfigError(f"reference.update cannot follow the experts of {name}: leave them out of lora keys")
    product = module.scale * (own["lora_a"] @ own["lora_b"])
    delta = product if "embedding" in module else product.T
    if "m" not in own:
        return delta
    weight = _dense(module.get("linear", module.get("embedding")))
    whole = weight + delta
    return (own["m"] / mx.linalg.norm(whole, axis=1))[:, None] * whole - weight


def _dense(plain: nn.Module) -> mx.array:
    """The weights of a module, dequantised where they are quantised, float32."""
    weight = plain.weight
    if "scales" in plain:
        weight = mx.dequantize(
            weight, plain.scales, plain.get("biases"), group_size=plain.group_size, bits=plain.bits, mode=plain.mode
        )
    return weight.astype(mx.float32)
