"""One update: losses and gradients of each micro-batch by autograd, added up, then one optimiser step.

What the optimiser sees is the whole batch; how it is split into micro-batches changes rounding only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mlxpref.errors import AdapterError, ConfigError, RunError
from mlxpref.objectives import Objective
from mlxpref.objectives.registry import FROM_MODEL
from mlxpref.records import Batch, Logps, MicroBatch, StepReport, stack_lists
from mlxpref.torch_backend import reading
from mlxpref.torch_backend.adapter import read_safetensors, write_safetensors
from mlxpref.torch_backend.arrays import to_numpy, to_torch
from mlxpref.torch_backend.moving import MovingReference
from mlxpref.torch_backend.optimizers import Optimizer, make_optimizer
from mlxpref.torch_backend.policy import Policy

STATE = "step_state.safetensors"

Values = dict[str, Tensor]
"""``tokens`` (B, S, L), and by name what else a model says of each token."""


class _Part(NamedTuple):
    """What one micro-batch contributes, without gradient."""

    losses: Tensor
    tokens: Tensor


class Step:
    """The owner of weights, optimiser, random state and the objective's state of a run.

    Calling it with a batch and a learning rate makes one update. An objective that couples the examples of a
    batch gets the log-probs of all micro-batches before any gradient is taken: two passes.

    Attributes:
        policy: whose masters move.
        state: of the objective, by formula.
        moving: the reference, where it follows the policy; else None.
        n_drawn: batches that dropout was drawn for so far, which with the seed is the whole random state.
    """

    def __init__(
        self,
        policy: Policy,
        objective: Objective,
        optimizer: Optimizer,
        max_grad_norm: float | None,
        seed: int,
        *,
        n_groups: int = 1,
        moving: MovingReference | None = None,
    ):
        self.policy = policy
        self.objective = objective
        self.optimizer = optimizer
        self.max_grad_norm = max_grad_norm
        self.seed = seed
        self.n_drawn = 0
        self.moving = moving
        self.optimizer.init(policy.masters)
        self._treedef, self._leaves = _flattened(objective.initial_state(n_groups), policy.device)
        self._statistics = sorted(objective.needs & FROM_MODEL)

    @property
    def state(self) -> Any:
        return _rebuilt(self._treedef, self._leaves)

    def __call__(self, batch: Batch, learning_rate: float) -> StepReport:
        """Make one update.

        Args:
            batch: NumPy arrays; all micro-batches that belong to the step.
            learning_rate: of this step.

        Returns:
            What it did; ``skipped`` when a loss or gradient was not finite and nothing was changed.
        """
        batch, gradients, parts, state = self._differentiated(batch)
        norm = torch.stack([gradients[name].square().sum() for name in sorted(gradients)]).sum().sqrt()
        if self.max_grad_norm is not None:
            factor = (self.max_grad_norm / norm.clamp(min=1e-6)).clamp(max=1.0)
            gradients = {name: value * factor for name, value in gradients.items()}
        finite = bool(torch.isfinite(norm)) and all(bool(torch.isfinite(part.losses).all()) for part in parts)
        if finite:
            self.optimizer.step(self.policy.masters, gradients, learning_rate)
            self.policy.place_masters()
            self._leaves = state
            if self.moving is not None:
                self.moving.follow()
        return _report(batch, parts, float(norm), not finite)

    def gradients(self, batch: Batch) -> dict[str, np.ndarray]:
        """Gradients of the batch's mean loss by parameter, float32, before clipping; no weight or moment moves."""
        _, gradients, _, _ = self._differentiated(batch)
        return {name: to_numpy(value) for name, value in gradients.items()}

    def _differentiated(self, batch: Batch) -> tuple[Batch, Values, list[_Part], list[Tensor]]:
        """The batch completed, gradients of its mean loss, what its parts gave, and the objective's next state."""
        self.n_drawn += 1
        batch = batch._replace(parts=tuple(map(self._completed, batch.parts)))
        tensors = [to_torch(part, self.policy.device) for part in batch.parts]
        self.policy.model.zero_grad(set_to_none=True)
        self.policy.model.train()
        try:
            parts, state = self._coupled(tensors) if self.objective.coupled else self._one_by_one(tensors)
        finally:
            self.policy.model.eval()
        gradients = {name: slot.gradient for name, slot in self.policy.slots.items()}
        self.policy.model.zero_grad(set_to_none=True)
        return batch, gradients, parts, state

    def _one_by_one(self, tensors: Sequence[MicroBatch]) -> tuple[list[_Part], list[Tensor]]:
        """Backward through each micro-batch for itself."""
        total = sum(part.weights.sum() for part in tensors)
        parts = []
        for index, part in enumerate(tensors):
            values = self._read(part, index)
            losses = self.objective(columns(values, part))
            ((losses * part.weights).sum() / total).backward()
            parts.append(_Part(losses.detach(), values["tokens"].detach()))
        return parts, self._leaves

    def _coupled(self, tensors: Sequence[MicroBatch]) -> tuple[list[_Part], list[Tensor]]:
        """The same of losses that depend on the whole batch.

        All log-probs first; then the objective on all of them, whose slopes towards each token go back through the
        model, micro-batch after micro-batch, with the dropout of the first pass.
        """
        with torch.no_grad():
            values = [self._read(part, index) for index, part in enumerate(tensors)]
        for of_part in values:
            for value in of_part.values():
                value.requires_grad_(True)
        total = sum(part.weights.sum() for part in tensors)
        losses, state = self._apply(values, tensors)
        mean = sum((one * part.weights).sum() for one, part in zip(losses, tensors, strict=True)) / total
        mean.backward()
        for index, (part, of_part) in enumerate(zip(tensors, values, strict=True)):
            again = self._read(part, index)
            reached = [name for name, value in of_part.items() if value.grad is not None and again[name].requires_grad]
            torch.autograd.backward([again[name] for name in reached], [of_part[name].grad for name in reached])
        parts = [_Part(one.detach(), of_part["tokens"].detach()) for one, of_part in zip(losses, values, strict=True)]
        return parts, [leaf.detach() for leaf in _flattened(state, self.policy.device)[1]]

    def _read(self, part: MicroBatch, index: int) -> Values:
        """What the model says of every scored token of the batch's part of this index, dropout as drawn for it."""
        torch.manual_seed(int(np.random.SeedSequence([self.seed, self.n_drawn, index]).generate_state(1)[0]))
        logps, more = self.policy.network.token_values(part, self._statistics)
        return {"tokens": logps.tokens, **more}

    def _apply(self, values: Sequence[Values], tensors: Sequence[MicroBatch]) -> tuple[list[Tensor], Any]:
        given = [columns(value, part) for value, part in zip(values, tensors, strict=True)]
        return self.objective.apply_parts(given, self.state)

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> StepReport:
        """Losses and log-probs of a batch under the current weights, dropout off; nothing moves."""
        batch = batch._replace(parts=tuple(map(self._completed, batch.parts)))
        tensors = [to_torch(part, self.policy.device) for part in batch.parts]
        values = [self._read(part, index) for index, part in enumerate(tensors)]
        losses, _ = self._apply(values, tensors)
        parts = [_Part(one, value["tokens"]) for one, value in zip(losses, values, strict=True)]
        return _report(batch, parts, 0.0, False)

    def _completed(self, part: MicroBatch) -> MicroBatch:
        """With what is the reference's and cannot be known beforehand: a moving one's log-probs, hidden rows."""
        if self.moving is not None:
            part = part._replace(reference=reading.token_logps(self.policy, part, reference=True).tokens)
        if "token_kl" in self._statistics:
            hidden = reading.hidden_rows(self.policy, part, reference=True)
            part = part._replace(extras={**part.extras, "reference_hidden": hidden})
        return part

    # --- what a checkpoint keeps ---

    def save_state(self, folder: Path) -> None:
        """Write ``step_state.safetensors``: float32 masters, random state, what optimiser and objective carry from
        step to step, and a reference that moves."""
        state = {f"masters.{name}": value for name, value in self.policy.masters.items()}
        state |= {f"optimizer.{name}": value for name, value in self.optimizer.state().items()}
        state |= {f"objective.{index}": leaf for index, leaf in enumerate(self._leaves)}
        if self.moving is not None:
            state |= {f"reference.{name}": value for name, value in self.moving.save().items()}
        state["random"] = torch.tensor(self.n_drawn)
        write_safetensors(folder / STATE, state)

    def load_state(self, folder: Path) -> None:
        """Take up what ``save_state`` wrote, bit for bit.

        Raises:
            RunError: the file is missing, damaged, or of a run with other parameters.
        """
        file = folder / STATE
        try:
            state = read_safetensors(file)
        except AdapterError as error:
            raise RunError(str(error)) from error
        self._check(file, state)
        for name, value in self.policy.masters.items():
            value.copy_(state[f"masters.{name}"])
        self.policy.place_masters()
        self.optimizer.load(_under(state, "optimizer."))
        device = self.policy.device
        self._leaves = [state[f"objective.{index}"].to(device) for index in range(len(self._leaves))]
        if self.moving is not None:
            self.moving.load(_under(state, "reference."))
        self.n_drawn = int(state["random"])

    def _check(self, file: Path, state: Mapping[str, Tensor]) -> None:
        held = {name: value.shape for name, value in _under(state, "masters.").items()}
        if held != {name: value.shape for name, value in self.policy.masters.items()}:
            raise RunError(f"{file}: holds other parameters than this configuration trains, or is another backend's")
        if "random" not in state or state["random"].ndim:
            raise RunError(f"{file}: was written by another backend; go on with the one that the run began with")
        if len(_under(state, "objective.")) != len(self._leaves):
            raise RunError(f"{file}: was written by a run with another objective")


def columns(values: Values, batch: MicroBatch) -> dict[str, Any]:
    """What an objective may ask for, by name."""
    found: dict[str, Any] = {**batch.extras, **values, "policy": Logps(values["tokens"], batch.mask)}
    if batch.reference is not None:
        found["reference"] = Logps(batch.reference, batch.mask)
    if batch.scores is not None:
        found["scores"] = batch.scores
    return found


def _under(state: Mapping[str, Tensor], prefix: str) -> Values:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def _flattened(tree: Any, device: torch.device) -> tuple[Any, list[Tensor]]:
    """A tree of dicts and tuples, and its numbers in order as float32 tensors."""
    leaves: list[Tensor] = []

    def walk(node: Any) -> Any:
        if isinstance(node, Mapping):
            return {name: walk(value) for name, value in node.items()}
        if isinstance(node, tuple):
            found = [walk(value) for value in node]
            return type(node)(*found) if hasattr(node, "_fields") else tuple(found)
        leaf = node if isinstance(node, Tensor) else torch.from_numpy(np.array(node, np.float32))
        leaves.append(leaf.to(device, torch.float32))
        return len(leaves) - 1

    return walk(tree), leaves


def _rebuilt(tree: Any, leaves: Sequence[Tensor]) -> Any:
    if isinstance(tree, Mapping):
        return {name: _rebuilt(value, leaves) for name, value in tree.items()}
    if isinstance(tree, tuple):
        found = [_rebuilt(value, leaves) for value in tree]
        return type(tree)(*found) if hasattr(tree, "_fields") else tuple(found)
    return leaves[tree]


def _report(batch: Batch, parts: Sequence[_Part], norm: float, skipped: bool) -> StepReport:
    losses = np.concatenate([to_numpy(part.losses) for part in parts])
    weights = np.concatenate([np.asarray(part.weights) for part in batch.parts])
    return StepReport(
        loss=float((losses * weights).sum() / max(weights.sum(), 1e-12)),
        losses=losses,
        policy_sums=_sums([part.tokens.cpu() for part in parts], batch),
        reference_sums=None
        if batch.parts[0].reference is None
        else _sums([torch.from_numpy(np.asarray(part.reference)) for part in batch.parts], batch),
        lengths=stack_lists([np.asarray(part.mask).sum(-1) for part in batch.parts], 0.0),
        grad_norm=norm,
        skipped=skipped,
    )


def _sums(tokens: Sequence[Tensor], batch: Batch) -> np.ndarray:
    """(B, K) sums of policy or reference, in one way, so that equal tokens give equal sums."""
    pairs = zip(tokens, batch.parts, strict=True)
    return stack_lists([Logps(found.numpy(), np.asarray(part.mask)).sums for found, part in pairs], np.nan)


def make_step(
    policy: Policy,
    objective: Any,
    *,
    optimizer: str = "adamw",
    optimizer_options: dict[str, Any] | None = None,
    weight_decay: float = 0.0,
    max_grad_norm: float | None = 1.0,
    seed: int = 0,
    n_groups: int = 1,
    reference_update: Mapping[str, Any] | None = None,
) -> Step:
    """The update of a policy under an objective.

    Args:
        policy: with trainable parameters.
        objective: a resolved objective; called with the columns of each micro-batch.
        optimizer, optimizer_options, weight_decay: see ``make_optimizer``.
        max_grad_norm: global norm to clip to; None for no clipping.
        seed: of dropout.
        n_groups: different values of the column ``groups``.
        reference_update: ``kind`` "soft" or "hard", ``alpha`` and ``every``: the reference follows the policy
            (see ``MovingReference``); its log-probs are computed in every step then. None: it stays.

    Raises:
        ConfigError: of ``make_optimizer``; or an objective that compares whole distributions, with a head that
            trains.
    """
    if "token_kl" in objective.needs and policy.network.outer:
        raise ConfigError(
            f"{objective.name} compares the policy's and the reference's whole distributions, which share one "
            f"head here; {', '.join(policy.network.outer[:3])} would train: adapt layers only"
        )
    chosen = make_optimizer(optimizer, weight_decay, optimizer_options)
    moving = None if reference_update is None else MovingReference(policy, **reference_update)
    return Step(policy, objective, chosen, max_grad_norm, seed, n_groups=n_groups, moving=moving)
