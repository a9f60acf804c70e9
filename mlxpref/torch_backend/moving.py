"""A reference that follows the policy: its weights are moved towards the policy's every so many updates.

The mixture is exact in the merged weights: the reference holds for each adapted module what its weights differ by
from the base's, whole and in float32. That is a dense matrix a module: more memory than an adapter takes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from mlxpref.errors import RunError
from mlxpref.torch_backend.policy import Policy


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
        self._weights = self._own()
        self._place()

    def follow(self) -> None:
        """Count one update of the policy, and move if it is time."""
        self.n_updates += 1
        if self.n_updates % self.every:
            return
        for name, value in self._own().items():
            self._weights[name] = self.share * value + (1 - self.share) * self._weights[name]
        self._place()

    def save(self) -> dict[str, Tensor]:
        """What a checkpoint keeps."""
        return {**self._weights, "n_updates": torch.tensor(self.n_updates)}

    def load(self, saved: Mapping[str, Tensor]) -> None:
        """Take up what ``save`` gave.

        Raises:
            RunError: it is of a run without a moving reference, or with other adapted modules.
        """
        shapes = {name: tuple(value.shape) for name, value in saved.items() if name != "n_updates"}
        if "n_updates" not in saved or shapes != {name: tuple(v.shape) for name, v in self._weights.items()}:
            raise RunError("the checkpoint holds no moving reference that fits this configuration")
        self.n_updates = int(saved["n_updates"])
        self._weights = {name: saved[name].to(old.device) for name, old in self._weights.items()}
        self._place()

    @torch.no_grad()
    def _own(self) -> dict[str, Tensor]:
        """The policy's trained weights, or how far an adapter moves those of each module."""
        if self.policy.fine_tune_type == "full":
            return {name: value.clone() for name, value in self.policy.masters.items()}
        return {one.name: one.delta() for one in self.policy.adapted}

    def _place(self) -> None:
        """Put the weights where ``Policy.as_reference`` looks."""
        policy = self.policy
        if policy.fine_tune_type == "full":
            dtypes = {name: slot.parameter.dtype for name, slot in policy.slots.items()}
            policy.initial = {name: value.to(dtypes[name]) for name, value in self._weights.items()}
        else:
            policy.shifts = self._weights
